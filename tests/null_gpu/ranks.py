"""Several ranks, each a process with a null GPU of its own, and what each asked of it.

python -m tests.null_gpu.ranks MODULE FUNCTION FOLDER    what `run_ranks` starts
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.null_gpu import recording
from tests.null_gpu.recording import Call

WORLD = 4
LIBRARIES = ("megatron.core.distributed", "megatron.core.optimizer", "megatron.core.pipeline_parallel")
"""What the ranks import as they run."""
Parts = dict[str, list[list[Call]]]
"""The calls of every rank, by part of the run."""


def run_ranks(module: str, function: str, folder: Path) -> Parts:
    """Call `function` of `module` on four ranks, which find each other as under torchrun, and return what
    they asked of their devices in each part (`recording.begin`). RuntimeError with the output if one fails.
    """
    command = [sys.executable, "-m", "tests.null_gpu.ranks", module, function, str(folder)]
    # Nothing ends before the host waits for it; losses and norms are numbers.
    environment = os.environ | {"NULL_GPU_LATE": "1", "NULL_GPU_ZERO_RESULTS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    if done.returncode:
        outputs = "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("*.out")))
        raise RuntimeError(f"{done.stdout}{done.stderr}\n{outputs}")
    logs = [recording.read(folder / f"rank-{rank}.log") for rank in range(WORLD)]
    return {parts[0].name: [part.calls for part in parts] for parts in zip(*logs, strict=True)}


def _main(module: str, name: str, folder: Path) -> int:
    """Import `module`, then fork the ranks: it is imported once."""
    _end_with_parent()
    with mock.patch.multiple(torch.cuda, **_ANSWERS):
        for library in LIBRARIES:
            importlib.import_module(library)
        function = getattr(importlib.import_module(module), name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    end = multiprocessing.get_context("fork").Barrier(WORLD)  # the first has the store that all use
    ranks = {}
    for rank in range(WORLD):
        if (process := os.fork()) == 0:
            _rank(function, rank, port, folder, end)
        ranks[process] = rank
    while ranks:
        process, status = os.wait()
        rank = ranks.pop(process)
        if status:
            print(f"rank {rank} failed")
            for other in ranks:  # they would wait for it
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


# What libraries ask as they are imported. PyTorch's own functions would ask the device, after which a forked
# process may not use it.
_ANSWERS = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_capability": lambda *device: (9, 0),
}


def _end_with_parent() -> None:
    """Have the kernel end this process when its parent ends, however that does."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _rank(function: Callable[[], None], rank: int, port: int, folder: Path, end: Any) -> None:
    _end_with_parent()
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(WORLD),
        LOCAL_RANK="0",  # the only GPU there is
        LOCAL_WORLD_SIZE=str(WORLD),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        NULL_GPU_LOG=str(folder / f"rank-{rank}.log"),
    )
    code = 1
    with (folder / f"rank-{rank}.out").open("w", buffering=1) as output:
        sys.stdout = sys.stderr = output
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        try:
            with recording.operations():
                function()
                end.wait()
            code = 0
        except BaseException:
            traceback.print_exc()
        recording.flush()
    os._exit(code)  # without the destructors of what was imported


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
