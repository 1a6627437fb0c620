"""Instruction data: conversations to rows of exactly S + 1 tokens, with a loss mask and where each
conversation starts.

Whole conversations only, packed best fit, longest first; none crosses a row. What is left of a row is
padding: masked, and a document of its own, so that with data.documents=masked nothing attends to it. Files
are those of row_writer.py; beside them, where records could not be used, PREFIX.broken.jsonl says which and
why. Interrupted, it starts again from the beginning: same input and seed, same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import shutil
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_ultralong.data import conversations, input_files, megatron_index, row_writer
from megatron_ultralong.data.best_fit import best_fit, contents
from megatron_ultralong.data.conversations import DOMAINS, Unusable
from megatron_ultralong.data.packed_rows import FORMAT
from megatron_ultralong.data.permutation import permutation
from megatron_ultralong.data.sft import chat_template, select_examples, tokenise_chat
from megatron_ultralong.data.sft.sample_buffer import Spill
from megatron_ultralong.data.sft.select_examples import Source
from megatron_ultralong.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ultralong.errors import UserError

MAX_TOKENS = 8192
"""Longest example, as the paper's (arXiv 2504.06214): all under 8K tokens."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is made of the conversations."""

    seq_length: int = 8192
    """S; must divide by 2 x cp. A row has one token more, the last one's target."""
    cp: int = 1
    """Context parallel ranks it will be trained on."""
    max_tokens: int | None = None
    """Tokens of the longest example; None = 8192, or S + 1 where that is less."""
    long: Literal["drop", "cut"] = "drop"
    """Longer ones: left out, or cut after the last answer that fits."""
    examples: int | None = None
    """Examples in all; None = all there are."""
    mix: dict[str, Fraction] | None = None
    """Share of each domain; None = as there are."""
    fit: Literal["best", "single"] = "best"
    """Whole conversations together in rows, by best fit; or each in a row of its own, the rest padded."""
    template: str = "auto"
    date: str = chat_template.DATE
    seed: int = 0
    workers: int = 1
    """Processes that encode; the output is the same."""

    def __post_init__(self) -> None:
        for name, value in (
            ("--seq-length", self.seq_length),
            ("--cp", self.cp),
            ("--max-tokens", self.longest),
            ("--workers", self.workers),
            ("--examples", self.examples),
        ):
            if value is not None and value < 1:
                raise UserError(f"{name} {value}: must be at least 1")
        if self.seq_length % (2 * self.cp):
            below = self.seq_length // (2 * self.cp) * 2 * self.cp
            raise UserError(
                f"--seq-length {self.seq_length}: must divide by 2 x CP = {2 * self.cp}; use {below or 2 * self.cp}"
            )
        if self.longest > self.seq_length + 1:
            raise UserError(
                f"--max-tokens {self.longest}: a row holds {self.seq_length} + 1 tokens; use fewer, or a longer --seq-length"
            )
        if self.mix is not None and self.examples is None:
            raise UserError("--mix: say how many with --examples")

    @property
    def longest(self) -> int:
        return min(MAX_TOKENS, self.seq_length + 1) if self.max_tokens is None else self.max_tokens


