"""Keys and values of a placed row, sent to the ranks that need them, and their gradients, sent back.

Buffers are [n, 2, b, g, d]: tokens come first, so that those of a message are contiguous and need not be
copied.

Shapes: s tokens of this rank, n of a round, b = 1 sequence, g KV heads, d head dimension. Memory beyond
inputs and outputs: the keys and values that are sent, and two rounds received; in the backward also the
float32 gradients of two rounds. Between nodes one more of each, of the round that is forwarded.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_ultralong.context_parallel import comm
from megatron_ultralong.context_parallel.comm import Communicator, Messages, Transfer
from megatron_ultralong.context_parallel.kernels.merge import accumulation_dtype
from megatron_ultralong.context_parallel.schedule import Round, Schedule, Step
from megatron_ultralong.context_parallel.zigzag import AttentionBlock


def arrivals(
    k: Tensor, v: Tensor, ranks: Communicator, schedule: Schedule
) -> Iterator[tuple[list[AttentionBlock], Sequence[Tensor]]]:
    """Yield (blocks, (K, V)): this rank's own first, then those of each round, in order.

    The next round is in flight while the caller computes with what was yielded, which is valid until the next
    round.
    """
    own = _tokens_first((k, v), schedule.sent)
    relayed = own[:0]  # what arrived in the last relayed round, while it is forwarded

    def start(this: Round) -> tuple[Transfer, Tensor, Messages]:
        sends = [
            (step.to, _joined([*(own[x] for x in step.sent), *(relayed[x] for x in step.forwarded)]))
            for step in this.steps
            if step.tokens_sent
        ]
        received = comm.receive_buffer((this.tokens, *own.shape[1:]), own.dtype, own.device)
        return ranks.exchange(sends, _received(this, received)), received, sends

    rounds = schedule.rounds
    in_flight = start(rounds[0]) if rounds else None
    yield schedule.own, (k, v)
    for at, this in enumerate(rounds):
        assert in_flight is not None
        in_flight[0].wait()
        received, in_flight = in_flight[1], None  # what was sent has lived until here
        if not this.in_order:
            received = torch.cat([received[part] for part in this.parts])
        if this.kind == "relayed":
            relayed = received
        if at + 1 < len(rounds):
            in_flight = start(rounds[at + 1])
        if not any(one.kind == "forwards" for one in rounds[at + 2 : at + 3]):
            relayed = own[:0]
        kv = _heads_first(received)
        yield this.blocks, (kv[0], kv[1])


class ReturnedSum:
    """dKV of this rank's keys: its own share, and those that come back from the ranks that its keys went to.

    A relay adds up the gradients of the keys that it forwarded, and sends the sum back after the rounds that
    forwarded them. Has the methods of `ring.RotatingSum`, for the rounds of `arrivals`.
    """

    def __init__(self, total: Tensor, ranks: Communicator, schedule: Schedule) -> None:
        """total [2, b, g, s, d], to which is added in place."""
        self._total, self._ranks = total, ranks
        self._rounds = deque(schedule.rounds)
        self._share: Tensor | None = None
        """[n, 2, b, g, d] of the keys of this round, in its order."""
        self._relayed: tuple[Round, Tensor] | None = None
        """The last relayed round, and the sum of its gradients, until it is sent back."""
        self._in_flight: _Returns | None = None
        self._own = True
        """Whether this rank's own keys were yielded last."""

    def add(self, keys: slice, dkv: Sequence[Tensor]) -> None:
        """Add (dk, dv) of these keys of what was yielded last."""
        if not self._own and self._share is None:
            self._receive()  # before more memory is taken
            self._share = self._zeros(self._rounds[0])
        into = self._total if self._share is None else _heads_first(self._share)
        for total, share in zip(into, dkv, strict=True):
            total[:, :, keys] += share

    def send(self) -> None:
        """Send the gradients of the keys that were yielded last to their ranks."""
        if not self._own:
            self._end(self._rounds.popleft())
        self._own = False

    def home(self) -> Tensor:
        """Return the complete dKV [2, b, g, s, d] of this rank's own keys."""
        self._receive()
        if self._relayed is not None:
            self._return(self._take_relayed())
            self._receive()
        return self._total

    def _zeros(self, this: Round) -> Tensor:
        _, b, g, _, d = self._total.shape
        return self._total.new_zeros((this.tokens, 2, b, g, d))

    def _end(self, ended: Round) -> None:
        self._receive()
        # None: no query of these rows sees a key of this round.
        share, self._share = self._zeros(ended) if self._share is None else self._share, None
        if ended.kind == "forwards":
            self._return([(ended, share)])
            return
        returned = self._take_relayed()  # all that was forwarded has come back
        if ended.kind == "relayed":
            self._relayed = ended, share
        else:
            returned.append((ended, share))
        if returned:
            self._return(returned)

    def _take_relayed(self) -> list[tuple[Round, Tensor]]:
        taken, self._relayed = self._relayed, None
        return [] if taken is None else [taken]

    def _return(self, ended: Sequence[tuple[Round, Tensor]]) -> None:
        """Send the gradients of these rounds back."""
        sends: list[tuple[int, Tensor]] = []
        for this, share in ended:
            if not this.in_order:
                share, arranged = torch.empty_like(share), share
                for rows, part in zip(
                    this.parts, arranged.split([x.stop - x.start for x in this.parts]), strict=True
                ):
                    share[rows] = part
            sends += _received(this, share)
        _, b, g, _, d = self._total.shape
        kind = {"dtype": self._total.dtype, "device": self._total.device}
        back = [
            (step, comm.receive_buffer((step.tokens_sent, 2, b, g, d), **kind))
            for this, _ in ended
            for step in this.steps
            if step.tokens_sent
        ]
        transfer = self._ranks.exchange(sends, [(step.to, buffer) for step, buffer in back])
        self._in_flight = _Returns(transfer, sends, back)

    def _receive(self) -> None:
        """Wait for the gradients that are on their way, and add them."""
        if self._in_flight is None:
            return
        returns, self._in_flight = self._in_flight, None
        returns.transfer.wait()
        relayed = None if self._relayed is None else self._relayed[1]
        for step, buffer in returns.back:
            first = 0
            for rows in step.rows:
                last = first + rows.stop - rows.start
                self._total[:, :, :, rows] += _heads_first(buffer[first:last])
                first = last
            for keys in step.forwarded:
                assert relayed is not None
                last = first + keys.stop - keys.start
                relayed[keys] += buffer[first:last]
                first = last


