"""tools/report_run.py on runs written by hand: what counts after a restart, parts that are missing, the plan,
and a page without anything from outside."""

from __future__ import annotations

import base64
import dataclasses
import html.parser
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from megatron_ultralong import recipes, shapes
from megatron_ultralong.config import Memory, Parallel, to_dict
from megatron_ultralong.errors import UserError
from megatron_ultralong.planning import memory
from megatron_ultralong.run_report import figures, page, plan, read

TOOL = Path(__file__).parents[2] / "tools" / "report_run.py"
RUN = dataclasses.replace(
    recipes.get("ultralong_1m"),
    parallel=Parallel(tp=8, cp=8),
    memory=Memory(offload="layer_inputs"),
    train=dataclasses.replace(recipes.get("ultralong_1m").train, iterations=100),
)


def start(iteration: int, device: str = "NVIDIA H200", **more: Any) -> dict[str, Any]:
    return {
        "kind": "start",
        "time": "2026-11-29T10:00:00.000+00:00",
        "format": 1,
        "iteration": iteration,
        "iterations": 100,
        "run": to_dict(RUN),
        "model": dataclasses.asdict(shapes.LLAMA_3_1_8B),
        "layout": {"tp": 8, "pp": 1, "cp": 8, "dp": 1, "ranks": 64},
        "devices": {device: 64},
        "hosts": {"node<1>": 64},
        "versions": {"torch": "2.13.0"},
        "kernels": {"attention": "cuDNN"},
        "rope": {
            "settings": "yarn & more",
            "length": 1048576,
            "attention_factor": 1.0,
            "inverse_frequencies": [1.0, 0.5],
        },
        **more,
    }


def step(iteration: int, loss: float = 2.0, **more: Any) -> dict[str, Any]:
    return {
        "kind": "step",
        "time": "2026-11-29T10:00:00.000+00:00",
        "iteration": iteration,
        "loss": loss,
        "grad_norm": 1.0,
        "learning_rate": 1e-5,
        "tokens": iteration * 1000,
        "seconds": 80.0,
        "tokens_per_second": 100000.0,
        "tokens_per_second_per_gpu": 1600.0,
        "causal_mfu": 0.4,
        "parts": {"forward": 30.0, "backward": 50.0},
        "memory": {"peak_allocated": 70e9, "peak_reserved": 75e9, "peak_resident": 9e9},
        "slowest_rank": {"rank": 3, "work": 79.0, "median_work": 78.0},
        "eta_seconds": 7200.0,
        **more,
    }


