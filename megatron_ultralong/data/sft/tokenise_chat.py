"""Rendered conversations to token ids and which of them are trained on, by any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy
from numpy.typing import NDArray

from megatron_ultralong.data.sft.chat_template import Rendered
from megatron_ultralong.io.workers import WorkerPool

BATCH = 1 << 19
"""Characters encoded in one go."""

Encoded = tuple[NDArray[numpy.int32], NDArray[numpy.uint8]]
"""(ids [n], 1 where a token is trained on [n])."""


def encode(backend: Any, batch: list[Rendered]) -> list[Encoded]:
    """The tokens of each text, all of it at once: what encoding the template's whole output gives. backend: a
    tokenizers.Tokenizer.

    A token is trained on where any of its characters is.
    """
    found = []
    for rendered, encoding in zip(
        batch, backend.encode_batch([r.text for r in batch], add_special_tokens=False), strict=True
    ):
        starts, ends = numpy.array(encoding.offsets, numpy.int64).reshape(-1, 2).T
        begins, stops = numpy.array(rendered.spans, numpy.int64).reshape(-1, 2).T
        span = numpy.searchsorted(stops, starts, side="right")  # the first that ends after the token's start
        trained = (span < len(stops)) & (ends > numpy.append(begins, 0)[span])
        found.append((numpy.array(encoding.ids, numpy.int32), trained.astype(numpy.uint8)))
    return found


def encode_all(rendered: Iterable[Rendered], backend: Any, workers: int) -> Iterator[Encoded]:
    """`encode` of all, in order. workers: processes; 1 = this one, with the tokenizer's own threads."""
    with WorkerPool(workers, _encoder, (backend.to_str(),)) as processes:
        for _, _, found in processes.map((batch, None) for batch in _batches(rendered)):
            yield from found


def _encoder(tokenizer: str) -> Callable[[list[Rendered]], list[Encoded]]:
    import tokenizers

    return partial(encode, tokenizers.Tokenizer.from_str(tokenizer))


def fitting(trained: NDArray[numpy.uint8], most: int) -> int:
    """Tokens of the longest beginning that ends with an answer and is no longer than `most`; 0 where there is
    none."""
    ends = (
        numpy.flatnonzero(numpy.diff(trained, append=numpy.uint8(0)) == 255) + 1
    )  # uint8: from 1 to 0 is 255
    fit = ends[ends <= most]
    return int(fit[-1]) if len(fit) else 0


def _batches(rendered: Iterable[Rendered]) -> Iterator[list[Rendered]]:
    batch: list[Rendered] = []
    size = 0
    for one in rendered:
        batch.append(one)
        size += len(one.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
