"""What a run that resumes does differently than before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ultralong import config
from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.config import Run
from megatron_ultralong.errors import UserError

SECTIONS = ("train", "optim", "lora", "data", "parallel", "memory")
"""Sections of the settings that are compared; model and RoPE are refused where they differ."""
_WITHOUT_EFFECT = {
    ("train", "log_every"),
    ("train", "eval_every"),
    ("train", "async_save"),
    ("train", "eval_rows"),
    ("data", "workers"),
}


def check(state: TrainingState, run: Run) -> None:
    """UserError where a run with these settings cannot resume from the checkpoint of `state`."""
    before = _stored_run(state)
    if state.iteration > run.train.iterations:
        raise UserError(
            f"train.iterations={run.train.iterations} is below the {state.iteration} iterations of the checkpoint; raise it, "
            "or use a new --save folder"
        )
    if before is not None and before.train.precision != run.train.precision:
        raise UserError(
            f"the run was started with train.precision={before.train.precision} and cannot resume with "
            f"{run.train.precision}; use a new --save folder, with --load for the weights"
        )
    if (
        before is not None
        and "iterations" in (before.data.mix, run.data.mix)
        and (before.data.mix, before.train.global_batch) != (run.data.mix, run.train.global_batch)
    ):
        raise UserError(
            f"the run was started with data.mix={before.data.mix} and train.global_batch={before.train.global_batch}; with "
            "data.mix=iterations both decide which rows are used, and cannot change: use a new --save folder, with "
            "--load for the weights"
        )
    if before is not None and before.lora != run.lora:
        was, now = (config.to_dict(one)["lora"] for one in (before, run))
        name = next(name for name in now if was[name] != now[name])
        raise UserError(
            f"the run was started with lora.{name}={was[name]} and cannot resume with {now[name]}; use a new "
            "--save folder"
        )


def _stored_run(state: TrainingState) -> Run | None:
    """The run of the checkpoint; None where this release cannot read it, as it may resume all the same."""
    try:
        return state.stored_run()
    except UserError:
        return None


def notes(state: TrainingState, run: Run, load: Path | None, load_hf: Path | None) -> list[str]:
    """Lines for the log: settings that were changed, and --load and --load-hf, which are not used."""
    lines = [f"changed since iteration {state.iteration}: {line}" for line in changes(state, run)]
    unused = [
        f"--{name} {value}" for name, value in (("load", load), ("load-hf", load_hf)) if value is not None
    ]
    if run.lora.rank:  # one of them has the weights that are not trained
        unused = []
    if unused:
        lines.append(f"{' and '.join(unused)} ignored: the run resumes from its own checkpoint")
    if state.iteration == run.train.iterations:
        lines.append(
            f"complete: iteration {state.iteration} of {run.train.iterations}; raise train.iterations to train on"
        )
    return lines


def changes(state: TrainingState, run: Run) -> list[str]:
    """Lines "section.name: was -> now" for the settings that differ from those of the checkpoint."""
    before = _stored_run(state)
    if before is None:
        return []
    old, new = config.to_dict(before), config.to_dict(run)
    lines = []
    for section in SECTIONS:
        for name, value in new[section].items():
            was: Any = old[section].get(name)
            if was != value and (section, name) not in _WITHOUT_EFFECT:
                lines.append(f"{section}.{name}: {was} -> {value}")
    return lines
