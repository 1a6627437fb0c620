"""TransformerEngine's linears and norms in the layers, built from its own Python (its compiled part is
stubbed): the same parameters as Megatron's own linears, and checkpoints of one load in the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.null_gpu import transformer_engine_stub

if not transformer_engine_stub.FOLDER.exists():
    pytest.skip(
        f"TransformerEngine's Python files are not in {transformer_engine_stub.FOLDER} (make venv-latest)",
        allow_module_level=True,
    )
transformer_engine_stub.install()

from megatron_ultralong.checkpoint import saving, sharded, tensor_sums
from megatron_ultralong.checkpoint.megatron_lm.export import export_megatron
from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.config import Memory, Model, Parallel, Runtime
from megatron_ultralong.model import llama, spec, weight_mapping
from megatron_ultralong.rope.methods import Unscaled
from megatron_ultralong.runtime import launch
from tests.tiny import hf_model

PLAIN = Model(hidden_size=256, ffn_size=512, layers=2, heads=4, kv_heads=2, head_dim=64, vocab_size=500)
MODELS = {
    "plain": PLAIN,
    "biases": replace(PLAIN, qkv_bias=True, attention_output_bias=True, mlp_bias=True),
    "qwen3": replace(PLAIN, family="qwen3", qk_norm=True, qkv_bias=True, attention_output_bias=True),
}
OF_EVERY_MODEL = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Any]:
    yield launch.start(Runtime(device="cuda"), Parallel())
    launch.stop()


def built(ranks: Any, model: Model, transformer_engine: bool | None) -> list[torch.nn.Module]:
    return llama.build(
        model,
        Unscaled(),
        ranks,
        Parallel(),
        Memory(offload="off"),
        "bf16",
        transformer_engine=transformer_engine,
    )


def test_is_used_on_gpus(ranks: Any) -> None:
    assert spec.have_transformer_engine()
    [chunk] = built(ranks, PLAIN, None)
    layer = llama.unwrap(chunk).decoder.layers[0]
    assert type(layer.self_attention.linear_qkv).__module__ == "megatron.core.extensions.transformer_engine"


RENAMED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""TransformerEngine's linears contain the norm before them."""


def parameters(chunk: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters by the names that they have with TransformerEngine."""
    found = llama.named_parameters(chunk)
    for old, new in RENAMED.items():
        found = {name.replace(old, new): x for name, x in found.items()}
    return found


@OF_EVERY_MODEL
def test_parameters_are_the_same(ranks: Any, model: Model) -> None:
    [ours], [theirs] = built(ranks, model, False), built(ranks, model, True)
    assert list(parameters(theirs)) == list(llama.named_parameters(theirs))
    marks = ("tensor_model_parallel", "partition_dim", "partition_stride")
    described = [
        {
            name: (x.shape, x.dtype, x.device, *(getattr(x, mark, None) for mark in marks))
            for name, x in parameters(chunk).items()
        }
        for chunk in (ours, theirs)
    ]
    assert described[0] == described[1]
    for name, x in llama.named_parameters(theirs).items():
        assert x.shape == weight_mapping.shard_shape(name, model, 1)


@OF_EVERY_MODEL
@pytest.mark.parametrize("with_te", [True, False], ids=["from it", "into it"])
def test_checkpoints(
    ranks: Any, model: Model, with_te: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Checksums are sums on the device, which computes nothing: they are whatever its memory holds.
    monkeypatch.setattr(tensor_sums, "first_difference", lambda stored, loaded: None)
    source, target = built(ranks, model, with_te), built(ranks, model, not with_te)
    # Copies of up to 1 MiB are executed on the null GPU.
    values = {
        name: torch.full(x.shape, number + 1, dtype=x.dtype)
        for number, (name, x) in enumerate(parameters(source[0]).items())
    }
    with torch.no_grad():
        for name, x in parameters(source[0]).items():
            x.copy_(values[name])
    folder = saving.save(tmp_path, TrainingState(model=model, rope=Unscaled()), source, None)
    sharded.load(folder, target)
    for name, x in parameters(target[0]).items():
        if name.endswith(("linear_fc1.weight", "linear_fc1.bias")):
            continue  # its halves are joined by a kernel
        torch.testing.assert_close(x.detach().cpu(), values[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("name", ["plain", "qwen3"])
def test_has_all_that_megatron_lm_loads(ranks: Any, name: str, tmp_path: Path) -> None:
    """Its GPTModel has a state of TransformerEngine for every module, and does not load without one."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    model = replace(MODELS[name], qkv_bias=False, attention_output_bias=False)
    hf_model(model).save_pretrained(tmp_path / "hf")
    export_megatron(tmp_path / "hf", tmp_path / "out", ranks, Parallel())
    config = llama.transformer_config(model, Parallel(), Memory(recompute="none"), "bf16")
    spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=model.qk_norm)
    gpt = GPTModel(config, spec, 512, 64, position_embedding_type="rope")
    requested = {"model": gpt.sharded_state_dict()}
    _, unused, missing = dist_checkpointing.load(
        requested, str(tmp_path / "out" / "release"), strict=StrictHandling.RETURN_ALL
    )
    assert not missing
    # Asked for by Megatron-Core before 0.15.
    assert unused == {"decoder.layers.self_attention.core_attention._extra_state"}
