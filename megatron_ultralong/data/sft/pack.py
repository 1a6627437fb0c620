"""Instruction data: conversations to rows of exactly S + 1 tokens, with a loss mask and document starts.

Complete conversations, longest first, packed by best fit with even attention; none crosses a row. The rest of
a row is padding: masked, and a document of its own, so that with data.documents=masked nothing attends to it.
The files are those of row_writer.py; PREFIX.broken.jsonl lists the records that could not be used. An
interrupted run starts again from the beginning: same input and seed, same bytes.
"""

from __future__ import annotations

import contextlib
import glob
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from megatron_ultralong.data import megatron_index, row_writer
from megatron_ultralong.data.best_fit import contents, even_fit
from megatron_ultralong.data.conversations import DOMAINS
from megatron_ultralong.data.packed_rows import FORMAT
from megatron_ultralong.data.permutation import permutation
from megatron_ultralong.data.sft.encode_sources import ChatEncoder, encode_sources
from megatron_ultralong.data.sft.sample_buffer import SampleBuffer, SampleColumns
from megatron_ultralong.data.sft.select_examples import (
    ConversationSource,
    domain_quotas,
    select_examples,
)
from megatron_ultralong.data.sft.settings import SftSettings
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files
from megatron_ultralong.io.progress import counted, progress_bar


@dataclass(frozen=True)
class Selection:
    """Which of the encoded conversations are packed."""

    columns: SampleColumns
    """Of all encoded conversations."""
    available: dict[str, int]
    """Conversations of each domain."""
    wanted: dict[str, int]
    numbers: NDArray[numpy.int64]
    """Of the selected ones, in order."""

    def totals(self, of: NDArray[numpy.bool_] | None = None) -> dict[str, int]:
        """Return the manifest's totals of the selected conversations, of those in the mask `of`."""
        numbers = self.numbers if of is None else self.numbers[of[self.numbers]]
        return {
            "chosen": len(numbers),
            "tokens": int(self.columns.tokens[numbers].sum()),
            "trained_tokens": int(self.columns.trained_tokens[numbers].sum()),
        }


