"""Last norm, output layer and vocabulary-parallel cross entropy over chunks of the sequence: whole logits
never exist.

The gradient of a chunk is formed in the forward pass, while its logits are there, and scaled in the backward
pass: logits are computed once and at most `chunk` tokens of them are alive. The weights' gradients leave once
a micro-batch. Whole are the hidden states and their gradient.

Shapes: s tokens of this context-parallel rank, b sequences, H hidden size, v = V/TP rows of the padded
vocabulary, t = s/TP with sequence parallelism (else s), c tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_ultralong.config import LOSS_BLOCK
from megatron_ultralong.model.layer.gradients import ChunkedBackward, leaf, mark_reusable


def sharded_token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    group: Any,
    vocab_size: int,
    *,
    sequence_parallel: bool,
    chunk: int,
    z_loss: float = 0.0,
    norm: torch.nn.Module | None = None,
) -> Tensor:
    """Sum of loss_mask x cross entropy, float32 scalar, equal on every tensor-parallel rank.

    z_loss adds z_loss x logsumexp(logits)^2 to each token's cross entropy (PaLM, arXiv 2204.02311, section
    5).

    norm is what hidden goes through first, a chunk at a time; its parameters get their gradients by hand.

    hidden [t, b, H]; weight [v, H], rows of the vocabulary from rank x v on; labels int64 [b, s]; loss_mask
    float [b, s]. Rows from `vocab_size` on are padding and take no part in the softmax. `chunk` is in tokens
    of the whole s x b (0 = all).
    """
    # Inside forward gradients always look switched off, and needs_input_grad does not know of no_grad.
    return _ShardedTokenLoss.apply(
        hidden,
        weight,
        labels,
        loss_mask,
        group,
        vocab_size,
        sequence_parallel,
        chunk,
        z_loss,
        norm,
        torch.is_grad_enabled(),
    )


@torch.no_grad()
def sharded_token_nll(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    group: Any,
    vocab_size: int,
    *,
    sequence_parallel: bool,
    chunk: int,
    norm: torch.nn.Module,
) -> Tensor:
    """The cross entropy of each token, float32 [b, s], equal on every tensor-parallel rank; no gradients.
    Arguments as `sharded_token_loss`."""
    t, b, _ = hidden.shape
    parts = group.size() if sequence_parallel else 1
    labels = labels.t()  # [s, b]
    rows = max(1, chunk // (b * parts)) if chunk else t
    nll = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
    for start in range(0, t, rows):
        x_cbH = _gather(norm(hidden[start : start + rows]), group, parts)
        take = _rows_of_chunk(start, min(start + rows, t), t, parts).to(labels.device)
        logits = torch.matmul(x_cbH.flatten(0, 1), weight.t())  # [c, v]
        log_sum, picked, _ = _statistics(logits, labels[take].flatten(), group, group.rank(), vocab_size)
        nll[take] = (log_sum - picked).view(-1, b)
    return nll.t()


class _ShardedTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        group: Any,
        vocab_size: int,
        sequence_parallel: bool,
        chunk: int,
        z_loss: float,
        norm: torch.nn.Module | None,
        grad_enabled: bool,
    ) -> Tensor:
        t, b, _ = hidden.shape
        tp, rank = group.size(), group.rank()
        parts = tp if sequence_parallel else 1
        labels, loss_mask = labels.t(), loss_mask.t()  # [s, b]
        rows = max(1, chunk // (b * parts)) if chunk else t
        need_hidden, need_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = (
            torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        )
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        norm_backward = ChunkedBackward(list(norm.parameters()) if norm is not None else [])
        for start in range(0, t, rows):
            stop = min(start + rows, t)
            before = after = hidden[start:stop]
            if norm is not None:
                with torch.set_grad_enabled(need_hidden):
                    before = leaf(before)
                    after = norm(before)
            x_cbH = _gather(after.detach(), group, parts)
            take = _rows_of_chunk(start, stop, t, parts).to(labels.device)
            x = x_cbH.flatten(0, 1)  # [c, H]
            target, mask = labels[take].flatten(), loss_mask[take].flatten().float()
            logits = torch.matmul(x, weight.t())  # [c, v]
            loss, grad = _cross_entropy(
                logits, target, mask, group, rank, vocab_size, z_loss, need_hidden or need_weight
            )
            del logits  # the gradient has its place
            total += loss
            if grad is None:
                continue
            if grad_weight is not None:
                grad_weight += torch.matmul(grad.t(), x)
            if grad_hidden is not None:
                grad_x = torch.matmul(grad, weight).view_as(x_cbH)
                share = _reduce(grad_x, group, parts)
                grad_hidden[start:stop] = (
                    share if norm is None else norm_backward.backward([after], [before], [share])[0]
                )
            del grad  # before the next chunk's logits
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.norm_backward = norm_backward
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = mark_reusable(
                ctx, grad_hidden.mul_(grad_total.to(grad_hidden.dtype))
            )  # in place, so once: a second backward is refused
            ctx.norm_backward.accumulate_into_params(grad_total)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, *[None] * 9


def _cross_entropy(
    logits: Tensor,
    target: Tensor,
    mask: Tensor,
    group: Any,
    rank: int,
    vocab_size: int,
    z_loss: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """(masked sum, its gradient by the logits [c, v]). logits [c, v] in the weight's dtype; the gradient
    takes their place.

    Computed in float32, a block of rows at a time: no float32 copy of all of them exists.
    """
    v = logits.shape[1]
    log_sum, picked, peak = _statistics(logits, target, group, rank, vocab_size)
    lse = log_sum + peak
    loss = torch.where(mask > 0, mask * (log_sum - picked + z_loss * lse.square()), 0.0).sum()
    if not need_grad:
        return loss, None
    scale = mask * (1 + 2 * z_loss * lse)
    local, inside = _local(target, rank, v)
    start = 0
    for block in logits.split(max(1, LOSS_BLOCK // v)):
        rows = slice(start, start + len(block))
        start += len(block)
        grad = (block.float() - lse[rows, None]).exp_().mul_(scale[rows, None])
        grad[torch.arange(len(block), device=grad.device), local[rows]] -= inside[rows] * mask[rows]
        block.copy_(grad)
        del grad
    return loss, logits


def _statistics(
    logits: Tensor, target: Tensor, group: Any, rank: int, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(log of the softmax's sum, target's logit, both less the largest logit; that), float32 [c] each. logits
    [c, v]: padded rows become -inf."""
    v = logits.shape[1]
    if (rank + 1) * v > vocab_size:
        logits[:, max(0, vocab_size - rank * v) :] = float("-inf")
    blocks = logits.split(max(1, LOSS_BLOCK // v))
    local, inside = _local(target, rank, v)
    peak = torch.cat([block.max(dim=1).values.float() for block in blocks])
    _all_reduce(peak, group, torch.distributed.ReduceOp.MAX)
    sums = torch.cat(
        [
            (block.float() - p[:, None]).exp_().sum(dim=1)
            for block, p in zip(blocks, peak.split(len(blocks[0])), strict=True)
        ]
    )
    picked = torch.where(inside, logits.gather(1, local[:, None]).squeeze(1).float() - peak, 0.0)
    both = torch.stack([sums, picked])  # [2, c]
    _all_reduce(both, group, torch.distributed.ReduceOp.SUM)
    return both[0].log(), both[1], peak  # less the peak, both: their difference stays exact for large logits


def _local(target: Tensor, rank: int, v: int) -> tuple[Tensor, Tensor]:
    """(row of this rank's vocabulary, whether the target is among them), [c] each."""
    local = target - rank * v
    return local.clamp(0, v - 1), (local >= 0) & (local < v)


def _rows_of_chunk(start: int, stop: int, t: int, parts: int) -> Tensor:
    """Rows of the sequence that a gathered chunk holds: the same local ones of every rank's stretch of t."""
    return torch.cat([torch.arange(part * t + start, part * t + stop) for part in range(parts)])


def _all_reduce(x: Tensor, group: Any, op: Any) -> None:
    if group.size() > 1:
        torch.distributed.all_reduce(x, op=op, group=group)


def _gather(x: Tensor, group: Any, parts: int) -> Tensor:
    """[r, b, H] of every rank -> [parts * r, b, H], rank after rank."""
    if parts == 1:
        return x
    whole = x.new_empty((parts * x.shape[0], *x.shape[1:]))
    torch.distributed.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole


def _reduce(x: Tensor, group: Any, parts: int) -> Tensor:
    """Sum of every rank's [c, b, H]; with sequence parallelism only this rank's stretch of it."""
    if parts > 1:
        share = x.new_empty((x.shape[0] // parts, *x.shape[1:]))
        torch.distributed.reduce_scatter_tensor(share, x.contiguous(), group=group)
        return share
    _all_reduce(x, group, torch.distributed.ReduceOp.SUM)
    return x
