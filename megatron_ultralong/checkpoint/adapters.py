"""LoRA's checkpoints, which contain what was trained and not the model: their tensors by Hugging Face's
names, merged with the model's, or as PEFT's files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ultralong import lora
from megatron_ultralong.checkpoint import sharded, tensor_sums
from megatron_ultralong.checkpoint.hf.assets import to_json
from megatron_ultralong.checkpoint.megatron_lm import bridge
from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files
from megatron_ultralong.lora import Lora
from megatron_ultralong.model import weight_mapping

_ADAPTER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?adapters\.(\w+)\.([ab])")
_LAYER = re.compile(r"(decoder\.layers\.)(?!\d)(.+)")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The tensors of a checkpoint of adapters, complete, on the CPU."""

    settings: Lora
    adapters: dict[str, Tensor]
    """By PEFT's names."""
    weights: dict[str, Tensor]
    """Norms and embedding that were trained, by Hugging Face's names."""

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """Return a tensor of the base model, by Hugging Face's name, as it is after the training: W + alpha /
        rank B A, computed in float32 and rounded once."""
        if name in self.weights:
            return self.weights[name].to(weight.dtype)
        linear = name.removesuffix(".weight")
        a, b = (self.adapters.get(lora.peft_tensor(linear, which)) for which in lora.PARTS)
        if a is None or b is None:
            return weight
        product = b.float() @ a.float()
        return (weight.float() + self.settings.scale * product).to(weight.dtype)


def read(checkpoint: Path, state: TrainingState) -> Trained:
    """Read a checkpoint of adapters; every rank calls it. UserError, on every rank, where it cannot be read
    or its values are not those that were saved."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    run = state.stored_run()
    assert run is not None
    stored = {
        name: one
        for name, one in sharded.stored_tensors(checkpoint).items()
        if not name.startswith("optimizer.")
    }
    # One rank's sums are those of the complete tensors.
    replica = torch.distributed.get_rank()
    requested = {
        name: ShardedTensor.from_rank_offsets(
            name,
            torch.empty(one.global_shape, dtype=one.dtype),
            replica_id=replica,
            allow_shape_mismatch=name in (weight_mapping.EMBEDDING, weight_mapping.OUTPUT),
        )
        for name, one in stored.items()
    }
    sums = tensor_sums.Sums(state.model.vocab_size)
    strategy = sums.while_loading(serialization.get_default_load_sharded_strategy(str(checkpoint)))
    loaded = sharded.load_state(requested, checkpoint, strategy, complete=False)
    sharded.compare(checkpoint, sums)
    found: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for key in stored:
        tensor = loaded[key]
        if match := _ADAPTER.fullmatch(key):
            layer, target, which = match.groups()
            layers = range(len(tensor)) if layer is None else [int(layer)]
            for number, one in zip(layers, tensor if layer is None else [tensor], strict=True):
                found[lora.peft_name(target, number, which)] = one  # type: ignore[arg-type]
            continue
        stacked = _LAYER.fullmatch(key)
        names = [key] if stacked is None else [f"{stacked[1]}{n}.{stacked[2]}" for n in range(len(tensor))]
        for name, one in zip(names, [tensor] if stacked is None else tensor, strict=True):
            [hf] = weight_mapping.hf_names(weight_mapping.canonical(name), state.model)
            weights[hf] = one[: state.model.vocab_size] if name == weight_mapping.EMBEDDING else one
    return Trained(settings=run.lora, adapters=found, weights=weights)


# ---- PEFT's files ------------------------------------------------------------------------------


def write_peft(
    folder: Path, trained: Trained, state: TrainingState, config: dict[str, Any] | None, base: str
) -> None:
    """Write adapter_config.json and adapter_model.safetensors into `folder`, and base_config.json if the
    adapters were trained with another `config` than the base model's. base: path or name of the model that
    PEFT loads with them. UserError where the model's embedding was trained and is its output layer too."""
    from safetensors.torch import save

    settings = trained.settings
    whole: list[str] = []
    if settings.train_norms:
        whole += ["input_layernorm", "post_attention_layernorm", "norm"]
        whole += ["q_norm", "k_norm"] if state.model.qk_norm else []
    if settings.train_embeddings:
        if state.model.tied_embeddings:
            raise UserError(
                "PEFT has no form for a trained embedding that is the output layer too: export it merged, without --adapter"
            )
        whole.append("embed_tokens")
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(settings.targets),
        "modules_to_save": whole or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors = dict(trained.adapters)
    tensors |= {f"{lora.PEFT_PREFIX}{name}": tensor for name, tensor in trained.weights.items()}
    try:
        (folder / "adapter_config.json").write_text(to_json(values), encoding="utf-8")
        (folder / "adapter_model.safetensors").write_bytes(
            save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"})
        )
        if config is not None:
            (folder / "base_config.json").write_text(to_json(config), encoding="utf-8")
        if state.run is not None:
            (folder / "training_run.json").write_text(json.dumps(state.run, indent=2) + "\n")
    except OSError as error:
        raise atomic_files.cannot_write(str(folder), error) from None


# ---- the model that they belong to -------------------------------------------------------------


def frozen_sum(chunks: list[torch.nn.Module], values: Callable[[Tensor], Tensor] | None = None) -> str:
    """A sum of all weights that are not trained, equal under every layout; every rank calls it. values:
    returns those of a view of a parameter on the meta device."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    from megatron_ultralong.model.llama import unwrap

    sums = tensor_sums.Sums(unwrap(chunks[0]).vocab_size)
    for chunk in chunks:
        frozen = {n for n, parameter in unwrap(chunk).named_parameters() if not parameter.requires_grad}
        state = sharded.complete_state(chunk)
        leaves = nested_values({name: leaf for name, leaf in state.items() if name in frozen})
        built = [leaf.build() if isinstance(leaf, ShardedTensorFactory) else leaf for leaf in leaves]
        for leaf in tensor_sums.saved_tensors(built):
            sums.add_all([(leaf, leaf.data if values is None else values(leaf.data))])
    return hashlib.sha256(repr(sorted(sums.on_all_ranks().items())).encode()).hexdigest()


def read_model_state(checkpoint: Path) -> TrainingState:
    """`bridge.read_state`; UserError where the checkpoint contains adapters only."""
    state = bridge.read_state(checkpoint)
    if state.has_adapters_only():
        raise UserError(
            f"{checkpoint} contains adapters only; merge them with their model: ultralong convert export --load "
            f"{checkpoint} --base DIR --output DIR"
        )
    return state