def pack_conversations(
    sources: Sequence[ConversationSource],
    tokenizer_dir: Path,
    output: str,
    settings: SftSettings,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Write `output`.bin, .idx, .mask.*, .docs.* and .json; return the manifest. Files of an earlier run are
    replaced at the end.

    UserError for mistakes of the user; then nothing is written. Memory: about 100 bytes per example; its
    tokens wait on the disk.
    """
    size = sum(path.stat().st_size for source in sources for path in source.files)
    encoder = ChatEncoder.load(tokenizer_dir, settings.template, settings.date, settings.special_tokens)
    with row_writer.staged(output) as stage, _remove_abandoned(stage, output):
        buffer = SampleBuffer(stage)
        with progress_bar("encoding", size, "B", hidden=not show_progress) as bar:
            entries = encode_sources(sources, encoder, settings, buffer, bar.update)
        selection = _select(buffer.finish(), sources, settings)
        if not len(selection.numbers):
            unusable = {
                name: sum(entry[name] for entry in entries) for name in ("broken", "unsupported", "too_long")
            }
            reasons = [f"; {count} {name.replace('_', ' ')}" for name, count in unusable.items() if count]
            raise UserError(
                f"nothing to train on: none of {sum(entry['read'] for entry in entries)} records is a conversation of up to "
                f"{settings.longest} tokens{''.join(reasons)}"
            )
        writer = row_writer.RowWriter(
            stage,
            settings.seq_length + 1,
            megatron_index.token_dtype(encoder.tokenizer.vocab_size),
            masks=True,
            starts=True,
        )
        rows = _assign_rows(selection, settings)
        for examples in counted(rows, "packing", "row", hidden=not show_progress):
            row, mask, starts = _build_row(buffer, examples, writer.length, encoder.pad_id)
            writer.add(row[None], mask[None], [starts])
        writer.finish()
        buffer.remove()
        made = _manifest(settings, encoder, writer, selection, entries)
        return row_writer.write_manifest(stage, made)


def _select(
    columns: SampleColumns, sources: Sequence[ConversationSource], settings: SftSettings
) -> Selection:
    of_domain = {name: int((columns.domain == d).sum()) for d, name in enumerate(DOMAINS)}
    available = {name: count for name, count in of_domain.items() if settings.mix or count}
    for name, share in (settings.mix or {}).items():
        if share and not available[name]:
            raise UserError(f"--mix: the input has no example of domain {name}")
    wanted = domain_quotas(available, settings.examples, settings.mix)
    names = [source.name for source in sources]
    numbers = select_examples(names, columns.source, columns.domain, wanted, settings.seed)
    return Selection(columns, available, wanted, numbers)


def _assign_rows(selection: Selection, settings: SftSettings) -> list[NDArray[numpy.int64]]:
    """Return the conversations of each row, by their numbers; the rows in random order."""
    lengths = selection.columns.tokens[selection.numbers]
    if settings.fit == "best":
        rows = contents(even_fit(lengths, settings.seq_length + 1))
    else:
        rows = contents(numpy.arange(len(lengths)))
    return [selection.numbers[rows[i]] for i in permutation(len(rows), [settings.seed])]


def _build_row(
    buffer: SampleBuffer, examples: NDArray[numpy.int64], length: int, pad_id: int
) -> tuple[NDArray[numpy.int32], NDArray[numpy.uint8], list[int]]:
    """Return ids [length], loss mask [length] and document starts of a row."""
    row, mask = numpy.full(length, pad_id, numpy.int32), numpy.zeros(length, numpy.uint8)
    starts, end = [], 0
    for example in examples:
        ids, trained = buffer.sample(example)
        starts.append(end)
        row[end : end + len(ids)] = ids
        mask[end : end + len(ids)] = trained
        end += len(ids)
    return row, mask, [*starts, end] if end < length else starts


def _manifest(
    settings: SftSettings,
    encoder: ChatEncoder,
    writer: row_writer.RowWriter,
    selection: Selection,
    entries: list[dict[str, Any]],
) -> dict[str, Any]:
    columns, total, mix = selection.columns, selection.totals(), settings.mix
    tokenizer, template = encoder.tokenizer, encoder.template
    return {
        "format": FORMAT,
        "kind": "sft",
        "seq_length": settings.seq_length,
        "rows": writer.rows,
        "documents": total["chosen"],
        "tokens": total["tokens"],
        "trained_tokens": total["trained_tokens"],
        "padding": writer.rows * writer.length - total["tokens"],
        "max_token_id": writer.largest,
        "dtype": numpy.dtype(writer.dtype).name,
        "mask": True,
        "document_starts": True,
        "pad_id": encoder.pad_id,
        "max_tokens": settings.longest,
        "long": settings.long,
        "examples": settings.examples,
        "mix": None if mix is None else {name: float(share) for name, share in mix.items()},
        "seed": settings.seed,
        "fit": settings.fit,
        "template": {"name": template.name, "spans": template.spans, "date": settings.date},
        "special_tokens": {
            "encoded_as": settings.special_tokens,
            "spelled_out": sum(entry["special_tokens"] for entry in entries),
        },
        "tokenizer": {
            "name": tokenizer.path.resolve().name,
            "sha256": tokenizer.sha256,
            "encoding_sha256": tokenizer.encoding_sha256,
            "vocab_size": tokenizer.vocab_size,
        },
        "domains": {
            name: {
                "usable": usable,
                "wanted": selection.wanted.get(name, 0),
                **selection.totals(columns.domain == DOMAINS.index(name)),
            }
            for name, usable in selection.available.items()
        },
        "sources": [{**entry, **selection.totals(columns.source == s)} for s, entry in enumerate(entries)],
    }


@contextlib.contextmanager
def _remove_abandoned(stage: Path, output: str) -> Iterator[None]:
    """Hold a lock in the staging folder, and remove those of killed runs of this output: their locks are
    free."""
    with (stage / "new lock").open("w") as own:
        with contextlib.suppress(UserError):  # some network file systems have no locks
            atomic_files.lock(own, "")
        (stage / "new lock").rename(stage / "lock")
        for path in stage.parent.glob(f".{glob.escape(Path(output).name)}.partial-*/lock"):
            if path == stage / "lock":
                continue
            with contextlib.suppress(OSError, UserError), path.open("r+") as other:
                atomic_files.lock(other, "")
                shutil.rmtree(path.parent, ignore_errors=True)
        yield
