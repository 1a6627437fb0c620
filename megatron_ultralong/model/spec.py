"""The transformer layer as a Megatron-Core spec: TransformerEngine's linears and norms where installed,
Megatron's own else.

A checkpoint of one loads in the other: without TransformerEngine the norms are modules of their own, stored
under the names that TransformerEngine's fused linears give them.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from megatron_ultralong.config import Memory
from megatron_ultralong.context_parallel.api import ContextGroups
from megatron_ultralong.model.attention import CoreAttention, RotaryTable
from megatron_ultralong.model.layer.offload import HostStore
from megatron_ultralong.model.norm import RMSNorm


def have_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def block_spec(
    rotary: RotaryTable,
    groups: ContextGroups,
    layers: int,
    memory: Memory,
    store: HostStore,
    transformer_engine: bool,
) -> Any:
    """Megatron's TransformerBlockSubmodules for `layers` layers of one pipeline stage."""
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

        qkv, fc1, row, norm, final_norm = (
            te.TELayerNormColumnParallelLinear,
            te.TELayerNormColumnParallelLinear,
            te.TERowParallelLinear,
            IdentityOp,
            te.TENorm,
        )
        renamed = {}
    else:
        qkv, fc1, row, norm, final_norm = (
            ColumnParallelLinear,
            ColumnParallelLinear,
            RowParallelLinear,
            RMSNorm,
            RMSNorm,
        )
        renamed = {
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        }
    layer = ModuleSpec(
        module=Layer,
        params={"memory": memory, "store": store},
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=qkv,
                    core_attention=_core_attention(rotary, groups),
                    linear_proj=row,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=fc1, linear_fc2=row)),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=renamed,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=final_norm)


def _core_attention(rotary: RotaryTable, groups: ContextGroups) -> Any:
    def build(*args: Any, pg_collection: Any = None, **kwargs: Any) -> CoreAttention:
        return CoreAttention(*args, rotary=rotary, groups=groups, **kwargs)

    return build
