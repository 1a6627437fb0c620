"""Checksums of a checkpoint: of each file, and of each tensor whatever the layout (tensor_sums.py).

`checksums.json` is written with the checkpoint: size and SHA-256 of all its other files, and the sums of its
tensors. A checkpoint of another program has none; then only what its index refers to is compared with the
sizes of its files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_ultralong.checkpoint import torch_index
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files
from megatron_ultralong.runtime import agreement

FILE = "checksums.json"
FORMAT = 1
ALGORITHM = "sha256"
_WRITER = re.compile(r"__(\d+)_")
"""Beginning of the names of Megatron's data files: the rank that writes it."""
_SMALL = 1 << 20
"""Bytes of a file that is hashed before the ranks start, when each rank checks for itself."""


@dataclass(frozen=True, kw_only=True)
class FileSum:
    """Of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Checksums:
    """Contents of checksums.json."""

    files: dict[str, FileSum]
    """By path relative to the checkpoint."""
    tensors: dict[str, str]
    """Tensor -> its sum (`tensor_sums.Sums`)."""


# ---- writing -----------------------------------------------------------------------------------


def hash_file(file: Path) -> FileSum:
    """OSError where it cannot be read."""
    with file.open("rb") as opened:
        return FileSum(
            sha256=hashlib.file_digest(opened, ALGORITHM).hexdigest(), bytes=os.fstat(opened.fileno()).st_size
        )


def hash_own(folder: Path) -> dict[str, FileSum]:
    """Hash the data files that this rank has written in a checkpoint's folder, which its host may still have
    in memory. UserError where one cannot be read back."""
    rank = torch.distributed.get_rank()
    mine = [name for name in files_of(folder) if (match := _WRITER.match(name)) and int(match[1]) == rank]
    return {name: _hash_back(folder, name) for name in mine}


def hash_written(folder: Path, mine: Mapping[str, FileSum]) -> dict[str, FileSum]:
    """Return the sums of all files of a checkpoint just written; every rank calls it. mine: `hash_own` of
    this rank. UserError, on every rank, where a file cannot be read back."""
    # On a network file system a rank may not see yet what another host has just written.
    sums = {name: found for part in agreement.gather(mine) for name, found in part.items()}
    rest = agreement.on_main_rank(
        lambda: {name: _hash_back(folder, name) for name in files_of(folder) if name not in sums}
    )
    return sums | rest


def _hash_back(folder: Path, name: str) -> FileSum:
    try:
        return hash_file(folder / name)
    except OSError as error:
        raise UserError(
            f"checkpoint {folder} cannot be written: {name} cannot be read back: {error.strerror or error}"
        ) from None


def _hash_on_all_ranks(folder: Path, owners: Mapping[str, int]) -> dict[str, FileSum | str]:
    """Hash files on the ranks given; every rank calls it and gets all results. A text instead of a sum says
    why a file could not be read."""
    rank = torch.distributed.get_rank()
    mine: dict[str, FileSum | str] = {}
    for name, owner in owners.items():
        if owner == rank:
            try:
                mine[name] = hash_file(folder / name)
            except OSError as error:
                mine[name] = error.strerror or str(error)
    return {name: found for part in agreement.gather(mine) for name, found in part.items()}


def files_of(folder: Path) -> list[str]:
    """The files of a checkpoint except checksums.json, relative to it, sorted."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != FILE)


def write(folder: Path, files: Mapping[str, FileSum], tensors: Mapping[str, str]) -> None:
    """Write checksums.json. UserError where it cannot be written."""
    values = {
        "format": FORMAT,
        "algorithm": ALGORITHM,
        "files": {name: {"bytes": one.bytes, "sha256": one.sha256} for name, one in sorted(files.items())},
        "tensors": dict(sorted(tensors.items())),
    }
    atomic_files.write_json(folder / FILE, {**values, "sha256": _of_itself(values)})


