"""The transformer layer as a Megatron-Core spec: TransformerEngine's linears and norms if installed,
otherwise Megatron's own.

A checkpoint of one loads in the other: without TransformerEngine the norms are modules of their own, stored
under the names that TransformerEngine's fused linears give them.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from megatron_ultralong.config import Memory, Model
from megatron_ultralong.context_parallel.api import ContextGroups
from megatron_ultralong.model.attention import CoreAttention, RotaryTable
from megatron_ultralong.model.layer.offload import HostStore
from megatron_ultralong.model.norm import RMSNorm

if TYPE_CHECKING:
    from megatron_ultralong.model.adapters import Adapters


@functools.cache
def have_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def layers_of(device: torch.device, adapters: bool = False) -> str:
    """Return whose linear layers and norms a model on `device` is made of by default, and why. adapters:
    whether it has LoRA's."""
    megatron = f"Megatron-Core {importlib.metadata.version('megatron-core')} and PyTorch"
    if device.type != "cuda":
        return megatron
    if not have_transformer_engine():
        return f"{megatron}: TransformerEngine is not installed"
    if adapters:
        return f"{megatron}: adapters need the output of a norm, which is inside TransformerEngine's linear"
    import transformer_engine

    return f"TransformerEngine {transformer_engine.__version__}"


def block_spec(
    model: Model,
    layers: int,
    core_attention: Any,
    memory: Memory,
    store: HostStore,
    *,
    transformer_engine: bool,
    adapters: Callable[[], Adapters] | None = None,
) -> Any:
    """Return Megatron's TransformerBlockSubmodules for `layers` layers of `model` in one pipeline stage.

    core_attention: that of the function of this name. adapters: makes LoRA's of a layer.
    """
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

    from megatron_ultralong.model.layer.layer import Layer

    if transformer_engine:
        from megatron.core.extensions import transformer_engine as te

        column, row = te.TELayerNormColumnParallelLinear, te.TERowParallelLinear
        norm, final_norm, renamed = IdentityOp, te.TENorm, {}
    else:
        column, row = ColumnParallelLinear, RowParallelLinear
        norm = final_norm = RMSNorm
        renamed = {
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        }
    head_norm = RMSNorm if model.qk_norm else IdentityOp  # applied with RoPE, by the code in attention.py
    layer = ModuleSpec(
        module=Layer,
        params={
            "memory": memory,
            "store": store,
            "layer_forward": _layer_forward(memory),
            "adapters": adapters,
        },
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column,
                    core_attention=core_attention,
                    linear_proj=_with_bias(row, model.attention_output_bias),
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=_with_bias(column, model.mlp_bias), linear_fc2=_with_bias(row, model.mlp_bias)
                ),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=renamed,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=final_norm)


def _layer_forward(memory: Memory) -> Any:
    """How a layer computes its forward, and what its backward recomputes."""
    from megatron_ultralong.model.layer.layer import forward_in_one_graph
    from megatron_ultralong.model.layer.query_chunks import forward_query_chunks
    from megatron_ultralong.model.layer.recompute import forward_all_but_attention

    if memory.query_chunks:
        return forward_query_chunks
    return forward_all_but_attention if memory.recompute == "all_but_attention" else forward_in_one_graph


def core_attention(rotary: RotaryTable, groups: ContextGroups) -> Any:
    """Return what builds a layer's core attention."""

    def build(*args: Any, pg_collection: Any = None, **kwargs: Any) -> CoreAttention:
        return CoreAttention(*args, rotary=rotary, groups=groups, **kwargs)

    return build


def _with_bias(linear: Any, bias: bool) -> Any:
    """Return the class `linear` with a bias that it adds itself, if `bias` says so.

    Megatron has one setting for the biases of all linears, and most linears leave it to their caller to add
    them.
    """
    if not bias:
        return linear

    class WithBias(linear):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"bias": True, "skip_bias_add": False}))

    return WithBias
