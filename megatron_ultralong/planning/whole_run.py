"""Hours and GPU-hours of a whole run: its iterations, and its checkpoints where their speed is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_ultralong.config import Model, Parallel, Run
from megatron_ultralong.planning.hardware import Machine
from megatron_ultralong.planning.memory import trained_parameters
from megatron_ultralong.planning.search import Estimate

NOT_INCLUDED = "start, held-out loss, evaluations and restarts are not included"


@dataclass(frozen=True, kw_only=True)
class Duration:
    """The time of one run, or of all stages of one."""

    iterations: int
    training: float
    """Seconds of all iterations."""
    saves: int
    """Checkpoints."""
    save_bytes: int
    """Of all checkpoints together."""
    saving: float | None
    """Seconds of all checkpoints; None where their speed is not known."""
    gpus: int

    @property
    def hours(self) -> float:
        return (self.training + (self.saving or 0.0)) / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.gpus

    def __add__(self, other: Duration) -> Duration:
        known = self.saving is not None and other.saving is not None
        return Duration(
            iterations=self.iterations + other.iterations,
            training=self.training + other.training,
            saves=self.saves + other.saves,
            save_bytes=self.save_bytes + other.save_bytes,
            saving=(self.saving or 0.0) + (other.saving or 0.0) if known else None,
            gpus=self.gpus,
        )

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "iterations": self.iterations,
            "training_seconds": self.training,
            "saves": self.saves,
            "save_bytes": self.save_bytes,
            "saving_seconds": self.saving,
            "hours": self.hours,
            "gpu_hours": self.gpu_hours,
        }


def checkpoint_bytes(run: Run, model: Model) -> int:
    """Bytes of a checkpoint: what is trained, its float32 master weights and two moments."""
    whole = replace(run, parallel=Parallel())
    return trained_parameters(whole, model, 0) * ((2 if run.train.precision == "bf16" else 4) + 12)


def duration(estimate: Estimate, model: Model, machine: Machine) -> Duration:
    """The time of all iterations of `estimate.run`, and of its checkpoints."""
    t = estimate.run.train
    every = t.save_every or t.iterations
    saves = t.iterations // every + (t.iterations % every != 0)
    size = saves * checkpoint_bytes(estimate.run, model)
    return Duration(
        iterations=t.iterations,
        training=t.iterations * estimate.seconds,
        saves=saves,
        save_bytes=size,
        saving=None if machine.save_rate is None else size / machine.save_rate,
        gpus=machine.gpus,
    )


def lines(durations: Mapping[str, Duration]) -> list[str]:
    """Lines for the text report: the first name's run, and the hours of all names."""
    first = next(iter(durations.values()))
    size = f"{first.saves} checkpoints of {first.save_bytes / 1e9:,.2f} GB together"
    saved = f"{size} included" if first.saving is not None else f"{size} not included (--save-rate)"
    return [
        f"whole run of {first.iterations:,} iterations, estimated: "
        + "; ".join(
            f"{name} {_number(d.hours)} hours, {_number(d.gpu_hours)} GPU-hours"
            for name, d in durations.items()
        ),
        f"  {saved}; {NOT_INCLUDED}",
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
