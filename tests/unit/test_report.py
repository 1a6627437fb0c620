"""Tables of results beside published figures: which cells are filled, with what, and what is left out."""

from __future__ import annotations

import csv
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ultralong.config import UserError
from megatron_ultralong.evaluate import curves, positions, published, report

ROOT = Path(__file__).parents[2]
K = 1024


def result(task: str, path: str, scores: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"format": 1, "task": task, "model": {"path": f"models/{path}"}, "settings": {}, "scores": scores, **more}


def perplexity(level: float, length: int) -> dict[str, Any]:
    import torch

    stretches = len(positions.edges(length)) - 1
    sums = torch.stack([torch.linspace(level, level - 0.5, stretches), torch.ones(stretches)]).double() * 100
    return {str(length): {**positions.summary(sums, length), "rows": 4}}


def write(folder: Path, name: str, values: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(values))
    return folder / name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two models; the second was measured in part."""
    ruler = {task: {str(length): value - drop for length, drop in ((32 * K, 0), (128 * K, 10), (512 * K, 20), (K * K, 30))}
             for task, value in (("niah_single_1", 100.0), ("vt", 80.0))}
    averages = {str(length): 90.0 - drop for length, drop in ((32 * K, 0), (128 * K, 10), (512 * K, 20), (K * K, 30))}
    write(tmp_path / "a", "ruler.json", result("ruler", "A", ruler, averages=averages))
    cells = [{"set": "hotpotwikiqa", "length": f"{n}k", "score": 20.0 + n / 16, "questions": 3} for n in (16, 32, 64, 128, 256)]
    write(tmp_path / "a", "lveval.json", {"format": 1, "task": "lveval", "model": {"path": "A"}, "cells": cells})
    write(tmp_path / "a", "infinitebench.json", result("infinitebench", "A", {"passkey": 100.0, "code_debug": 20.0}))
    write(tmp_path / "a", "standard.json", result("standard", "A", {"MMLU": 60.0, "MMLU-Pro": 40.0, "MATH": 50.0, "GSM8K": 80.0, "HumanEval": 70.0}))
    write(tmp_path / "a", "perplexity.json", result("perplexity", "A", perplexity(2.0, 32 * K)))
    write(tmp_path / "a", "niah.json", {"format": 1, "task": "niah", "model": {"path": "A"}, "settings": {}, "by_length": {"4096": 1.0, "131072": 0.625}})
    write(tmp_path / "b", "ruler.json", result("ruler", "x", {"vt": {str(32 * K): 70.0}, "cwe": {str(32 * K): 50.0}}))
    write(tmp_path / "b", "ruler_128k.json", result("ruler", "x", {"vt": {"128K": {"score": 60.0, "samples": 2}}, "cwe": {str(128 * K): 30.0}}))
    write(tmp_path / "b", "standard.json", {**result("standard", "x", {"MMLU": 33.333, "arc_easy": 71.0, "odd": None}),
                                            "settings": {"limit": 10}})
    write(tmp_path / "b", "perplexity.json", result("perplexity", "x", perplexity(2.4, 16 * K)))
    write(tmp_path / "b", "manifest.json", {"format": 1, "tokens": 3})
    write(tmp_path / "b", "newer.json", {**result("ruler", "x", {}), "format": 2})
    (tmp_path / "b" / "broken.json").write_text("{")
    return tmp_path


def test_cells(folder: Path) -> None:
    found, notes = report.collect([str(folder / "a"), f"B | small={folder / 'b'}"])
    tables = {name: (columns, cells, theirs) for name, _, columns, cells, theirs in report.build(found)}
    assert list(tables) == ["long_context", "ruler", "lveval", "infinitebench", "standard", "passkey", "perplexity"]
    long = tables["long_context"][1]
    assert long["A"] == pytest.approx({"RULER <128K": 85.0, "RULER <512K": 80.0, "RULER <1M": 75.0, "LV-Eval <128K": 23.75, "LV-Eval <256K": 26.2,
                                       "InfiniteBench": 60.0})
    assert long["B | small"] == {"RULER <128K": pytest.approx(52.5)}, "512K was not measured: no average up to there"
    assert long["UltraLong-1M (published)"] == {"RULER <1M": 79.1, "InfiniteBench": 32.14}
    columns, standard, theirs = tables["standard"]
    assert columns == ["MMLU", "MMLU-Pro", "MATH", "GSM8K", "HumanEval", "average", "arc_easy"]
    assert standard["A"]["average"] == 60.0 and "average" not in standard["B | small"] and len(theirs) == 6
    assert tables["passkey"][1] == {"A": {"4K": 100.0, "128K": 62.5}}
    assert tables["ruler"][1]["B | small"] == {"32K": 60.0, "128K": 45.0}
    assert tables["perplexity"][0] == ["16K", "32K"]
    again = write(folder / "c", "ruler.json", result("ruler", "A", {"vt": {str(32 * K): 1.0}}))
    assert report.collect([str(folder / "a"), str(again)])[1] == [f"{again} counts, not {folder / 'a' / 'ruler.json'}: both tell ruler of A"]
    assert [note.split("/")[-1] for note in notes] == [
        "broken.json left out: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        "manifest.json left out: is no result of an evaluation", "newer.json left out: has format 2, this version reads 1"]


def test_published_figures_are_the_paper_s() -> None:
    """Against shared arithmetic: the ablation's rows are whole, and the long recipe beats both others where the paper says so."""
    rows = {name: row for name, row in published.LONG.items() if name.startswith("ablation") and len(row) == len(report.LONG)}
    assert len(rows) == 3 and all(list(row) == list(report.LONG) for row in rows.values())
    assert {column for row in published.LONG.values() for column in row} <= set(report.LONG)
    assert sorted(published.STANDARD) == sorted(name for name in published.LONG if not name.startswith("ablation"))


