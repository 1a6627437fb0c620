"""SIGTERM as a request to stop between two iterations, after a checkpoint."""

from __future__ import annotations

import signal
from typing import Any

import torch

from megatron_ultralong.runtime import agreement


class StopRequest:
    """Records SIGTERM from its creation on. Slurm may signal a single rank, so all ranks agree on it."""

    def __init__(self) -> None:
        self._received = False
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        self._received = True

    def on_any_rank(self, device: torch.device) -> bool:
        """Whether any rank has received SIGTERM. Every rank calls it."""
        return agreement.first_rank_where(self._received, device) is not None
