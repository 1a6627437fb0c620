"""Packed rows in files, and several sets of them blended by weight.

The row of sample number n is a pure function of n and the seed, so that a run resumes from its number of
samples alone. A sample is one row: S + 1 tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from megatron_ultralong.data import row_files
from megatron_ultralong.data.permutation import permutation
from megatron_ultralong.data.row_files import SequenceFile
from megatron_ultralong.data.tokenizer import check_same
from megatron_ultralong.errors import UserError

FORMAT = 1
"""Format version of the manifest: the one written, and the newest one read."""
SAMPLED_BLOCKS = 4
"""Blocks of each file that a rank compares with the manifest's checksums when a run starts."""


class PackedDataset:
    """The rows of PREFIX.bin/.idx, with PREFIX.mask and PREFIX.docs where the manifest has them. Can be
    pickled.

    UserError where a file is missing or truncated, where a row does not have S + 1 tokens, or where there are
    no rows.
    """

    def __init__(self, prefix: str, seq_length: int) -> None:
        self.prefix, self.seq_length = prefix, seq_length
        self.manifest = read_manifest(prefix)
        self._tokens = _open_rows(prefix, seq_length)
        self._mask: SequenceFile | None = None
        self._document_starts: SequenceFile | None = None
        self._vocab_size: int | None = None
        if self.manifest.get("document_starts"):
            self._document_starts = SequenceFile(f"{prefix}.docs")
            self._document_starts.check_size()
            if len(self._document_starts) != len(self._tokens):
                raise UserError(f"{prefix}.docs does not belong to {prefix}; prepare the data again")
        if self.manifest.get("mask"):
            self._mask = _open_rows(f"{prefix}.mask", seq_length)
            if len(self._mask) != len(self._tokens) or self._mask.dtype != numpy.uint8:
                raise UserError(f"{prefix}.mask does not belong to {prefix}; prepare the data again")

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def dtype(self) -> numpy.dtype[Any]:
        """Of the tokens in the file."""
        return self._tokens.dtype

    def __getitem__(self, row: int) -> tuple[NDArray[Any], NDArray[numpy.uint8] | None]:
        """(tokens [S + 1], whether each counts as a target [S + 1] or None where all do). UserError where
        they cannot be read, or are none of these."""
        tokens, mask = self._tokens[row], None if self._mask is None else self._mask[row]
        if self._vocab_size is not None and not 0 <= tokens.min() <= tokens.max() < self._vocab_size:
            wrong = next(int(x) for x in tokens if not 0 <= x < self._vocab_size)
            raise UserError(
                f"{self.prefix}.bin, row {row}: token id {wrong} is outside the vocabulary of {self._vocab_size}; "
                "the file was changed: prepare the data again"
            )
        if mask is not None and mask.max() > 1:
            raise UserError(
                f"{self.prefix}.mask.bin, row {row}: contains {mask.max()}, but a mask is 0 or 1; prepare the data again"
            )
        return tokens, mask

    def document_starts(self, row: int) -> list[int]:
        """Where documents start among the S + 1 tokens of a row, 0 first. UserError where PREFIX.docs is not
        part of the data."""
        if self._document_starts is None:
            raise UserError(
                f"{self.prefix} has no document starts, which data.documents=masked requires; prepare it with --document-starts"
            )
        starts = self._document_starts[row]
        if starts[0] != 0 or (numpy.diff(starts) <= 0).any() or starts[-1] > self.seq_length:
            raise UserError(
                f"{self.prefix}.docs.bin, row {row}: starts of documents are not ascending within the row from 0 on; "
                "prepare the data again"
            )
        return [int(start) for start in starts]

    def check_files(self, sample: int | None = None, seed: int = 0) -> bool:
        """Compare the files with the manifest's checksums: all of them, or a random sample of their blocks.
        False where the manifest has none. UserError where they differ."""
        recorded = self.manifest.get("checksums")
        if recorded is not None:
            row_files.check(self.prefix, recorded, sample, seed)
        return recorded is not None

    def check_vocabulary(self, vocab_size: int) -> None:
        """UserError where a row contains an id that a model with `vocab_size` embeddings does not have; from
        now on, each row that is read is checked too."""
        self._vocab_size = vocab_size
        largest = self.manifest["max_token_id"]
        if largest >= vocab_size:
            tokenizer = self.manifest.get("tokenizer", {}).get("name", "another tokenizer")
            raise UserError(
                f"{self.prefix} contains token id {largest}, but the model has a vocabulary of {vocab_size}; "
                f"it was made with {tokenizer}: prepare the data again with the model's own tokenizer"
            )