def test_the_command_writes_markdown_csv_and_plots(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "report", *arguments])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "tools" / "evaluate.py"), run_name="__main__")
        return stop.value.code or 0

    out = tmp_path / "report"
    assert run("--results", str(folder / "a"), f"B | small={folder / 'b'}", "--out", str(out)) == 0
    text = (out / "report.md").read_text()
    assert "| B \\| small | 52.50 | - | - | - | - | - |" in text and "| *UltraLong-4M (published)* | - | - | 78.00 | - | - | 30.38 |" in text
    assert "B | small, standard: only the first 10 questions" in text
    assert "A, ruler: 2 of 13 tasks; lengths 32K, 128K, 512K, 1M" in text
    assert "arXiv 2504.06214" in text and "100% at every length" in text
    with (out / "standard.csv").open() as file:
        rows = {(row["model"], row["source"]): row for row in csv.DictReader(file)}
    assert rows["A", "measured"]["average"] == "60.00" and rows["ProLong-512k", "arXiv 2504.06214"]["average"] == "40.81"
    assert rows["B | small", "measured"]["MATH"] == "-" and rows["B | small", "measured"]["MMLU"] == "33.33"
    for name in ("long_context", "standard", "ruler", "perplexity"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "broken.json left out" in capsys.readouterr().out
    assert run("--results", str(folder / "a" / "standard.json"), "--out", str(tmp_path / "one"), "--no-published") == 0
    assert "published" not in (tmp_path / "one" / "report.md").read_text() and not (tmp_path / "one" / "ruler.png").exists()
    with pytest.raises(UserError, match="no results found"):
        report.write([str(folder / "b" / "manifest.json")], out)
    with pytest.raises(UserError, match="no such file"):
        report.write([f"x={folder / 'nothing'}"], out)


def test_only_perplexities_are_drawn_together(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only results of `perplexity`"):
        curves.by_position([result("ruler", "A", {})], tmp_path / "a.png")
