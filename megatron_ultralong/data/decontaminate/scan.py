"""What is found in a batch of documents, and what becomes of them: reported, left out, or with what was found
cut out."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy

from megatron_ultralong.data.decontaminate.filter_files import Batch
from megatron_ultralong.data.decontaminate.ngrams import Hit, Index, spans
from megatron_ultralong.errors import UserError

_SHOWN = 60  # words of a match that are written out


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """What becomes of a document that has words of a benchmark."""

    action: Literal["report", "drop", "cut"] = "drop"
    margin: int = 0
    """cut: words that go too, before and after those found."""
    pieces: Literal["join", "split"] = "join"
    """cut: what is left of a document stays one, or each piece becomes a document."""
    min_piece: int = 0
    """cut: a piece of fewer characters goes too."""

    def __post_init__(self) -> None:
        for name, value in (("--margin", self.margin), ("--min-piece", self.min_piece)):
            if value < 0:
                raise UserError(f"{name} {value}: must be 0 or more")
        if self.action != "cut" and (self.margin or self.min_piece or self.pieces != "join"):
            raise UserError(f"--margin, --pieces and --min-piece are for --action cut, not {self.action}")


@dataclass
class Outcome:
    """Of a batch."""

    edits: dict[int, list[Any]] = field(default_factory=dict)
    """Items that are replaced, by number; by nothing where they are left out."""
    matches: list[dict[str, Any]] = field(default_factory=list)
    broken: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(
            ("documents", "contaminated", "dropped", "cut", "words", "words_removed", "broken"), 0
        )
    )


@dataclass
class _Document:
    item: int
    texts: list[str]
    record: dict[str, Any] | None = None
    """The object of a .jsonl line."""
    conversation: bool = False


class Scanner:
    """Searches batches, and treats what it finds."""

    def __init__(self, index: Index, treatment: Treatment, text_key: str) -> None:
        self.index, self.treatment, self.text_key = index, treatment, text_key
        self.vocabulary = index.words()
        self.names = ["", *index.vocabulary]

    @staticmethod
    def open(folder: Path, treatment: Treatment, text_key: str) -> Scanner:
        """One with the index that was saved in `folder`."""
        return Scanner(Index.load(folder), treatment, text_key)

    def __call__(self, batch: Batch) -> Outcome:
        outcome = Outcome()
        found = list(self._documents(batch, outcome))
        rows, owners = [], []
        for document in found:
            for number, text in enumerate(document.texts):
                rows += [
                    self.vocabulary.ids(text),
                    numpy.zeros(1, dtype=numpy.int32),
                ]  # a 0 between texts: no n-gram spans two
                owners.append((document, number))
        starts = numpy.concatenate([[0], numpy.cumsum([len(row) for row in rows])])[
            ::2
        ]  # of each text, and the end
        hits: dict[int, dict[int, list[Hit]]] = defaultdict(lambda: defaultdict(list))
        for hit in self.index.find(numpy.concatenate(rows)) if rows else ():
            row = int(numpy.searchsorted(starts, hit.start, side="right")) - 1
            document, number = owners[row]
            hits[document.item][number].append(Hit(hit.start - int(starts[row]), hit.length, hit.text))
        words: dict[int, int] = defaultdict(int)
        for (document, _), ids in zip(owners, rows[::2]):
            words[document.item] += len(ids)
        outcome.counts["documents"] += len(found)
        outcome.counts["words"] += sum(words.values())
        for document in found:
            if document.item in hits:
                self._treat(batch, document, hits[document.item], words[document.item], outcome)
        return outcome

    # ---- documents ------------------------------------------------------------------------------

    def _documents(self, batch: Batch, outcome: Outcome) -> Iterator[_Document]:
        for i, item in enumerate(batch.items):
            if batch.kind == ".jsonl" and item.isspace():
                continue
            try:
                yield self._document(batch, i, item)
            except (ValueError, RecursionError) as error:
                outcome.edits[i] = []
                outcome.broken.append(
                    {"file": batch.path, "line": batch.first + i, "reason": " ".join(str(error).split())}
                )
                outcome.counts["broken"] += 1

    def _document(self, batch: Batch, i: int, item: Any) -> _Document:
        """Its texts; ValueError, with the reason, for what is none."""
        if batch.kind == ".txt":
            return _Document(i, [item.decode("utf-8-sig")])
        if batch.kind == ".parquet":
            return _Document(i, [_text(item, self.text_key)])
        if isinstance(item, ValueError):  # of conversations: why it is none
            raise item
        record = json.loads(item.removeprefix(b"\xef\xbb\xbf"))
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
        if self.text_key in record and batch.kind != "messages":
            return _Document(i, [_text(record[self.text_key], self.text_key)], record)
        if isinstance(record.get("messages"), list):
            return _Document(
                i, [_content(message) for message in record["messages"]], record, conversation=True
            )
        raise ValueError(
            f"no key {self.text_key!r} or 'messages' among {', '.join(list(record)[:8]) or 'none'}"
        )

    # ---- treatment ------------------------------------------------------------------------------

    def _treat(
        self, batch: Batch, document: _Document, hits: dict[int, list[Hit]], words: int, outcome: Outcome
    ) -> None:
        place: dict[str, Any] = {"file": batch.path, "line": batch.first + document.item}
        if document.record is not None and "id" in document.record:
            place["id"] = document.record["id"]
        for number, of_text in sorted(hits.items()):
            ids = self.vocabulary.ids(document.texts[number])
            for hit in spans(of_text, self.index.owners):
                benchmark, task, example, part = self.index.owners[hit.text]
                shown = [self.names[i] for i in ids[hit.start : hit.start + min(hit.length, _SHOWN)]]
                outcome.matches.append(
                    {
                        **place,
                        **({"message": number} if document.conversation else {}),
                        "benchmark": benchmark,
                        "task": task,
                        "example": example,
                        "part": part,
                        "words": hit.length,
                        "text": " ".join(shown),
                    }
                )
        counts, action = outcome.counts, self.treatment.action
        counts["contaminated"] += 1
        if action == "report":
            return
        left = [] if action == "drop" or document.conversation else self._cut(document.texts[0])
        counts["dropped" if not left else "cut"] += 1
        counts["words_removed"] += words - sum(len(self.vocabulary.ids(text)) for text in left)
        outcome.edits[document.item] = self._rewritten(batch, document, left)

    def _cut(self, text: str) -> list[str]:
        """What is left of a text, of which something is left out until nothing is found in it any more; []
        where no word is left."""
        join, least = self.treatment.pieces == "join", self.treatment.min_piece
        done, waiting = [], [text]
        while waiting:
            text = waiting.pop(0)
            pieces = self._pieces(text)
            if len(pieces) == 1:
                done.append(text)
                continue
            pieces = [piece for piece in pieces if len(piece.strip()) >= least and (join or piece.strip())]
            waiting = (
                ["".join(pieces), *waiting] if join else [*pieces, *waiting]
            )  # joined pieces may make another match
        return [text for text in done if len(self.vocabulary.ids(text))]

    def _pieces(self, text: str) -> list[str]:
        """The text without the words found in it, in pieces; itself where nothing is found."""
        hits = list(self.index.find(self.vocabulary.ids(text)))
        if not hits:
            return [text]
        where = self.index.normalise.spans(text)
        pieces, end = [], 0
        for first, last in _ranges(hits, self.treatment.margin, len(where)):
            pieces.append(text[end : max(where[first][0], end)])
            end = where[last - 1][1]
        return [*pieces, text[end:]]

    def _rewritten(self, batch: Batch, document: _Document, left: list[str]) -> list[Any]:
        if batch.kind == ".parquet" or not left:
            return list(left)
        if batch.kind == ".txt":
            return [text.encode() for text in left]
        ending = b"\n" if batch.items[document.item].endswith(b"\n") else b""
        return [
            b"\n".join(to_json({**(document.record or {}), self.text_key: text}) for text in left) + ending
        ]


def to_json(value: Any) -> bytes:
    """As JSON in one line. Half of a surrogate pair, which JSON can say and UTF-8 cannot, stays an escape."""
    return json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace")


def _ranges(hits: list[Hit], margin: int, words: int) -> Iterator[tuple[int, int]]:
    """Ranges of words, the end exclusive, that cover all hits and the margin around them; apart from each
    other, in order."""
    first, last = 0, 0
    for hit in sorted(hits, key=lambda hit: hit.start):
        begin, end = max(hit.start - margin, 0), min(hit.start + hit.length + margin, words)
        if begin > last:
            if last:
                yield first, last
            first = begin
        last = max(last, end)
    yield first, last


def _content(message: Any) -> str:
    """The text of a message: its content, or the text parts of it."""
    if not isinstance(message, dict) or "content" not in message:
        raise ValueError("a message without 'content'")
    content = message["content"]
    parts = [
        part.get("text") if isinstance(part, dict) else part
        for part in (content if isinstance(content, list) else [content])
    ]
    return "\n".join(
        _text(part, "content") for part in parts if part is not None
    )  # None: a call of a tool, a picture


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name!r} holds {'nothing' if value is None else type(value).__name__}, not text")
    value.isascii() or value.encode()  # JSON can say "\ud800": an error here, as UnicodeEncodeError is a ValueError
    return value
