"""Answers and log-likelihoods from our own model: what is read once for many questions, what is written, when
it ends.

Every rank runs this with the same arguments. The model is a `model.inference.prefill_decode.InferenceModel`; nothing here knows of
layers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends import memory_check
from megatron_ultralong.model.inference.kv_cache import KVCache

if TYPE_CHECKING:
    from megatron_ultralong.model.inference.prefill_decode import InferenceModel

Ends = Callable[[list[int]], bool]
"""Whether an answer is at its end, from all its tokens so far."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen from its logits."""

    temperature: float = 0.0
    """0 = the likeliest token always."""
    top_p: float = 1.0
    """Among the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Among so many likeliest tokens; 0 = all."""
    seed: int = 0
    """With the prompt it decides the random numbers: an answer does not depend on what else is asked."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature {self.temperature}: must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: must be above 0 and at most 1")
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k}: must be 0 or more")

    def generator(self, prompt: Sequence[int]) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed_of(prompt))

    def seed_of(self, prompt: Sequence[int]) -> int:
        """32 bits: of a longer seed torch's generator on the CPU takes no more."""
        return zlib.crc32(f"{self.seed}/".encode() + numpy.asarray(prompt, dtype=numpy.int64).tobytes())

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """A token from float32 logits [V]."""
        if self.temperature == 0:
            return int(logits.argmax())
        values, tokens = (logits / self.temperature).sort(descending=True, stable=True)
        if self.top_k:
            values = values[: self.top_k]
        probabilities = torch.softmax(values, dim=0)
        # The first token that reaches top_p still counts.
        probabilities[probabilities.cumsum(0) - probabilities >= self.top_p] = 0
        sums = probabilities.double().cumsum(0)
        chance = torch.rand(1, generator=generator, dtype=torch.float64).to(sums) * sums[-1]
        place = min(int(torch.searchsorted(sums, chance, right=True)), int(probabilities.count_nonzero()) - 1)
        return int(tokens[place])


