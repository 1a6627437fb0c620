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


def probe(
    trainer: Trainer,
    starts: Sequence[int],
    positions: Sequence[int],
    seed: int,
    ranks_per_node: int = 1,
) -> list[Probe]:
    """Change the tokens at `positions` of a row of random tokens, one at a time; every rank calls it.

    starts: of the row's documents. ranks_per_node: as in `BatchShard`, by which the row is placed. UserError
    where two equal passes differ, so that nothing can be said.
    """
    length, vocabulary = trainer.run.train.seq_length, trainer.run.model.vocab_size  # type: ignore[union-attr]
    row = _Row(trainer, starts, ranks_per_node)
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(0, vocabulary, (2, 1, length), generator=generator)
    holders = row.holders()
    unchanged = row.losses(tokens, labels)
    if not torch.equal(unchanged, row.losses(tokens, labels)):
        raise UserError(
            "two equal forward passes gave different outputs; add --set train.deterministic=true to compare them"
        )
    bounds, at = [*starts, length], torch.arange(length)
    found = []
    for position in positions:
        other = tokens.clone()
        other[0, position] = (other[0, position] + 1) % vocabulary
        differs = row.losses(other, labels) != unchanged
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


@dataclass(frozen=True)
class _Row:
    """A row on the trainer's ranks."""

    trainer: Trainer
    starts: Sequence[int]
    ranks_per_node: int

    def shard(self, rank: int) -> BatchShard:
        return BatchShard(
            cp_rank=rank,
            cp=self.trainer.ranks.cp,
            ulysses=self.trainer.run.parallel.ulysses,
            ranks_per_node=self.ranks_per_node,
        )

    def held(self, rank: int) -> Tensor:
        """The positions of a context-parallel rank's tokens."""
        at = torch.arange(self.trainer.run.train.seq_length).unsqueeze(0)
        return loader.share({"at": at}, self.starts, self.shard(rank))[0]["at"][0]

    def holders(self) -> Tensor:
        """The context-parallel rank of each position: int64 [S]."""
        holders = torch.full((self.trainer.run.train.seq_length,), -1)
        for rank in range(self.trainer.ranks.cp):
            holders[self.held(rank)] = rank
        return holders

    def losses(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The bits of each position's cross entropy, which may be no number: int32 [S], the same on every
        rank."""
        ranks, parallel = self.trainer.ranks, self.trainer.run.parallel
        whole = {"tokens": tokens, "labels": labels, "loss_mask": torch.ones(tokens.shape)}
        batch, placement = loader.share(whole, self.starts, self.shard(ranks.cp_rank))
        batch["placement"] = placement

        def batches() -> Iterator[Batch]:
            while True:
                yield batch

        count = parallel.pp if parallel.vpp > 1 else 1  # what an interleaved pipeline requires
        mine = step.token_losses(
            self.trainer,
            [batches() for _ in self.trainer.chunks],
            count,
            lambda losses, _: losses[0].float().cpu(),
        )
        bits = torch.zeros(self.trainer.run.train.seq_length, dtype=torch.int32)
        for rank, of_rank in agreement.gather((ranks.cp_rank, mine[:1])):
            for one in of_rank:
                bits[self.held(rank)] = one.view(torch.int32)
        return bits
