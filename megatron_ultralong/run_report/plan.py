"""What planning/ estimates for a run, beside what the run measured."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from megatron_ultralong import config
from megatron_ultralong.config import Model
from megatron_ultralong.errors import UserError
from megatron_ultralong.planning import memory, search
from megatron_ultralong.planning.hardware import Machine, gpu_named
from megatron_ultralong.run_report.read import RunRecord

RECENT = 50
"""Iterations whose median is compared."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A plan beside measured figures."""

    rows: list[tuple[str, str, float | None, float | None]]
    """(what, its unit, planned, measured)."""
    parts: dict[str, float]
    """Planned seconds of an iteration, by part."""
    memory: dict[str, int]
    """Planned bytes of a GPU, by part."""
    note: str
    """For which machine."""


def compare(record: RunRecord) -> Comparison | str:
    """The plan of the last process's layout; in one line why there is none."""
    start = record.start
    devices = list(start.get("devices", {}))
    gpu = gpu_named(devices[0]) if len(devices) == 1 else None
    if gpu is None:
        return (
            f"no plan: there is no data sheet of {', '.join(devices) or 'the device'} (planning/hardware.py)"
        )
    try:
        run = config.from_dict(start["run"])
        planned = search.estimate(
            run, Model(**start["model"]), Machine(gpu=gpu, gpus=start["layout"]["ranks"])
        )
    except (KeyError, TypeError) as error:
        return f"no plan: settings are missing in the start line ({error})"
    except UserError as error:
        return f"no plan: {error}"
    note = f"by the data sheet of {gpu.name} and the assumed fractions of it (docs/plan.md)"
    if run.data.documents == "masked":
        note += "; masked documents are planned as long as the row"

    def median(*keys: str) -> float | None:
        values = list(record.series(*keys).values())[-RECENT:]
        return statistics.median(values) if values else None

    peaks = record.series("memory", "peak_allocated").values()
    return Comparison(
        rows=[
            ("seconds per iteration", "s", planned.seconds, median("seconds")),
            (
                "tokens/s per GPU",
                "tokens/s",
                planned.tokens_per_second,
                median("tokens_per_second_per_gpu"),
            ),
            ("causal MFU", "%", 100 * planned.mfu, _percent(median("causal_mfu"))),
            (
                "memory of a GPU",
                "GB",
                memory.total(planned.memory) / 1e9,
                max(peaks) / 1e9 if peaks else None,
            ),
        ],
        parts={name: seconds for name, seconds in planned.time.items() if seconds},
        memory={name: size for name, size in planned.memory.items() if size},
        note=note,
    )


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
