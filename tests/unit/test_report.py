"""Tables of results next to published figures: which cells are filled, with what, and what is left out. The
results are files of format 1."""

from __future__ import annotations

import csv
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.pipeline.command import write_results
from megatron_ultralong.evaluate.pipeline.results import BenchmarkResult, TaskScore
from megatron_ultralong.evaluate.report import comparison, curves, published, read_results
from megatron_ultralong.evaluate.report import tables as report_tables
from megatron_ultralong.evaluate.report.markdown import as_csv, markdown
from megatron_ultralong.evaluate.scorers import loss_by_position
from megatron_ultralong.evaluate.tasks import infinitebench, lveval
from megatron_ultralong.evaluate.tasks.ruler import averages as ruler_averages
from megatron_ultralong.evaluate.tasks.ruler import tasks as ruler_tasks

ROOT = Path(__file__).parents[2]
K = 1024


def result(task: str, path: str, scores: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "format": 1,
        "task": task,
        "model": {"path": f"models/{path}"},
        "settings": {},
        "scores": scores,
        **more,
    }


def perplexity(level: float, length: int) -> dict[str, Any]:
    import torch

    stretches = len(loss_by_position.edges(length)) - 1
    sums = torch.stack([torch.linspace(level, level - 0.5, stretches), torch.ones(stretches)]).double() * 100
    return {str(length): {**loss_by_position.summary(sums, length), "rows": 4}}


def grid(needles: int, share: float, **more: Any) -> dict[str, Any]:
    return {
        "format": 1,
        "task": "niah",
        "mode": "passkey" if needles == 1 else "passkeys",
        "model": {"path": "A", "max_position": 4 * K},
        "settings": {"needles": needles},
        "by_length": {"4096": share, "8192": share},
        "cells": [{"length": length, "depth": 50.0, "accuracy": share, **more} for length in (4 * K, 8 * K)],
    }


def command(monkeypatch: pytest.MonkeyPatch, *arguments: Path | str) -> None:
    """Run tools/evaluate.py's main in this process, so that its UserError is seen."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "tools" / "evaluate.py"))["main"]()


def built(*places: Path | str) -> dict[str, report_tables.ReportTable]:
    return {
        table.name: table
        for table in report_tables.build(report_tables.collect([str(place) for place in places])[0])
    }


def values(table: report_tables.ReportTable) -> dict[str, dict[str, float]]:
    return {row: {column: cell.value for column, cell in cells.items()} for row, cells in table.rows.items()}


def write(folder: Path, name: str, values: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(values))
    return folder / name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two models; the second was measured in part."""
    ruler = {
        task: {
            str(length): value - drop
            for length, drop in ((32 * K, 0), (128 * K, 10), (512 * K, 20), (K * K, 30))
        }
        for task, value in (("niah_single_1", 100.0), ("vt", 80.0))
    }
    averages = {
        str(length): 90.0 - drop for length, drop in ((32 * K, 0), (128 * K, 10), (512 * K, 20), (K * K, 30))
    }
    write(tmp_path / "a", "ruler.json", result("ruler", "A", ruler, averages=averages))
    cells = [
        {"set": "hotpotwikiqa", "length": f"{n}k", "score": 20.0 + n / 16, "questions": 3}
        for n in (16, 32, 64, 128, 256)
    ]
    write(
        tmp_path / "a", "lveval.json", {"format": 1, "task": "lveval", "model": {"path": "A"}, "cells": cells}
    )
    write(
        tmp_path / "a",
        "infinitebench.json",
        result("infinitebench", "A", {"passkey": 100.0, "code_debug": 20.0}),
    )
    write(
        tmp_path / "a",
        "standard.json",
        result(
            "standard", "A", {"MMLU": 60.0, "MMLU-Pro": 40.0, "MATH": 50.0, "GSM8K": 80.0, "HumanEval": 70.0}
        ),
    )
    write(tmp_path / "a", "perplexity.json", result("perplexity", "A", perplexity(2.0, 32 * K)))
    write(
        tmp_path / "a",
        "niah.json",
        {
            "format": 1,
            "task": "niah",
            "model": {"path": "A"},
            "settings": {},
            "by_length": {"4096": 1.0, "131072": 0.625},
        },
    )
    write(
        tmp_path / "b",
        "ruler.json",
        result("ruler", "x", {"vt": {str(32 * K): 70.0}, "cwe": {str(32 * K): 50.0}}),
    )
    write(
        tmp_path / "b",
        "ruler_128k.json",
        result("ruler", "x", {"vt": {"128K": {"score": 60.0, "samples": 2}}, "cwe": {str(128 * K): 30.0}}),
    )
    write(
        tmp_path / "b",
        "standard.json",
        {
            **result("standard", "x", {"MMLU": 33.333, "arc_easy": 71.0, "odd": None}),
            "settings": {"limit": 10},
        },
    )
    write(tmp_path / "b", "perplexity.json", result("perplexity", "x", perplexity(2.4, 16 * K)))
    write(tmp_path / "b", "manifest.json", {"format": 1, "tokens": 3})
    write(tmp_path / "b", "newer.json", {**result("ruler", "x", {}), "format": 3})
    (tmp_path / "b" / "broken.json").write_text("{")
    return tmp_path