def _of_itself(values: dict[str, Any]) -> str:
    """The checksum of checksums.json."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# ---- verifying ---------------------------------------------------------------------------------


def read(folder: Path) -> Checksums | None:
    """None where the checkpoint has none. UserError where they cannot be read."""
    file = folder / FILE
    if not file.is_file():
        return None
    values = atomic_files.read_json(file)
    if values.pop("sha256", None) != _of_itself(values):
        raise UserError(f"{file} does not match its own checksum")
    try:
        if values["format"] != FORMAT or values["algorithm"] != ALGORITHM:
            raise UserError(f"{file}: unsupported format; use the release that wrote it")
        return Checksums(
            files={str(name): FileSum(**one) for name, one in values["files"].items()},
            tensors={str(name): str(one) for name, one in values["tensors"].items()},
        )
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{file} cannot be read: it has been changed") from None


def fault_at_start(folder: Path) -> str | None:
    """What is wrong with a checkpoint as far as names, sizes and its small files tell, in one line; None =
    nothing found. Each rank may call it by itself. UserError where a file is there but cannot be read, which
    is no damage."""
    try:
        if not (folder / "metadata.json").is_file():
            return "metadata.json is missing"
        if not (folder / FILE).is_file():
            return f"{FILE} is missing" if recorded(folder) else torch_index.fault(folder)
        (folder / FILE).read_bytes()  # OSError where it cannot be read now, which is no damage
        sums = read(folder)
    except UserError as error:
        return str(error).replace(f"{folder}/", "")
    except OSError as error:
        raise _unreadable(folder, error) from None
    assert sums is not None
    for name, expected in sums.files.items():
        try:
            fault = _size_fault(folder / name, name, expected)
            if fault is None and expected.bytes <= _SMALL:
                fault = _hash_fault(name, expected, hash_file(folder / name))
        except OSError as error:
            raise _unreadable(folder / name, error) from None
        if fault is not None:
            return fault
    return None


def fault_on_all_ranks(folder: Path) -> str | None:
    """What is wrong with a checkpoint, all of its files read and hashed, each by one rank; the same answer on
    every rank. Every rank calls it. UserError, on every rank, where a file cannot be read, or where two ranks
    read different things."""
    fault = agreement.on_main_rank(lambda: fault_at_start(folder))
    if fault is not None:
        return fault
    sums = agreement.on_main_rank(lambda: read(folder))
    if sums is None:
        return None
    world = torch.distributed.get_world_size()
    by_size = sorted(sums.files, key=lambda name: (-sums.files[name].bytes, name))
    owners = {name: i % world for i, name in enumerate(by_size)}
    for name, found in _hash_on_all_ranks(folder, owners).items():
        if isinstance(found, str):
            raise UserError(f"{folder / name} cannot be read on rank {owners[name]}: {found}; start again")
        if _hash_fault(name, sums.files[name], found) is not None:
            return agreement.on_main_rank(partial(_again, folder, name, sums.files[name]))
    return None


def _again(folder: Path, name: str, expected: FileSum) -> str:
    """The fault of a file, read once more by rank 0."""
    try:
        fault = _hash_fault(name, expected, hash_file(folder / name))
    except OSError as error:
        raise _unreadable(folder / name, error) from None
    if fault is None:
        raise UserError(
            f"{folder / name} was read with different contents by two ranks: a fault of memory, network or storage; "
            "start again"
        )
    return fault


def _unreadable(file: Path, error: OSError) -> UserError:
    return UserError(f"{file} cannot be read: {error.strerror or error}; start again")


def summary(folder: Path) -> str:
    """What was verified of an undamaged checkpoint, in a few words. UserError as in `read`."""
    sums = read(folder)
    if sums is None:
        return "no checksums; file sizes match the index"
    total = sum(one.bytes for one in sums.files.values())
    return f"undamaged: {len(sums.files)} files of {total:,} bytes match their checksums"


def recorded(folder: Path) -> bool:
    """Whether run.json says that the checkpoint was written with checksums. UserError where it cannot be
    read."""
    file = folder / "run.json"
    return file.is_file() and bool(atomic_files.read_json(file).get("checksums"))


def _size_fault(file: Path, name: str, expected: FileSum) -> str | None:
    if not file.is_file():
        return f"{name} is missing"
    size = file.stat().st_size
    if size != expected.bytes:
        return f"{name} has {size:,} bytes instead of {expected.bytes:,}"
    return None


def _hash_fault(name: str, expected: FileSum, found: FileSum) -> str | None:
    return None if found == expected else f"{name} does not match its checksum"
