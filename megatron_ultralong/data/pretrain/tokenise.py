"""Documents to token ids, in order, in flat memory.

A long document is cut into windows of characters that overlap. Each window is encoded alone, and two
neighbours are joined at a character in the middle of their overlap where both have a token border and the
same tokens around it. What comes out is what encoding the whole document gives; where neighbours find no such
place (a kilobyte of digits, say) they are encoded again as one. (In runs of thousands of one character, or of
digits, a tokenizer may settle on another split of the same characters.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

WINDOW = 1 << 17
"""Characters of a window."""
OVERLAP = 1 << 10
"""Characters that a window shares with the next one."""
BATCH = 1 << 20
"""Characters encoded in one go."""
_AGREE = 4  # tokens that must be the same on both sides of a joint

Ids = NDArray[numpy.int32]


@dataclass
class Window:
    """A part of a document, and what it encodes to."""

    text: str
    first: bool
    last: bool
    ids: Ids | None = None
    starts: Ids | None = None
    """Character of `text` at which each token starts; only where the document has more windows."""
    ends: Ids | None = None
    begin: int = 0
    """Character from which on the tokens are this window's to give; those before are the window's before."""


def tokenise(documents: Iterable[Iterable[str]], backend: Any) -> Iterator[tuple[Ids, bool]]:
    """(ids, whether the document ends with them) for each document, given as pieces of text; a long one comes
    in several parts.

    backend: a tokenizers.Tokenizer, which uses its own threads.
    """
    return _joined((window for batch in _batches(documents) for window in encode(backend, batch)), backend)


# ---- windows -----------------------------------------------------------------------------------


def windows(pieces: Iterable[str]) -> Iterator[Window]:
    """A document's text as windows of WINDOW characters, each beginning with the last OVERLAP of the one
    before. At least one."""
    text, start, first = "", 0, True
    for piece in pieces:
        text, start = text[start:] + piece, 0
        while len(text) - start > WINDOW:
            yield Window(text[start : start + WINDOW], first, last=False)
            start, first = start + WINDOW - OVERLAP, False
    yield Window(text[start:], first, last=True)


def encode(backend: Any, batch: list[Window]) -> list[Window]:
    """The windows with their tokens."""
    whole = [w for w in batch if w.first and w.last]
    parts = [w for w in batch if not (w.first and w.last)]
    for window, encoding in zip(
        whole, backend.encode_batch_fast([w.text for w in whole], add_special_tokens=False), strict=True
    ):
        window.ids = numpy.array(encoding.ids, dtype=numpy.int32)
    _encode_parts(backend, parts)
    return batch


def _encode_parts(backend: Any, parts: list[Window]) -> None:
    for window, encoding in zip(
        parts, backend.encode_batch([w.text for w in parts], add_special_tokens=False), strict=True
    ):
        window.ids = numpy.array(encoding.ids, dtype=numpy.int32)
        window.starts, window.ends = numpy.array(encoding.offsets, dtype=numpy.int32).reshape(-1, 2).T


def _batches(documents: Iterable[Iterable[str]]) -> Iterator[list[Window]]:
    """Windows of all documents, together until they hold BATCH characters (or very many are short)."""
    batch: list[Window] = []
    size = 0
    for pieces in documents:
        for window in windows(pieces):
            batch.append(window)
            size += len(window.text) + 100
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _joined(encoded: Iterable[Window], backend: Any) -> Iterator[tuple[Ids, bool]]:
    """Each document's tokens exactly once, without the ones that overlapping windows both have."""
    held: Window | None = None
    """The window not yet given out; without ids where it has grown since it was encoded."""
    wanted = 0
    """Characters `held` shall have before it is encoded again: doubles, so that all of it together stays
    linear."""
    for window in encoded:
        assert window.ids is not None
        if held is None:
            if window.last:
                yield window.ids, True
            else:
                held = window
            continue
        if held.ids is None and len(held.text) >= wanted:
            _encode_parts(backend, [held])
        cut = _joint(held, window)
        if cut is not None:
            yield _tokens(held, held.begin, cut), False
            window.begin = cut - (len(held.text) - OVERLAP)
            held = window
        else:
            if held.ids is not None:
                wanted = 2 * len(held.text)
            held = Window(held.text + window.text[OVERLAP:], held.first, window.last, begin=held.begin)
        if held.last:
            if held.ids is None:
                _encode_parts(backend, [held])
            yield _tokens(held, held.begin, None), True
            held = None


def _joint(left: Window, right: Window) -> int | None:
    """Character of `left` nearest the middle of the overlap where both windows break alike, with the same
    tokens around it."""
    if left.ids is None:
        return None
    shift = len(left.text) - OVERLAP
    a, b = _near(left, shift, shift, len(left.text)), _near(right, 0, 0, OVERLAP)  # [tokens, 3]
    borders = numpy.intersect1d(a[:, 0], b[:, 0])
    for border in borders[numpy.argsort(numpy.abs(borders - OVERLAP // 2), kind="stable")]:
        i, j = numpy.searchsorted(a[:, 0], border), numpy.searchsorted(b[:, 0], border)
        around_a, around_b = a[max(i - _AGREE, 0) : i + _AGREE], b[max(j - _AGREE, 0) : j + _AGREE]
        if len(around_a) == 2 * _AGREE and numpy.array_equal(around_a, around_b) and a[i - 1, 1] <= border:
            return int(border) + shift
    return None


def _near(window: Window, shift: int, low: int, high: int) -> NDArray[numpy.int32]:
    """Tokens that start in [low, high): columns start and end (relative to `shift`) and id."""
    assert window.ids is not None and window.starts is not None and window.ends is not None
    here = slice(numpy.searchsorted(window.starts, low), numpy.searchsorted(window.starts, high))
    return numpy.stack([window.starts[here] - shift, window.ends[here] - shift, window.ids[here]], axis=1)


def _tokens(window: Window, begin: int, end: int | None) -> Ids:
    """The tokens from character `begin` to before `end`."""
    assert window.ids is not None and window.starts is not None
    first = 0 if begin == 0 else numpy.searchsorted(window.starts, begin)
    return window.ids[first : None if end is None else numpy.searchsorted(window.starts, end)]