def prepare(
    sources: Sequence[Source],
    tokenizer_dir: Path,
    output: str,
    settings: Settings,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Write `output`.bin, .idx, .mask.*, .docs.* and .json; returns the manifest. Files of an earlier run are
    replaced, at the end.

    UserError for what a user can mend; then nothing is written. Memory: about 100 bytes an example; its
    tokens wait on the disk.
    """
    size = sum(path.stat().st_size for source in sources for path in source.files)
    tokenizer = load_tokenizer(tokenizer_dir)
    template = chat_template.choose(tokenizer_dir, settings.template, settings.date)
    pad = _pad(tokenizer)
    with row_writer.staged(output) as stage, _alone(stage, output):
        spill = Spill(stage)
        with tqdm(total=size, unit="B", unit_scale=True, desc="encoding", disable=not show_progress) as bar:
            told = _encode(sources, tokenizer, template, settings, spill, bar)
        source, domain, lengths, trained = spill.finish()
        available = {
            name: int((domain == d).sum())
            for d, name in enumerate(DOMAINS)
            if settings.mix or (domain == d).any()
        }
        for name, share in (settings.mix or {}).items():
            if share and not available[name]:
                raise UserError(f"--mix: there is no example of domain {name} in the input")
        wanted = select_examples.quotas(available, settings.examples, settings.mix)
        chosen = select_examples.choose([s.name for s in sources], source, domain, wanted, settings.seed)
        if not len(chosen):
            raise UserError(
                f"nothing to train on: of {sum(t['read'] for t in told)} records none is a conversation of up to "
                f"{settings.longest} tokens{_why(told)}"
            )
        writer = row_writer.RowWriter(
            stage,
            settings.seq_length + 1,
            megatron_index.token_dtype(tokenizer.vocab_size),
            masks=True,
            starts=True,
        )
        _pack(writer, spill, chosen, lengths, pad, settings, show_progress)
        writer.finish()
        spill.remove()

        def totals(of: NDArray[numpy.bool_]) -> dict[str, int]:
            some = chosen[of[chosen]]
            return {
                "chosen": len(some),
                "tokens": int(lengths[some].sum()),
                "trained_tokens": int(trained[some].sum()),
            }

        everything = totals(numpy.ones(len(lengths), bool))
        manifest = {
            "format": FORMAT,
            "kind": "sft",
            "seq_length": settings.seq_length,
            "rows": writer.rows,
            "documents": len(chosen),
            "tokens": everything["tokens"],
            "trained_tokens": everything["trained_tokens"],
            "padding": writer.rows * writer.length - everything["tokens"],
            "max_token_id": writer.largest,
            "dtype": numpy.dtype(writer.dtype).name,
            "mask": True,
            "document_starts": True,
            "pad_id": pad,
            "max_tokens": settings.longest,
            "long": settings.long,
            "examples": settings.examples,
            "mix": None
            if settings.mix is None
            else {name: float(share) for name, share in settings.mix.items()},
            "seed": settings.seed,
            "fit": settings.fit,
            "template": {"name": template.name, "spans": template.spans, "date": settings.date},
            "tokenizer": {
                "name": tokenizer.path.resolve().name,
                "sha256": tokenizer.sha256,
                "vocab_size": tokenizer.vocab_size,
            },
            "domains": {
                name: {
                    "usable": available[name],
                    "wanted": wanted.get(name, 0),
                    **totals(domain == DOMAINS.index(name)),
                }
                for name in available
            },
            "sources": [{**one, **totals(source == s)} for s, one in enumerate(told)],
        }
        row_writer.write_manifest(stage, manifest)
    return manifest


# ---- reading and encoding ----------------------------------------------------------------------


def _encode(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    template: chat_template.Template,
    settings: Settings,
    spill: Spill,
    bar: Any,
) -> list[dict[str, Any]]:
    """Every usable conversation into `spill`; what the manifest says of each source's input."""
    told = [
        {
            "name": source.name,
            "domain": source.domain,
            "form": source.form,
            "files": [_file(path) for path in source.files],
            "read": 0,
            "broken": 0,
            "unsupported": 0,
            "duplicates": 0,
            "too_long": 0,
            "usable": 0,
            "turns_cut": 0,
            "cut_to_length": 0,
        }
        for source in sources
    ]
    counts: list[Counter[str]] = [Counter() for _ in sources]
    owners: deque[tuple[int, int]] = deque()
    """(source, domain) of each conversation that is being encoded, in order."""
    seen: set[bytes] = set()

    def rendered() -> Iterator[chat_template.Rendered]:
        for s, source in enumerate(sources):
            for path in source.files:
                for one in conversations.read(
                    path, source=source.name, domain=source.domain, form=source.form, progress=bar.update
                ):
                    counts[s]["read"] += 1
                    try:
                        if isinstance(one, Unusable):
                            counts[s][one.kind] += 1
                            spill.tell(source.name, one)
                            continue
                        text = template.render(one.messages)
                    except chat_template.NotRendered as error:
                        counts[s]["unsupported"] += 1
                        spill.tell(source.name, Unusable(one.place, "unsupported", str(error)))
                        continue
                    key = _question(one.messages)
                    if key in seen:
                        counts[s]["duplicates"] += 1
                        continue
                    seen.add(key)
                    counts[s]["turns_cut"] += one.turns_cut
                    owners.append((s, DOMAINS.index(one.domain)))
                    yield text

    for ids, trained in tokenise_chat.encode_all(rendered(), tokenizer.backend, settings.workers):
        s, d = owners.popleft()
        keep = len(ids)
        if keep > settings.longest:
            keep = tokenise_chat.fitting(trained, settings.longest) if settings.long == "cut" else 0
            counts[s]["cut_to_length" if keep else "too_long"] += 1
        if keep:
            counts[s]["usable"] += 1
            spill.add(ids[:keep], trained[:keep], s, d)
    return [{**one, **count} for one, count in zip(told, counts, strict=True)]


def _question(messages: Sequence[conversations.Message]) -> bytes:
    """What makes two conversations the same: the first question, but for case and white space."""
    first = next(message.content for message in messages if message.role == "user")
    return hashlib.blake2b(" ".join(first.split()).casefold().encode(), digest_size=16).digest()


def _file(path: Path) -> dict[str, Any]:
    with input_files.opened(path) as file, input_files.readable(path):
        return {
            "path": str(path),
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            "bytes": file.tell(),
        }


def _pad(tokenizer: Tokenizer) -> int:
    """The padding token; the one that ends a turn or a text only where there is no other. It is masked
    anyway."""
    pad, eos = tokenizer.special["pad"], tokenizer.special["eos"]
    if pad is None or pad == eos:
        pad = tokenizer.backend.token_to_id("<|finetune_right_pad_id|>")
    return next((i for i in (pad, eos) if i is not None), 0)


def _why(told: list[dict[str, Any]]) -> str:
    sums = {name: sum(one[name] for one in told) for name in ("broken", "unsupported", "too_long")}
    return "".join(f"; {count} {name.replace('_', ' ')}" for name, count in sums.items() if count)


# ---- rows --------------------------------------------------------------------------------------


def _pack(
    writer: row_writer.RowWriter,
    spill: Spill,
    chosen: NDArray[numpy.int64],
    lengths: NDArray[numpy.int64],
    pad: int,
    settings: Settings,
    show_progress: bool,
) -> None:
    """The chosen conversations as rows, in random order."""
    ends, ids, trained = spill.read()
    bins = contents(
        best_fit(lengths[chosen], writer.length) if settings.fit == "best" else numpy.arange(len(chosen))
    )
    for which in tqdm(
        permutation(len(bins), [settings.seed]),
        unit="row",
        desc="packing",
        disable=not show_progress,
    ):
        row, mask, starts, at = (
            numpy.full(writer.length, pad, numpy.int32),
            numpy.zeros(writer.length, numpy.uint8),
            [],
            0,
        )
        for example in chosen[bins[which]]:
            length, end = lengths[example], ends[example]
            row[at : at + length], mask[at : at + length] = (
                ids[end - length : end],
                trained[end - length : end],
            )
            starts.append(at)
            at += length
        writer.add(row[None], mask[None], [[*starts, at] if at < writer.length else starts])


@contextlib.contextmanager
def _alone(stage: Path, output: str) -> Iterator[None]:
    """Removes staging folders of this output whose process is dead: a live one holds a lock, which its end
    sets free."""
    name = stage / "lock"
    with (stage / "new lock").open("w") as own:
        with contextlib.suppress(
            OSError
        ):  # some network disks have no locks: then nobody's folder looks dead
            fcntl.flock(own, fcntl.LOCK_EX)
        (stage / "new lock").rename(name)
        for path in name.parent.parent.glob(f".{glob.escape(Path(output).name)}.partial-*/lock"):
            if path == name:
                continue
            with contextlib.suppress(OSError), path.open("r+") as other:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path.parent, ignore_errors=True)
        yield
