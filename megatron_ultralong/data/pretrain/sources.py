"""What pretraining data is made from: files, directories and globs, as named sources with weights and rates
by length of document.

The YAML file of `--sources` (only `sources` and `input` are required):

    tokens: 1B                # tokens in total, without separators; B is 10^9
    seed: 0
    max_repeats: 4            # how often a document may be used
    shuffle: true             # documents in random order
    rates: {<4K: 0.25, 4K-8K: 1, ">=8K": 3}     # default of all sources; or shares: {...}
    sources:
      books:
        input: [data/books, data/more/*.jsonl.zst]
        weight: 0.7           # share of the tokens, relative to the other sources
        text_key: body
        id_key: name
        shares: {<8K: 0.2, ">=8K": 0.8}
      code: {input: corpus.idx, weight: 0.3, strip_id: 128001}   # strip_id: see DocumentSource
      chats: {input: chats.jsonl, special_tokens: control}   # spelled-out special tokens; default: text
"""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

from megatron_ultralong.data import documents, input_files, row_writer
from megatron_ultralong.data.pretrain.length_buckets import LengthBuckets, parse_bucket
from megatron_ultralong.data.special_tokens import SpecialTokenMode
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import yaml_file

MAX_REPEATS = 4
"""How often a document may be used by default: for up to four epochs, repeated tokens are about as good as
new ones (arXiv 2305.16264)."""


@dataclass(frozen=True, kw_only=True)
class DocumentSource:
    """Documents of one kind."""

    name: str
    files: tuple[Path, ...]
    text_key: str = "text"
    id_key: str | None = None
    weight: Fraction | None = None
    """Share of the tokens, relative to the other sources; None = as its documents and rates give."""
    lengths: LengthBuckets | None = None
    """None = every document once."""
    folders: tuple[Path, ...] = ()
    """Directories that were searched for the files."""
    strip_id: int | None = None
    """Token removed from the end of a Megatron corpus's documents, such as its end of document."""
    special_tokens: SpecialTokenMode = "text"
    """What special tokens spelled out in its texts become."""


@dataclass(frozen=True, kw_only=True)
class DocumentMix:
    """All sources, and how they are mixed."""

    sources: tuple[DocumentSource, ...]
    tokens: int | None = None
    """Tokens in total; None = as weights and rates give."""
    max_repeats: int = MAX_REPEATS
    shuffle: bool = False
    seed: int = 0

    @property
    def resampled(self) -> bool:
        """Whether documents may be used more or less than once."""
        return self.tokens is not None or any(s.lengths or s.weight for s in self.sources)

    @property
    def files(self) -> list[Path]:
        """The files of all sources, in order."""
        return [path for source in self.sources for path in source.files]


def from_inputs(
    inputs: list[Path],
    text_key: str = "text",
    id_key: str | None = None,
    special_tokens: SpecialTokenMode = "text",
) -> DocumentMix:
    """`--input`: files, directories and globs as one source, every document once, in order."""
    source = DocumentSource(
        name="input",
        files=expand(inputs),
        text_key=text_key,
        id_key=id_key,
        folders=tuple(path for path in inputs if path.is_dir()),
        special_tokens=special_tokens,
    )
    return DocumentMix(sources=(source,))


def expand(inputs: Iterable[Path], what: str = "--input") -> tuple[Path, ...]:
    """The files that paths, directories (all files of known kinds below, sorted) and globs name. UserError
    for one that names no file. what: the option or key, for messages."""
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside = [p for p in input_files.files_below(path) if _known(p)]
            if not inside:
                raise UserError(
                    f"{what} {path}: contains no .txt, .jsonl (also .gz, .zst), .parquet or .idx file"
                )
            files += inside
        elif not path.exists() and glob.has_magic(str(path)):
            matched = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
            if not matched:
                raise UserError(f"{what} {path}: no file matches")
            files += matched
        else:
            files.append(path.with_suffix(".idx") if path.suffix == ".bin" else path)
    for path in files:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{what} {input_files.printable(str(path))}: the file's name is not UTF-8; rename it"
            ) from None
        if documents.kind(path) == ".idx":
            _not_packed(path)
    documents.check(files)
    seen: set[Path] = set()
    for path in files:
        if path.resolve() in seen:
            raise UserError(
                f"{what} {path}: is named twice; to use documents more often, set rates in a --sources file"
            )
        seen.add(path.resolve())
    return tuple(files)


def load(path: Path) -> DocumentMix:
    """Read the file of `--sources`; paths in it are relative to its folder. UserError, which names the key,
    for anything unknown in it."""
    values = yaml_file.read(path, "--sources")
    reader = _SourcesFile(path)
    values = reader.mapping(
        values, "the file", {"tokens", "seed", "max_repeats", "shuffle", "rates", "shares", "sources"}
    )
    default_lengths = reader.lengths(values, "")
    entries = values.get("sources")
    if not isinstance(entries, dict) or not entries:
        raise reader.wrong("sources", "must have at least one name with its input")
    if len({str(name) for name in entries}) < len(entries):
        raise reader.wrong("sources", "has two sources of the same name")
    sources = tuple(reader.source(str(name), entry, default_lengths) for name, entry in entries.items())
    if len({s.weight is None for s in sources}) > 1:
        without = next(s.name for s in sources if s.weight is None)
        raise reader.wrong(
            f"sources.{without}", "has no weight, but others have; give every source a weight, or none"
        )
    return DocumentMix(
        sources=sources,
        tokens=reader.tokens(values.get("tokens")),
        max_repeats=reader.integer(values, "max_repeats", MAX_REPEATS, 1),
        shuffle=reader.flag(values, "shuffle", True),
        seed=reader.integer(values, "seed", 0, 0),
    )


