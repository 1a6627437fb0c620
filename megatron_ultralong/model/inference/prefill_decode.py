"""Generation: prefill of prompts in chunks and decoding of tokens, under tensor, pipeline and context
parallelism.

Each chunk of a prompt is split over the context-parallel ranks into equal runs of consecutive tokens. So
activations take memory for one chunk only, and keys and values stay on the rank that computed them
(context_parallel/decode.py). Generated tokens are the same on all context-parallel ranks; their keys and
values are kept by the ranks in turn. Pipeline stages work on different chunks at the same time. There is no
sequence parallelism, which cannot split a single token. Every rank makes the same calls.

Shapes: C tokens of a chunk, c = C/CP of this rank, n sequences, H hidden size, v = V/TP rows of the padded
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ultralong.config import LOSS_BLOCK, Memory, Model, Parallel
from megatron_ultralong.context_parallel import decode
from megatron_ultralong.model import llama
from megatron_ultralong.model.inference.kv_cache import KVCache
from megatron_ultralong.model.rotary_embedding import cos_sin, split_and_rotate
from megatron_ultralong.rope.base import Rope
from megatron_ultralong.runtime.launch import Ranks


class InferenceModel:
    """This rank's part of a model for generation. Its weights, in `chunk`, are not yet set."""

    def __init__(
        self, model: Model, rope: Rope, ranks: Ranks, parallel: Parallel, precision: str, chunk_tokens: int
    ) -> None:
        """chunk_tokens: prompt tokens that all ranks read at a time, C; rounded up to a multiple of CP.
        UserError where the model cannot be split."""
        [self.chunk] = llama.build(
            model,
            rope,
            ranks,
            parallel,
            Memory(recompute="none", offload="off"),
            precision,
            sequence_parallel=False,
        )
        """The model chunk, to be filled with weights."""
        self.model, self.ranks = model, ranks
        self.chunk_tokens = -(-chunk_tokens // ranks.cp) * ranks.cp
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._llama = llama.unwrap(self.chunk).eval().requires_grad_(False)
        self._frequencies = rope.inverse_frequencies(model.head_dim)
        self._groups = ranks.groups
        self.first, self.last = ranks.pp_rank == 0, ranks.pp_rank == ranks.pp - 1
        output_rank = torch.tensor(
            [ranks.rank if self.last and ranks.tp_rank == ranks.cp_rank == 0 else -1], device=ranks.device
        )
        torch.distributed.all_reduce(output_rank, op=torch.distributed.ReduceOp.MAX)
        self.output_rank = int(output_rank)
        """The global rank that has the logits and chooses the next tokens."""

    @property
    def rope(self) -> Rope:
        """The RoPE method, with its trained network if it has one."""
        return self._llama.rotary.rope

    def cache(self, capacity: int, before: KVCache | None = None) -> KVCache:
        """Create an empty cache with room for `capacity` tokens of this rank (see `tokens_per_rank`)."""
        m = self.model
        return KVCache(
            m.layers // self.ranks.pp,
            m.kv_heads // self.ranks.tp,
            m.head_dim,
            capacity,
            before,
            dtype=self.dtype,
            device=self.ranks.device,
        )

    def set_length(self, tokens: int) -> bool:
        """Use the frequencies of sequences of `tokens` tokens, for RoPE methods that depend on the length.

        Returns whether they are others than before: keys that were cached with those must be read again.
        """
        before, self._frequencies = (
            self._frequencies,
            self.rope.inverse_frequencies(self.model.head_dim, tokens),
        )
        return not torch.equal(before[0], self._frequencies[0]) or before[1] != self._frequencies[1]

    def tokens_per_rank(self, tokens: int) -> int:
        """The most of `tokens` tokens that one rank can hold."""
        return -(-tokens // self.ranks.cp)

    # ---- prefill --------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, tokens: Sequence[int], cache: KVCache) -> Iterator[tuple[int, Tensor]]:
        """Read `tokens` into `cache`, chunk by chunk (prefill).

        Yields, on the last stage and for chunks of which this rank has any tokens, (index in `tokens` of its
        first one, hidden states [c, H] after the last layer). The iterator must be exhausted.
        """
        device, cp, rank = self.ranks.device, self.ranks.cp, self.ranks.cp_rank
        for start in range(0, len(tokens), self.chunk_tokens):
            n = min(self.chunk_tokens, len(tokens) - start)
            c = -(-n // cp)
            first = start + rank * c
            mine = max(0, min(c, n - rank * c))
            position = cache.end + rank * c
            positions = torch.arange(position, position + c, device=device)
            # Padding of the last ranks' runs follows all tokens: no token attends to it, and it is not kept.
            ids = torch.zeros(c, dtype=torch.int64, device=device)
            ids[:mine] = torch.tensor(tokens[first : first + mine], dtype=torch.int64, device=device)
            angles = cos_sin(positions, *self._angles())
            x = self._enter(ids)
            for i, layer in enumerate(self._llama.decoder.layers):
                q, k, v = self._project(layer, x, angles)
                out = decode.prefill_attention(
                    q, k, v, [part.kept(i) for part in cache.chain], self._groups.cp
                )
                cache.put(i, k[:, :, :mine], v[:, :, :mine])
                x = layer.output_and_mlp(x, out)
            cache.advance(n, position, mine)
            x = self._leave(x)
            if self.last and mine:
                yield first, x[:mine, 0]

    def gather_hidden(self, states: list[Tensor | None]) -> Tensor:
        """Give all context-parallel ranks the hidden states [n, H], each of which one rank has. Last stage
        only."""
        zero = torch.zeros(self.model.hidden_size, dtype=self.dtype, device=self.ranks.device)
        rows = torch.stack([zero if row is None else row for row in states])
        torch.distributed.all_reduce(rows, group=self._groups.cp)  # zeros except on one rank: exact
        return rows

    # ---- decode ---------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, tokens: list[int], caches: list[KVCache], turn: int) -> Tensor | None:
        """Read one more token of each of n sequences (decode) and return, on the last stage, hidden states
        [n, H] after the last layer.

        The caches share the same `before`. turn: the step's number, which determines the rank that keeps the
        tokens.
        """
        device = self.ranks.device
        keeps = turn % self.ranks.cp == self.ranks.cp_rank
        positions = torch.tensor([cache.end for cache in caches], device=device)
        angles = cos_sin(positions, *self._angles())
        x = self._enter(torch.tensor(tokens, device=device))
        shared = caches[0].before
        for i, layer in enumerate(self._llama.decoder.layers):
            q, k, v = self._project(layer, x, angles)
            if keeps:
                for j, cache in enumerate(caches):
                    cache.put(i, k[:, :, j : j + 1], v[:, :, j : j + 1])
            x = layer.output_and_mlp(
                x,
                decode.decode_attention(
                    q,
                    [shared.kept(i)] if shared else [],
                    [cache.kept(i, int(keeps)) for cache in caches],
                    self._groups.cp,
                ),
            )
        for cache in caches:
            cache.advance(1, cache.end, int(keeps))
        x = self._leave(x)
        return x[:, 0] if self.last else None

    # ---- output layer: last stage only ----------------------------------------------------------

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits, float32 [n, V] without padding, on every tensor-parallel rank, from hidden states
        [n, H] after the last layer."""
        part = self._logits(hidden)
        if self.ranks.tp == 1:
            return part[:, : self.model.vocab_size]
        every = [torch.empty_like(part) for _ in range(self.ranks.tp)]
        torch.distributed.all_gather(every, part, group=self._groups.tp)
        return torch.cat(every, dim=-1)[:, : self.model.vocab_size]

    @torch.no_grad()
    def score(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the log-probabilities, float32 [n], of `targets`, int64 [n], after hidden states [n, H],
        and whether each is the most likely token.

        One block of rows at a time, over the shards of the vocabulary: complete logits never exist.
        """
        scored = [
            self._score_block(x, t)
            for x, t in zip(*(y.split(self._block()) for y in (hidden, targets)), strict=True)
        ]
        return torch.cat([score for score, _ in scored]), torch.cat([best for _, best in scored])

    def _score_block(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._logits(hidden)  # [n, v]
        v = logits.shape[1]
        local = targets - self.ranks.tp_rank * v
        inside = (local >= 0) & (local < v)
        picked = torch.where(inside, logits.gather(1, local.clamp(0, v - 1)[:, None]).squeeze(1), -torch.inf)
        peak, best = logits.max(dim=1)
        # float64 represents a token id exactly.
        mine = torch.stack(
            [
                torch.logsumexp(logits, dim=1).double(),
                picked.double(),
                peak.double(),
                best + self.ranks.tp_rank * v,
            ]
        )  # [4, n]
        every = [torch.empty_like(mine) for _ in range(self.ranks.tp)]
        torch.distributed.all_gather(every, mine, group=self._groups.tp)
        lse, picks, peaks, bests = torch.stack(every, dim=1)  # [TP, n] each
        likeliest = bests.gather(0, peaks.argmax(dim=0, keepdim=True)).squeeze(0)
        return (picks.amax(dim=0) - torch.logsumexp(lse, dim=0)).float(), likeliest == targets

    def _block(self) -> int:
        return max(1, LOSS_BLOCK // self._llama.output_layer.output_size_per_partition)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits, float32 [n, v], of this rank's rows of the vocabulary; padding rows are -inf."""
        llama = self._llama
        weight = (
            llama.shared_embedding_or_output_weight()
            if llama.share_embeddings_and_output_weights
            else llama.output_layer.weight
        )
        logits = torch.matmul(llama.decoder.final_layernorm(hidden), weight.t()).float()
        first = self.ranks.tp_rank * logits.shape[1]
        logits[:, max(0, self.model.vocab_size - first) :] = -torch.inf
        return logits

    # ---- parts of a stage -----------------------------------------------------------------------

    def _angles(self) -> tuple[Tensor, float]:
        frequencies, factor = self._frequencies
        return frequencies.to(self.ranks.device), factor

    def _project(self, layer: Any, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Apply norms, projection and RoPE: x [c, 1, H] -> q [1, h, c, d], k and v [1, g, c, d]."""
        attention = layer.self_attention
        qkv = attention.linear_qkv(layer.input_layernorm(x))[0]
        norm = attention.core_attention.head_norm
        return split_and_rotate(qkv, attention.num_query_groups_per_partition, *angles, norm=norm)

    def _enter(self, ids: Tensor) -> Tensor:
        """Return the stage's input [c, 1, H]: the embedding of ids [c], or the output of the previous
        stage."""
        if self.first:
            return self._llama.embedding(ids[None], None)
        x = torch.empty(len(ids), 1, self.model.hidden_size, dtype=self.dtype, device=self.ranks.device)
        torch.distributed.recv(
            x,
            src=torch.distributed.get_global_rank(self._groups.pp, self.ranks.pp_rank - 1),
            group=self._groups.pp,
        )
        return x

    def _leave(self, x: Tensor) -> Tensor:
        """Send the stage's output to the next stage, if any."""
        if not self.last:
            torch.distributed.send(
                x.contiguous(),
                dst=torch.distributed.get_global_rank(self._groups.pp, self.ranks.pp_rank + 1),
                group=self._groups.pp,
            )
        return x
