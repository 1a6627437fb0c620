"""Answers and log-likelihoods of the parallel model; prompts with a common beginning share its keys and
values.

Every rank runs this with the same arguments. The model is a
`model.inference.prefill_decode.InferenceModel`; nothing here knows its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_ultralong.evaluate.backends import memory_check
from megatron_ultralong.evaluate.backends.sampling import Sampling
from megatron_ultralong.model.inference.kv_cache import KVCache

if TYPE_CHECKING:
    from megatron_ultralong.model.inference.prefill_decode import InferenceModel

StopCheck = Callable[[list[int]], bool]
"""Whether an answer is complete, from all of its tokens so far."""


class DecodingSession:
    """A model together with the keys and values of the context it read last, which the next prompts may
    share."""

    def __init__(self, reader: InferenceModel) -> None:
        self.reader = reader
        self._ids: list[int] = []
        self._context: KVCache | None = None
        self._length: int | None = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: Sequence[int],
        stop_checks: Sequence[StopCheck],
        sampling: Sampling,
        progress: Callable[[int], Any] = lambda n: None,
    ) -> list[list[int]]:
        """Generate at most `max_tokens` tokens after each prompt, including the one at which its stop check
        is true.

        The common beginning of all prompts is read once, and not again where the prompts of the previous call
        began with it. progress: called with the number of tokens read or generated since the last call.
        UserError, on all ranks alike, where memory does not suffice.
        """
        if not all(prompts):
            raise ValueError("a prompt must have at least one token; give the beginning-of-text token")
        if self.reader.rope.depends_on_length() and len(prompts) > 1:
            # Each has frequencies of its own, and shares no keys with the others.
            return [
                self.generate([prompt], [most], [check], sampling, progress)[0]
                for prompt, most, check in zip(prompts, max_tokens, stop_checks, strict=True)
            ]
        self._set_length(len(prompts[0]) + max_tokens[0])
        reader, prompts = self.reader, [list(prompt) for prompt in prompts]
        common = _common_length(prompts)
        own = [
            reader.tokens_per_rank(len(prompt) - common) + reader.tokens_per_rank(most)
            for prompt, most in zip(prompts, max_tokens, strict=True)
        ]
        context = self._read_context(prompts[0][:common], own, progress)
        caches, last_hidden = [], []
        for prompt, capacity in zip(prompts, own, strict=True):
            caches.append(reader.cache(capacity, context))
            last_hidden.append(self._read_to_last(prompt[common:], caches[-1], progress))
        hidden = reader.gather_hidden(last_hidden) if reader.last else None
        chooses = reader.ranks.rank == reader.output_rank
        generators = [sampling.generator(prompt) for prompt in prompts] if chooses else []
        generated: list[list[int]] = [[] for _ in prompts]
        active = [i for i, most in enumerate(max_tokens) if most > 0]
        if hidden is not None:
            hidden = hidden[active]
        step = 0
        while active:
            chosen = torch.zeros(len(active), dtype=torch.int64, device=reader.ranks.device)
            if hidden is not None:
                logits = reader.logits(hidden)
                if chooses:
                    chosen = torch.tensor(
                        [sampling.choose(row, generators[i]) for i, row in zip(active, logits, strict=True)]
                    ).to(chosen)
            torch.distributed.broadcast(chosen, src=reader.output_rank)
            unfinished = []
            for i, token in zip(active, chosen.tolist(), strict=True):
                generated[i].append(token)
                if len(generated[i]) < max_tokens[i] and not stop_checks[i](generated[i]):
                    unfinished.append(i)
            progress(len(active))
            active = unfinished
            if active:
                hidden = reader.step([generated[i][-1] for i in active], [caches[i] for i in active], step)
            step += 1
        return generated

    def loglikelihood(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): the summed log-probability of the continuation, and whether
        greedy decoding generates it.

        A context must have at least one token. The common beginning of two consecutive pairs is read once.
        UserError as in `generate`.
        """
        scores = [self.scores(context, continuation) for context, continuation in pairs]
        return [(float(logp.double().sum()), bool(greedy.all())) for logp, greedy in scores]

    def scores(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Log-probability of each token of `continuation`, float32 [n], and whether it is the most likely
        one, bool [n], on the CPU of every rank. A context must have at least one token; what the previous
        call read of it is not read again. UserError as in `generate`."""
        if not context:
            raise ValueError(
                "a log-likelihood needs at least one token of context; give the beginning-of-text token"
            )
        reader, device = self.reader, self.reader.ranks.device
        ids = [*context, *continuation]
        self._set_length(len(ids))
        # The last token of the context is read again: the first score comes from it.
        reused = self._keep_common(ids[: len(context) - 1])
        cache = self._grow(ids[reused:-1], [])
        scored = torch.zeros(
            2, len(continuation), device=device
        )  # each token is scored by the one rank that has it
        for place, hidden in reader.read(ids[reused:-1], cache):
            first = max(0, len(context) - 1 - reused - place)
            if first < len(hidden):
                start = reused + place + first + 1
                targets = torch.tensor(ids[start : start + len(hidden) - first], device=device)
                scored[:, start - len(context) :][:, : len(targets)] = torch.stack(
                    [part.float() for part in reader.score(hidden[first:], targets)]
                )
        self._ids = ids[:-1]
        if reader.last:
            torch.distributed.all_reduce(scored, group=reader.ranks.groups.cp)
        torch.distributed.broadcast(scored, src=reader.output_rank)
        logp, greedy = scored.cpu()
        return logp, greedy > 0

    # ---- the shared context ---------------------------------------------------------------------

    def _set_length(self, tokens: int) -> None:
        """Fix the length of a request, prompt and new tokens, for RoPE methods that depend on it: from its
        first token on, so that cached keys never mix frequencies."""
        if self.reader.rope.depends_on_length() and tokens != self._length:
            self._length = tokens
            if self.reader.set_length(tokens):
                self._ids, self._context = [], None

    def _read_context(self, ids: Sequence[int], own: list[int], progress: Callable[[int], Any]) -> KVCache:
        reused = self._keep_common(ids)
        cache = self._grow(ids[reused:], own)
        for _ in self._read(ids[reused:], cache, progress):
            pass
        self._ids = list(ids)
        return cache

    def _read_to_last(
        self, ids: Sequence[int], cache: KVCache, progress: Callable[[int], Any]
    ) -> Tensor | None:
        """Read `ids`; returns the hidden state [H] of the last token where this rank has it."""
        last = None
        for place, hidden in self._read(ids, cache, progress):
            if place + len(hidden) == len(ids):
                last = hidden[-1].clone()
        return last

    def _read(
        self, ids: Sequence[int], cache: KVCache, progress: Callable[[int], Any]
    ) -> Iterator[tuple[int, Tensor]]:
        """`InferenceModel.read` with progress reports."""
        size = self.reader.chunk_tokens
        for start in range(0, len(ids), size):
            chunk = ids[start : start + size]
            for place, hidden in self.reader.read(chunk, cache):
                yield start + place, hidden
            progress(len(chunk))

    def _keep_common(self, ids: Sequence[int]) -> int:
        """Drop the part of the shared context that `ids` do not begin with; returns the number of tokens
        left."""
        reused = _common_length([self._ids, ids], all_but=0)
        self._ids = self._ids[:reused]
        if self._context is not None:
            self._context.truncate(reused)
        return reused

    def _grow(self, more: Sequence[int], own: list[int]) -> KVCache:
        """Give the shared context room for `more` tokens, after checking that they and `own` (tokens of this
        rank) fit into memory."""
        reader = self.reader
        if not self._ids:
            self._context = None  # free its memory before allocating
        needed = (self._context.held if self._context else 0) + reader.tokens_per_rank(len(more))
        memory_check.check_room(
            reader, needed - (self._context.capacity if self._context else 0), own, len(self._ids) + len(more)
        )
        if self._context is None:
            self._context = reader.cache(needed)
        self._context.reserve(needed)
        return self._context


def _common_length(sequences: Sequence[Sequence[int]], all_but: int = 1) -> int:
    """Number of tokens that all sequences begin with, leaving at least `all_but` of each."""
    first = sequences[0]
    most = min(len(sequence) for sequence in sequences) - all_but
    for other in sequences[1:]:
        most = min(most, len(other) - all_but)
        if first[:most] != other[:most]:
            most = next(i for i in range(most) if first[i] != other[i])
    return most
