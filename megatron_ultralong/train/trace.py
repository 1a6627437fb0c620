"""A torch profiler trace of some iterations of rank 0 (`runtime.profile`), for Perfetto or chrome://tracing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FOLDER = "profile"
"""Of a run directory."""


class Trace:
    """Records the iterations FROM to TO, those of them that this process trains, in one file.

    A trace that cannot be written is a warning: the run goes on.
    """

    def __init__(
        self, window: tuple[int, int], folder: Path, device: torch.device, note: Callable[[str], None]
    ) -> None:
        """window: `Runtime.profiled`. folder: the run directory. note: called with a line for the log."""
        self._first, self._last = window
        self._folder, self._device, self._note = folder / FOLDER, device, note
        self._profiler: Any = None
        self._from = self._to = 0

    def begin(self, iteration: int) -> None:
        """Before an iteration."""
        if self._profiler is None and self._first <= iteration <= self._last:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()
            self._from = iteration

    def ends_at(self, iteration: int) -> bool:
        """Whether `end` of this iteration writes the trace, which may take minutes."""
        return self._profiler is not None and iteration >= self._last

    def end(self, iteration: int) -> bool:
        """After an iteration, whose work the device has finished; return whether it was recorded."""
        if self._profiler is None:
            return False
        self._to = iteration
        if iteration >= self._last:
            self.close()
        return True

    def close(self) -> None:
        """Write what was recorded, if anything is being recorded."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        name = f"iterations_{self._from}_to_{max(self._from, self._to)}.pt.trace.json.gz"
        partial = self._folder / f".partial.{name}"
        try:
            profiler.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(partial))
            partial.replace(self._folder / name)
        except Exception as error:  # the profiler's own, or a full disk
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            self._note(
                f"warning: {self._folder / name} cannot be written ({error}); this run goes on without it"
            )
        else:
            self._note(f"profile written: {self._folder / name}")
