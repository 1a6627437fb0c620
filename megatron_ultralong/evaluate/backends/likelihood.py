"""Log-likelihoods of given tokens by a transformers model, without materialising logits of (tokens x
vocabulary).

Shapes: b sequences in a batch, t tokens, H hidden size, V vocabulary, n scored tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ultralong.errors import UserError

TokenPair = tuple[Sequence[int], Sequence[int]]
"""Token ids of (context, continuation)."""
CHUNK = 1024
"""Tokens whose logits exist at a time."""


@torch.inference_mode()
def token_nll(
    model: Any, tokens: Tensor, rows: Tensor, columns: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """-log p(target) after tokens[row, :column + 1], float32 [n], and whether the target is the greedy
    choice, bool [n].

    tokens int64 [b, t]; rows, columns, targets int64 [n]; all on the model's device. Rows of `tokens` may be
    padded at their ends, which causal attention ignores. UserError where the model has no separate output
    layer.
    """
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        raise UserError(
            f"{type(model).__name__} has no separate body and output layer; a causal language model is needed"
        )
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state  # [b, t, H]
    nll, greedy = [], []
    for row, column, target in zip(
        rows.split(CHUNK), columns.split(CHUNK), targets.split(CHUNK), strict=True
    ):
        logits = head(hidden[row, column]).float()  # [chunk, V]
        nll.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
        greedy.append(logits.argmax(dim=-1) == target)
    return torch.cat(nll), torch.cat(greedy)


def sequence_nll(model: Any, ids: Sequence[int]) -> Tensor:
    """-log p of each of `ids` but the first, given those before it, float32 [n - 1] on the CPU."""
    row = torch.tensor(ids, device=model.device)
    places = torch.arange(len(row) - 1, device=row.device)
    return token_nll(model, row[None, :-1], torch.zeros_like(places), places, row[1:])[0].cpu()


def pair_loglikelihoods(
    model: Any, pairs: Sequence[TokenPair], batch_tokens: int
) -> list[tuple[float, bool]]:
    """(log p of the continuation given the context, whether greedy decoding generates it) for each pair.

    Neither part may be empty. batch_tokens: tokens in a batch, padding included. One forward pass serves all
    pairs that differ only in their last token, as the choices of a multiple-choice question do.
    """
    shared: dict[tuple[int, ...], list[int]] = {}
    for i, (context, continuation) in enumerate(pairs):
        if not len(context) or not len(continuation):
            raise ValueError(f"pair {i}: context and continuation need at least one token each")
        shared.setdefault((*context, *continuation)[:-1], []).append(i)
    answers: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    for batch in _batches(sorted(shared, key=len, reverse=True), batch_tokens):
        t = len(batch[0])
        tokens = torch.tensor([[*row, *[0] * (t - len(row))] for row in batch], device=model.device)
        scored = [
            (row, i, len(inputs) - len(pairs[i][1]))
            for row, inputs in enumerate(batch)
            for i in shared[inputs]
        ]
        places = torch.tensor(
            [(row, first + j, token) for row, i, first in scored for j, token in enumerate(pairs[i][1])],
            device=model.device,
        )
        nll, greedy = token_nll(model, tokens, *places.unbind(1))
        sizes = [len(pairs[i][1]) for _, i, _ in scored]
        for (_, i, _), losses, hits in zip(
            scored, nll.double().split(sizes), greedy.split(sizes), strict=True
        ):
            answers[i] = (-float(losses.sum()), bool(hits.all()))
    return answers


def _batches(rows: list[tuple[int, ...]], batch_tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Group `rows`, longest first, into batches of at most `batch_tokens` padded tokens, or a single row."""
    batch: list[tuple[int, ...]] = []
    for row in rows:
        if batch and (len(batch) + 1) * len(batch[0]) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
