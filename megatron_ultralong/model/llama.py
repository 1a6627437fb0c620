"""The model composed of Megatron-Core's stable parts: embedding, transformer block, output layer. A Llama, or
one of the families that differ from it by options (families.py). Parameter names are those of GPTModel.

Shapes: b sequences, S complete sequence, s = S/CP tokens of this context-parallel rank, H hidden size, V
vocabulary padded to a multiple of the tensor parallel size, v = V/TP.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import WrappedTensor
from torch import Tensor

from megatron_ultralong.config import Memory, Model, Parallel, check_model_layout
from megatron_ultralong.context_parallel import api
from megatron_ultralong.context_parallel.placement import Placement
from megatron_ultralong.lora import Lora
from megatron_ultralong.model import spec
from megatron_ultralong.model.adapters import Adapters, freeze
from megatron_ultralong.model.attention import RotaryTable
from megatron_ultralong.model.layer.offload import HostStore
from megatron_ultralong.model.loss import LossSpec, sharded_token_loss, sharded_token_nll
from megatron_ultralong.model.weight_mapping import padded_vocab_size
from megatron_ultralong.rope.base import Rope
from megatron_ultralong.runtime.launch import Ranks

NO_LORA = Lora()


class _Layers(TransformerBlock):
    """Megatron's layers of a stage. The final norm has its parameter name here, but is applied by the code
    that uses the layers' output."""

    final_layernorm: Any

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        norm, self.final_layernorm = self.final_layernorm, None
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.final_layernorm = norm


class _WithGradient(torch.autograd.Function):
    """x as a tensor that has a gradient, which nobody keeps: that of a leaf would stay, and so would x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, nothing: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A model chunk's place in the pipeline, and its layers."""

    pre_process: bool
    """It has the embedding."""
    post_process: bool
    """It has the final norm and the output layer."""
    vp_stage: int | None
    """Its number on this rank in an interleaved pipeline."""
    block: Any
    """Megatron's specification of its layers."""
    store: HostStore
    """Where its layers keep offloaded tensors."""
    rotary: RotaryTable
    """What rotates its layers' queries and keys."""
    loss_chunk: int
    """`memory.loss_chunk`."""


class Llama(LanguageModule):
    """One pipeline stage (or model chunk) of a model."""

    def __init__(self, config: TransformerConfig, model: Model, groups: Any, stage: Stage) -> None:
        super().__init__(config=config, pg_collection=groups)
        pre_process, post_process, vp_stage = stage.pre_process, stage.post_process, stage.vp_stage
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = model.tied_embeddings
        self.model_type = ModelType.encoder_or_decoder
        self.vocab_size, self.loss_chunk = model.vocab_size, stage.loss_chunk
        self.store, self.rotary = stage.store, stage.rotary
        self.has_adapters = False
        padded = padded_vocab_size(model.vocab_size, groups.tp.size())
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config,
                vocab_size=padded,
                max_sequence_length=0,
                position_embedding_type="none",
                tp_group=groups.tp,
            )
        self.decoder = _Layers(
            config,
            stage.block,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        if post_process:
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                padded,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_bias_add=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process and model.tied_embeddings,
                tp_group=groups.tp,
            )
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Set the hidden states of the previous stage (called by Megatron's pipeline schedules)."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        z_loss: float = 0.0,
        placement: Placement | None = None,
        z_sum: Tensor | None = None,
    ) -> Tensor:
        """tokens, labels: int64 [b, s], loss_mask: float32 [b, s], each this rank's zigzag shard, or its
        tokens of a row (b = 1) with a `placement`, whose attention stays inside documents. z_sum: as
        in `loss.sharded_token_loss`.

        Returns on the last stage: with labels and loss_mask, the sum of loss_mask x (cross entropy + z_loss x
        logsumexp^2) over this rank's tokens (float32 scalar); with labels only, the cross entropy of each
        token (float32 [b, s], no gradients); without labels, the logits [b, s, v] with padded rows at -inf.
        On other stages: hidden states [s (/TP), b, H].
        """
        self.store.begin_forward()
        hidden = self.embedding(tokens, None) if self.pre_process else None
        if hidden is not None and torch.is_grad_enabled() and not hidden.requires_grad:
            # A frozen embedding: recomputed layers need an input with a gradient.
            hidden = _WithGradient.apply(hidden, torch.empty(0, device=hidden.device, requires_grad=True))
        # Wrapped, so that no reference here keeps the embeddings alive while the layers run.
        states, hidden = None if hidden is None else WrappedTensor(hidden), None
        hidden = self.decoder(
            hidden_states=states,
            attention_mask=None,
            packed_seq_params=placement,
        )
        if not self.post_process:
            return hidden
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        if labels is None:
            logits, _ = self.output_layer(self.decoder.final_layernorm(hidden), weight=weight)  # [s, b, v]
            first = self.tp_group.rank() * logits.shape[-1]
            rows = torch.arange(first, first + logits.shape[-1], device=logits.device)
            return logits.masked_fill(rows >= self.vocab_size, float("-inf")).transpose(0, 1)
        spec = LossSpec(
            group=self.tp_group,
            vocab_size=self.vocab_size,
            sequence_parallel=self.config.sequence_parallel,
            chunk=self.loss_chunk,
            z_loss=z_loss,
        )
        norm = self.decoder.final_layernorm
        if loss_mask is None:
            return sharded_token_nll(hidden, weight, labels, spec, norm)
        return sharded_token_loss(hidden, weight, labels, loss_mask, spec, norm, z_sum)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As in GPTModel, without the output layer's extra state, which is empty and which GPTModel's strict
        load does not expect."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state.pop(f"{prefix}output_layer._extra_state", None)
        return state


