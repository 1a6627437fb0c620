"""Resuming Megatron's distributed optimizer with torch's AdamW, that is, without TransformerEngine or apex.

torch's AdamW has one `step` tensor per parameter where the fused Adams have one number per group. Megatron's
distributed optimizer stores the number, but its load looks for the tensor among the stored states, and then
shares one tensor between all parameters.
"""

from __future__ import annotations

import types
from typing import Any

import torch


def adapt(optimizer: Any) -> None:
    """Make the optimizer's load read `step` from the parameter groups."""
    for one in _torch_adamw(optimizer):
        one._set_main_param_and_optimizer_states = types.MethodType(_copy_states, one)


def before_load(optimizer: Any) -> None:
    """Create the state tensors of a new optimizer for a load to fill; parameters do not change."""
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    for one in _distributed(optimizer):
        if len(one.optimizer.state) == 0:
            one._init_optimizer_states_with_dummy_values()


def after_load(optimizer: Any) -> None:
    """Give each parameter its own copy of the `step` tensor that all share after a load; the shared one would
    advance once per parameter."""
    for one in _torch_adamw(optimizer):
        for state in one.optimizer.state.values():
            state["step"] = state["step"].clone()


def steps(optimizer: Any) -> set[int]:
    """The step counts in the optimizer's states (or groups): a single number unless something is wrong."""
    counts: set[int] = set()
    for one in _distributed(optimizer):
        states = [s["step"] for s in one.optimizer.state.values() if "step" in s]
        groups = [g["step"] for g in one.optimizer.param_groups if "step" in g and g["params"]]
        counts |= {int(s) for s in states or groups}
    return counts


def _copy_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
    """Copy master weight and moments of one parameter, but not `step`."""
    group, order = self.model_param_group_index_map[model_param]
    main = self.optimizer.param_groups[group]["params"][order]
    for key, target in {"param": main, **self.optimizer.state[main]}.items():
        if key != "step":
            target.copy_(tensors[key])


def _distributed(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _torch_adamw(optimizer: Any) -> list[Any]:
    return [one for one in _distributed(optimizer) if isinstance(one.optimizer, torch.optim.AdamW)]
