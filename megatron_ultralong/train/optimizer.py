"""Megatron's distributed optimizer around AdamW, and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_ultralong.checkpoint import optimizer_state
from megatron_ultralong.config import Optim, Train
from megatron_ultralong.runtime.launch import Ranks


def learning_rate(train: Train, iteration: int) -> float:
    """Learning rate of optimizer step `iteration` (counted from 1): linear warm-up from 0, then cosine decay
    to min_lr, or constant."""
    if train.warmup and iteration <= train.warmup:
        return train.lr * iteration / train.warmup
    if train.schedule == "constant":
        return train.lr
    done = (iteration - train.warmup) / max(1, train.iterations - train.warmup)
    return train.min_lr + (train.lr - train.min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def data_parallel(chunks: list[torch.nn.Module], ranks: Ranks) -> list[torch.nn.Module]:
    """Wrap each chunk in Megatron's DistributedDataParallel: float32 gradients, reduced once per iteration.

    Reduction is not overlapped with the backward: an iteration at these lengths takes seconds to minutes, its
    reduction far less.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=False,
        check_for_nan_in_grad=False,
    )
    wrapped = [
        DistributedDataParallel(
            chunk.config, config, chunk, disable_bucketing=i > 0, pg_collection=ranks.groups
        )
        for i, chunk in enumerate(chunks)
    ]
    if ranks.groups.dp_cp.size() == 1:
        for chunk in wrapped:  # would copy gradients and weights onto themselves
            chunk.finish_grad_sync = chunk.start_param_sync = _nothing
    for chunk in wrapped:
        # The ranks' weights are equal already, read and broadcast or made from a seed; this guarantees it.
        chunk.broadcast_params()
    return wrapped


def build(chunks: list[torch.nn.Module], optim: Optim, train: Train, ranks: Ranks) -> Any:
    """Build the distributed AdamW over data-parallel `chunks` (fp32 master weights in bf16 runs). Weights
    must be loaded before."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from megatron_ultralong.model.llama import unwrap

    config = OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        min_lr=train.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip,
        bf16=train.precision == "bf16",
        params_dtype=torch.bfloat16 if train.precision == "bf16" else torch.float32,
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(config, chunks)
    for chunk in chunks:
        unwrap(chunk).config.grad_scale_func = optimizer.scale_loss
    optimizer_state.adapt(optimizer)
    _avoid_copies(optimizer)
    return optimizer


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _avoid_copies(optimizer: Any) -> None:
    """Leave out what Megatron copies onto itself: float32 weights, of which the optimizer's shards are views,
    and scaled gradients where neither TransformerEngine nor apex is installed."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not any(one.model_float16_groups):
            one._copy_main_params_to_model_params = _nothing
    if clip_grads.multi_tensor_scale_impl is utils.local_multi_tensor_scale:
        clip_grads.multi_tensor_scale_impl = _scale


def _scale(chunk_size: int, overflow: Tensor, tensors: list[list[Tensor]], scale: float) -> None:
    """Megatron's `local_multi_tensor_scale` without a temporary tensor."""
    for source, target in zip(*tensors, strict=True):
        torch.mul(source, scale, out=target)


def step(optimizer: Any, is_acceptable: Callable[[float], bool]) -> tuple[bool, float]:
    """Update the weights, unless `is_acceptable` refuses the norm of the gradient before clipping; return
    whether they were updated, and the norm, both the same on every rank."""
    norms: list[float] = []

    def norm() -> float:
        norms.append(float(type(optimizer).get_grad_norm(optimizer)))
        return norms[-1]

    def update() -> bool:
        return is_acceptable(norms[-1]) and bool(type(optimizer).step_with_ready_grads(optimizer))

    optimizer.get_grad_norm, optimizer.step_with_ready_grads = norm, update
    updated, _, _ = optimizer.step()
    return updated, norms[-1]


def set_hyperparameters(optimizer: Any, lr: float, optim: Optim) -> None:
    """Set this iteration's values in every parameter group, scaled by the group's own multipliers. A loaded
    checkpoint leaves its own there."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = optim.weight_decay * group.get("wd_mult", 1.0)
        group["betas"] = (optim.beta1, optim.beta2)
        group["eps"] = optim.eps
        if "fused" in group:  # torch's AdamW, where neither TransformerEngine nor apex is installed
            # On a CPU, one pass over weights, gradients and moments in place of a dozen. On CUDA it would
            # need the step counts there; None is torch's choice.
            on_cpu = all(p.device.type == "cpu" for p in group["params"])
            group["fused"] = True if on_cpu else None
