"""Packed rows as files hold them, and several sets of them blended by weight.

Which row is sample number n is a pure function of n and the seed, so that a run goes on anywhere by its
number of samples alone. A sample is one row: S + 1 tokens.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from megatron_ultralong.errors import UserError

FORMAT = 1
"""Version of the manifest that this version writes, and the newest it reads."""
_HEADER = struct.Struct("<9sQBQQ")
"""How a Megatron index begins: magic, version, number type, rows, documents + 1."""


class PackedRows:
    """The rows of PREFIX.bin/.idx, memory-mapped; with PREFIX.mask where there is one. Can be sent to another
    process.

    UserError where a file is missing or cut short, where a row is not S + 1 tokens, and where there is no
    row.
    """

    def __init__(self, prefix: str, seq_length: int) -> None:
        self.prefix, self.seq_length = prefix, seq_length
        self.manifest = _manifest(prefix)
        self._tokens = _indexed(prefix, seq_length)
        self._mask, self._starts = None, None
        if self.manifest.get("document_starts"):
            self._starts = _open(f"{prefix}.docs")
            if len(self._starts) != len(self._tokens):
                raise UserError(f"{prefix}.docs does not belong to {prefix}; prepare the data again")
        if self.manifest.get("mask"):
            self._mask = _indexed(f"{prefix}.mask", seq_length)
            if len(self._mask) != len(self._tokens) or self._mask.index.dtype != numpy.uint8:
                raise UserError(f"{prefix}.mask does not belong to {prefix}; prepare the data again")

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, row: int) -> tuple[NDArray[Any], NDArray[numpy.uint8] | None]:
        """(tokens [S + 1], whether each counts as a target [S + 1] or None where all do)."""
        return self._tokens[row], None if self._mask is None else self._mask[row]

    def starts(self, row: int) -> list[int]:
        """Where documents start among the S + 1 tokens of a row, 0 first. UserError where the set does not
        say."""
        if self._starts is None:
            raise UserError(
                f"{self.prefix} does not say where its documents start, which data.documents=masked needs; prepare it with "
                "--document-starts"
            )
        return [int(start) for start in self._starts[row]]

    def check_vocabulary(self, vocab_size: int) -> None:
        """UserError where a row holds an id that a model with `vocab_size` embeddings does not have."""
        largest = self.manifest["max_token_id"]
        if largest >= vocab_size:
            tokenizer = self.manifest.get("tokenizer", {}).get("name", "another tokenizer")
            raise UserError(
                f"{self.prefix} holds token id {largest}, but the model has a vocabulary of {vocab_size}; "
                f"it was made with {tokenizer}: prepare the data again with the model's own tokenizer"
            )


class Rows:
    """One or several sets of packed rows. Of any n first samples, each set gives its share of the weights
    (but for some samples).

    Every row of a set is given once, in shuffled order, before one is given again.
    """

    def __init__(self, sets: Sequence[PackedRows], weights: Sequence[Fraction] | None = None) -> None:
        self.sets = list(sets)
        self.weights = list(weights or [Fraction(1)] * len(self.sets))
        assert self.sets and len(self.sets) == len(self.weights) and min(self.weights) > 0
        self.seq_length = self.sets[0].seq_length

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.sets)

    def locate(self, sample: int, seed: int, shuffle: bool = True) -> tuple[int, int]:
        """(set, row) of sample number `sample`, counted from 0 over all ranks."""
        which, number = self._share(sample)
        epoch, place = divmod(number, len(self.sets[which]))
        if not shuffle:
            return which, place
        return which, int(_order(len(self.sets[which]), seed, which, epoch)[place])

    def identity(self) -> list[dict[str, Any]]:
        """What the sets are, wherever they lie: of each its weight, rows and the hash of its manifest."""
        return [
            {
                "weight": str(weight),
                "rows": len(rows),
                "manifest": hashlib.sha256(json.dumps(rows.manifest, sort_keys=True).encode()).hexdigest(),
            }
            for weight, rows in zip(self.weights, self.sets, strict=True)
        ]

    def first(self, count: int) -> list[tuple[int, int]]:
        """(set, row) of `count` different rows (of all, if fewer): the first ones of each set, by weight. No
        shuffling."""
        taken = [0] * len(self.sets)
        found: list[tuple[int, int]] = []
        while len(found) < min(count, len(self)):
            open_sets = [k for k, rows in enumerate(self.sets) if taken[k] < len(rows)]
            which = min(open_sets, key=lambda k: (taken[k] + 1) / self.weights[k])
            found.append((which, taken[which]))
            taken[which] += 1
        return found

    def epoch(self, samples: int) -> int:
        """Whole passes done after `samples` samples over the set most repeated."""
        done = [0] * len(self.sets)
        if samples:
            for which, number in self._counts(samples):
                done[which] = number // len(self.sets[which])
        return max(done)

    def _counts(self, samples: int) -> list[tuple[int, int]]:
        """(set, how many of the first `samples` samples it gives). Each set takes its share of what those
        before it left."""
        counts, left, weight = [], samples, sum(self.weights, Fraction(0))
        for which, own in enumerate(self.weights):
            taken = _part(left, own, weight)
            counts.append((which, taken))
            left, weight = left - taken, weight - own
        return counts

    def _share(self, sample: int) -> tuple[int, int]:
        """(set, number within it) of a sample: the one set whose count the sample raises."""
        left, weight = sample, sum(self.weights, Fraction(0))
        for which, own in enumerate(self.weights):
            taken = _part(left, own, weight)
            if _part(left + 1, own, weight) > taken:
                return which, taken
            left, weight = left - taken, weight - own
        raise AssertionError("the last set takes all that is left")


def open_blend(arguments: list[str], seq_length: int, vocab_size: int, masked: bool = False) -> Rows:
    """The rows that `--data` or `--valid` name. UserError where they do not fit the sequence length or the
    vocabulary, or do not say where documents start though attention is to be `masked`."""
    named = parse_data_arguments(arguments)
    sets = [PackedRows(prefix, seq_length) for _, prefix in named]
    for rows in sets:
        rows.check_vocabulary(vocab_size)
        if masked:
            rows.starts(0)
    return Rows(sets, [weight for weight, _ in named])


def parse_data_arguments(arguments: list[str]) -> list[tuple[Fraction, str]]:
    """`PREFIX` or `WEIGHT PREFIX WEIGHT PREFIX ...` as (weight, prefix); weights are relative to each other
    and above 0."""
    if len(arguments) == 1:
        return [(Fraction(1), arguments[0])]
    if not arguments or len(arguments) % 2:
        raise UserError(
            f"data: {' '.join(arguments) or 'nothing'}: expected PREFIX, or WEIGHT PREFIX WEIGHT PREFIX ..."
        )
    pairs = []
    for text, prefix in zip(arguments[::2], arguments[1::2], strict=True):
        try:
            weight = Fraction(text)
        except (ValueError, ZeroDivisionError):
            raise UserError(f"data: {text}: expected a weight before {prefix}, like 0.7") from None
        if weight <= 0:
            raise UserError(f"data: weight {text} of {prefix} must be above 0; leave the set out instead")
        pairs.append((weight, prefix))
    if len({prefix for _, prefix in pairs}) < len(pairs):
        raise UserError("data: a set is named twice; name it once, with the sum of its weights")
    return pairs


def _part(samples: int, own: Fraction, weight: Fraction) -> int:
    """samples x own / weight, rounded exactly: one more sample adds 0 or 1."""
    return int((2 * samples * own + weight) // (2 * weight))


@lru_cache(maxsize=16)
def _order(rows: int, seed: int, which: int, epoch: int) -> NDArray[numpy.int64]:
    """A permutation of the rows, int64 [rows]. numpy keeps raw random bits the same in all versions, but not
    its own shuffles."""
    bits = numpy.random.PCG64(numpy.random.SeedSequence([seed, which, epoch])).random_raw(rows)
    return numpy.argsort(bits, kind="stable")


# ---- files -------------------------------------------------------------------------------------


def _manifest(prefix: str) -> dict[str, Any]:
    path = Path(f"{prefix}.json")
    if prefix.endswith((".bin", ".idx", ".json")) and Path(prefix).is_file():
        raise UserError(f"data {prefix}: give the prefix without {Path(prefix).suffix}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        number = manifest["format"]
        if not isinstance(number, int) or not isinstance(manifest["max_token_id"], int):
            raise TypeError("format and max_token_id must be numbers")
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; make packed rows with tools/prepare_data.py (it writes that file last)"
        ) from None
    except OSError as error:
        raise UserError(f"data {prefix}: {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"data {prefix}: {path} is no manifest; make packed rows with tools/prepare_data.py"
        ) from None
    if number > FORMAT:
        raise UserError(
            f"data {prefix}: written by a newer version (format {number}, this one reads up to {FORMAT})"
        )
    return manifest


def _open(prefix: str) -> Any:
    """Megatron's IndexedDataset over PREFIX.bin/.idx; UserError where it is not that."""
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    try:
        for path in (data, index):
            with path.open("rb") as file:
                header = file.read(_HEADER.size)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if not header.startswith(b"MMIDIDX\x00\x00") or len(header) < _HEADER.size:
        raise UserError(f"{index} is not a Megatron index; prepare the data again")
    _, _, _, count, documents = _HEADER.unpack(header)
    if count == 0 or data.stat().st_size == 0:
        raise UserError(f"{prefix} holds no rows; prepare the data again")
    if index.stat().st_size < _HEADER.size + 12 * count + 8 * documents:
        raise UserError(f"{index} was cut short; prepare the data again")

    from megatron.core.datasets.indexed_dataset import IndexedDataset

    try:
        return IndexedDataset(prefix)
    except (AssertionError, ValueError, KeyError, OSError) as error:
        raise UserError(
            f"{index} cannot be read: {error or type(error).__name__}; prepare the data again"
        ) from None


def _indexed(prefix: str, seq_length: int) -> Any:
    """As `_open`, with rows of seq_length + 1 tokens."""
    from megatron.core.datasets.indexed_dataset import DType

    rows = _open(prefix)
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    wrong = numpy.flatnonzero(rows.sequence_lengths != seq_length + 1)
    if len(wrong):
        found = rows.sequence_lengths[wrong[0]]
        raise UserError(
            f"{prefix} has rows of {found} tokens, but sequence length {seq_length} needs {seq_length + 1}; "
            f"repack it: tools/prepare_data.py pretrain --seq-length {seq_length}"
        )
    if data.stat().st_size != len(rows) * (seq_length + 1) * DType.size(rows.index.dtype):
        raise UserError(f"{data} is not as long as {index.name} says; prepare the data again")
    return rows