@dataclass(frozen=True)
class _SourcesFile:
    """Checked values of one file."""

    path: Path

    def wrong(self, key: str, what: str) -> UserError:
        return UserError(f"--sources {self.path}: {key} {what}")

    def mapping(self, value: Any, what: str, known: set[str]) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.wrong(what, f"must have keys like {', '.join(sorted(known))}")
        for key in value:
            if key not in known:
                raise self.wrong(f"{key} in {what}", f"is unknown; known are {', '.join(sorted(known))}")
        return value

    def integer(self, values: dict[str, Any], key: str, default: int, least: int) -> int:
        value = values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.wrong(key, f"must be a whole number of at least {least}")
        return value

    def flag(self, values: dict[str, Any], key: str, default: bool) -> bool:
        value = values.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "must be true or false")
        return value

    def tokens(self, value: Any) -> int | None:
        """1000000 or 1B; None = not set."""
        if value is None:
            return None
        try:
            return parse_tokens(str(value))
        except UserError as error:
            raise self.wrong("tokens", str(error)) from None

    def source(self, name: str, entry: Any, default: LengthBuckets | None) -> DocumentSource:
        what = f"sources.{name}"
        known = {"input", "weight", "text_key", "id_key", "rates", "shares", "strip_id", "special_tokens"}
        values = self.mapping(entry, what, known)
        inputs = values.get("input")
        inputs = [inputs] if isinstance(inputs, str) else inputs
        if not isinstance(inputs, list) or not inputs or not all(isinstance(text, str) for text in inputs):
            raise self.wrong(f"{what}.input", "must be a file, directory or glob, or a list of them")
        paths = [self._resolve(text) for text in inputs]
        files = expand(paths, f"--sources {self.path}: {what}.input")
        weight = None if values.get("weight") is None else _number(values["weight"])
        if weight is not None and not 0 < weight < 1e12:
            raise self.wrong(
                f"{what}.weight", "must be a number above 0; leave the source out instead of weight 0"
            )
        for key in ("text_key", "id_key"):
            if not isinstance(values.get(key, ""), str):
                raise self.wrong(f"{what}.{key}", "must be a name")
        special_tokens = values.get("special_tokens", "text")
        if special_tokens not in get_args(SpecialTokenMode):
            raise self.wrong(f"{what}.special_tokens", "must be text or control")
        return DocumentSource(
            name=name,
            files=files,
            text_key=values.get("text_key", "text"),
            id_key=values.get("id_key"),
            weight=None if weight is None else Fraction(str(weight)),
            lengths=self.lengths(values, f"{what}.") or default,
            folders=tuple(path for path in paths if path.is_dir()),
            strip_id=self.integer(values, "strip_id", 0, 0) if "strip_id" in values else None,
            special_tokens=special_tokens,
        )

    def _resolve(self, text: str) -> Path:
        """A path or glob of the file, relative to its folder, whose own name is not a glob."""
        path = Path(text).expanduser()
        if path.is_absolute() or not glob.has_magic(text):
            return self.path.parent / path
        return Path(glob.escape(str(self.path.parent))) / path

    def lengths(self, values: dict[str, Any], what: str) -> LengthBuckets | None:
        given = [key for key in ("rates", "shares") if key in values]
        if len(given) > 1:
            raise self.wrong(f"{what}rates", "and shares exclude each other; give one of them")
        if not given:
            return None
        key = given[0]
        buckets = values[key]
        if not isinstance(buckets, dict) or not buckets:
            raise self.wrong(f"{what}{key}", 'must be like {<4K: 0.25, 4K-8K: 1, ">=8K": 3}')
        parsed = []
        for name, value in buckets.items():
            if not 0 <= _number(value) < 1e12:
                raise self.wrong(f"{what}{key}, {name}:", "must be a number of at least 0")
            bounds = parse_bucket(str(name))
            if bounds is None:
                raise self.wrong(
                    f"{what}{key}, {name}:",
                    'is not a bucket of lengths; write <4K, 4K-8K, ">=8K" or all',
                )
            parsed.append((*bounds, _number(value)))
        parsed.sort()
        borders = [0.0, *(last for _, last, _ in parsed)]
        if borders[-1] != math.inf or any(
            first != border for (first, _, _), border in zip(parsed, borders, strict=False)
        ):
            raise self.wrong(
                f"{what}{key}",
                f"must cover every length once, from <N to >=N, not {', '.join(map(str, buckets))}",
            )
        if not sum(value for *_, value in parsed) > 0:
            raise self.wrong(f"{what}{key}", "must not all be 0")
        return LengthBuckets(
            edges=tuple(int(last) for _, last, _ in parsed[:-1]),
            values=tuple(value for *_, value in parsed),
            shares=key == "shares",
        )


def parse_tokens(text: str) -> int:
    """A number of tokens: a whole number, or billions (10^9) like 1B or 0.5B."""
    match = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)([Bb]?)", text)
    size = Fraction(match[1].replace("_", "")) * (10**9 if match[2] else 1) if match else Fraction(0)
    if size < 1 or size.denominator != 1:
        raise UserError(f"must be a whole number of tokens, like 500_000_000 or 0.5B, not {text}")
    return int(size)


def _known(path: Path) -> bool:
    try:
        kind = documents.kind(path)
    except UserError:
        return False
    return kind != ".idx" or not path.name.endswith((".mask.idx", ".docs.idx"))


def _number(value: Any) -> float:
    """A number; NaN for anything else. YAML reads 1e-3 as text."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _not_packed(path: Path) -> None:
    if row_writer.is_manifest(path.with_suffix(".json")):
        raise UserError(
            f"{path}: contains packed rows, not documents; give the documents they were made from"
        )
