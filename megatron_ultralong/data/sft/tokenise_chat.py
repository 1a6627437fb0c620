"""Rendered conversations to token ids and a mask of the trained tokens, by any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy
from numpy.typing import NDArray

from megatron_ultralong.data.sft.chat_template import RenderedChat
from megatron_ultralong.data.special_tokens import MixedEncoder, load_backend
from megatron_ultralong.io.workers import WorkerPool

BATCH_CHARACTERS = 1 << 19
"""Characters encoded at a time."""

EncodedChat = tuple[NDArray[numpy.int32], NDArray[numpy.uint8]]
"""(ids [n], trained [n]: 1 where the token is trained on)."""


def encode_batch(encoder: MixedEncoder, batch: list[RenderedChat]) -> list[EncodedChat]:
    """Encode each text as a whole, as the output of the template, special tokens in contents as text.

    A token is trained on if any of its characters is.
    """
    encoded = []
    for rendered, (ids, offsets) in zip(
        batch, encoder.encode_batch([(rendered.text, rendered.as_text) for rendered in batch]), strict=True
    ):
        token_begins, token_ends = offsets.T
        span_begins, span_ends = numpy.array(rendered.spans, numpy.int64).reshape(-1, 2).T
        # The first span that ends after the token's begin.
        span = numpy.searchsorted(span_ends, token_begins, side="right")
        trained = (span < len(span_ends)) & (token_ends > numpy.append(span_begins, 0)[span])
        encoded.append((numpy.array(ids, numpy.int32), trained.astype(numpy.uint8)))
    return encoded


def encode_chats(rendered: Iterable[RenderedChat], backend: Any, workers: int) -> Iterator[EncodedChat]:
    """Encode conversations in order. workers: processes; 1 = this one, with the tokenizer's own threads."""
    with WorkerPool(workers, _make_encoder, (backend.to_str(),)) as pool:
        for _, _, encoded in pool.map((batch, None) for batch in _batches(rendered)):
            yield from encoded


def _make_encoder(tokenizer_json: str) -> Callable[[list[RenderedChat]], list[EncodedChat]]:
    return partial(encode_batch, MixedEncoder(load_backend(tokenizer_json, "control")))


def tokens_to_keep(trained: NDArray[numpy.uint8], max_tokens: int) -> int:
    """Return the length of the longest prefix that ends with an answer and has at most `max_tokens`; 0 if
    there is none."""
    # Where `trained` falls from 1 to 0, its difference as uint8 is 255.
    answer_ends = numpy.flatnonzero(numpy.diff(trained, append=numpy.uint8(0)) == 255) + 1
    fitting = answer_ends[answer_ends <= max_tokens]
    return int(fitting[-1]) if len(fitting) else 0


def _batches(rendered: Iterable[RenderedChat]) -> Iterator[list[RenderedChat]]:
    batch: list[RenderedChat] = []
    characters = 0
    for chat in rendered:
        batch.append(chat)
        characters += len(chat.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
