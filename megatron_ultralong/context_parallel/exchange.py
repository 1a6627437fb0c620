"""Keys and values of a placed row, sent to the ranks that need them, and their gradients, sent back.

Shapes: s tokens of this rank, n of the messages of a round, b = 1 sequence, g KV heads, d head dimension.
Memory beyond inputs and outputs: one round sent and two received, [2, b, g, n, d]; in the backward also the
float32 gradients of two rounds.
"""

from __future__ import annotations

import itertools
from collections import deque
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
    """Yield (blocks, (K, V)): this rank's own first, then those of each step, in order.

    The next round is in flight while the caller computes with what was yielded, which is valid until the next
    step.
    """

    def start(steps: Sequence[Step]) -> tuple[Transfer, list[Tensor | None], list[Tensor | None]]:
        sent = [_joined((k, v), step.sent) if step.sent else None for step in steps]
        received = [_buffer(k, step.received, k.dtype) for step in steps]
        return ranks.exchange(_to(steps, sent), _from(steps, received)), sent, received

    in_flight = start(schedule.rounds[0]) if schedule.rounds else None
    yield schedule.own, (k, v)
    for steps, following in itertools.zip_longest(schedule.rounds, schedule.rounds[1:]):
        assert in_flight is not None
        in_flight[0].wait()
        received, in_flight = in_flight[2], None  # what was sent has lived until here
        if following is not None:
            in_flight = start(following)
        received.reverse()
        for step in steps:
            buffer = received.pop()
            yield step.blocks, (k[:, :, :0], v[:, :, :0]) if buffer is None else (buffer[0], buffer[1])
            buffer = None


class ReturnedSum:
    """dKV of this rank's keys: its own share, and those that come back from the ranks that its keys went to.

    Has the methods of `ring.RotatingSum`, for the steps of `arrivals`.
    """

    def __init__(self, total: Tensor, ranks: Communicator, schedule: Schedule) -> None:
        """total [2, b, g, s, d], to which is added in place."""
        self._total, self._ranks = total, ranks
        self._rounds = deque(schedule.rounds)
        self._shares: list[Tensor | None] = []
        """Of the current round's steps, the one that was yielded last included."""
        self._in_flight: tuple[Transfer, Sequence[Step], list[Tensor | None], list[Tensor | None]] | None = (
            None
        )
        self._own = True
        """Whether this rank's own keys were yielded last."""

    def add(self, keys: slice, dkv: Sequence[Tensor]) -> None:
        """Add (dk, dv) of these keys of what was yielded last."""
        into = self._total if self._own else self._shares[-1]
        if into is None:
            self._receive()  # before more memory is taken
            into = self._shares[-1] = self._zeros(self._rounds[0][len(self._shares) - 1])
        for total, share in zip(into, dkv, strict=True):
            total[:, :, keys] += share

    def send(self) -> None:
        """Send the gradients of the keys that were yielded last to their rank, if their round is over, and
        prepare for the next."""
        self._own = False
        if self._rounds and len(self._shares) == len(self._rounds[0]):
            self._return(self._rounds.popleft())
        if self._rounds:
            self._shares.append(None)

    def home(self) -> Tensor:
        """Return the complete dKV [2, b, g, s, d] of this rank's own keys."""
        self._receive()
        return self._total

    def _zeros(self, step: Step) -> Tensor:
        buffer = _buffer(self._total[0], step.received, self._total.dtype)
        assert buffer is not None
        return buffer.zero_()

    def _return(self, steps: Sequence[Step]) -> None:
        self._receive()
        for at, step in enumerate(steps):  # a step of which no query of these rows sees a key
            if self._shares[at] is None and step.received:
                self._shares[at] = self._zeros(step)
        shares, self._shares = self._shares, []
        back = [_buffer(self._total[0], step.tokens_sent, self._total.dtype) for step in steps]
        transfer = self._ranks.exchange(_from(steps, shares), _to(steps, back))
        self._in_flight = transfer, steps, shares, back

    def _receive(self) -> None:
        """Wait for the gradients of the last round, and add them."""
        if self._in_flight is None:
            return
        transfer, steps, _, back = self._in_flight
        transfer.wait()
        self._in_flight = None
        for step, buffer in zip(steps, back, strict=True):
            first = 0
            for rows in step.sent:
                assert buffer is not None
                length = rows.stop - rows.start
                self._total[:, :, :, rows] += buffer[:, :, :, first : first + length]
                first += length


def gradient_zeros(k: Tensor) -> Tensor:
    """dKV [2, b, g, s, d] of keys k, zero, in the dtype of its sums."""
    return torch.zeros((2, *k.shape), dtype=accumulation_dtype(k), device=k.device)


def _to(steps: Sequence[Step], buffers: Sequence[Tensor | None]) -> list[tuple[int, Tensor]]:
    """The buffers with the ranks to which keys go."""
    return [(step.to, x) for step, x in zip(steps, buffers, strict=True) if x is not None]


def _from(steps: Sequence[Step], buffers: Sequence[Tensor | None]) -> list[tuple[int, Tensor]]:
    """The buffers with the ranks from which keys come."""
    return [(step.source, x) for step, x in zip(steps, buffers, strict=True) if x is not None]


def _buffer(like: Tensor, tokens: int, dtype: torch.dtype) -> Tensor | None:
    """For the keys and values of so many tokens, or their gradients, of heads like k [b, g, s, d]; None for
    none."""
    shape = (2, *like.shape[:2], tokens, like.shape[3])
    return comm.receive_buffer(shape, dtype, like.device) if tokens else None


def _joined(kv: Sequence[Tensor], rows: Sequence[slice]) -> Tensor:
    """`rows` of K and of V, concatenated: [2, b, g, n, d]."""
    b, g, _, d = kv[0].shape
    joined = kv[0].new_empty((2, b, g, sum(one.stop - one.start for one in rows), d))
    for part, x in zip(joined, kv, strict=True):
        torch.cat([x[:, :, one] for one in rows], dim=2, out=part)
    return joined
