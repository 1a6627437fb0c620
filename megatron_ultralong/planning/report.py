"""The report of `ultralong plan`: from the command line's arguments to a search, as text and as JSON."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ultralong import recipes, shapes
from megatron_ultralong.command_settings import of_stage, override, parse_count
from megatron_ultralong.config import Model, Parallel, Run, Train, to_dict
from megatron_ultralong.errors import UserError
from megatron_ultralong.io.text_table import paragraphs
from megatron_ultralong.planning import documents, memory, report_table, search, whole_run
from megatron_ultralong.planning.documents import DocumentLengths
from megatron_ultralong.planning.flops import FORMULA
from megatron_ultralong.planning.hardware import GPUS, Machine, parse_assumptions
from megatron_ultralong.planning.layouts import SEARCHED_SETTINGS
from megatron_ultralong.planning.search import Estimate
from megatron_ultralong.planning.whole_run import Duration

TOKENS_PER_BATCH = 8 * 1024**2
"""Tokens per iteration if no batch size is given: as in the paper's runs."""

SHORT_NAMES = {name.split("/")[1].lower().removesuffix("-instruct"): name for name in shapes.SHAPES}
"""llama-3.1-8b and so on: Hugging Face name."""


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """The arguments of `ultralong plan`, as they were typed."""

    gpus: int
    gpu: str = "h100"
    model: str | Model | None = None
    """A name, a Hugging Face directory, or a shape."""
    recipe: str | None = None
    settings: Sequence[str] = ()
    seq_length: str | None = None
    global_batch: int | None = None
    host_memory: str = "2T"
    assumptions: Sequence[str] = ()
    document_length: str | None = None
    documents: Path | None = None
    save_rate: str | None = None
    show: int = 4

    def all_settings(self) -> list[str]:
        """Return `settings` after those that --seq-length and --global-batch stand for."""
        options = (("train.seq_length", self.seq_length), ("train.global_batch", self.global_batch))
        return [f"{key}={value}" for key, value in options if value is not None] + list(self.settings)


@dataclass(frozen=True, kw_only=True, repr=False)
class PlanReport:
    """The result for the user, which prints as its text, also at the end of a notebook's cell."""

    text: str
    values: dict[str, Any]
    """The same for JSON."""
    fits: bool
    """Whether any layout fits."""
    whole: Duration | None
    """Of the whole run with the best layout, or with the closest where none fits; None where the request says
    no number of iterations."""

    def __repr__(self) -> str:
        return self.text


def report(request: PlanRequest) -> PlanReport:
    """Search for layouts and report them, of each stage where the recipe has several. Raises UserError for a
    mistake in the request."""
    machine = _machine(request)
    if request.show < 1:
        raise UserError(f"--show {request.show}: must be at least 1")
    if request.model is None and request.recipe is None:
        raise UserError("nothing to plan: give --model with --seq-length, or --recipe")
    if request.recipe not in recipes.STAGES:
        start = recipes.get(request.recipe) if request.recipe else _new_run(request)
        return _plan(request, start, _shape(start, request.model), machine, request.all_settings())
    if request.seq_length is not None or request.global_batch is not None:
        raise UserError(
            f"--seq-length and --global-batch apply to one stage; {request.recipe} has several: "
            f"--set {recipes.STAGES[request.recipe][0]}:train.seq_length=..."
        )
    stages = recipes.stages(request.recipe)
    shape = _shape(stages[0], request.model)  # the others train what the one before them saved
    plans = {
        stage.name: _plan(
            dataclasses.replace(request, recipe=stage.name),
            stage,
            shape,
            machine,
            of_stage(request.settings, stage.name, request.recipe, recipes.STAGES[request.recipe]),
        )
        for stage in stages
    }
    wholes = {name: plan.whole for name, plan in plans.items() if plan.whole is not None}
    first, *others = wholes.values()
    whole = sum(others, start=first)
    text = "\n\n".join(
        f"stage {number} of {len(plans)}: {plan.text}" for number, plan in enumerate(plans.values(), 1)
    )
    return PlanReport(
        text="\n".join([text, "", *paragraphs(whole_run.lines({"all stages": whole} | wholes))]),
        values={
            "format": 2,
            "stages": {name: plan.values for name, plan in plans.items()},
            "whole_run": whole.values(),
        },
        fits=all(plan.fits for plan in plans.values()),
        whole=whole,
    )


