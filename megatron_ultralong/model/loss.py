"""Final norm, output layer and vocabulary-parallel cross entropy in chunks of the sequence: complete logits
never exist.

The gradient of a chunk is computed in the forward pass, while its logits exist, and scaled in the backward
pass: logits are computed once, for at most `chunk` tokens at a time. The weights' gradients are accumulated
once per micro-batch. Only the hidden states and their gradient exist for all tokens.

Shapes: s tokens of this context-parallel rank, b sequences, H hidden size, v = V/TP rows of the padded
vocabulary, t = s/TP with sequence parallelism (otherwise s), c tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ultralong.config import LOSS_BLOCK
from megatron_ultralong.model.elementwise import row_blocks
from megatron_ultralong.model.layer.gradients import ChunkedBackward, leaf, mark_reusable


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """How the loss is computed."""

    group: Any
    """The tensor parallel group; rank r of it has the vocabulary's rows from r x v on."""
    vocab_size: int
    """Rows of the vocabulary; later ones are padding, excluded from the softmax."""
    sequence_parallel: bool = False
    """Hidden states are split over the group."""
    chunk: int = 0
    """Tokens of s x b at a time; 0 = all."""
    z_loss: float = 0.0
    """Adds z_loss x logsumexp(logits)^2 to each token's cross entropy (PaLM, arXiv 2204.02311, section 5)."""

    @property
    def parts(self) -> int:
        """Ranks that the sequence is split over."""
        return self.group.size() if self.sequence_parallel else 1

    def local_rows(self, t: int, b: int) -> int:
        """Rows of the local hidden states [t, b, H] per chunk."""
        return max(1, self.chunk // (b * self.parts)) if self.chunk else t


def sharded_token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    spec: LossSpec,
    norm: torch.nn.Module | None = None,
    z_sum: Tensor | None = None,
) -> Tensor:
    """Sum loss_mask x (cross entropy + z-loss): float32 scalar, equal on every tensor-parallel rank.

    hidden: [t, b, H]. weight: [v, H]. labels: int64 [b, s]. loss_mask: float [b, s]. norm: applied to hidden
    first, chunk by chunk; its parameters' gradients are accumulated here, not by autograd. z_sum: float32
    scalar to which the z-loss's share of the sum is added, without a gradient.
    """
    # Inside forward, grad mode is always off, and needs_input_grad ignores no_grad.
    return _ShardedTokenLoss.apply(
        hidden, weight, labels, loss_mask, spec, norm, z_sum, torch.is_grad_enabled()
    )


@torch.no_grad()
def sharded_token_nll(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    spec: LossSpec,
    norm: torch.nn.Module,
) -> Tensor:
    """Compute the cross entropy of each token: float32 [b, s], equal on every tensor-parallel rank, without
    gradients. Arguments as in `sharded_token_loss`."""
    t, b, _ = hidden.shape
    group, parts, rows = spec.group, spec.parts, spec.local_rows(t, b)
    labels = labels.t()  # [s, b]
    nll = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
    for start in range(0, t, rows):
        x_cbH = _gather(norm(hidden[start : start + rows]), group, parts)
        logits = torch.matmul(x_cbH.flatten(0, 1), weight.t())  # [c, v]
        target = _chunk_of(labels, start, rows, parts)
        log_sum, picked, _ = _statistics(logits, target.flatten(), spec)
        _chunk_of(nll, start, rows, parts).copy_((log_sum - picked).view_as(target))
    return nll.t()


class _ShardedTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        spec: LossSpec,
        norm: torch.nn.Module | None,
        z_sum: Tensor | None,
        grad_enabled: bool,
    ) -> Tensor:
        t, b, _ = hidden.shape
        group, parts, rows = spec.group, spec.parts, spec.local_rows(t, b)
        labels, loss_mask = labels.t(), loss_mask.t()  # [s, b]
        need_hidden, need_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight: Tensor | None = None  # float32
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
            x = x_cbH.flatten(0, 1)  # [c, H]
            target, mask = (_chunk_of(y, start, rows, parts).flatten() for y in (labels, loss_mask.float()))
            logits = torch.matmul(x, weight.t())  # [c, v]
            loss, z_loss, grad = _cross_entropy(logits, target, mask, spec, need_hidden or need_weight)
            del logits  # overwritten by the gradient
            total += loss
            if z_loss is not None:
                total += z_loss
                if z_sum is not None:
                    z_sum += z_loss
            if grad is None:
                continue
            if need_weight:
                grad_weight = _add_product(grad_weight, grad.t(), x)
            if grad_hidden is not None:
                grad_x = torch.matmul(grad, weight).view_as(x_cbH)
                share = _reduce(grad_x, group, parts)
                grad_hidden[start:stop] = (
                    share if norm is None else norm_backward.backward([after], [before], [share])[0]
                )
            del grad  # free it before the next chunk's logits
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
            )  # in place: autograd refuses a second backward
            ctx.norm_backward.accumulate_into_params(grad_total)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, *[None] * 6


