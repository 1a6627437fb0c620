"""What a run needs, checked on every rank before anything is allocated: `ultralong train --dry-run`. Nothing
is written."""

from __future__ import annotations

import importlib.metadata
import math
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_ultralong import __version__, shapes
from megatron_ultralong.checkpoint import run_directory
from megatron_ultralong.checkpoint.hf import assets
from megatron_ultralong.checkpoint.hf.reader import HFReader
from megatron_ultralong.config import Model, Run, check_model_layout
from megatron_ultralong.data import packed_rows
from megatron_ultralong.data.packed_rows import BlendedDataset
from megatron_ultralong.data.tokenizer import load_tokenizer
from megatron_ultralong.errors import UserError
from megatron_ultralong.planning import whole_run
from megatron_ultralong.runtime import agreement, launch
from megatron_ultralong.train import dry_run_report, resume_changes, run_lock, weights_source
from megatron_ultralong.train.dry_run_plan import Hardware, plan
from megatron_ultralong.train.dry_run_report import Finding, RankFindings
from megatron_ultralong.train.run import PrepareEvaluation, RunFiles
from megatron_ultralong.train.stages import Stage, check_order, is_complete
from megatron_ultralong.train.weights_source import WeightsSource

MEETING_MINUTES = 5
"""Timeout of the collectives that gather what the ranks found."""

Evaluations = Callable[[Path], Sequence[PrepareEvaluation]]


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """What is assumed outside torchrun, where the ranks of the run are not there to be asked."""

    gpus: int | None = None
    """Ranks of the run; None = the fewest that the layouts of all stages take."""
    gpu: str = "h100"
    """A name of planning.hardware.GPUS, where this machine has no GPU."""


def dry_run(
    stages: Sequence[Stage],
    files: RunFiles,
    assumed: Assumed,
    evaluations: Evaluations = lambda save: (),
) -> tuple[list[str], int]:
    """Check `stages`, all of which have run directories in `files.save` if there are several. Every rank of
    torchrun calls it; a process alone assumes the ranks.

    Returns the lines to print (on rank 0; none elsewhere) and the number of problems, the same on all ranks.
    """
    if launch.under_torchrun() and assumed.gpus is not None:
        raise UserError("--gpus is for a dry run without torchrun, which knows the number of ranks")
    if assumed.gpus is not None and assumed.gpus < 1:
        raise UserError(f"--gpus {assumed.gpus}: must be at least 1")
    found = [_Checks(stages, number, files, assumed, evaluations).run() for number in range(len(stages))]
    mine = RankFindings(host=socket.gethostname(), stages=found)
    everyone, is_main = [mine], True
    if launch.under_torchrun():
        launch.join(torch.device("cpu"), MEETING_MINUTES)
        everyone, is_main = agreement.gather(mine), torch.distributed.get_rank() == 0
        torch.distributed.destroy_process_group()
    lines, problems = dry_run_report.lines([stage.run.name for stage in stages], everyone)
    return lines if is_main else [], problems