def test_cells(folder: Path) -> None:
    found, left_out, _ = report_tables.collect([str(folder / "a"), f"B | small={folder / 'b'}"])
    tables = {table.name: table for table in report_tables.build(found)}
    assert list(tables) == [
        "long_context",
        "ruler",
        "lveval",
        "infinitebench",
        "standard",
        "passkey",
        "perplexity",
    ]
    long = values(tables["long_context"])
    assert long["A"] == pytest.approx(
        {
            "RULER <128K": 85.0,
            "RULER <512K": 80.0,
            "RULER <1M": 75.0,
            "LV-Eval <128K": 23.75,
            "LV-Eval <256K": 26.2,
            "InfiniteBench": 60.0,
        }
    )
    assert long["B | small"] == {"RULER <128K": pytest.approx(52.5)}, (
        "512K was not measured: no average up to there"
    )
    assert long["UltraLong-1M (published)"] == {"RULER <1M": 79.1, "InfiniteBench": 32.14}
    standard = values(tables["standard"])
    assert tables["standard"].columns == [
        "MMLU",
        "MMLU-Pro",
        "MATH",
        "GSM8K",
        "HumanEval",
        "average",
        "arc_easy",
    ]
    assert (
        standard["A"]["average"] == 60.0
        and "average" not in standard["B | small"]
        and len(tables["standard"].published) == 6
    )
    assert values(tables["passkey"]) == {"A": {"4K": 100.0, "128K": 62.5}}
    assert values(tables["ruler"])["B | small"] == {"32K": 60.0, "128K": 45.0}
    assert tables["perplexity"].columns == ["16K", "32K"]
    again = write(folder / "c", "ruler.json", result("ruler", "A", {"vt": {str(32 * K): 1.0}}))
    notes = report_tables.collect([str(folder / "a"), str(again)])[2]
    assert len(notes) == 1 and notes[0].startswith(
        f"{again} is used, not {folder / 'a' / 'ruler.json'}: both contain ruler of A; "
    )
    assert [note.split("/")[-1] for note in left_out] == [
        "broken.json left out: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        "manifest.json left out: is not a benchmark result",
        "newer.json left out: has unsupported format version 3 (expected 1 or 2)",
    ]