def write(folder: Path, *lines: dict[str, Any], torn: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    return folder


class Tags(html.parser.HTMLParser):
    """The tags of a page with their attributes; each is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(text: str) -> list[str]:
    """Nothing is fetched, no script runs, and each picture is an SVG; returns their headings."""
    headings = []
    for tag, attributes in Tags(text).found:
        assert tag not in ("script", "link", "iframe", "object", "embed", "a"), tag
        for name, value in attributes.items():
            assert name not in ("href", "srcset") and not name.startswith("on")
            if name == "src":
                kind, _, data = str(value).partition(",")
                assert kind == "data:image/svg+xml;base64"
                svg = ElementTree.fromstring(base64.b64decode(data))
                assert svg.tag == "{http://www.w3.org/2000/svg}svg"
                headings.append(str(attributes["alt"]))
    assert "url(" not in text and "@import" not in text and "http" not in re.sub('base64,[^"]*', "", text)
    return headings


# ---- what counts -------------------------------------------------------------------------------


def test_iterations_that_were_trained_again(tmp_path: Path) -> None:
    """Killed after 6 with a checkpoint of 4, and after 5; the second time a line was cut."""
    folder = write(
        tmp_path / "run",
        start(0),
        *(step(i, loss=10.0 + i) for i in range(1, 7)),
        {"kind": "validation", "iteration": 4, "loss": 1.0, "seconds": 2.0},
        {"kind": "validation", "iteration": 6, "loss": 9.0, "seconds": 2.0},
        {"kind": "evaluation", "iteration": 6, "scalars": {"perplexity/all": 3.0}, "seconds": 2.0},
        {"kind": "save", "iteration": 4, "seconds": 5.0, "waited": 5.0},
        start(4),
        step(5, loss=25.0),
        start(4),
        step(5, loss=35.0),
        {"kind": "save", "iteration": 5, "seconds": 5.0, "error": "no space"},
        {"kind": "of a later release", "iteration": 5, "time": "2026-11-29T10:00:00.000+00:00"},
        torn='{"kind": "step", "iter',
    )
    record = read.read(folder)
    assert record.series("loss") == {1: 11.0, 2: 12.0, 3: 13.0, 4: 14.0, 5: 35.0}
    assert list(record.validations) == [4] and not record.evaluations
    assert record.restarts == [4, 4] and sum(record.lost.values()) == 3 and record.step_seconds == 8 * 80.0
    assert (
        record.unreadable == 1
        and record.status == "no end is recorded: running, or killed; last line at 2026-11-29 10:00:00 UTC"
    )
    back = read.read(
        write(tmp_path / "back", start(0), *(step(i, loss=i) for i in (1, 2, 3, 4)), step(2, loss=9.0))
    )
    assert back.series("loss") == {1: 1.0, 2: 9.0} and not back.restarts, "of its own accord"
    text = page.page(record)
    assert "Loss" in check_page(text) and "1 lines of metrics.jsonl cannot be read" in text
    assert "node&lt;1&gt;" in text and "yarn &amp; more" in text
    write(tmp_path / "run", start(0), {"kind": "stop", "iteration": 0, "reason": "loss is <not> finite"})
    assert "loss is &lt;not&gt; finite" in page.page(read.read(folder))


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [start(0)],
        [start(0, run={}, model={}, rope={}, devices={})],
        [step(1)],
        [{"kind": "step", "iteration": 1}],
        [start(0), {"kind": "validation", "iteration": 3, "loss": None}],
        [{"kind": "evaluation", "iteration": 3, "scalars": {"a/b": 1.0, "c": None}}],
        [{"kind": "save", "iteration": 3, "seconds": 2.0, "waited": 2.0}],
        [{"kind": "save", "iteration": 3}, {"kind": "bad_step", "iteration": 4, "bad_steps": 2}],
        [{"kind": "step", "iteration": "one"}, {"kind": "start", "iteration": 2}],
    ],
)
def test_pages_of_runs_with_parts_missing(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    check_page(page.page(read.read(write(tmp_path / "run", *lines))))


def test_long_runs_are_thinned(tmp_path: Path) -> None:
    record = read.read(write(tmp_path / "run", start(0), *(step(i, loss=float(i)) for i in range(1, 5001))))
    x, y = figures.thin(record.series("loss"))
    assert (
        len(x) <= figures.POINTS and x == y and x[0] == 4.0 and sum(x) / len(x) == pytest.approx(2500.5, 1e-3)
    )
    assert figures.thin({3: 1.0, 1: 2.0}) == ([1.0, 3.0], [2.0, 1.0]) and figures.thin({}) == ([], [])
    text = page.page(record)
    assert len(text) < 1_500_000 and text.count("<tr>") < 200
    assert "<td>1</td>" in text and "<td>5,000</td>" in text, "the first and the last are in the table"


# ---- the plan ----------------------------------------------------------------------------------


def test_the_plan_beside_measured(tmp_path: Path) -> None:
    record = read.read(write(tmp_path / "run", start(0), *(step(i, seconds=80.0 + i) for i in range(1, 4))))
    found = plan.compare(record)
    assert isinstance(found, plan.Comparison)
    planned = {what: value for what, _, value, _ in found.rows}
    assert {what: value for what, _, _, value in found.rows} == {
        "seconds per iteration": 82.0,
        "tokens/s per GPU": 1600.0,
        "causal MFU": 40.0,
        "memory of a GPU": 70.0,
    }
    assert planned["seconds per iteration"] == pytest.approx(sum(found.parts.values()))
    size = memory.total(memory.gpu_memory(RUN, shapes.LLAMA_3_1_8B, 64, "cudnn"))
    assert planned["memory of a GPU"] == size / 1e9
    assert "Plan beside measured" in page.page(record)

    for device, reason in (("cpu", "no data sheet of cpu"), ("NVIDIA T4", "no data sheet of NVIDIA T4")):
        other = plan.compare(read.read(write(tmp_path / "run", start(0, device=device))))
        assert isinstance(other, str) and reason in other
    for change in ({"run": {"name": "x"}}, {"layout": {}}, {"layout": {"ranks": 63}}, {"model": {"a": 1}}):
        broken = plan.compare(read.read(write(tmp_path / "run", start(0, **change))))
        assert isinstance(broken, str) and broken.startswith("no plan: ")


# ---- the tool ----------------------------------------------------------------------------------


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["report_run.py", *map(str, arguments)])
    runpy.run_path(str(TOOL), run_name="report_run")["main"]()


def test_the_tool_adds_scores_of_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "run", start(0), *(step(i) for i in range(1, 5)))
    results = tmp_path / "results"
    results.mkdir()
    for name, model in (
        ("a", folder / "iter_0000002"),
        ("b", folder / "iter_0000004"),
        ("c", tmp_path / "base"),
    ):
        score = {"a": 50.0, "b": 100.0, "c": 10.0}[name]
        scores = [{"task": "niah", "length": n, "score": score} for n in (8192, 16384)]
        cells = [{"length": n, "depth": 50.0, "accuracy": score / 100} for n in (8192, 16384)]
        values = {"format": 2, "task": "niah", "model": {"path": str(model)}, "settings": {"needles": 1}}
        (results / f"{name}.json").write_text(
            json.dumps(values | {"scores": scores, "extra": {"cells": cells}})
        )
    run_tool(monkeypatch, folder, "--results", results)
    assert capsys.readouterr().out == f"{folder}/report.html\n"
    text = (folder / "report.html").read_text()
    assert "Passkey" in check_page(text) and text.index("passkey/8192") < text.index("passkey/16384")
    assert f"{results}/c.json: its model {tmp_path}/base is not a checkpoint of this run" in text
    run_tool(monkeypatch, folder, "--output", tmp_path / "other.html")
    assert "Passkey" not in check_page((tmp_path / "other.html").read_text())


def test_what_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object) -> str:
        with pytest.raises(UserError) as error:
            run_tool(monkeypatch, *arguments)
        assert "\n" not in str(error.value)
        return str(error.value)

    line = f"{tmp_path} is not a run directory: metrics.jsonl is missing"
    assert refused(tmp_path) == line
    assert refused(tmp_path / "none").endswith("none is not a run directory: metrics.jsonl is missing")
    folder = write(tmp_path / "pretrain", start(0))
    assert refused(tmp_path) == f"{line}; it contains those of the stages pretrain: give one of them"
    assert (
        refused(folder, "--output", tmp_path / "pretrain")
        == f"--output {folder} cannot be written: Is a directory"
    )
    assert "no such file or directory" in refused(folder, "--results", tmp_path / "nothing")
    write(folder, start(0, format=2))
    assert "unsupported format version 2 (expected 1)" in refused(folder)
    assert not (folder / "report.html").exists()


def test_every_section_of_the_settings_is_shown() -> None:
    assert set(page.SECTIONS) >= {name for name, value in to_dict(RUN).items() if isinstance(value, dict)}