def _cross_entropy(
    logits: Tensor,
    target: Tensor,
    mask: Tensor,
    spec: LossSpec,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (masked sum of the cross entropy, that of the z-loss (None = off), the gradient of both with
    respect to the logits [c, v], which overwrites them).

    logits: [c, v] in the weight's dtype. Computed in float32, one block of rows at a time: no float32 copy of
    all logits exists.
    """
    log_sum, picked, peak = _statistics(logits, target, spec)
    lse = log_sum + peak
    loss = torch.where(mask > 0, mask * (log_sum - picked), 0.0).sum()
    z_loss = None
    if spec.z_loss:
        z_loss = torch.where(mask > 0, mask * spec.z_loss * lse.square(), 0.0).sum()
    if not need_grad:
        return loss, z_loss, None
    scale = mask * (1 + 2 * spec.z_loss * lse)
    local, inside = _local(target, spec.group.rank(), logits.shape[1])
    if logits.dtype == torch.float32:  # exponentials by now
        logits.mul_((scale * torch.exp(-log_sum))[:, None])
        return loss, z_loss, logits.scatter_add_(1, local[:, None], (-mask * inside)[:, None])
    at_target = logits.gather(1, local[:, None]).squeeze(1)
    for rows in row_blocks(logits, LOSS_BLOCK):
        block = logits[rows]
        torch.mul(torch.sub(block, lse[rows, None]).exp_(), scale[rows, None], out=block)
    # The target's in float32 too, and rounded once.
    at_target = (at_target - lse).exp_().mul_(scale) - inside * mask
    logits.scatter_(1, local[:, None], at_target.to(logits.dtype)[:, None])
    return loss, z_loss, logits


def _statistics(logits: Tensor, target: Tensor, spec: LossSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return (log of the softmax's sum, target's logit, both minus the largest logit; the largest logit):
    float32 [c] each.

    Padded columns of logits [c, v] become -inf; float32 logits are overwritten by their exponentials relative
    to the largest logit, others are computed from twice, because their dtype is not precise enough.
    """
    v = logits.shape[1]
    group, rank = spec.group, spec.group.rank()
    if (rank + 1) * v > spec.vocab_size:
        logits[:, max(0, spec.vocab_size - rank * v) :] = float("-inf")
    local, inside = _local(target, rank, v)
    peak = logits.amax(dim=1).float()
    _all_reduce(peak, group, torch.distributed.ReduceOp.MAX)
    picked = torch.where(inside, logits.gather(1, local[:, None]).squeeze(1).float() - peak, 0.0)
    sums = torch.empty_like(peak)
    for rows in row_blocks(logits, LOSS_BLOCK):
        kept = logits[rows] if logits.dtype == torch.float32 else None
        torch.sum(torch.sub(logits[rows], peak[rows, None], out=kept).exp_(), dim=1, out=sums[rows])
    both = torch.stack([sums, picked])  # [2, c]
    _all_reduce(both, group, torch.distributed.ReduceOp.SUM)
    return both[0].log(), both[1], peak  # relative to the peak: exact differences for large logits


def _local(target: Tensor, rank: int, v: int) -> tuple[Tensor, Tensor]:
    """(target's row in this rank's vocabulary, whether this rank has it): [c] each."""
    local = target - rank * v
    return local.clamp(0, v - 1), (local >= 0) & (local < v)


def _chunk_of(x: Tensor, start: int, rows: int, parts: int) -> Tensor:
    """The rows of x [s, b] that a gathered chunk holds, `start` and following of each rank's t: view [parts,
    c, b].

    A view, and not an index made on the host, for whose copy the host would have to wait.
    """
    return x.unflatten(0, (parts, -1))[:, start : start + rows]


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Return total + a @ b in float32, in the memory of total; None = 0."""
    if total is None:
        return torch.matmul(a, b).float()
    if a.dtype == torch.float32:
        return total.addmm_(a, b)
    return total.add_(torch.matmul(a, b))


def _all_reduce(x: Tensor, group: Any, op: Any) -> None:
    if group.size() > 1:
        torch.distributed.all_reduce(x, op=op, group=group)


def _gather(x: Tensor, group: Any, parts: int) -> Tensor:
    """Gather [r, b, H] of every rank -> [parts * r, b, H], in rank order."""
    if parts == 1:
        return x
    whole = x.new_empty((parts * x.shape[0], *x.shape[1:]))
    torch.distributed.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole


def _reduce(x: Tensor, group: Any, parts: int) -> Tensor:
    """Sum [c, b, H] over the ranks; with sequence parallelism return this rank's part of it only."""
    if parts > 1:
        share = x.new_empty((x.shape[0] // parts, *x.shape[1:]))
        torch.distributed.reduce_scatter_tensor(share, x.contiguous(), group=group)
        return share
    _all_reduce(x, group, torch.distributed.ReduceOp.SUM)
    return x