class BlendedDataset:
    """One or several packed datasets. Among the first n samples, for any n, each has its share by weight to
    within a few samples.

    Every row of a dataset is used once, in shuffled order, before one is used again.
    """

    def __init__(
        self,
        datasets: Sequence[PackedDataset],
        weights: Sequence[Fraction] | None = None,
        block_size: int = 1,
    ) -> None:
        """block_size: consecutive samples that are drawn from one dataset."""
        self.block_size = block_size
        self.datasets = list(datasets)
        self.weights = list(weights or [Fraction(1)] * len(self.datasets))
        assert self.datasets and len(self.datasets) == len(self.weights) and min(self.weights) > 0
        self.seq_length = self.datasets[0].seq_length

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.datasets)

    def locate(self, sample: int, seed: int, shuffle: bool = True) -> tuple[int, int]:
        """(dataset, row) of sample number `sample`, counted from 0 over all ranks."""
        which, number = self._share(sample)
        epoch, place = divmod(number, len(self.datasets[which]))
        if not shuffle:
            return which, place
        return which, int(_order(len(self.datasets[which]), seed, which, epoch)[place])

    def identity(self) -> list[dict[str, Any]]:
        """What the datasets are, independent of their paths: weight, rows and the hash of each manifest."""
        return [
            {
                "weight": str(weight),
                "rows": len(dataset),
                "manifest": hashlib.sha256(json.dumps(dataset.manifest, sort_keys=True).encode()).hexdigest(),
            }
            for weight, dataset in zip(self.weights, self.datasets, strict=True)
        ]

    def first(self, count: int) -> list[tuple[int, int]]:
        """(dataset, row) of `count` different rows (all, if fewer): the first ones of each dataset, by
        weight. Not shuffled."""
        taken = [0] * len(self.datasets)
        first: list[tuple[int, int]] = []
        while len(first) < min(count, len(self)):
            unfinished = [k for k, dataset in enumerate(self.datasets) if taken[k] < len(dataset)]
            which = min(unfinished, key=lambda k: (taken[k] + 1) / self.weights[k])
            first.append((which, taken[which]))
            taken[which] += 1
        return first

    def epoch(self, samples: int) -> int:
        """Complete passes, after `samples` samples, over the dataset that is repeated most."""
        left, weight, passes = samples // self.block_size, sum(self.weights, Fraction(0)), 0
        for dataset, own in zip(self.datasets, self.weights, strict=True):
            taken = _rounded_share(left, own, weight)
            passes = max(passes, taken * self.block_size // len(dataset))
            left, weight = left - taken, weight - own
        return passes

    def _share(self, sample: int) -> tuple[int, int]:
        """(dataset, number within it) of a sample: the one dataset whose count the sample raises.

        Each dataset takes its share of what those before it left.
        """
        left, place = divmod(sample, self.block_size)
        weight = sum(self.weights, Fraction(0))
        for which, own in enumerate(self.weights):
            taken = _rounded_share(left, own, weight)
            if _rounded_share(left + 1, own, weight) > taken:
                return which, taken * self.block_size + place
            left, weight = left - taken, weight - own
        raise AssertionError("the last dataset takes what is left")


def open_blend(
    arguments: list[str],
    seq_length: int,
    vocab_size: int,
    document_starts: bool = False,
    tokenizer: Path | None = None,
    block_size: int = 1,
) -> BlendedDataset:
    """Open the rows that `--data` or `--valid` name.

    document_starts: they must have them. tokenizer: the directory of the model's tokenizer, with which they
    must have been made (None = any). block_size: as in `BlendedDataset`. UserError where one of these fails,
    or the rows do not fit the sequence length or the vocabulary; a line is printed where the tokenizer cannot
    be told.
    """
    named = parse_data_arguments(arguments)
    datasets = [PackedDataset(prefix, seq_length) for _, prefix in named]
    for dataset in datasets:
        # Another sample on each rank and at each start.
        rank = int(os.environ.get("RANK", "0"))
        dataset.check_files(SAMPLED_BLOCKS, seed=time.time_ns() + rank)
        note = None if tokenizer is None else check_same(tokenizer, dataset.prefix, dataset.manifest)
        if note is not None and rank == 0:
            print(note, file=sys.stderr)
        dataset.check_vocabulary(vocab_size)
        if dataset.manifest.get("trained_tokens") == 0:
            raise UserError(f"{dataset.prefix} contains no token to train on; prepare the data again")
        if document_starts:
            dataset.document_starts(0)
    return BlendedDataset(datasets, [weight for weight, _ in named], block_size)


def parse_data_arguments(arguments: list[str]) -> list[tuple[Fraction, str]]:
    """Parse `PREFIX` or `WEIGHT PREFIX WEIGHT PREFIX ...` to (weight, prefix) pairs. Weights are relative and
    above 0."""
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
            raise UserError(
                f"data: weight {text} of {prefix} must be above 0; to leave the data out, do not name it"
            )
        pairs.append((weight, prefix))
    if len({prefix for _, prefix in pairs}) < len(pairs):
        raise UserError("data: a prefix is named twice; name it once, with the sum of its weights")
    return pairs


def _rounded_share(samples: int, own: Fraction, weight: Fraction) -> int:
    """samples x own / weight, rounded exactly: one more sample adds 0 or 1."""
    return int((2 * samples * own + weight) // (2 * weight))


@lru_cache(maxsize=16)
def _order(rows: int, seed: int, which: int, epoch: int) -> NDArray[numpy.int64]:
    """The order of a dataset's rows in one epoch, int64 [rows]."""
    return permutation(rows, [seed, which, epoch])


# ---- files -------------------------------------------------------------------------------------


def read_manifest(prefix: str) -> dict[str, Any]:
    """The manifest of packed rows. UserError where it is missing, or is none."""
    path = Path(f"{prefix}.json")
    if prefix.endswith((".bin", ".idx", ".json")) and Path(prefix).is_file():
        raise UserError(f"data {prefix}: give the prefix without {Path(prefix).suffix}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        number = manifest["format"]
        if not isinstance(number, int) or not isinstance(manifest["max_token_id"], int):
            raise TypeError
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; make packed rows with `ultralong prepare`, which writes this file last"
        ) from None
    except OSError as error:
        raise UserError(f"data {prefix}: {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"data {prefix}: {path} is not a manifest; make packed rows with `ultralong prepare`"
        ) from None
    if number > FORMAT:
        raise UserError(
            f"data {prefix}: unsupported format version {number} (expected {FORMAT} or less); it was written by a newer version"
        )
    return manifest


def _open_rows(prefix: str, seq_length: int) -> SequenceFile:
    """The rows of PREFIX.bin/.idx, all of seq_length + 1 numbers. UserError where they are damaged, or of
    another length."""
    rows = SequenceFile(prefix)
    wrong = rows.first_length_other_than(seq_length + 1)
    if wrong is not None:
        raise UserError(
            f"{prefix} has rows of {wrong} tokens, but sequence length {seq_length} requires {seq_length + 1}; "
            f"repack it: ultralong prepare pretrain --seq-length {seq_length}"
        )
    rows.check_size()
    return rows
