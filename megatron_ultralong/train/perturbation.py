"""Which outputs of a model change when one token is changed: what a token may see, measured on a layout.

Exactly the outputs of that token and of the later ones of its document may change. Others that do are a leak,
between documents or from the future; later ones that do not are tokens that a rank does not see.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ultralong.data import loader
from megatron_ultralong.data.loader import Batch, BatchShard
from megatron_ultralong.errors import UserError
from megatron_ultralong.runtime import agreement
from megatron_ultralong.train import step
from megatron_ultralong.train.step import Trainer


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What changed with one token."""

    position: int
    """Of the token that was changed."""
    document: tuple[int, int]
    """Its document's first position, and one after the last."""
    rank: int
    """The context-parallel rank that holds it."""
    later: dict[int, int]
    """Of each context-parallel rank, its tokens whose output should change."""
    changed: dict[int, int]
    """Of these, those whose output did."""
    elsewhere: list[int]
    """Positions whose output changed and should not."""

    def faults(self, least: float) -> list[str]:
        """What is wrong, in lines. least: share of a rank's later tokens that must change."""
        found = []
        if self.elsewhere:
            shown = ", ".join(map(str, self.elsewhere[:5])) + (", ..." if len(self.elsewhere) > 5 else "")
            found.append(
                f"token {self.position} changed {len(self.elsewhere)} outputs that it must not, at {shown}"
            )
        found += [
            f"token {self.position} changed {self.changed[rank]} of the {count} outputs that see it on "
            f"context-parallel rank {rank}"
            for rank, count in self.later.items()
            if self.changed[rank] < least * count
        ]
        return found


def probe(trainer: Trainer, starts: Sequence[int], positions: Sequence[int], seed: int) -> list[Probe]:
    """Change the tokens at `positions` of a row of random tokens, one after the other; every rank calls it.

    starts: of the row's documents. UserError where two equal passes differ, so that nothing can be said.
    """
    length, vocabulary = trainer.run.train.seq_length, trainer.run.model.vocab_size  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(0, vocabulary, (2, 1, length), generator=generator)
    holders = _holders(trainer, starts)
    unchanged = _losses(trainer, tokens, labels, starts)
    if not torch.equal(unchanged, _losses(trainer, tokens, labels, starts)):
        raise UserError(
            "two equal forward passes gave different outputs; add --set train.deterministic=true to compare them"
        )
    bounds, at = [*starts, length], torch.arange(length)
    found = []
    for position in positions:
        other = tokens.clone()
        other[0, position] = (other[0, position] + 1) % vocabulary
        differs = _losses(trainer, other, labels, starts) != unchanged
        number = bisect.bisect_right(bounds, position) - 1
        sees = (at >= position) & (at < bounds[number + 1])
        later = {rank: int((sees & (holders == rank)).sum()) for rank in range(trainer.ranks.cp)}
        found.append(
            Probe(
                position=position,
                document=(bounds[number], bounds[number + 1]),
                rank=int(holders[position]),
                later=later,
                changed={rank: int((sees & differs & (holders == rank)).sum()) for rank in later},
                elsewhere=(differs & ~sees).nonzero().flatten().tolist(),
            )
        )
    return found


def _shard(trainer: Trainer, rank: int) -> BatchShard:
    return BatchShard(cp_rank=rank, cp=trainer.ranks.cp, ulysses=trainer.run.parallel.ulysses)


def _holders(trainer: Trainer, starts: Sequence[int]) -> Tensor:
    """The context-parallel rank of each position: int64 [S]."""
    length = trainer.run.train.seq_length
    holders = torch.full((length,), -1)
    for rank in range(trainer.ranks.cp):
        holders[_held(trainer, starts, rank)] = rank
    return holders


def _held(trainer: Trainer, starts: Sequence[int], rank: int) -> Tensor:
    at = torch.arange(trainer.run.train.seq_length).unsqueeze(0)
    return loader.share({"at": at}, starts, _shard(trainer, rank))[0]["at"][0]


def _losses(trainer: Trainer, tokens: Tensor, labels: Tensor, starts: Sequence[int]) -> Tensor:
    """The cross entropy of each position: float32 [S], the same on every rank."""
    ranks, parallel = trainer.ranks, trainer.run.parallel
    whole = {"tokens": tokens, "labels": labels, "loss_mask": torch.ones(tokens.shape)}
    batch, placement = loader.share(whole, starts, _shard(trainer, ranks.cp_rank))
    batch["placement"] = placement

    def batches() -> Iterator[Batch]:
        while True:
            yield batch

    count = parallel.pp if parallel.vpp > 1 else 1  # what an interleaved pipeline requires
    mine = step.token_losses(
        trainer, [batches() for _ in trainer.chunks], count, lambda losses, _: losses[0].float().cpu()
    )
    losses = torch.full((trainer.run.train.seq_length,), torch.nan)
    for rank, of_rank in agreement.gather((ranks.cp_rank, mine[:1])):
        for one in of_rank:
            losses[_held(trainer, starts, rank)] = one
    assert not losses.isnan().any()
    return losses