class _Returns(NamedTuple):
    """Gradients on their way."""

    transfer: Transfer
    sent: Messages
    """They live until the transfer is over."""
    back: Sequence[tuple[Step, Tensor]]
    """What comes back for each message of keys."""


def gradient_zeros(k: Tensor) -> Tensor:
    """dKV [2, b, g, s, d] of keys k, zero, in the dtype of its sums."""
    return torch.zeros((2, *k.shape), dtype=accumulation_dtype(k), device=k.device)


def _received(this: Round, buffer: Tensor) -> Messages:
    """The messages of a round, which follow each other in a buffer [n, ...]."""
    steps = [step for step in this.steps if step.received]
    ends = itertools.accumulate(step.tokens_received for step in steps)
    return [
        (step.source, buffer[end - step.tokens_received : end]) for step, end in zip(steps, ends, strict=True)
    ]


def _tokens_first(kv: Sequence[Tensor], rows: Sequence[slice]) -> Tensor:
    """Copy `rows` of K and V [b, g, s, d]: [n, 2, b, g, d]."""
    b, g, _, d = kv[0].shape
    copied = kv[0].new_empty((sum(x.stop - x.start for x in rows), 2, b, g, d))
    first = 0
    for one in rows:
        last = first + one.stop - one.start
        for to, x in zip(_heads_first(copied[first:last]), kv, strict=True):
            to.copy_(x[:, :, one])
        first = last
    return copied


def _heads_first(buffer: Tensor) -> Tensor:
    """[n, 2, b, g, d] as [2, b, g, n, d], the same memory."""
    return buffer.permute(1, 2, 3, 0, 4)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first dimension; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