def test_what_is_no_whole_benchmark_is_marked_in_its_cell(tmp_path: Path) -> None:
    made = {"model": {"path": "A", "max_position": 100 * K}, "wording": "own"}
    scores = {
        task: {
            str(length): {"score": 50.0, "samples": 20, "empty": 0, "refused": 3}
            for length in (4 * K, 128 * K)
        }
        for task in ("vt", "fwe")
    }
    own = {"wording": "own", "haystack": "own sentences", "words": "own"}
    write(
        tmp_path / "1",
        "ruler.json",
        {
            **result("ruler", "A", scores, data={"vt": own, "fwe": {"wording": "own"}}, official_samples=500),
            **made,
        },
    )
    staged = {"format": 1, **made, "of": {"limit": 2}, "settings": {"max_length": 8 * K}}
    passkey = {"task": "passkey", "score": 0.0, "questions": 2, "cut": 2}
    write(tmp_path / "1", "infinitebench.json", {**staged, "task": "infinitebench", "cells": [passkey]})
    cells = [
        {"set": "cmrc_mixup", "length": level, "score": 9.0, "questions": 2, "cut": cut}
        for level, cut in (("64k", 0), ("128k", 1))
    ]
    write(tmp_path / "1", "lveval.json", {**staged, "task": "lveval", "wording": "official", "cells": cells})
    write(tmp_path / "1", "niah.json", {**grid(1, 1.0, refused=1), "model": made["model"]})
    whole = {
        task: {
            str(ruler_averages.FIRST * 2**i): {"score": 70.0, "samples": 500, "empty": 0} for i in range(9)
        }
        for task in ruler_tasks.TASKS
    }
    write(
        tmp_path / "2",
        "ruler.json",
        result(
            "ruler", "B", whole, official_samples=500, data={task: {"wording": "official"} for task in whole}
        ),
    )
    tables = built(tmp_path)
    text = markdown(tables["long_context"])
    assert (
        "| A | 50.00†‡ | - | - | 9.00† | - | 0.00† |" in text
        and "| B | 70.00 | 70.00 | 70.00 | - | - | - |" in text
    )
    assert (
        "- A: RULER <128K: mean of 4K, 128K; 2 of 13 tasks; 20 of 500 samples per task and length; own sentences in place of essays; "
        "own word lists; prompts refused by the endpoint: 12; ‡ beyond the 102,400 positions of the model's config\n"
    ) in text
    assert "- A: RULER <128K, InfiniteBench: own wording\n" in text
    assert (
        "- A: LV-Eval <128K, InfiniteBench: only the first 2 questions; prompts cut in the middle, to 8,192 tokens "
        "including the answer: 1 at LV-Eval <128K, 2 at InfiniteBench\n" in text
    )
    assert (
        "- A: LV-Eval <128K: 2 of 44 sets and lengths\n" in text
        and "- A: InfiniteBench: 1 of 12 tasks" in text
        and "- B" not in text
    )
    assert tables["ruler"].shown("A")[:1] == ["50.00†"] and "50.00†‡" in tables["ruler"].shown("A")
    assert tables["lveval"].notes("A")[0] == "1 of 11 sets; only the first 2 questions"
    assert markdown(tables["passkey"]).endswith("- A: prompts refused by the endpoint: 1 at 4K, 1 at 8K")
    rows = {row["model"]: row for row in csv.DictReader(as_csv(tables["long_context"]).splitlines())}
    assert (
        rows["A"]["InfiniteBench"] == "0.00"
        and "InfiniteBench: 1 of 12 tasks" in rows["A"]["notes"]
        and rows["B"]["notes"] == ""
    ), "plain numbers"
    assert "1 of 12" not in as_csv(tables["infinitebench"]) and "first 2 questions" in as_csv(
        tables["infinitebench"]
    )


def test_averages_are_those_of_the_results(tmp_path: Path) -> None:
    """RULER's are over 4K and its doublings, as ruler.json's: lengths between count in no average."""
    scores = {
        "vt": {
            str(length): {"score": score}
            for length, score in ((4 * K, 90.0), (100 * K, 10.0), (128 * K, 60.0), (1000, 1.0))
        }
    }
    told = ruler_averages.averages(
        {"vt": {int(length): cell["score"] for length, cell in scores["vt"].items()}}
    )
    write(tmp_path, "ruler.json", result("ruler", "A", scores, **told))
    assert (
        values(built(tmp_path)["long_context"])["A"]
        == {"RULER <128K": told["up_to"]["128K"]["average"]}
        == {"RULER <128K": 75.0}
    )
    # LV-Eval's weigh sets and lengths alike, as lveval.json's, where sets have not the same lengths.
    cells = [
        {"set": name, "length": level, "score": score}
        for name, level, score in (
            ("cmrc_mixup", "16k", 9.0),
            ("lic_mixup", "16k", 3.0),
            ("lic_mixup", "128k", 0.0),
        )
    ]
    write(
        tmp_path,
        "lveval.json",
        {"format": 1, "task": "lveval", "model": {"path": "models/A"}, "cells": cells},
    )
    assert values(built(tmp_path)["long_context"])["A"]["LV-Eval <128K"] == 4.0


def test_several_needles_have_a_table_of_their_own(tmp_path: Path) -> None:
    for name, needles, share in (("one", 1, 1.0), ("four", 4, 0.25), ("two", 2, 0.5)):
        write(tmp_path / "in", f"{name}.json", grid(needles, share))
    tables = built(tmp_path / "in")
    assert report_tables.collect([str(tmp_path / "in")])[2] == [], "none tells what another told"
    assert values(tables["passkey"]) == {"A": {"4K": 100.0, "8K": 100.0}} and tables["passkey"].shown(
        "A"
    ) == ["100.00", "100.00‡"]
    assert values(tables["passkeys"]) == {
        "A, 4 needles": {"4K": 25.0, "8K": 25.0},
        "A, 2 needles": {"4K": 50.0, "8K": 50.0},
    }
    report_tables.write([str(tmp_path / "in")], tmp_path)
    passkeys = (tmp_path / "report.md").read_text().split("## ")
    assert [published.PASSKEY in part for part in passkeys if "4K" in part] == [True, False]


