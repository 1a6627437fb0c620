"""Whether all ranks see the same files in a folder, and after what time."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from pathlib import Path

from megatron_ultralong.check_cluster.findings import Findings, on_ranks
from megatron_ultralong.errors import UserError
from megatron_ultralong.runtime import agreement

WAIT = 15.0
"""Seconds after which a file counts as not shared: NFS clients may cache a folder that long."""
LATE = 3.0
"""Seconds after which a new file should be seen everywhere."""


def check(folder: Path, rank: int, hosts: list[str]) -> Findings:
    """Write a file on rank 0 and read it on all ranks; write one on the first rank of each host and read all
    on rank 0. The files are removed. Every rank calls it; UserError where rank 0 cannot write."""
    (name,) = {key for key in agreement.gather(uuid.uuid4().hex if rank == 0 else None) if key}
    file = folder / f".check_cluster-{name}"
    first = sorted({hosts.index(host) for host in hosts})
    own = file.with_name(f"{file.name}-{rank}")
    try:
        agreement.on_main_rank(lambda: _write(file, name))
        delay = _wait_for(file, name)
        shift = _mtime_shift(file) if delay is not None else None
        error: str | None = None
        if rank in first:
            try:
                _write(own, name)
            except UserError as caught:
                error = str(caught)
        errors = agreement.gather(error)
        others = [r for r in first if errors[r] is None]
        unseen = (
            [r for r in others if _wait_for(own.with_name(f"{file.name}-{r}"), name) is None]
            if rank == 0
            else []
        )
        seen = agreement.gather((delay, shift, unseen))
    finally:
        for path in (file, own):
            with contextlib.suppress(OSError):
                if path == own or rank == 0:
                    path.unlink()
    problems = []
    blind = [r for r, (delay, _, _) in enumerate(seen) if delay is None]
    advice = "give --shared, and --save in training, a folder of a file system that all nodes mount"
    if blind:
        problems.append(
            f"{folder} is not shared: {on_ranks(blind, hosts)} sees no file that rank 0 wrote; {advice}"
        )
    elif seen[0][2]:
        problems.append(
            f"{folder} is not shared: rank 0 sees no file that {on_ranks(seen[0][2], hosts)} wrote; {advice}"
        )
    for r, text in enumerate(errors):
        if text is not None and r not in blind:
            problems.append(f"{on_ranks([r], hosts)}: {text}")
    delays = {r: delay for r, (delay, _, _) in enumerate(seen) if delay is not None}
    late = [r for r, delay in delays.items() if delay > LATE]
    if late:
        problems.append(
            f"{on_ranks(late, hosts)} sees a new file in {folder} only after {max(delays.values()):.1f} s; "
            "mount it with a shorter attribute cache (NFS: actimeo=1)"
        )
    shifts = [shift for _, shift, _ in seen if shift is not None]
    line = (
        f"{folder}: seen by {len(delays)} of {len(seen)} ranks, after {max(delays.values(), default=0.0):.2f} s at most; "
        f"file times differ by {max(map(abs, shifts), default=0.0):.2f} s"
    )
    figures = {"folder": str(folder), "delay_seconds": delays, "not_seen": blind}
    return Findings(title="shared folder", lines=(line,), figures=figures, problems=tuple(problems))


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"--shared {path.parent}: cannot be written ({error.strerror})") from error


def _wait_for(path: Path, text: str) -> float | None:
    """Seconds until the file has the text; None if it never has."""
    began = time.monotonic()
    while time.monotonic() - began < WAIT:
        with contextlib.suppress(OSError):
            if path.read_text() == text:
                return time.monotonic() - began
        time.sleep(0.02)
    return None


def _mtime_shift(path: Path) -> float:
    """Seconds of the file's time minus this host's clock, a moment after it was written."""
    try:
        return path.stat().st_mtime - time.time()
    except OSError:
        return 0.0
