"""The search of a batch of documents for n-grams of benchmarks, and the treatment of contaminated documents:
reported, dropped, or with the matches cut out."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy

from megatron_ultralong.data.decontaminate.filter_files import DocumentBatch
from megatron_ultralong.data.decontaminate.ngrams import NgramIndex, NgramMatch, merge_matches
from megatron_ultralong.errors import UserError

_SHOWN_WORDS = 60
"""Words of a match that are written out."""


@dataclass(frozen=True, kw_only=True)
class ContaminationPolicy:
    """What happens to a contaminated document."""

    action: Literal["report", "drop", "cut"] = "drop"
    margin: int = 0
    """cut: words removed before and after each match as well."""
    pieces: Literal["join", "split"] = "join"
    """cut: the remaining pieces of a document stay one document, or become one document each."""
    min_piece: int = 0
    """cut: pieces of fewer characters are removed too."""

    def __post_init__(self) -> None:
        for name, value in (("--margin", self.margin), ("--min-piece", self.min_piece)):
            if value < 0:
                raise UserError(f"{name} {value}: must be 0 or more")
        if self.action != "cut" and (self.margin or self.min_piece or self.pieces != "join"):
            raise UserError(
                f"--margin, --pieces and --min-piece require --action cut, but it is {self.action}"
            )


@dataclass
class BatchScan:
    """The result for one batch."""

    edits: dict[int, list[Any]] = field(default_factory=dict)
    """New items for each item that is replaced, by its number in the batch; none for dropped documents."""
    matches: list[dict[str, Any]] = field(default_factory=list)
    broken: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("documents", "contaminated", "dropped", "cut", "words", "words_removed", "broken"), 0
        )
    )


@dataclass
class _ScannedDocument:
    item: int
    texts: list[str]
    record: dict[str, Any] | None = None
    """The object of a .jsonl line."""
    conversation: bool = False


class BatchScanner:
    """Searches batches of documents and treats the contaminated ones."""

    def __init__(self, index: NgramIndex, policy: ContaminationPolicy, text_key: str) -> None:
        self.index, self.policy, self.text_key = index, policy, text_key
        self.vocabulary = index.vocabulary()
        self.id_to_word = ["", *index.word_to_id]

    @staticmethod
    def load(folder: Path, policy: ContaminationPolicy, text_key: str) -> BatchScanner:
        """Return a scanner with the index that was saved in `folder`."""
        return BatchScanner(NgramIndex.load(folder), policy, text_key)

    def __call__(self, batch: DocumentBatch) -> BatchScan:
        scan = BatchScan()
        documents = list(self._parse_documents(batch, scan))
        texts = [(document, number) for document in documents for number in range(len(document.texts))]
        ids_of_texts = [self.vocabulary.encode(document.texts[number]) for document, number in texts]
        # All texts are searched at once, with a 0 after each, so that no n-gram spans two.
        separator = numpy.zeros(1, dtype=numpy.int32)
        starts = numpy.cumsum([0, *(len(ids) + 1 for ids in ids_of_texts)])
        matches: dict[int, dict[int, list[NgramMatch]]] = defaultdict(lambda: defaultdict(list))
        joined = [part for ids in ids_of_texts for part in (ids, separator)]
        for match in self.index.search(numpy.concatenate(joined)) if joined else ():
            i = int(numpy.searchsorted(starts, match.start, side="right")) - 1
            document, number = texts[i]
            matches[document.item][number].append(
                NgramMatch(match.start - int(starts[i]), match.length, match.text_number)
            )
        words: dict[int, int] = defaultdict(int)
        for (document, _), ids in zip(texts, ids_of_texts):
            words[document.item] += len(ids)
        scan.counts["documents"] += len(documents)
        scan.counts["words"] += sum(words.values())
        for document in documents:
            if document.item in matches:
                self._report(batch, document, matches[document.item], scan)
                if self.policy.action != "report":
                    self._remove(batch, document, words[document.item], scan)
        return scan

    # ---- documents ------------------------------------------------------------------------------

    def _parse_documents(self, batch: DocumentBatch, scan: BatchScan) -> Iterator[_ScannedDocument]:
        for i, item in enumerate(batch.items):
            if batch.kind == ".jsonl" and item.isspace():
                continue
            try:
                yield self._parse_document(batch, i, item)
            except (ValueError, RecursionError) as error:
                scan.edits[i] = []
                scan.broken.append(
                    {"file": batch.path, "line": batch.first + i, "reason": " ".join(str(error).split())}
                )
                scan.counts["broken"] += 1

    def _parse_document(self, batch: DocumentBatch, i: int, item: Any) -> _ScannedDocument:
        """Return the document of an item. ValueError, with the reason, for an item that is not a document."""
        if batch.kind == ".txt":
            return _ScannedDocument(i, [item.decode("utf-8-sig")])
        if batch.kind == ".parquet":
            return _ScannedDocument(i, [_checked_text(item, self.text_key)])
        if isinstance(item, ValueError):  # a record that is no conversation
            raise item
        record = json.loads(item.removeprefix(b"\xef\xbb\xbf"))
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
        if self.text_key in record and batch.kind != "messages":
            return _ScannedDocument(i, [_checked_text(record[self.text_key], self.text_key)], record)
        if isinstance(record.get("messages"), list):
            return _ScannedDocument(i, list(map(_content, record["messages"])), record, conversation=True)
        raise ValueError(
            f"no key {self.text_key!r} or 'messages' among {', '.join(list(record)[:8]) or 'none'}"
        )

    # ---- contaminated documents -----------------------------------------------------------------

    def _report(
        self,
        batch: DocumentBatch,
        document: _ScannedDocument,
        matches: dict[int, list[NgramMatch]],
        scan: BatchScan,
    ) -> None:
        """Add the matches of a document, by the number of its text, to the result."""
        scan.counts["contaminated"] += 1
        place: dict[str, Any] = {"file": batch.path, "line": batch.first + document.item}
        if document.record is not None and "id" in document.record:
            place["id"] = document.record["id"]
        for number, matches_of_text in sorted(matches.items()):
            ids = self.vocabulary.encode(document.texts[number])
            for match in merge_matches(matches_of_text, self.index.texts):
                shown = ids[match.start : match.start + min(match.length, _SHOWN_WORDS)]
                scan.matches.append(
                    {
                        **place,
                        **({"message": number} if document.conversation else {}),
                        **self.index.texts[match.text_number]._asdict(),
                        "words": match.length,
                        "text": " ".join(self.id_to_word[i] for i in shown),
                    }
                )

    def _remove(self, batch: DocumentBatch, document: _ScannedDocument, words: int, scan: BatchScan) -> None:
        """Drop a document of `words` words, or cut the matches out of it."""
        cut = self.policy.action == "cut" and not document.conversation
        pieces = self._cut(document.texts[0]) if cut else []
        scan.counts["cut" if pieces else "dropped"] += 1
        scan.counts["words_removed"] += words - sum(len(self.vocabulary.encode(text)) for text in pieces)
        scan.edits[document.item] = self._new_items(batch, document, pieces)

    def _cut(self, text: str) -> list[str]:
        """Return what remains of a text once matches are removed until none is found any more; [] where no
        word remains."""
        join, min_piece = self.policy.pieces == "join", self.policy.min_piece
        clean, waiting = [], [text]
        while waiting:
            text = waiting.pop(0)
            pieces = self._pieces(text)
            if len(pieces) == 1:
                clean.append(text)
                continue
            pieces = [
                piece for piece in pieces if len(piece.strip()) >= min_piece and (join or piece.strip())
            ]
            # Searched again: joined pieces may make another match.
            waiting = ["".join(pieces), *waiting] if join else [*pieces, *waiting]
        return [text for text in clean if len(self.vocabulary.encode(text))]

    def _pieces(self, text: str) -> list[str]:
        """Return the text between its matches, in pieces; the text itself if it has no match."""
        matches = list(self.index.search(self.vocabulary.encode(text)))
        if not matches:
            return [text]
        spans = self.vocabulary.word_spans(text)
        pieces, end = [], 0
        for first, last in _covered_words(matches, self.policy.margin, len(spans)):
            pieces.append(text[end : max(spans[first][0], end)])
            end = spans[last - 1][1]
        return [*pieces, text[end:]]

    def _new_items(self, batch: DocumentBatch, document: _ScannedDocument, pieces: list[str]) -> list[Any]:
        if batch.kind == ".parquet" or not pieces:
            return list(pieces)
        if batch.kind == ".txt":
            return [text.encode() for text in pieces]
        ending = b"\n" if batch.items[document.item].endswith(b"\n") else b""
        records = [{**(document.record or {}), self.text_key: text} for text in pieces]
        return [b"\n".join(map(to_json, records)) + ending]


def to_json(value: Any) -> bytes:
    """Return JSON in one line. A lone surrogate, which JSON can express and UTF-8 cannot, stays an escape."""
    return json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace")


def _covered_words(matches: list[NgramMatch], margin: int, words: int) -> Iterator[tuple[int, int]]:
    """Yield disjoint ranges of words, the end exclusive, in order, that cover all matches and `margin` words
    around each."""
    first, last = 0, 0
    for match in sorted(matches, key=lambda match: match.start):
        begin, end = max(match.start - margin, 0), min(match.start + match.length + margin, words)
        if begin > last:
            if last:
                yield first, last
            first = begin
        last = max(last, end)
    yield first, last


def _content(message: Any) -> str:
    """Return the text of a message: its content, or the text parts of it."""
    if not isinstance(message, dict) or "content" not in message:
        raise ValueError("a message without 'content'")
    content = message["content"]
    parts = [
        part.get("text") if isinstance(part, dict) else part
        for part in (content if isinstance(content, list) else [content])
    ]
    # None: a tool call or an image.
    return "\n".join(_checked_text(part, "content") for part in parts if part is not None)


def _checked_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"{name!r} contains {'nothing' if value is None else type(value).__name__}, not text"
        )
    value.isascii() or value.encode()  # JSON can contain "\ud800": UnicodeEncodeError is a ValueError
    return value