def transformer_config(
    model: Model,
    parallel: Parallel,
    memory: Memory,
    precision: str,
    deterministic: bool = False,
    sequence_parallel: bool = True,
) -> TransformerConfig:
    """Return Megatron's TransformerConfig for a model under a layout. sequence_parallel: applies with
    tensor parallelism only."""
    bf16 = precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_size,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        add_bias_linear=False,  # model/spec.py gives each linear its bias
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        tensor_model_parallel_size=parallel.tp,
        sequence_parallel=sequence_parallel and parallel.tp > 1,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        calculate_per_token_loss=True,  # see train/loss_normalisation.py
        bf16=bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        perform_initialization=False,
        recompute_granularity="full" if memory.recompute == "full" else None,
        recompute_method="uniform" if memory.recompute == "full" else None,
        recompute_num_layers=1 if memory.recompute == "full" else None,
        deterministic_mode=deterministic,
        variable_seq_lengths=False,
        # Interleaved over two ranks, both neighbours are the same peer, and batched communication would mix
        # up their tensors. Interleaved, outputs are sent during the next computation, and gloo would send
        # freed memory.
        deallocate_pipeline_outputs=parallel.vpp == 1,
        batch_p2p_comm=parallel.vpp == 1,
        overlap_p2p_comm=parallel.vpp > 1,
    )


def build(
    model: Model,
    rope: Rope,
    ranks: Ranks,
    parallel: Parallel,
    memory: Memory,
    precision: str,
    *,
    deterministic: bool = False,
    positions_by_document: bool = False,
    transformer_engine: bool | None = None,
    sequence_parallel: bool = True,
    lora: Lora = NO_LORA,
) -> list[torch.nn.Module]:
    """Build this rank's model chunks (one, or `parallel.vpp`) on the rank's device, with weights not yet set.

    transformer_engine: None = where installed, on GPUs, but not with adapters. UserError where the model
    cannot be split as `parallel` says.
    """
    assert memory.offload != "auto", "memory.offload=auto must be resolved first"
    check_model_layout(model, parallel)
    config = transformer_config(model, parallel, memory, precision, deterministic, sequence_parallel)
    use_te = (
        spec.have_transformer_engine()
        and ranks.device.type == "cuda"
        and not lora.rank  # an adapter's input is the norm's output, which is inside TransformerEngine's linear
        if transformer_engine is None
        else transformer_engine
    )
    context = api.split_group(ranks.groups.cp, parallel.ulysses, parallel.cp_comm_type, ranks.timeout)
    rotary = RotaryTable(rope, model.head_dim, positions_by_document)
    store = HostStore(ranks.device)
    chunks: list[torch.nn.Module] = []
    for number in range(parallel.vpp):
        vp_stage = number if parallel.vpp > 1 else None
        layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=ranks.pp_rank)
        stage = Stage(
            pre_process=ranks.pp_rank == 0 and number == 0,
            post_process=ranks.pp_rank == ranks.pp - 1 and number == parallel.vpp - 1,
            vp_stage=vp_stage,
            block=spec.block_spec(
                model,
                layers,
                spec.core_attention(rotary, context),
                memory,
                store,
                transformer_engine=use_te,
                adapters=partial(Adapters, config, model, lora, ranks.groups.tp) if lora.rank else None,
            ),
            store=store,
            rotary=rotary,
            loss_chunk=memory.loss_chunk,
        )
        chunk = Llama(config, model, ranks.groups, stage)
        _mark_tensor_parallel(chunk)
        chunk.has_adapters = lora.rank > 0
        freeze(chunk, lora, model)
        chunk = chunk.to(ranks.device)
        chunks.append(Float16Module(config, chunk) if precision == "bf16" else chunk)
    return chunks


def _mark_tensor_parallel(chunk: torch.nn.Module) -> None:
    """Mark the weights that are split over tensor parallel ranks, and how.

    Megatron marks them only when it initialises them, which it does not do here. An unmarked split weight
    would count as replicated, and the gradient norm would include the first rank's shard only.
    """
    for name, module in chunk.named_modules():
        if isinstance(module, tensor_parallel.RowParallelLinear):
            dim, stride = 1, 1
        elif isinstance(module, tensor_parallel.ColumnParallelLinear):
            dim, stride = 0, 2 if name.endswith("linear_fc1") else 1
        elif isinstance(module, tensor_parallel.VocabParallelEmbedding):
            dim, stride = 0, 1
        else:
            continue
        if module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            tensor_parallel.set_tensor_model_parallel_attributes(module.weight, True, dim, stride)


def unwrap(chunk: torch.nn.Module) -> Llama:
    """The Llama inside Megatron's wrappers (DistributedDataParallel, Float16Module)."""
    while not isinstance(chunk, Llama):
        chunk = chunk.module
    return chunk


def named_parameters(chunk: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters of a chunk by GPTModel's names, with layer numbers counted over the complete model from 0.

    The last pipeline stage's copy of a tied embedding is named `output_layer.weight`.
    """
    llama = unwrap(chunk)
    names: dict[str, torch.nn.Parameter] = {}
    for name, parameter in llama.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(llama.decoder.layers[int(parts[2])].layer_number - 1)
        names[".".join(parts)] = parameter
    return names
