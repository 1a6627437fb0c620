"""Ablations: grid files and the cells they expand to, settings refused before any run, resumption, tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ultralong.ablate import grid, plan, report, run, scores
from megatron_ultralong.ablate.plan import Job, Places, Step
from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.pipeline.results import BenchmarkResult, TaskScore
from tests import processes

_ = processes  # jobs are forked from its server
ROOT = Path(__file__).parents[2]
BASE = str(ROOT / "examples" / "demo" / "base")
GRID: dict[str, Any] = {
    "base": BASE,
    "recipe": "tiny_extend",
    "set": ["parallel.cp=1", "runtime.device=cpu", "train.iterations=2", "train.warmup=0"],
    "data": {"input": "train.jsonl", "separator-token": "eos"},
    "axes": {
        "method": {
            "untrained": {"train": False, "set": ["rope.type=none", "rope.allow_short=true"]},
            "ntk": {"set": ["rope.type=ntk"]},
        },
        "steps": {
            "one": {},
            "two": {"stages": [{"set": ["train.seq_length=2K"], "data": {"input": "half.jsonl"}}, {}]},
        },
    },
    "seeds": [1, 2],
    "evaluate": {
        "niah": {"lengths": [512, "4K"], "depths": [0, 100], "trials": 1},
        "perplexity": {"data": "held_out.jsonl", "lengths": [512], "rows": 1},
    },
}


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({**GRID, **changes}, sort_keys=False))
    return path


def places(folder: Path, **changes: Any) -> Places:
    return Places(out=folder / "out", grid=grid.read(written(folder, **changes)))


def test_expansion(tmp_path: Path) -> None:
    cells = grid.read(written(tmp_path)).cells
    assert [cell.name for cell in cells] == [
        "method=untrained,steps=one,untrained",
        "method=untrained,steps=two,untrained",
        "method=ntk,steps=one,seed=1",
        "method=ntk,steps=one,seed=2",
        "method=ntk,steps=two,seed=1",
        "method=ntk,steps=two,seed=2",
    ]
    first, second = cells[-1].stages
    common = (*GRID["set"], "rope.type=ntk")
    assert first.settings == (*common, "train.seq_length=2K", "train.seed=2")
    assert second.settings == (*common, "train.seed=2")
    assert first.data == {"input": "half.jsonl", "separator-token": "eos"} and second.data == GRID["data"]
    assert cells[-1].label == "ntk, two"

    axes = {"tuning": {"after": {"data": {"separator-token": None, "separator": ""}}}}
    axes["tuning"]["after"] |= {
        "then": [{"recipe": "tiny", "set": ["train.iterations=1"], "kind": "sft", "data": {"input": "x"}}],
        "evaluate": {"niah": {"trials": 3}},
    }
    (cell,) = grid.read(written(tmp_path, axes=axes, seeds=[7])).cells
    assert cell.stages[0].data == {"input": "train.jsonl", "separator": ""}
    assert (cell.stages[1].kind, cell.stages[1].settings) == ("sft", ("train.iterations=1", "train.seed=7"))
    assert cell.evaluate["niah"] == {**GRID["evaluate"]["niah"], "trials": 3}


def test_only_some_cells(tmp_path: Path) -> None:
    only = grid.parse_only(["method=ntk", "seed=2"])
    names = [cell.name for cell in grid.read(written(tmp_path), only).cells]
    assert names == ["method=ntk,steps=one,seed=2", "method=ntk,steps=two,seed=2"]
    for wrong, line in (
        ("methods=ntk", "--only methods: unknown axis; the grid has method, steps, seed"),
        ("method=yarn", "--only method=yarn: unknown; the grid has untrained, ntk"),
        ("method", "--only method: expected axis=value,value"),
    ):
        with pytest.raises(UserError) as error:
            grid.read(written(tmp_path), grid.parse_only([wrong]))
        assert str(error.value) == line


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"axis": {}}, "unknown key axis; did you mean axes?"),
        ({"axes": {"a": {"x": {"sett": []}}}}, "axes.a.x: unknown key sett; did you mean set?"),
        ({"axes": {"a": {"x/y": {}}}}, "axes.a.x/y: the name of a value must not contain"),
        ({"axes": {"a": {}}}, "axes.a: has no values"),
        ({"axes": {"a": {"x": {"then": [{"set": []}]}}}}, "`then` of x: needs a recipe"),
        ({"seeds": []}, "seeds must be a list of whole numbers"),
        ({"seeds": [1, 1]}, "seeds contains a number twice"),
        ({"evaluate": {"ruler": {}}}, "unknown key ruler"),
        ({"set": [{"a": 1}]}, "set must be a list of key=value"),
        ({"train": "later"}, "train must be true or false"),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        grid.read(written(tmp_path, **changes))
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"recipe": "tinny"}, "--recipe tinny: no such recipe; did you mean tiny?"),
        ({"set": ["parallel.cp=1", "train.sequence=1"]}, "--set train.sequence: no such setting"),
        ({"set": []}, "x cp=2 needs a multiple of 2 ranks"),
        (
            {"set": ["parallel.cp=1", "train.seq_length=8K", "rope.factor=8"]},
            "is longer than the 4096 tokens",
        ),
        (
            {"evaluate": {"niah": {"lengths": [512], "trails": 1}}},
            "`ultralong evaluate niah` has no option --trails",
        ),
        ({"evaluate": {"niah": {"trials": 1}}}, "evaluate.niah: lengths is missing"),
        ({"evaluate": {"niah": {"lengths": [512], "trials": "x"}}}, "invalid int value: 'x'"),
        ({"evaluate": {"niah": {"lengths": [512], "depths": [0, 200]}}}, "--depths are percent"),
        ({"evaluate": {"perplexity": {"lengths": [512]}}}, "evaluate.perplexity: data is missing"),
        ({"base": "nowhere"}, "base nowhere is not a directory"),
        ({"files": {"a": "missing.py --x"}}, "files.a: missing.py --x must begin with a Python script"),
    ],
)
def test_settings_are_refused_before_any_run(tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    axes = {"method": {"yarn": {}}}
    with pytest.raises(UserError) as error:
        plan.check(places(tmp_path, axes=axes, **changes))
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples" / "ablations").glob("*.yaml")), ids=lambda p: p.name
)
def test_shipped_grids(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    here = Places(out=tmp_path, grid=grid.read(path))
    plan.check(here)
    if here.base.is_dir():
        jobs = [job for _, job in plan.cell_jobs(here)]
        trained = [job for job, cell in zip(jobs, here.grid.cells, strict=True) if cell.seed is not None]
        if path.stem != "tuning":
            assert len({job.tokens for job in trained}) == 1, "equal tokens"
        assert plan.data_jobs(here)


def test_commands(tmp_path: Path) -> None:
    here = places(tmp_path)
    jobs = {job.name: job for _, job in plan.cell_jobs(here)}
    rows = plan.data_jobs(here)
    assert len(rows) == 2, "one set of rows for both seeds"
    words = [step.words for step in jobs["method=ntk,steps=two,seed=2"].steps]
    assert [one[0] for one in words] == [
        "train",
        "train",
        "convert",
        "evaluate",
        "evaluate",
    ]
    assert "--load-hf" in words[0] and "--load" in words[1]
    assert "512,4K" in words[3] and "0,100" in words[3]
    assert jobs["method=ntk,steps=two,seed=2"].tokens == 2 * 4 * (2048 + 4096)
    untrained = jobs["method=untrained,steps=one,untrained"]
    assert [step.words[0] for step in untrained.steps] == ["untrained", "evaluate", "evaluate"]
    assert untrained.tokens == 0


# ---- resumption ------------------------------------------------------------------------------------


def test_a_changed_setting_is_noticed(tmp_path: Path) -> None:
    factors = tmp_path / "factors.json"
    factors.write_text(json.dumps([1.0] * 15 + [8.0]))
    axes = {"method": {"longrope": {"set": ["rope.type=longrope", f"rope.factors={factors}"]}}}

    def job(**changes: Any) -> Job:
        return plan.cell_jobs(places(tmp_path, axes=axes, **changes))[0][1]

    one = job()
    assert run.state(one) == "new"
    one.folder.mkdir(parents=True)
    (one.folder / run.SETTINGS).write_text(json.dumps(one.settings))
    (one.folder / run.DONE).write_text("{}")
    for step in one.steps[1:]:  # the checkpoint is removed from finished cells
        step.makes.parent.mkdir(parents=True, exist_ok=True)
        step.makes.touch()
    assert run.state(one) == "finished" == run.state(job(seeds=[1, 2, 3]))
    assert run.state(job(set=[*GRID["set"], "train.lr=2e-3"])) == "changed"
    assert run.state(job(data={"input": "other.jsonl"})) == "changed"
    assert run.state(job(evaluate={"niah": {"lengths": [1024]}})) == "changed"
    factors.write_text(json.dumps([1.0] * 15 + [9.0]))
    assert run.state(job()) == "changed"
    factors.write_text(json.dumps([1.0] * 15 + [8.0]))
    one.steps[-1].makes.unlink()
    assert run.state(one) == "stopped"
    (one.folder / run.DONE).unlink()
    assert run.state(one) == "stopped"


def test_jobs(tmp_path: Path) -> None:
    """A failure leaves no finished job, the others run, and a resumed job repeats no complete command."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, pathlib\n"
        "name = pathlib.Path(sys.argv[1])\n"
        "if not pathlib.Path(sys.argv[2]).exists(): sys.exit('error: no input')\n"
        "name.write_text('made')\n"
        "print('made', name.name)\n"
    )

    def job(name: str, given: Path) -> Job:
        folder = tmp_path / name
        steps = [(folder / "a", script), (folder / "b", given)]
        return Job(
            name=name,
            folder=folder,
            steps=tuple(Step(words=(str(script), str(a), str(b)), makes=a) for a, b in steps),
            settings={"name": name},
        )

    here = Places(out=tmp_path, grid=grid.read(written(tmp_path)))
    lines: list[str] = []
    jobs = [job("fails", tmp_path / "later"), job("works", script)]
    assert run.run_jobs(jobs, here, 2, lines.append) == ["fails"]
    assert any(line.startswith("fails: failed: no input") for line in lines)
    assert [run.state(one) for one in jobs] == ["stopped", "finished"]
    (tmp_path / "later").touch()
    lines.clear()
    assert run.run_jobs(jobs, here, 2, lines.append) == []
    assert lines[0] == "1 of 2 finished before" and len(lines) == 2
    assert [run.state(one) for one in jobs] == ["finished", "finished"]
    log = (tmp_path / "fails" / run.LOG).read_text()
    assert log.count("made a") == 1 and log.count("made b") == 1