def test_two_models_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for run, files in (("a", "aaa"), ("b", "bbb")):
        write(
            tmp_path / run,
            "standard.json",
            {
                **result("standard", "", {"MMLU": 50.0 if run == "a" else 60.0}),
                "model": {"path": "iter_0001000", "fingerprint": files},
            },
        )
    assert [row for row in built(tmp_path)["standard"].rows if "published" not in row] == [
        "iter_0001000 (aaa)",
        "iter_0001000 (bbb)",
    ]
    _, _, notes = report_tables.collect([f"x={tmp_path}"])
    assert notes[0] == "x: one name for iter_0001000 (aaa), iter_0001000 (bbb)" and "is used, not" in notes[1]
    write(
        tmp_path / "c",
        "standard.json",
        {**result("standard", "", {"GSM8K": 1.0}), "model": {"path": "iter_0001000"}},
    )
    assert "iter_0001000 (files not known)" in built(tmp_path)["standard"].rows
    models = [{"path": "runs/iter_0001000", "fingerprint": files} for files in ("aaa", "bbb", "bbb")]
    assert curves.model_names([*models, {}]) == [
        *(f"iter_0001000 ({files})" for files in ("aaa", "bbb", "bbb")),
        "unnamed model",
    ]
    assert curves.model_names(models[1:]) == ["iter_0001000"] * 2
    assert (
        "does not record which files"
        in report_tables.collect([str(tmp_path / "a"), str(tmp_path / "c")])[2][0]
    )
    for run in "de":
        write(tmp_path / run, "ruler.json", {**result("ruler", "", {"vt": {"4096": 1.0}}), "model": None})
        write(
            tmp_path / run,
            "mmlu.json",
            {
                **result("standard", "", {"MMLU": 1.0}),
                "model": {"backend": "endpoint", "path": f"{run}/Llama"},
            },
        )
    tables = built(tmp_path / "d", tmp_path / "e")
    assert [*tables["ruler"].rows] == [f"unnamed model ({tmp_path / run})" for run in "de"]
    assert [*tables["standard"].rows][:2] == ["d/Llama", "e/Llama"]


def test_perplexities_of_different_text_are_told(tmp_path: Path) -> None:
    def made(path: str, name: str) -> dict[str, Any]:
        return {
            **result("perplexity", path, perplexity(2.0, 4 * K)),
            "settings": {"rows": 4, "text_key": "text", "data": [{"name": name, "bytes": 1234}]},
        }

    for model in "AB":
        write(tmp_path, f"{model}.json", made(model, "books.jsonl"))
    assert not built(tmp_path)["perplexity"].notes("A")
    write(tmp_path, "C.json", made("C", "other.jsonl"))
    write(tmp_path, "D.json", result("perplexity", "D", perplexity(2.0, 4 * K)))
    table = built(tmp_path)["perplexity"]
    assert [table.notes(row) for row in "ACD"] == [
        [f"text: {name}.jsonl, 1,234 bytes, field text, 4 rows"] for name in ("books", "other")
    ] + [["text: text not recorded"]] and table.shown("A")[0].endswith("†")


