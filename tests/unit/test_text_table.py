"""Every table that a command prints fits 80 columns, on input of the size it is made for."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ultralong import library, recipes
from megatron_ultralong.ablate import report as ablate_report
from megatron_ultralong.ablate.grid import Grid
from megatron_ultralong.ablate.scores import Row, Spread
from megatron_ultralong.checkpoint.rope_sources import compare, read
from megatron_ultralong.checkpoint.rope_sources import report as rope_report
from megatron_ultralong.data.decontaminate import report as decontaminate_report
from megatron_ultralong.data.pretrain import packing_report
from megatron_ultralong.data.sft import report as sft_report
from megatron_ultralong.evaluate.pipeline.results import BenchmarkResult, TaskScore
from megatron_ultralong.evaluate.report import comparison
from megatron_ultralong.evaluate.report.cells import TableCell
from megatron_ultralong.evaluate.tasks import infinitebench, lveval, perplexity
from megatron_ultralong.evaluate.tasks.niah import run as niah
from megatron_ultralong.evaluate.tasks.ruler import score as ruler
from megatron_ultralong.evaluate.tasks.ruler.tasks import TASKS as RULER_TASKS
from megatron_ultralong.evaluate.tasks.standard import run as standard
from megatron_ultralong.io import text_table
from megatron_ultralong.measure import attention, generation, loss, placement, report, step, train_step
from megatron_ultralong.measure.report import SpeedReport

K = 1024
LENGTHS = [4 * K * 2**i for i in range(11)]  # 4K to 4M
ROOT = Path(__file__).parents[2]


def fits(lines: str | list[str], *more: str) -> None:
    """No line is over 80 columns, and no cell is lost; more: what must be in the text, its spaces joined."""
    text = lines if isinstance(lines, str) else "\n".join(lines)
    assert max(map(len, text.splitlines())) <= 80, max(text.splitlines(), key=len)
    for word in more:
        assert word in " ".join(text.split()), word


def test_folding():
    rows = [["", "forward ms", "share of ideal, estimated"], ["a long name of a method, CP 8", "1", "2"]]
    assert text_table.text_table([["n", "a"], ["one", "1"], ["two", "10"]], rule=True) == [
        "n     a",
        "-------",
        "one   1",
        "two  10",
    ]
    assert text_table.text_table(rows)[0].startswith("   ") and len(text_table.text_table(rows)) == 2
    many = [
        ["name", *(f"column {i}" for i in range(20))],
        ["x", *map(str, range(20))],
        ["all"],
        ["y", *"-" * 20],
    ]
    lines = text_table.text_table(many, notes={3: "not installed"})
    assert lines[0].split() == ["column"] * lines[0].count("column") and lines[1].split()[0] == "name"
    cells = [word for line in lines if line.startswith("x ") for word in line.split()[1:]]
    assert cells == list(map(str, range(20))) and lines.count("y     not installed") == 1
    assert text_table._fold("all_but_attention", 10) == ["all_but_", "attention"]
    assert text_table._fold("  CP ring, merges and hops", 20, "  ") == ["  CP ring, merges", "    and hops"]
    assert text_table.paragraphs(["word " * 30, ""])[1].startswith("  word") and text_table.paragraphs(
        [""]
    ) == [""]


def test_wider_terminals_are_used(monkeypatch):
    monkeypatch.setattr(sys.stdout, "fileno", lambda: 1, raising=False)
    for columns, expected in ((60, 80), (132, 132)):
        monkeypatch.setattr(os, "get_terminal_size", lambda fd, n=columns: os.terminal_size((n, 40)))
        assert text_table.width() == expected


@pytest.mark.parametrize(
    "what, settings",
    [
        ("ultralong_4m", {}),
        ("ultralong_1m", {"settings": ["parallel.cp_comm_type=all_gather"]}),
        ("llama-3.1-405b", {"seq_length": "1M", "gpu": "b200"}),
    ],
)
def test_plan(what, settings):
    text = str(library.plan(what, gpus=256, **settings))
    fits([line for line in text.splitlines() if ": --set " not in line], "causal MFU", "optimizer (fp32)")
    assert ": --set " in text or "nothing fits" in text  # whole lines, to be copied


MEASURED = {
    module.__name__.rpartition(".")[2]: module
    for module in (attention, generation, loss, placement, step, train_step)
}


@pytest.mark.parametrize("name", MEASURED)
def test_benchmark(name):
    columns = MEASURED[name].COLUMNS
    names = [
        "ours: all-to-all 2 x ring 4, CP 8, 4 documents",
        "a training set (published histogram), CP 8: all-gather, row cut zigzag",
    ]
    rows: list[dict[str, Any]] = [{"name": one, **{c.key: 123456 for c in columns}} for one in names]
    rows += [
        {
            "name": "ring-flash-attn, zigzag, CP 2",
            "note": "not installed: pip install ring-flash-attn, " + "too " * 20,
        }
    ]
    rows[0]["note"] = (
        "its output differs from the reference by more than its precision explains, at one length"
    )
    made = SpeedReport(kind=name, about={"device": "H100"}, columns=columns, bars=(), rows=rows)
    text = report.text(made)
    fits(text, "not installed: pip install ring-flash-attn", "its output differs")
    assert text.count("not installed") == 1 and text.splitlines().count("device: H100") == 1


def result(task: str, scores: list[TaskScore], **values: Any) -> BenchmarkResult:
    return BenchmarkResult(
        task=task,
        model={"max_position": 128 * K},
        scores=tuple(scores),
        **{"settings": {}, "extra": {}, **values},
    )


def test_evaluations():
    depths = [0.0, 25.0, 50.0, 75.0, 100.0]
    scores = [TaskScore(task="passkey", length=n, score=100.0, count=50) for n in LENGTHS]
    cells = [{"length": n, "depth": depth, "accuracy": 1.0} for n in LENGTHS for depth in depths]
    fits(niah.table(result("niah", scores, extra={"cells": cells, "trials": []})), "4M*", "25%")

    scores = [TaskScore(task=t, length=n, score=100.0, count=500) for t in RULER_TASKS for n in LENGTHS]
    averages = {str(n): {"average": 99.99, "tasks": 13, "complete": True} for n in LENGTHS}
    extra = {"by_length": averages, "up_to": {}}
    fits(
        ruler.table(result("ruler", scores, settings={"wording": "own"}, extra=extra)),
        "niah_multikey_3",
        "mean of 13",
    )

    settings = {"wording": "own", "limit": None, "max_length": 128 * K}
    levels = list(lveval.LENGTHS.values())
    scores = [
        TaskScore(task=name, length=n, score=12.34, count=100, notes={"cut": 3, "refused": 1})
        for name in lveval.SETS
        for n in levels
    ]
    fits(
        lveval.table(
            result("lveval", scores, settings=settings, extra={"averages": {}, "refused": {}})
        ).splitlines()[:12]
    )
    scores = [TaskScore(task=t, score=12.3, count=500, notes={"cut": 400}) for t in infinitebench.TASKS]
    table = infinitebench.table(
        result("infinitebench", scores, settings=settings, extra={"averages": {}, "refused": {}})
    )
    fits(table.splitlines()[:13], "12.30* 500 400")

    buckets = [{"from": 4 * K * 2**i, "to": 4 * K * 2 ** (i + 1), "perplexity": 1234.567} for i in range(10)]
    by_length = {str(n): {"perplexity": 9.0, "by_position": buckets} for n in LENGTHS}
    scores = [TaskScore(task="perplexity", length=n, score=9.0, count=32) for n in LENGTHS]
    fits(perplexity.table(result("perplexity", scores, extra={"by_length": by_length})), "2M-4M")
    scores = [
        TaskScore(task=name, score=50.0)
        for name in ("MMLU", "leaderboard_mmlu_pro_of_some_group", "HumanEval")
    ]
    fits(standard.table(result("standard", scores, extra={"prompts_cut": 0})), "50.00")

    compared = [
        comparison.ComparedScore(
            benchmark="HumanEval, 0 shots",
            measured=TableCell(value=12.5),
            published=62.2,
            differences=(
                "prompts and scorer of lm-evaluation-harness: humaneval_instruct, pass@1",
                "own wording",
            ),
        )
    ] * 2
    fits(comparison.as_text(compared), "humaneval_instruct")


def test_recipes():
    fits(recipes.listed(), "tiny_extend_sft Instruction tuning", *recipes.names())


def test_data():
    bucket = {
        "from": 0,
        "bucket": "512K-1M",
        "documents": 12_345_678,
        "tokens": 9_876_543_210,
        "packed_documents": 12_345_678,
        "packed_tokens": 9_876_543_210,
    }
    source = {
        "name": "a source with a name that is longer than a column",
        "documents": 12_345_678,
        "tokens": 9_876_543_210,
        "packed": {"documents": 12_345_678, "tokens": 9_876_543_210},
        "lengths": [bucket] * 12,
    }
    fits(packing_report.length_table({"sources": [source] * 3}), "9,876,543,210", "all sources")

    entry = dict.fromkeys(sft_report._COLUMNS, 1_234_567) | {
        "name": "OpenMathInstruct-2, first part",
        "domain": "math",
    }
    manifest = {
        "sources": [entry | {"turns_cut": 1, "cut_to_length": 2}],
        "domains": {"math": {**entry, "wanted": 1}},
        "special_tokens": {"spelled_out": {}},
        "rows": 10,
        "seq_length": 131072,
        "documents": 20,
        "trained_tokens": 5,
        "tokens": 6,
        "padding": 1,
    }
    lines = sft_report.summary_lines(manifest, Path("/nonexistent"))
    fits([line for line in lines if " rows of " not in line], "1,234,567", "unsupported", "trained")

    counts = dict.fromkeys(("examples", "found", "matches", "documents", "too_short", "common"), 123456)
    found = {"tasks": {f"longest_named_task_of_them_{i}": counts for i in range(2)}, **counts}
    text = decontaminate_report.format_table({"benchmarks": {"infinitebench": found}, "totals": {}})
    fits(text.splitlines()[:-1], "n-grams", "123456")


def test_rope_and_ablation(tmp_path):
    base = ROOT / "examples" / "demo" / "base"
    sources = [one for _ in range(9) for one in read.read_source(base)]
    computed = [compare.compute(one, None, 4096) for one in sources]
    text = rope_report.text(computed, compare.compare(computed))
    fits([line for line in text.splitlines() if str(base) not in line], "max_position_embeddings", "[9]")

    score = Spread(mean=12.345, deviation=1.234, values=(12.0, 13.0))
    row = Row(
        label="yarn by rotations, 128K, attention inside documents",
        values={"rope": "yarn by rotations", "data": "128K", "documents": "masked"},
        seeds=(1, 2),
        planned=3,
        tokens=10**9,
        scores={(task, n): score for task in ("niah", "perplexity") for n in LENGTHS},
        by_position=None,
    )
    grid = Grid(
        path=tmp_path,
        base="",
        files={},
        axes={"rope": (), "data": (), "documents": ()},
        cells=(),
        seeds=(1, 2),
    )
    fits(ablate_report.terminal([row] * 2, grid), "12.3 ± 1.2", "passkey 4M", "2 of 3")
