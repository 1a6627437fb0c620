"""SIGTERM and SIGUSR1 as requests to stop between two iterations, after a checkpoint."""

from __future__ import annotations

import signal
from typing import Any

import torch

from megatron_ultralong.runtime import agreement

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Requests to stop; batch systems send the second as a warning."""


class StopRequest:
    """Records SIGTERM, and SIGUSR1, which batch systems send as a warning. From the first one's creation on,
    for all later ones of the process too: a signal between two stages stops the next. A single rank may be
    signalled, so all ranks agree on it."""

    stopped = False
    """Whether the ranks have agreed to stop."""
    _received = False

    def __init__(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    @staticmethod
    def _receive(number: int, frame: Any) -> None:
        StopRequest._received = True

    def on_any_rank(self, device: torch.device) -> bool:
        """Whether any rank has received one. Every rank calls it."""
        if agreement.first_rank_where(self._received, device) is not None:
            StopRequest.stopped = True
        return StopRequest.stopped