class _Checks:
    """The checks of one stage on this rank."""

    def __init__(
        self,
        stages: Sequence[Stage],
        number: int,
        files: RunFiles,
        assumed: Assumed,
        evaluations: Evaluations,
    ) -> None:
        self.stages, self.stage, self.asked = stages, stages[number], stages[number].run
        self.files, self.evaluations = files, evaluations
        self.before = stages[number - 1] if number else None
        self.save = files.save / self.asked.name if len(stages) > 1 else files.save
        self.first = stages[0].run, files.save / stages[0].run.name if len(stages) > 1 else files.save
        self.hardware = Hardware.of(self.asked, assumed.gpu)
        self.fewest = _fewest_ranks(self.asked)
        # All stages have the same ranks: those of one torchrun.
        together = math.lcm(*(_fewest_ranks(stage.run) for stage in stages))
        self.assumed_world = None if launch.under_torchrun() else assumed.gpus or together
        self.world = self.assumed_world or launch.world_size()
        self.found: list[Finding] = []

    def run(self) -> list[Finding]:
        if self.before is None and len(self.stages) > 1:
            self._try("stages", self._order)
        self._try("software", self._software)
        self._try("ranks", self._ranks)
        self._try("device", self.hardware.describe)
        run, source = self._source()
        first, _ = self.first
        model = (
            source.state.model if source else self.asked.model or first.model or shapes.SHAPES.get(first.base)
        )
        tokenizer = (source.assets.tokenizer or source.assets.base) if source else self.files.tokenizer
        if model is None:
            self.found.append(Finding(subject="data", text="not checked: it takes the model"))
            return self.found
        self._try("layout", lambda: self._layout(model))
        self._try("tokenizer", lambda: self._tokenizer(tokenizer, model))
        self._try("data", lambda: self._data(self.stage.data, model, tokenizer, trained=True))
        if self.stage.valid:
            valid = self.stage.valid
            self._try("held-out data", lambda: self._data(valid, model, tokenizer, trained=False))
        for prepare in self.evaluations(self.save):
            self._try("perplexity", lambda prepare=prepare: self._evaluation(prepare, run, tokenizer, model))  # type: ignore[misc]
        self._try("save", lambda: self._save(model), varies=True)
        try:
            self.found += plan(run, model, self.world, self.hardware)
        except UserError as error:
            if not any(one.wrong and one.subject in ("ranks", "layout") for one in self.found):
                self.found.append(Finding(subject="memory", text=str(error), wrong=True))
        return self.found

    def _try(self, subject: str, check: Callable[[], str], *, varies: bool = False) -> None:
        """Add what `check` returns, or the problem that it raises."""
        try:
            self.found.append(Finding(subject=subject, text=check(), varies=varies))
        except (UserError, OSError) as error:
            self.found.append(Finding(subject=subject, text=str(error), wrong=True))

    def _order(self) -> str:
        check_order(self.stages, self.files.save)
        return ", ".join(stage.run.name for stage in self.stages)

    def _software(self) -> str:
        core = importlib.metadata.version("megatron-core")
        return f"megatron_ultralong {__version__}, torch {torch.__version__}, Megatron-Core {core}"

    def _ranks(self) -> str:
        p, run = self.asked.parallel, self.asked
        dp = p.data_parallel(self.world)
        n = run.micro_batches(dp)
        text = (
            f"{self.world} = TP {p.tp} x PP {p.pp} x CP {p.cp} x DP {dp}; {n} micro-batch{'es' * (n > 1)} of "
            f"{run.train.micro_batch} in an iteration of each"
        )
        if self.assumed_world is not None:
            least = f"needs {self.fewest}" if p.dp else f"needs a multiple of {self.fewest}"
            unit = "ranks" if self.hardware.on_cpu else "GPUs"
            text += f"; assumed, as there is no torchrun: the layout {least} {unit}"
        return text

    def _layout(self, model: Model) -> str:
        check_model_layout(model, self.asked.parallel)
        return (
            f"{model.layers} layers, {model.heads} heads and {model.kv_heads} KV heads can be divided so, "
            f"{self.asked.train.seq_length:,} tokens into {2 * self.asked.parallel.cp} parts"
        )

    def _source(self) -> tuple[Run, WeightsSource | None]:
        """The run with model and RoPE of its weights, which are checked; without them if this fails."""
        run, save = self.first
        files = self.files
        try:
            found, source = weights_source.find(run, save, files.load, files.load_hf, files.tokenizer)
        except (UserError, OSError) as error:
            if self.before is None:
                self.found.append(Finding(subject="weights", text=str(error), wrong=True))
            return self.asked, None
        if self.before is not None:
            found = replace(self.asked, model=source.state.model, rope=self.asked.rope or source.state.rope)
        self._try("weights", lambda: self._weights(found, source))
        return found, source

    def _weights(self, run: Run, source: WeightsSource) -> str:
        """As `train_stages` finds them. source: of the first stage."""
        if len(self.stages) > 1 and is_complete(self.stage, self.save):
            return "complete: this stage is not trained again"
        if self.before is None:
            return _loaded(run, source)
        before, previous = self.before, self.files.save / self.before.run.name
        if is_complete(before, previous) and run_directory.complete_checkpoints(self.save):
            load = run_directory.complete_checkpoints(previous)[-1]
            return _loaded(*weights_source.find(self.asked, self.save, load, None, self.files.tokenizer))
        return f"those of stage {before.run.name}"

    def _tokenizer(self, folder: Path | None, model: Model) -> str:
        if folder is None:
            return "none: checkpoints and exports of this run will have no tokenizer"
        try:
            tokenizer = load_tokenizer(folder)
        except UserError as error:
            if self.files.tokenizer is not None:
                raise
            return f"warning: {error}; checkpoints and exports of this run will have no usable tokenizer"
        notes = assets.tokenizer_note(folder, model.vocab_size)
        return "; ".join([f"{folder}: {tokenizer.vocab_size:,} tokens", *notes])

    def _data(self, names: list[str], model: Model, tokenizer: Path | None, *, trained: bool) -> str:
        run = self.asked
        rows = packed_rows.open_blend(
            names,
            run.train.seq_length,
            model.vocab_size,
            run.data.documents == "masked",
            None if run.data.allow_other_tokenizer else tokenizer,
            run.train.global_batch if run.data.mix == "iterations" else 1,
        )
        used = run.train.iterations * run.train.global_batch if trained else None
        return _rows(rows, used)

    def _evaluation(self, prepare: PrepareEvaluation, run: Run, tokenizer: Path | None, model: Model) -> str:
        prepare(run, tokenizer, model.vocab_size)
        return "its rows or documents can be read"

    def _save(self, model: Model) -> str:
        """As `run_lock.locked` and `atomic_files.check_writable`, but nothing is made."""
        save = self.save
        place = save
        while not os.path.lexists(place):  # a link to nothing is in the way
            place = place.parent
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            what = "is not a directory" if not place.is_dir() else "cannot be written to"
            raise UserError(f"--save {save}: {place} {what}")
        run_lock.check_free(save)
        free, size = shutil.disk_usage(place).free, whole_run.checkpoint_bytes(self.asked, model)
        if free < size:
            raise UserError(
                f"--save {save}: a checkpoint takes {_gb(size)}, but only {_gb(free)} are free; use another disk"
            )
        kept = f"{self.asked.train.keep} are kept" if self.asked.train.keep else "all are kept"
        return f"{save}: {'a new folder, ' if place != save else ''}{_gb(free)} free; checkpoints of {_gb(size)}, of which {kept}"