class Session:
    """A model, and the keys and values of the context it read last, which the next questions may share."""

    def __init__(self, reader: InferenceModel) -> None:
        self.reader = reader
        self._ids: list[int] = []
        self._context: KVCache | None = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: Sequence[int],
        ends: Sequence[Ends],
        sampling: Sampling,
        progress: Callable[[int], Any] = lambda n: None,
    ) -> list[list[int]]:
        """What the model writes after each prompt, at most as many `tokens` as said for each; the one at
        which it `ends` included.

        What all prompts begin with is read once, and not again where the prompts of the call before began
        with it. progress: called with the number of tokens read or written since the last call. UserError, on
        all ranks alike, where memory does not suffice.
        """
        if not all(prompts):
            raise ValueError("a prompt must have a token at least; give the beginning-of-text token")
        reader, prompts = self.reader, [list(prompt) for prompt in prompts]
        common = _common(prompts)
        own = [
            reader.tokens_per_rank(len(prompt) - common) + reader.tokens_per_rank(most)
            for prompt, most in zip(prompts, tokens, strict=True)
        ]
        context = self._read_context(prompts[0][:common], own, progress)
        caches, found = [], []
        for prompt, capacity in zip(prompts, own, strict=True):
            caches.append(reader.cache(capacity, context))
            found.append(self._read_last(prompt[common:], caches[-1], progress))
        hidden = reader.gather_hidden(found) if reader.last else None
        speaks = reader.ranks.rank == reader.output_rank
        generators = [sampling.generator(prompt) for prompt in prompts] if speaks else []
        written: list[list[int]] = [[] for _ in prompts]
        rest = [i for i, most in enumerate(tokens) if most > 0]
        if hidden is not None:
            hidden = hidden[rest]
        turn = 0
        while rest:
            chosen = torch.zeros(len(rest), dtype=torch.int64, device=reader.ranks.device)
            if hidden is not None:
                logits = reader.logits(hidden)
                if speaks:
                    chosen = torch.tensor(
                        [sampling.choose(row, generators[i]) for i, row in zip(rest, logits, strict=True)]
                    ).to(chosen)
            torch.distributed.broadcast(chosen, src=reader.output_rank)
            going = []
            for i, token in zip(rest, chosen.tolist(), strict=True):
                written[i].append(token)
                if len(written[i]) < tokens[i] and not ends[i](written[i]):
                    going.append(i)
            progress(len(rest))
            rest = going
            if rest:
                hidden = reader.step([written[i][-1] for i in rest], [caches[i] for i in rest], turn)
            turn += 1
        return written

    def loglikelihood(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """For each (context, continuation) the sum of the continuation's log-probabilities, and whether
        greedy decoding would write it.

        A context must have a token at least. What two pairs in a row begin with is read once. UserError as
        `generate`.
        """
        found = [self.scores(context, continuation) for context, continuation in pairs]
        return [(float(scores.double().sum()), bool(likeliest.all())) for scores, likeliest in found]

    def scores(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of each token of `continuation` [n] its log-probability, float32 [n], and whether it is the
        likeliest there, bool [n], on the CPU of every rank. A context must have a token at least; what of it
        the call before read is not read again. UserError as `generate`."""
        if not context:
            raise ValueError("a log-likelihood needs a token of context; give the beginning-of-text token")
        reader, device = self.reader, self.reader.ranks.device
        ids = [*context, *continuation]
        reused = self._keep(
            ids[: len(context) - 1]
        )  # the last token of the context is read again: the first score comes from it
        cache = self._grow(ids[reused:-1], [])
        found = torch.zeros(2, len(continuation), device=device)  # each token's from the one rank that has it
        for place, hidden in reader.read(ids[reused:-1], cache):
            first = max(0, len(context) - 1 - reused - place)
            if first < len(hidden):
                start = reused + place + first + 1
                targets = torch.tensor(ids[start : start + len(hidden) - first], device=device)
                found[:, start - len(context) :][:, : len(targets)] = torch.stack(
                    [part.float() for part in reader.score(hidden[first:], targets)]
                )
        self._ids = ids[:-1]
        if reader.last:
            torch.distributed.all_reduce(found, group=reader.ranks.groups.cp)
        torch.distributed.broadcast(found, src=reader.output_rank)
        scores, likeliest = found.cpu()
        return scores, likeliest > 0

    # ---- the context that is kept ---------------------------------------------------------------

    def _read_context(self, ids: Sequence[int], own: list[int], progress: Callable[[int], Any]) -> KVCache:
        reused = self._keep(ids)
        cache = self._grow(ids[reused:], own)
        for _ in self._told(ids[reused:], cache, progress):
            pass
        self._ids = list(ids)
        return cache

    def _read_last(self, ids: Sequence[int], cache: KVCache, progress: Callable[[int], Any]) -> Tensor | None:
        """Hidden state [H] of the last token, where this rank has it."""
        last = None
        for place, hidden in self._told(ids, cache, progress):
            if place + len(hidden) == len(ids):
                last = hidden[-1].clone()
        return last

    def _told(self, ids: Sequence[int], cache: KVCache, progress: Callable[[int], Any]) -> Any:
        """`InferenceModel.read`, which reports its progress."""
        size = self.reader.chunk_tokens
        for start in range(0, len(ids), size):
            part = ids[start : start + size]
            for place, hidden in self.reader.read(part, cache):
                yield start + place, hidden
            progress(len(part))

    def _keep(self, ids: Sequence[int]) -> int:
        """Forget of the kept context what `ids` do not begin with; returns how many tokens are left."""
        reused = _common([self._ids, ids], all_but=0)
        self._ids = self._ids[:reused]
        if self._context is not None:
            self._context.truncate(reused)
        return reused

    def _grow(self, more: Sequence[int], own: list[int]) -> KVCache:
        """The kept context with room for `more` tokens, once it is known that they and `own` (tokens of this
        rank) fit."""
        reader = self.reader
        if not self._ids:
            self._context = None  # its room goes before new room is taken
        needed = (self._context.held if self._context else 0) + reader.tokens_per_rank(len(more))
        memory_check.check_room(
            reader, needed - (self._context.capacity if self._context else 0), own, len(self._ids) + len(more)
        )
        if self._context is None:
            self._context = reader.cache(needed)
        self._context.reserve(needed)
        return self._context


def _common(sequences: Sequence[Sequence[int]], all_but: int = 1) -> int:
    """How many tokens all sequences begin with, and leave `all_but` of each."""
    first = sequences[0]
    most = min(len(sequence) for sequence in sequences) - all_but
    for other in sequences[1:]:
        most = min(most, len(other) - all_but)
        if first[:most] != other[:most]:
            most = next(i for i in range(most) if first[i] != other[i])
    return most
