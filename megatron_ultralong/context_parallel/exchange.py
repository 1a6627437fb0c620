"""Keys and values of a placed row, sent to the ranks that need them, and their gradients, sent back.

Shapes: s tokens of this rank, n of a message, b = 1 sequence, g KV heads, d head dimension. Memory beyond
inputs and outputs: two messages sent and two received, [2, b, g, n, d]; in the backward also the float32
gradients of two messages each way.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_ultralong.context_parallel import comm
from megatron_ultralong.context_parallel.comm import Communicator, Transfer
from megatron_ultralong.context_parallel.kernels.merge import accumulation_dtype
from megatron_ultralong.context_parallel.schedule import Schedule, Step
from megatron_ultralong.context_parallel.zigzag import AttentionBlock


def arrivals(
    k: Tensor, v: Tensor, ranks: Communicator, schedule: Schedule
) -> Iterator[tuple[list[AttentionBlock], Sequence[Tensor]]]:
    """Yield (blocks, (K, V)): this rank's own first, then those of each message, in the order of the steps.

    The next message is in flight while the caller computes with what was yielded, which is valid until the
    next step.
    """

    def start(step: Step) -> tuple[Transfer, Tensor | None, Tensor | None]:
        message = _joined((k, v), step.sent) if step.sent else None
        buffer = None
        if step.received:
            shape = (2, *k.shape[:2], step.received, k.shape[3])
            buffer = comm.receive_buffer(shape, k.dtype, k.device)
        return _start(ranks, (step.to, message), (step.source, buffer)), message, buffer

    in_flight = start(schedule.steps[0]) if schedule.steps else None
    yield schedule.own, (k, v)
    for step, following in itertools.zip_longest(schedule.steps, schedule.steps[1:]):
        assert in_flight is not None
        transfer, message, buffer = in_flight
        transfer.wait()
        del message  # it lives until here
        in_flight = None if following is None else start(following)
        yield step.blocks, (k[:, :, :0], v[:, :, :0]) if buffer is None else (buffer[0], buffer[1])


class ReturnedSum:
    """dKV of this rank's keys: its own share, and those that come back from the ranks that its keys went to.

    Has the methods of `ring.RotatingSum`, for the steps of `arrivals`.
    """

    def __init__(self, total: Tensor, ranks: Communicator, schedule: Schedule) -> None:
        """total [2, b, g, s, d], to which is added in place."""
        self._total, self._ranks = total, ranks
        self._steps = iter(schedule.steps)
        self._step: Step | None = None
        self._share = total
        self._in_flight: tuple[Transfer, Step, Tensor | None, Tensor | None] | None = None

    def add(self, keys: slice, dkv: Sequence[Tensor]) -> None:
        """Add (dk, dv) of these keys of what was yielded last."""
        for total, share in zip(self._share, dkv, strict=True):
            total[:, :, keys] += share

    def send(self) -> None:
        """Send the gradients of the keys that were yielded last to their rank, and prepare for the next."""
        if self._step is not None:
            self._receive()
            step = self._step
            message = self._share if step.received else None
            buffer = self._gradients(step.tokens_sent) if step.sent else None
            transfer = _start(self._ranks, (step.source, message), (step.to, buffer))
            self._in_flight = transfer, step, message, buffer
        self._step = next(self._steps, None)
        if self._step is not None and self._step.received:
            self._share = self._gradients(self._step.received).zero_()

    def home(self) -> Tensor:
        """Return the complete dKV [2, b, g, s, d] of this rank's own keys."""
        self._receive()
        return self._total

    def _receive(self) -> None:
        """Wait for the gradients of the last step, and add them."""
        if self._in_flight is None:
            return
        transfer, step, _, buffer = self._in_flight
        transfer.wait()
        self._in_flight = None
        first = 0
        for rows in step.sent:
            assert buffer is not None
            length = rows.stop - rows.start
            self._total[:, :, :, rows] += buffer[:, :, :, first : first + length]
            first += length

    def _gradients(self, tokens: int) -> Tensor:
        shape = (*self._total.shape[:3], tokens, self._total.shape[4])
        return comm.receive_buffer(shape, self._total.dtype, self._total.device)


def gradient_zeros(k: Tensor) -> Tensor:
    """dKV [2, b, g, s, d] of keys k, zero, in the dtype of its sums."""
    return torch.zeros((2, *k.shape), dtype=accumulation_dtype(k), device=k.device)


def _start(
    ranks: Communicator, send: tuple[int, Tensor | None], receive: tuple[int, Tensor | None]
) -> Transfer:
    to, message = send
    source, buffer = receive
    return ranks.exchange(
        None if message is None else (to, message), None if buffer is None else (source, buffer)
    )


def _joined(kv: Sequence[Tensor], rows: Sequence[slice]) -> Tensor:
    """`rows` of K and of V, concatenated: [2, b, g, n, d]."""
    b, g, _, d = kv[0].shape
    joined = kv[0].new_empty((2, b, g, sum(one.stop - one.start for one in rows), d))
    for part, x in zip(joined, kv, strict=True):
        torch.cat([x[:, :, one] for one in rows], dim=2, out=part)
    return joined