@pytest.mark.parametrize(
    "bad",
    [
        [],
        {"task": "niah"},
        grid(1, 1.0) | {"by_length": {}, "cells": 3},
        result("ruler", "A", {}),
        result("ruler", "A", {"vt": {"4K": 1.0}}) | {"model": "str"},
        {"format": 1, "task": "lveval", "cells": [1]},
        {"format": 1, "task": "infinitebench", "cells": [{"score": 1.0}]},
        result("perplexity", "A", {"4096": {"perplexity": 1.0}}),
        result("perplexity", "A", {"4096": 3}),
        result("perplexity", "A", {}),
        result("standard", "A", {"MMLU": 1.0}) | {"settings": [1]},
        result("standard", "A", {"MMLU": float("nan")}),
    ],
)
def test_one_bad_file_is_left_out(bad: Any, tmp_path: Path) -> None:
    write(tmp_path / "in", "good.json", result("standard", "B", {"MMLU": 50.0}))
    file = write(tmp_path / "in", "bad.json", bad)
    lines = report_tables.write([str(tmp_path / "in")], tmp_path, with_published=False)
    assert lines[0].startswith(f"{file} left out: ") and values(built(tmp_path / "in")["standard"])["B"] == {
        "MMLU": 50.0
    }
    with pytest.raises(UserError, match=r"no results found; .* \(.*bad.json left out: "):
        report_tables.write([str(file)], tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    "bad",
    [
        [],
        {"task": "niah"},
        grid(1, 1.0) | {"cells": []},
        grid(1, 1.0) | {"by_length": {}},
        grid(1, 1.0) | {"model": "x"},
        grid(1, 1.0) | {"cells": [{"length": 4096}]},
        grid(1, 1.5),
        grid(1, 1.0) | {"model": {"max_position": "x"}},
    ],
)
def test_grids_that_cannot_be_drawn_are_told(
    bad: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, out = write(tmp_path, "good.json", grid(1, 1.0) | {"model": None}), tmp_path / "a.png"
    with pytest.raises(UserError, match="bad.json"):
        command(monkeypatch, "compare", "--results", good, write(tmp_path, "bad.json", bad), "--output", out)
    assert not out.exists()
    command(monkeypatch, "compare", "--results", good, "--output", out)
    assert out.exists()


def test_an_earlier_report_s_tables_go(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    write(out, "passkey.csv", "the user's own")
    one = write(tmp_path / "one", "standard.json", result("standard", "A", {"MMLU": 50.0}))
    report_tables.write([str(one)], out)
    assert (out / "passkey.csv").exists(), "no report was there before"
    report_tables.write([str(folder / "a")], out)
    (out / "notes.csv").write_text("mine")
    lines = report_tables.write([str(one)], out)
    assert sorted(path.name for path in out.iterdir()) == [
        "notes.csv",
        "report.md",
        "standard.csv",
        "standard.png",
    ]
    assert any("passkey.csv" in line and "left by an earlier report" in line for line in lines)


def test_published_figures_are_the_paper_s() -> None:
    """Against shared arithmetic: the ablation's rows are whole, and the long recipe beats both others where
    the paper says so."""
    rows = {
        name: row
        for name, row in published.LONG.items()
        if name.startswith("ablation") and len(row) == len(report_tables.LONG)
    }
    assert len(rows) == 3 and all(list(row) == list(report_tables.LONG) for row in rows.values())
    assert {column for row in published.LONG.values() for column in row} <= set(report_tables.LONG)
    assert sorted(published.STANDARD) == sorted(
        name for name in published.LONG if not name.startswith("ablation")
    )


def test_the_command_writes_markdown_csv_and_plots(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "report"
    command(
        monkeypatch,
        "report",
        "--results",
        str(folder / "a"),
        f"B | small={folder / 'b'}",
        "--output",
        str(out),
    )
    text = (out / "report.md").read_text()
    assert (
        "| B \\| small | 52.50† | - | - | - | - | - |" in text
        and "| *UltraLong-4M (published)* | - | - | 78.00 | - | - | 30.38 |" in text
    )
    assert "- B | small: only the first 10 questions" in text
    assert "- A: RULER <1M: mean of 32K, 128K, 512K, 1M" in text
    assert "arXiv 2504.06214" in text and "100% at every length" in text
    with (out / "standard.csv").open() as file:
        rows = {(row["model"], row["source"]): row for row in csv.DictReader(file)}
    assert (
        rows["A", "measured"]["average"] == "60.00"
        and rows["ProLong-512k", "arXiv 2504.06214"]["average"] == "40.81"
    )
    assert rows["B | small", "measured"]["MATH"] == "-" and rows["B | small", "measured"]["MMLU"] == "33.33"
    for name in ("long_context", "standard", "ruler", "perplexity"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "broken.json left out" in capsys.readouterr().out
    command(
        monkeypatch,
        "report",
        "--results",
        str(folder / "a" / "standard.json"),
        "--output",
        str(tmp_path / "one"),
        "--no-published",
    )
    assert (
        "published" not in (tmp_path / "one" / "report.md").read_text()
        and not (tmp_path / "one" / "ruler.png").exists()
    )
    with pytest.raises(UserError, match="no results found"):
        report_tables.write([str(folder / "b" / "manifest.json")], out)
    with pytest.raises(UserError, match="no such file"):
        report_tables.write([f"x={folder / 'nothing'}"], out)


# ---- one model beside its published figures ----------------------------------------------------

LADDER = tuple(4 * K * 2**i for i in range(9))


def protocol(folder: Path, *, lengths: tuple[int, ...] = LADDER, samples: int = 500) -> Path:
    """Results of every benchmark of the paper, complete unless fewer lengths or samples are given."""
    model = {"path": str(folder / "model"), "settings": {"temperature": 0.0, "chat": "auto"}}
    own = {"prompt": "own wording", "grid": "own grid", "depths": [0.0, 100.0], "trials": 10}
    paper_tasks = {
        f"paper/{name}": {"name": name, "task": name.lower(), "shots": shots, "metric": "acc,none"}
        for name, shots in published.SHOTS.items()
    }
    for task, settings, scores in (
        ("niah", own, [TaskScore(task="passkey", length=n, score=90.0, count=20) for n in lengths]),
        (
            "ruler",
            {
                "official_samples": 500,
                "prompts": {task: {"wording": "official"} for task in ruler_tasks.TASKS},
            },
            [
                TaskScore(task=task, length=length, score=80.0, count=samples)
                for task in ruler_tasks.TASKS
                for length in lengths
            ],
        ),
        (
            "lveval",
            {"wording": "own"},
            [
                TaskScore(task=name, length=length, score=30.0, count=5)
                for name in lveval.SETS
                for length in (16 * K, 32 * K, 64 * K, 128 * K)
            ],
        ),
        (
            "infinitebench",
            {"wording": "official", "limit": 7},
            [TaskScore(task=name, score=25.0, count=7) for name in infinitebench.TASKS],
        ),
        (
            "standard",
            {"harness": "lm-evaluation-harness 0.4.13", "paper": paper_tasks},
            [TaskScore(task=name, score=60.0, count=9) for name in published.SHOTS],
        ),
    ):
        of_task = BenchmarkResult(task=task, model=model, settings=settings, scores=tuple(scores))
        write(folder / "results", f"{task}.json", of_task.to_json())
    return folder / "results"


def compared(results: Path, name: str | None) -> dict[str, tuple[str, str, str]]:
    """{benchmark: (measured, published, what differs)}"""
    (results.parent / "model").mkdir(exist_ok=True)
    found, _ = comparison.read([str(results)], results.parent / "model")
    cells = [score.cells() for score in comparison.compare(found, name)]
    return {benchmark: (measured, figure, differs) for benchmark, measured, figure, differs in cells}


def test_what_differs_from_the_published_figures(tmp_path: Path) -> None:
    lines = compared(protocol(tmp_path), "UltraLong-1M")
    assert lines["RULER <1M"] == ("80.00", "79.10", "no known difference")
    assert lines["RULER <128K"] == ("80.00", "-", "no known difference")
    assert lines["LV-Eval <128K"] == ("30.00", "-", "own wording")
    assert lines["LV-Eval <256K"][0] == "-" and lines["LV-Eval <256K"][2] == (
        "the average also contains 256K, measured over 16K, 32K, 64K, 128K; own wording"
    )
    assert lines["InfiniteBench"] == ("25.00", "32.14", "only the first 7 questions")
    assert lines["MATH, 0 shots"] == (
        "60.00",
        "-",
        "prompts and scorer of lm-evaluation-harness 0.4.13: math, acc,none",
    )
    assert lines["average of the five"] == ("60.00", "62.47", "no known difference")
    assert lines["passkey"] == (
        "90.00",
        "100.00",
        "published at every length up to 1M, measured at 4K, 8K, 16K, 32K, 64K, 128K, 256K, 512K, 1M; own wording; "
        "own grid; 20 prompts per length, at 2 depths",
    )
    # A longer model's pass keys were published further than measured here.
    assert compared(tmp_path / "results", "UltraLong-4M")["passkey"][:2] == ("-", "100.00")
    assert compared(tmp_path / "results", "ProLong-512k")["passkey"][:2] == ("90.00", "-")
    assert {figure for _, figure, _ in compared(tmp_path / "results", None).values()} == {"-"}


def test_an_average_over_other_lengths_is_not_compared(tmp_path: Path) -> None:
    results = protocol(tmp_path, lengths=LADDER[:7], samples=50)
    for name in ("lveval", "infinitebench"):
        (results / f"{name}.json").unlink()
    values = json.loads((results / "standard.json").read_text())
    values["scores"] = [score for score in values["scores"] if score["task"] != "HumanEval"]
    values["settings"]["paper"]["paper/MMLU"]["shots"] = 0
    values["model"]["settings"] = {"temperature": 0.5, "chat": "no"}
    write(results, "standard.json", values)
    lines = compared(results, "UltraLong-2M")
    assert lines["RULER <128K"] == ("80.00", "-", "50 of 500 samples per task and length")
    assert lines["RULER <1M"] == (
        "-",
        "78.20",
        "published over lengths up to 1M, measured over 4K, 8K, 16K, 32K, 64K, 128K, 256K; "
        "50 of 500 samples per task and length",
    )
    assert lines["InfiniteBench"] == ("-", "32.49", "not run")
    assert lines["MMLU, 5 shots"][2].startswith("sampled at temperature 0.5; chat template not used; prompts")
    assert lines["MMLU, 5 shots"][2].endswith("; 0 shots (published: 5)")
    assert lines["HumanEval, 0 shots"] == ("-", "-", "not run")
    assert lines["average of the five"] == ("-", "61.06", "not run: HumanEval")


def test_which_figures_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert set(published.RELEASED.values()) == set(published.STANDARD)
    assert published.released("llama-3.1-8b-ultralong-2m-instruct") == "UltraLong-2M"
    assert published.released("Llama-3.1-8B-UltraLong-2M") is None
    model = tmp_path / "Llama-3-8B-ProLong-512k-Instruct"
    write(model, "config.json", {})
    arguments = ("published", "--model", model, "--output", tmp_path / "out")
    command(monkeypatch, *arguments)
    said = capsys.readouterr().out
    assert "beside the published figures of ProLong-512k" in said and said.count("not run") == 13
    assert "| average of the five | - | 40.81 | not run |" in (tmp_path / "out" / "published.md").read_text()
    assert "RULER <1M,-,71.20,not run" in (tmp_path / "out" / "published.csv").read_text()
    model_of = {"path": "models/other", "fingerprint": "1f0c"}
    other = BenchmarkResult(
        task="standard", model=model_of, settings={}, scores=(TaskScore(task="MMLU", score=1.0),)
    )
    other.write(tmp_path / "out" / "standard.json")
    for change, message in (
        ((), "standard.json has results of another model \\(models/other, files 1f0c\\), not of --model"),
        (("--published", "UltraLong"), "--published UltraLong: unknown; choose from Llama-3.1-8B-Instruct, "),
        (("--model", tmp_path / "no"), "no: no such directory"),
        (("--model", tmp_path / "out"), "out: contains no config.json"),
        (("--results", tmp_path / "no"), "no: no such file or directory"),
    ):
        with pytest.raises(UserError, match=message):
            command(monkeypatch, *arguments, *change)


def test_only_perplexities_are_drawn_together() -> None:
    with pytest.raises(ValueError, match="not a result of `perplexity`"):
        curves.check(read_results.parse(result("ruler", "A", {"vt": {"4K": 1.0}})))


def standard_result(*tasks: str, limit: int | None = None, **extra: Any) -> BenchmarkResult:
    return BenchmarkResult(
        task="standard",
        model={"path": "A"},
        settings={"limit": limit},
        scores=tuple(TaskScore(task=task, score=50.0) for task in tasks),
        extra=extra,
    )


def test_results_are_written_whole(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "standard.json"
    (tmp_path / ".standard.json.partial").write_text("what a killed run left")
    standard_result("MMLU", text="half a pair \ud83d \\ud83d, 字").write(path)
    assert [file.name for file in tmp_path.iterdir()] == ["standard.json"]
    assert "字" in path.read_text(encoding="utf-8")
    read = read_results.parse(json.loads(path.read_text(encoding="utf-8")))
    assert read == standard_result("MMLU", text="half a pair \ud83d \\ud83d, 字")
    written = f"table\n{path} written\n"
    write_results(standard_result("MMLU", seconds=3), tmp_path, "table")
    assert capsys.readouterr().out == written
    for changed, words in (
        (standard_result("MMLU", limit=2), "settings"),
        (standard_result("MMLU", "MATH", limit=2), "tasks or lengths"),
    ):
        write_results(changed, tmp_path, "table")
        line = f"{path} replaces results with other {words}; give another --output to keep both\n"
        assert capsys.readouterr().out == line + written
