"""What a hang leaves behind: the stacks of a rank's threads, and the lines that say which rank, where, and
how to resume."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shlex
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FrameType

import megatron_ultralong
from megatron_ultralong.runtime.hang_detection import Beat, Hang

_PACKAGE = os.path.dirname(megatron_ultralong.__file__) + os.sep
_CPU_DEVICE = _PACKAGE + os.path.join(
    "runtime", "cpu_device.py"
)  # every call of torch on a CPU goes through it


def main_thread_place() -> tuple[str, bool]:
    """Where the main thread is, as "file:line (function)", in this package if it is called from it; and
    whether that is a wait for other ranks."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "", False
    # Sources are not read here: their disk may be what hangs.
    path, names = frame.f_code.co_filename, frame.f_code.co_names
    waits = "torch/distributed/" in path or ("/megatron" in path and "wait" in names)
    inner = _place(frame)
    own: FrameType | None = frame
    while own is not None and not _is_own(own.f_code.co_filename):
        own = own.f_back
    if own is None or own is frame:
        return inner, waits
    return f"{_place(own)}, in {inner}", waits


def _is_own(path: str) -> bool:
    return path.startswith(_PACKAGE) and path != _CPU_DEVICE


def _place(frame: FrameType) -> str:
    path = frame.f_code.co_filename.removeprefix(_PACKAGE)
    _, found, below = path.partition("site-packages/")
    return f"{below if found else path}:{frame.f_lineno} ({frame.f_code.co_name})"


def write_stacks(folder: Path | None, rank: int, about: str, seconds: float = 5.0) -> Path | None:
    """Write the stacks of all threads to `folder`/rank_N.txt, or to the temporary folder where that takes
    more than `seconds` or fails; return the file, or None where neither can be written."""
    temporary = Path(tempfile.gettempdir()) / f"megatron_ultralong-hang-{os.getppid()}"
    for place in (folder, temporary):
        if place is None:
            continue
        written: list[Path] = []
        # In a thread: the disk may be what hangs.
        writer = threading.Thread(target=_write, args=(place, rank, about, written), daemon=True)
        writer.start()
        writer.join(seconds)
        if written:
            return written[0]
    return None


def _write(folder: Path, rank: int, about: str, written: list[Path]) -> None:
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank_{rank}.txt"
        with path.open("w") as file:
            file.write(f"{about}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        written.append(path)


def lines(
    hang: Hang, beats: Mapping[int, Beat], silence: Callable[[int], float], stacks: Mapping[int, str]
) -> list[str]:
    """The report: the ranks at fault with host and last sign of life, where the others are, and their stacks.

    silence: seconds since a rank's last sign of life. stacks: rank -> file, or ''.
    """
    said = []
    by_host: dict[str, list[int]] = {}
    for rank in hang.ranks:
        if rank not in beats:
            said.append(f"error: rank {rank} has not started, {hang.seconds:.0f} s after the others")
        elif rank in hang.silent:
            by_host.setdefault(beats[rank].host, []).append(rank)
        else:
            said.append(
                f"error: rank {rank} (host {beats[rank].host}, process {beats[rank].pid}) is alive, but the others have "
                f"waited for it for {hang.seconds:.0f} s: {where(beats[rank])}"
            )
    for host, ranks in by_host.items():
        said.append(
            f"error: no sign of life for {silence(ranks[0]):.0f} s of rank {ranges(ranks)} (host {host}, process "
            f"{', '.join(str(beats[rank].pid) for rank in sorted(ranks))}): stopped or ended, or the host or the link "
            f"to it is down; last seen in {where(beats[ranks[0]])}"
        )
    if not hang.ranks:
        said.append(
            f"error: all ranks are alive, but none has made progress for {hang.seconds:.0f} s; the stacks show what "
            "each waits for"
        )
    others: dict[str, list[int]] = {}
    for rank, beat in beats.items():
        if rank not in hang.ranks and not beat.left:
            late = f"no sign of life for {silence(rank):.0f} s, " if rank in hang.silent else ""
            others.setdefault(f"{late}{where(beat)}", []).append(rank)
    said += [f"rank {ranges(ranks)}: {place}" for place, ranks in others.items()]
    written = {rank: os.path.dirname(path) for rank, path in stacks.items() if path}
    for folder in sorted(set(written.values())):
        of = ranges(rank for rank in written if written[rank] == folder)
        said.append(f"stacks of rank {of} are in {folder}/rank_N.txt")
    return said


def where(beat: Beat) -> str:
    """What a rank is at."""
    return f"{beat.phase}, {beat.place}" if beat.place else beat.phase


def ranges(ranks: Iterable[int]) -> str:
    """Ranks in short: 0-3, 6."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def resume_line(hosts: int) -> str:
    """How to resume: torchrun's own command line where it can be read."""
    program = sys.argv[0].split() if sys.argv[0].startswith("ultralong ") else sys.argv[:1]
    command = shlex.join(_torchrun() or [*program, *sys.argv[1:]])
    everywhere = " on every host" if hosts > 1 else ""
    return f"to resume, run the same command again{everywhere}: {command}"


def _torchrun() -> list[str] | None:
    """The command line of the torchrun that started this rank; None if it cannot be read, or it was another
    program."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        if any(
            os.path.basename(word) == "torchrun" or word.startswith("torch.distributed.") for word in words
        ):
            return words
    return None


def end_torchrun() -> None:
    """Kill the torchrun that started this rank: it waits for a store that does not answer, until TCP gives up
    after a quarter of an hour."""
    if _torchrun() is not None:
        os.kill(os.getppid(), signal.SIGKILL)


def end_siblings(ranks: Iterable[int], beats: Mapping[int, Beat]) -> None:
    """Kill the given ranks where they are processes of this rank's torchrun: one that is stopped ignores
    torchrun's SIGTERM, and would stay until its SIGKILL."""
    for rank in ranks:
        beat = beats.get(rank)
        if beat is None or beat.host != socket.gethostname() or beat.pid == os.getpid():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            status = Path(f"/proc/{beat.pid}/stat").read_text()
            if int(status.rpartition(")")[2].split()[1]) == os.getppid():
                os.kill(beat.pid, signal.SIGKILL)
