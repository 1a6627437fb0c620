"""The checkpoints of a run directory (`iter_NNNNNNN/`): which are complete, and the newest undamaged one."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from megatron_ultralong.checkpoint import integrity
from megatron_ultralong.errors import UserError
from megatron_ultralong.runtime import agreement


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run directory, oldest first."""
    return [path for path in _iterations(folder) if (path / "metadata.json").is_file()]


def all_of(path: Path) -> list[Path]:
    """All iterations of a run directory, oldest first, damaged ones too; or `path`, where it is an iteration.
    UserError where there is none."""
    found = [path] if _is_iteration(path) else _iterations(path)
    if not found:
        raise _nothing_in(path)
    return found


def _iterations(folder: Path) -> list[Path]:
    """The iterations of a run directory, oldest first; also those that have been damaged."""
    try:
        if not folder.is_dir():
            return []
        found = [path for path in folder.iterdir() if re.fullmatch(r"iter_\d+", path.name) and path.is_dir()]
    except PermissionError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None
    return sorted(found, key=lambda path: int(path.name[5:]))


def newest(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint of a run directory that looks undamaged (None = it has no checkpoint at all), and
    newer ones with what is wrong with them. Each rank may call it by itself.

    UserError where all of them are damaged, and where one cannot be read.
    """
    return _newest(folder, _iterations(folder), integrity.fault_at_start, _START_ANEW)


def newest_verified(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """As `newest`, after reading and hashing all of a checkpoint's files; every rank calls it and gets the
    same answer."""
    iterations = agreement.on_main_rank(lambda: _iterations(folder))
    return _newest(folder, iterations, integrity.fault_on_all_ranks, _START_ANEW)


def resolve(path: Path) -> Path:
    """Return an iteration's folder: `path` itself, or the newest in the run directory `path` that looks
    undamaged. Each rank may call it by itself. UserError where there is none."""
    return _resolve(path, all_of(path), integrity.fault_at_start)[0]


def resolve_verified(path: Path) -> Path:
    """As `resolve`, after reading and hashing all of its files; every rank calls it, and gets the same
    answer. A line on stderr names what was passed over, and what is used instead."""
    # The ranks' own views of a shared folder may differ for a while.
    iterations = agreement.on_main_rank(lambda: all_of(path))
    found, damaged = _resolve(path, iterations, integrity.fault_on_all_ranks)
    if damaged and torch.distributed.get_rank() == 0:
        print("\n".join(damaged_lines(damaged, found)), file=sys.stderr, flush=True)
    return found


_START_ANEW = "; use another copy, or rename them to start anew"


def _newest(
    folder: Path, iterations: list[Path], find_fault: Callable[[Path], str | None], advice: str
) -> tuple[Path | None, dict[Path, str]]:
    damaged: dict[Path, str] = {}
    for path in reversed(iterations):
        fault = find_fault(path)
        if fault is None:
            return path, damaged
        damaged[path] = fault
    if damaged:
        faults = "; ".join(f"{path.name}: {fault}" for path, fault in damaged.items())
        raise UserError(f"{folder} contains no undamaged checkpoint ({faults}){advice}")
    return None, damaged


def _resolve(
    path: Path, iterations: list[Path], find_fault: Callable[[Path], str | None]
) -> tuple[Path, dict[Path, str]]:
    if iterations == [path]:
        fault = find_fault(path)
        if fault is not None:
            raise UserError(f"{path} is damaged: {fault}; use another checkpoint")
        return path, {}
    found, damaged = _newest(path, iterations, find_fault, "; use another checkpoint")
    assert found is not None
    return found, damaged


def _is_iteration(path: Path) -> bool:
    named = re.fullmatch(r"iter_\d+", path.name) is not None
    return path.is_dir() and not _iterations(path) and (named or (path / "metadata.json").is_file())


def _nothing_in(path: Path) -> UserError:
    return UserError(
        f"{path} contains no complete checkpoint; expected a run directory with iter_* folders, or one of those"
    )


def damaged_lines(damaged: dict[Path, str], used: Path) -> list[str]:
    """Lines that say which checkpoints were passed over, and what is used instead."""
    return [f"note: {path} is damaged ({fault}); using {used.name}" for path, fault in damaged.items()]


def set_aside(checkpoints: Iterable[Path], why: str = "damaged") -> None:
    """Rename checkpoints to NAME.`why`, so that they are neither found again nor counted among those to keep.
    UserError where that fails."""
    for path in checkpoints:
        target, number = path.with_name(f"{path.name}.{why}"), 1
        while target.exists():
            number += 1
            target = path.with_name(f"{path.name}.{why}-{number}")
        try:
            path.rename(target)
        except OSError as error:
            raise UserError(
                f"{path} is not to be used again ({why}) and cannot be renamed: {error.strerror or error}"
            ) from None
