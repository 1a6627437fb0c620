"""Several runs one after the other, each from the last checkpoint of the one before.

A stage is complete when its last iteration is saved and evaluated. The same command skips complete stages and
resumes the first that is not.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_ultralong.checkpoint import run_directory
from megatron_ultralong.config import Run, check_model_layout
from megatron_ultralong.data import packed_rows
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files
from megatron_ultralong.runtime import launch
from megatron_ultralong.runtime.signals import StopRequest
from megatron_ultralong.train import weights_source
from megatron_ultralong.train.run import PrepareEvaluation, RunFiles, train_run

_MARK = "complete"
"""File of a run directory that is written after the last evaluation, which follows the last checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A run with its packed rows; `RunFiles` explains them."""

    run: Run
    data: list[str]
    valid: list[str] | None = None


def train_stages(
    stages: Sequence[Stage],
    first: RunFiles,
    say: Callable[[str], None],
    evaluations: Callable[[Path], Sequence[PrepareEvaluation]] = lambda save: (),
) -> bool:
    """Train `stages` in order; every rank calls it. Returns whether all are complete: False where a stage was
    asked to stop.

    first: the files of the first stage; its `save` is the folder of all run directories, named by recipe.
    say: called with a line for each stage. evaluations: those of a run directory. UserError as in
    `train_run`, and before the first stage where another's rows do not fit.
    """
    _check(stages, first)
    check_order(stages, first.save)
    previous: Path | None = None
    for number, stage in enumerate(stages, 1):
        save = first.save / stage.run.name
        name, iterations = f"stage {number} of {len(stages)}: {stage.run.name}", stage.run.train.iterations
        done = _iterations(save)
        if is_complete(stage, save):
            say(f"{name}: complete after {done} iterations")
            # By its name: an older one must not take its place where it is damaged.
            previous = run_directory.complete_checkpoints(save)[-1]
        else:
            start = (
                f"resumes at iteration {done}"
                if done
                else f"starts from {previous}"
                if previous
                else "starts"
            )
            say(f"{name}: {start}, {iterations} iterations")
            files = replace(first, data=stage.data, valid=stage.valid, save=save)
            if previous is not None:
                files = replace(files, load=previous, load_hf=None)
            state = train_run(stage.run, files, evaluations(save))
            if state.iteration < iterations or StopRequest.stopped:
                return False
            if int(os.environ.get("RANK", "0")) == 0:
                atomic_files.write_text(save / _MARK, f"{state.iteration}\n")
            gc.collect()  # models and optimizers are in reference cycles
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            # By its own name: another node may still have an older listing of the run directory.
            previous = save / f"iter_{iterations:07d}"
    return True


def _check(stages: Sequence[Stage], first: RunFiles) -> None:
    """UserError where a stage's rows or layout cannot work, before the first one starts."""
    run, source = weights_source.find(
        stages[0].run, first.save / stages[0].run.name, first.load, first.load_hf, first.tokenizer
    )
    for stage in stages:
        try:
            stage.run.micro_batches(stage.run.parallel.data_parallel(launch.world_size()))
            check_model_layout(source.state.model, stage.run.parallel)
        except UserError as error:
            raise UserError(f"stage {stage.run.name}: {error}") from None
        for names in (stage.data, stage.valid):
            if names:
                data = stage.run.data
                tokenizer = source.assets.tokenizer or source.assets.base
                try:
                    packed_rows.open_blend(
                        names,
                        stage.run.train.seq_length,
                        source.state.model.vocab_size,
                        data.documents == "masked",
                        None if data.allow_other_tokenizer else tokenizer,
                    )
                except UserError as error:
                    raise UserError(f"stage {stage.run.name}: {error}") from None


def check_order(stages: Sequence[Stage], folder: Path) -> None:
    """UserError where a stage still has to train, but a later one was trained from another checkpoint of it.
    folder: that of the stages' run directories."""
    trained = [_iterations(folder / stage.run.name) for stage in stages]
    for i, stage in enumerate(stages):
        if not is_complete(stage, folder / stage.run.name):
            for later, iterations in zip(stages[i + 1 :], trained[i + 1 :], strict=True):
                if iterations:
                    raise UserError(
                        f"{folder / later.run.name} was trained from another checkpoint of stage {stage.run.name}, "
                        "which is not complete; remove it, or use a new --save folder"
                    )
            return


def is_complete(stage: Stage, save: Path) -> bool:
    """Whether the stage was trained and evaluated to its end."""
    return _iterations(save) >= stage.run.train.iterations and (save / _MARK).is_file()


def _iterations(save: Path) -> int:
    """Iterations of the newest complete checkpoint in a run directory; 0 = none."""
    checkpoints = run_directory.complete_checkpoints(save)
    return int(checkpoints[-1].name[5:]) if checkpoints else 0