# ---- tables ----------------------------------------------------------------------------------------


def _results(job: Job, passkey: float, nll: float) -> None:
    bucket = {"from": 0, "to": 512, "nll": nll, "perplexity": math.exp(nll), "tokens": 512}
    by_length = {"512": {**bucket, "by_position": [bucket], "by_sixteenth": [bucket]}}
    for task, score, extra in (
        ("niah", passkey, {}),
        ("perplexity", math.exp(nll), {"by_length": by_length}),
    ):
        (job.folder / task).mkdir(parents=True)
        BenchmarkResult(
            task=task,
            model={"path": "hf"},
            settings={},
            scores=(TaskScore(task=task, length=512, score=score, count=1),),
            extra=extra,
        ).write(job.folder / task / f"{task}.json")


def test_table(tmp_path: Path) -> None:
    here = places(tmp_path)
    cells = plan.cell_jobs(here)
    done = [(cell, job) for cell, job in cells if cell.values["steps"] == "one"]
    for (_, job), (passkey, nll) in zip(done, ((0.0, 1.0), (80.0, 0.1), (90.0, 0.3)), strict=True):
        _results(job, passkey, nll)
    rows = scores.rows(cells, [job.name for _, job in done])
    assert [row.label for row in rows] == ["untrained, one", "ntk, one"]
    assert rows[1].seeds == (1, 2) and rows[1].scores["niah", 512].text(1) == "85.0 ± 7.1"
    assert rows[1].by_position is not None
    assert rows[1].by_position.extra["by_length"]["512"]["perplexity"] == pytest.approx(math.exp(0.2))
    lines = report.write(rows, here.grid, here.out)
    assert lines[1].split() == ["untrained,", "one", "untrained", "0.0", "2.718"]
    text = (here.out / "ablation.md").read_text()
    assert "| ntk | one | 2 | 32,768 | 85.0 ± 7.1 | 1.228 ± 0.173 |" in text
    assert "| *no separator* | *85.47* |" in text and "not measured here" in text
    table = (here.out / "ablation.csv").read_text().splitlines()
    assert table[0].startswith("method,steps,source,seeds,tokens,passkey 512 mean,passkey 512 deviation")
    assert "arXiv 2504.06214" in table[-1]
    assert json.loads((here.out / "ablation.json").read_text())["rows"][1]["scores"][0]["values"] == [
        80.0,
        90.0,
    ]
    assert (here.out / "passkey.png").is_file() and (here.out / "perplexity.png").is_file()