def _plan(request: PlanRequest, start: Run, shape: Model, machine: Machine, given: list[str]) -> PlanReport:
    """The report of one run, `start` with the settings `given`."""
    run = override(dataclasses.replace(start, parallel=_fewest_ranks(start, given)), given)
    option = "--documents" if request.documents is not None else "--document-length"
    if (request.documents or request.document_length) is not None and run.data.documents != "masked":
        raise UserError(
            f"{option} applies only where attention stays inside documents: add --set data.documents=masked, or leave "
            "it out"
        )
    keys = {setting.partition("=")[0].strip() for setting in given}
    fixed = [
        key
        for key in SEARCHED_SETTINGS
        if key in keys and (key != "parallel.dp" or run.parallel.dp is not None)
    ]

    result = search.search(run, shape, machine, fixed)
    shown = {
        "best" if number == 1 else f"no. {number}": new
        for number, new in enumerate(result.best[: request.show], 1)
    }
    notes = [
        f"{result.fitting:,} of {result.tried:,} combinations of layout and memory mode fit "
        f"({len(result.best):,} layouts)"
    ]
    if result.faster is not None:
        notes.append(f"faster, but does not fit: {_name(result.faster)}: {result.faster.problem}")
    if not result.best:
        assert result.closest is not None
        shown["closest"] = result.closest
        notes.append(f"nothing fits; the closest is {_name(result.closest)}: {result.closest.problem}")
        notes.append(_what_would_fit(run, shape, machine, fixed))
    if request.recipe:
        own = _recipe_layout(start, given, shape, machine)
        if isinstance(own, Estimate):
            shown["recipe"] = own
        problem = own.problem if isinstance(own, Estimate) else own
        if problem is not None:
            notes.append(f"the recipe's own layout: {problem}")

    settings = {
        name: search.as_settings(new, start, given, complete=not request.recipe)
        for name, new in shown.items()
        if new.problem is None
    }
    title = request.recipe or _title(request.model)
    text = [report_table.heading(title, run, machine), "", report_table.table(shown, machine), ""]
    whole: dict[str, Duration] = {}
    if request.recipe or "train.iterations" in keys:
        whole = {name: whole_run.duration(new, shape, machine) for name, new in shown.items()}
        text += [*paragraphs(whole_run.lines(whole)), ""]
    # Settings stay whole lines, to be copied.
    text += [f"{name}: --set {' '.join(line)}" for name, line in settings.items()] + paragraphs(notes)
    values = {
        "format": 2,
        "estimated": True,
        "run": to_dict(run),
        "machine": dataclasses.asdict(machine),
        "mfu_formula": FORMULA,
        "plans": {name: as_json(new, settings.get(name, [])) for name, new in shown.items()},
        "whole_run": {name: one.values() for name, one in whole.items()},
        "notes": notes,
    }
    best = next(iter(whole.values()), None)
    return PlanReport(text="\n".join(text), values=values, fits=bool(result.best), whole=best)


def as_json(new: Estimate, settings: list[str]) -> dict[str, Any]:
    """Return an estimate as plain values: bytes, FLOPs, seconds."""
    p = new.run.parallel
    return {
        "layout": {"tp": p.tp, "pp": p.pp, "vpp": p.vpp, "cp": p.cp, "dp": new.dp},
        "context": {"ulysses": p.ulysses, "cp_comm_type": p.cp_comm_type},
        "memory": dataclasses.asdict(new.run.memory),
        "set": settings,
        "fits": new.problem is None,
        "problem": new.problem,
        "memory_bytes_per_gpu": {**new.memory, "all": memory.total(new.memory)},
        "host_bytes_per_node": {**new.host, "all": memory.total(new.host)},
        "work_per_gpu_and_iteration": new.work,
        "seconds_per_iteration": {**new.time, "all": new.seconds},
        "tokens_per_second_per_gpu": new.tokens_per_second,
        "causal_mfu": new.mfu,
    }


# ---- what was requested ------------------------------------------------------------------------


def _machine(request: PlanRequest) -> Machine:
    if request.gpu.lower() not in GPUS:
        raise UserError(f"--gpu {request.gpu}: unknown; choose one of {', '.join(GPUS)}")
    rate = request.save_rate
    return Machine(
        gpu=GPUS[request.gpu.lower()],
        gpus=request.gpus,
        host_memory=_bytes("--host-memory", request.host_memory, "2T or 1500G"),
        assumed=parse_assumptions(request.assumptions),
        documents=_documents(request),
        save_rate=None if rate is None else _bytes("--save-rate", rate, "10G"),
    )


def _documents(request: PlanRequest) -> DocumentLengths | None:
    if request.documents is not None:
        if request.document_length is not None:
            raise UserError("--documents and --document-length both state lengths; leave one out")
        return documents.read(request.documents)
    if request.document_length is None:
        return None
    length = parse_count(request.document_length, "--document-length")
    if length < 1:
        raise UserError(f"--document-length {length}: must be at least 1")
    return DocumentLengths((length,))