def _fewest_ranks(run: Run) -> int:
    p = run.parallel
    return p.tp * p.pp * p.cp * (p.dp or 1)


def _loaded(run: Run, source: WeightsSource) -> str:
    """What is loaded, checked as far as headers, names and sizes tell."""
    model = source.state.model
    shape = f"{model.layers} layers, hidden size {model.hidden_size:,}, vocabulary {model.vocab_size:,}"
    if source.resume is not None:
        resume_changes.check(source.state, run)
        damaged = "".join(f"; {path.name} is damaged ({fault})" for path, fault in source.damaged)
        return f"resumes from {source.resume}: iteration {source.state.iteration}; {shape}{damaged}"
    if source.hf is not None:
        HFReader(source.hf, model).close()
        return f"{source.hf}: all tensors are there; {shape}"
    if source.checkpoint is not None:
        return f"{source.checkpoint}: {shape}"
    return f"new, from train.seed={run.train.seed}; {shape}"


def _rows(rows: BlendedDataset, used: int | None) -> str:
    named = ", ".join(f"{one.prefix}: {len(one):,} rows, {one.dtype}" for one in rows.datasets)
    text = f"{named}; {rows.seq_length:,} + 1 tokens a row"
    if used is not None:
        text += f"; the run reads {used:,} rows, {used / len(rows):.3g} times the data"
    return text


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