def _bytes(option: str, text: str, example: str) -> int:
    """The number that G and T after it multiply by powers of 1024."""
    scale = {"G": 1024**3, "T": 1024**4}.get(text[-1:].upper(), 1)
    try:
        return int(float(text[:-1] if scale > 1 else text) * scale)
    except (ValueError, OverflowError):
        raise UserError(f"{option} {text}: expected bytes, like {example}") from None


def _title(model: str | Model | None) -> str:
    if not isinstance(model, Model):
        return str(model)
    return f"model of {model.layers} layers, hidden {model.hidden_size}, {model.heads} heads"


def _new_run(request: PlanRequest) -> Run:
    """A run of one rank for `request.model`, without a recipe."""
    key = "train.seq_length="
    length = request.seq_length or next(
        (s.removeprefix(key) for s in request.settings if s.startswith(key)), None
    )
    if length is None:
        raise UserError("--model without --recipe needs --seq-length, like 1M")
    tokens = parse_count(length, "--seq-length")
    batch = max(1, TOKENS_PER_BATCH // max(tokens, 1))
    return Run(
        name=_title(request.model), train=Train(seq_length=tokens, global_batch=batch, iterations=1, lr=0.0)
    )


def _fewest_ranks(start: Run, given: list[str]) -> Parallel:
    """The smallest layout to start the search from, so that no length is refused because of the recipe's
    layout."""
    pairs = (setting.partition("=") for setting in reversed(given))
    text = next((value for key, _, value in pairs if key.strip() == "parallel.ulysses"), "")
    ulysses = int(text) if text.isdigit() and int(text) else start.parallel.ulysses
    return Parallel(cp=ulysses, ulysses=ulysses, cp_comm_type=start.parallel.cp_comm_type)


def _shape(run: Run, name: str | Model | None) -> Model:
    """The model to plan for: the run's own, that of `name`, or the one the recipe starts from."""
    if isinstance(name, Model):
        return name
    if run.model is not None:
        if name is not None:
            raise UserError(f"recipe {run.name} defines its own model; leave --model out")
        return run.model
    if name is None and run.base not in shapes.SHAPES:
        raise UserError(f"recipe {run.name} takes the shape of the model it loads; give it with --model")
    if name is None:
        return shapes.SHAPES[run.base]
    if Path(name).is_dir():
        from megatron_ultralong.checkpoint.hf.config import read_config

        return read_config(name).model
    known = {
        **{short: shapes.SHAPES[long] for short, long in SHORT_NAMES.items()},
        **{long.lower(): model for long, model in shapes.SHAPES.items()},
    }
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), sorted(known), n=1, cutoff=0.0)[0]
        raise UserError(
            f"--model {name}: neither a directory nor a known name; did you mean {near}? "
            f"Known: {', '.join(SHORT_NAMES)}"
        )
    return known[name.lower()]


def _recipe_layout(recipe: Run, given: list[str], shape: Model, machine: Machine) -> Estimate | str:
    """The recipe's own layout with the given settings and memory.offload as training settles it, or why it
    fails."""
    try:
        run = memory.settle_offload(
            override(recipe, given), shape, machine.gpus, machine.gpu.memory, machine.gpu.backend
        )
        return search.estimate(run, shape, machine)
    except UserError as error:
        return str(error)


def _what_would_fit(run: Run, shape: Model, machine: Machine, fixed: list[str]) -> str:
    """How many GPUs, or which shorter sequence, it would take."""
    more = search.more_gpus(run, shape, machine, fixed)
    length = search.shorter_sequence(run, shape, machine, fixed)
    gpus = f"{machine.gpus:,} GPUs"
    return "; ".join(
        (
            f"a layout fits on {more:,} GPUs"
            if more
            else f"no layout fits on up to {64 * machine.gpus:,} GPUs",
            f"{gpus} fit {length:,} tokens per sequence" if length else f"{gpus} fit no shorter sequence",
        )
    )


def _name(new: Estimate) -> str:
    p, m = new.run.parallel, new.run.memory
    groups = f" of {p.ulysses} x {p.cp // p.ulysses}" if p.ulysses > 1 else ""
    chunks = ", query_chunks=true" if m.query_chunks else ""
    return (
        f"TP {p.tp} x PP {p.pp} x CP {p.cp}{groups} x DP {new.dp} with recompute={m.recompute}, "
        f"offload={m.offload}{chunks}"
    )
