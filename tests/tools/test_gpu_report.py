"""tools/gpu_report.py at tiny sizes on a CPU: killed and resumed, its tables, rows that fail, its time."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ultralong.errors import UserError
from megatron_ultralong.gpu_report import expected_seconds, predictions, run, sizes, table, worker
from megatron_ultralong.gpu_report.journal import Journal
from megatron_ultralong.measure.attention_inputs import random_starts
from megatron_ultralong.planning import flops
from megatron_ultralong.planning.hardware import gpu_named
from tests import processes

ROOT = Path(__file__).parents[2]
GROUPS = "loss,step,longest,extension"
NOT_NEEDED = (
    "accelerate datasets evaluate gguf jieba lm_eval matplotlib nltk openai pandas pyarrow rouge rouge_score scipy sentencepiece "
    "sklearn tenacity tensorboard xdist zstandard"
).split()
"""What setup.py requires or "dev" has, beyond what torch, transformers and Megatron-Core bring and
tests/gpu/conftest.py checks."""
FACTS = {"device": "NVIDIA H100 80GB HBM3", "torch": "2", "sizes": "full", "commit": "c", "missing": []}


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment in which new interpreters do not have `NOT_NEEDED`."""
    (tmp_path / "bare").mkdir()
    text = f"import sys\nsys.modules.update(dict.fromkeys({NOT_NEEDED}))\n"
    (tmp_path / "bare" / "sitecustomize.py").write_text(text)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "bare"), os.environ["PYTHONPATH"]])}


def test_needs_little(bare: dict[str, str]) -> None:
    """On a rented GPU there are torch, transformers and Megatron-Core."""
    modules = [f"tests.gpu.{path.stem}" for path in sizes.TESTS.glob("*.py") if path.stem != "__init__"]
    code = f"""
import importlib, sys
for name in {[*modules, "megatron_ultralong.gpu_report.run", "megatron.core.dist_checkpointing"]}:
    importlib.import_module(name)
from tests.gpu.conftest import missing
sys.modules["psutil"] = sys.modules["megatron"] = None
del sys.modules["megatron.core"]
print(missing())
import zstandard
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=bare, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["['megatron-core', 'psutil']"], done.stderr[-2000:]
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError: import of zstandard"), done.stderr[
        -2000:
    ]


def events(out: Path) -> list[dict[str, Any]]:
    file = out / "rows.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def ended(out: Path) -> list[str]:
    return [event["row"] for event in events(out) if event["event"] in ("row", "failed")]


@pytest.mark.complete
def test_killed_and_resumed(tmp_path: Path, bare: dict[str, str]) -> None:
    """kill -9 in the middle of a work; the next call measures only what is missing. The extension's tools run
    without `NOT_NEEDED`."""
    out, base = tmp_path / "out", tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "gpt2"}')
    command = [
        sys.executable,
        "tools/gpu_report.py",
        "--device",
        "cpu",
        "--output",
        str(out),
        "--only",
        GROUPS,
    ]
    with processes.Popen([*command, "--model", str(base)], cwd=ROOT, stdout=processes.DEVNULL) as first:
        while "step, 256: offload-all" not in ended(out):
            assert first.poll() is None
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
    before = ended(out)
    tables = [json.loads((out / "gpu_report.json").read_text())["rows"]]
    assert {row["row"] for row in tables[0]} <= set(before)

    second = processes.run([*command, "--model", str(base)], cwd=ROOT, capture_output=True, timeout=900.0)
    assert second.returncode == 0, second.stderr
    rows = ended(out)
    assert rows[: len(before)] == before and len(rows) == len(set(rows))
    values = json.loads((out / "gpu_report.json").read_text())
    assert values["missing"] == [] and "Nothing is missing." in (out / "gpu_report.md").read_text()
    [failed] = [row for row in values["rows"] if row["row"] == "extension, base x 2: training"]
    assert failed["note"].startswith("failed: UserError: ") and "gpt2" in failed["note"], failed

    demo = ["--model", "examples/demo/base", "--retry-failed"]
    third = processes.run([*command, *demo], cwd=ROOT, capture_output=True, env=bare, timeout=900.0)
    assert third.returncode == 0 and "report: " in third.stdout, third.stderr
    again = ended(out)[len(rows) :]
    assert again[0].startswith("loss, 256: Liger") and again[-1] == "extension, base x 2: training"
    check_tables(out)


def check_tables(out: Path) -> None:
    text, values = (out / "gpu_report.md").read_text(), json.loads((out / "gpu_report.json").read_text())
    assert "not the figures of a GPU" in text and "- device: " in text and "- torch: " in text
    assert f"- command: `python tools/gpu_report.py --device cpu --output {out}" in text
    assert "missing: a GPU: the figures are not those of one" in text
    rows = {row["row"]: row for row in values["rows"]}
    assert "loss, 256: Liger fused linear cross entropy: not installed" in text
    for name in sizes.MODES:
        row = rows[f"step, 256: {name}"]
        assert (
            row["figures"]["peak_bytes"] / row["predicted"]["peak_bytes"] - 1
            == row["relative_error"]["peak_bytes"]
        )
        assert abs(row["relative_error"]["peak_bytes"]) < 0.15, row
        assert "seconds" not in row["predicted"]  # nothing is known of a CPU
    assert rows["longest, in 3 MiB: all-but-attention"]["relative_error"]["tokens"] is not None
    extended = rows["extension, base x 2: training"]["figures"]
    assert extended["iteration_seconds"] > 0 and 0 < extended["last_loss"] < 20, extended
    [line] = [line for line in text.splitlines() if line.startswith("| step, 256: full |")]
    assert line == "| step, 256: full | tokens | 256 | - | - |"


# ---- a program that is told what a process says ------------------------------------------------


class Scripted:
    """A process and its connection: `messages` arrive one after the other, then it exits or hangs."""

    pid, exitcode = 1, -9

    def __init__(self, messages: list[Any], end: str, clock: list[float] | None = None) -> None:
        self.messages, self.end, self.clock = messages, end, clock or [0.0]

    def poll(self, timeout: float) -> bool:
        if not self.messages and self.end == "hang":
            self.clock[0] += timeout
            return False
        return True

    def recv(self) -> Any:
        if not self.messages:
            raise EOFError
        return self.messages.pop(0)

    def join(self, timeout: float) -> None: ...


def report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scripts: list[Scripted], **changes: Any
) -> tuple[run._Report, list[tuple[Any, ...]]]:
    """A report on a GPU whose processes are `scripts`, and the arguments each was started with."""
    started: list[tuple[Any, ...]] = []

    @contextlib.contextmanager
    def process(target: Any, *args: Any) -> Iterator[Any]:
        if target is worker.check_machine:
            script = Scripted([dict.fromkeys(("kernel",)) | FACTS], "exit")
        else:
            started.append(args)
            script = scripts.pop(0)
        yield script, script

    monkeypatch.setattr(run, "_process", process)
    values: dict[str, Any] = {"minutes": 9.0, "groups": ["loss"], "device": "cuda", "scale": "full"}
    made = run._Report(run.ReportSettings(out=tmp_path / "out", **values | changes), lambda line: None)
    made.check_machine()
    return made, started


def figures(rows: list[str], name: str) -> list[Any]:
    more = [("start", rows[rows.index(name) + 1])] if name != rows[-1] else []
    return [("row", name, {"ms": 2.0}, {"ms": 1.6}), *more]


def test_failures_do_not_end_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*next(sizes.works(sizes.FULL, ["loss"], None)).rows]
    monkeypatch.setattr(run, "LEAST", 0.0)
    monkeypatch.setattr(run, "PATIENCE", 0.0)
    monkeypatch.setattr(expected_seconds, "start", lambda on_gpu: 0.0)
    scripts = [
        Scripted([("start", rows[0]), *figures(rows, rows[0])], "exit"),  # killed during the second
        Scripted([("start", rows[2]), ("failed", rows[2], "ValueError: x", False)], "exit"),
        Scripted([("start", rows[3])], "hang"),  # longer than its limit
        Scripted([("start", rows[4]), ("failed", rows[4], "ImportError: no y", True)], "exit"),
        Scripted(
            [("start", rows[0]), ("failed", rows[0], "UserError: z", True)], "exit"
        ),  # of the larger size
    ]
    made, started = report(tmp_path, monkeypatch, scripts)
    made.measure()
    assert [args[1] for args in started] == [rows, rows[2:], rows[3:], rows[4:], rows] and not scripts
    path = made.write()
    made.journal.close()
    text = path.read_text()
    for line in (
        f"| loss, 16K: {rows[0]} | ms | 2 | 1.6 | +25.0% |",
        f"- loss, 16K: {rows[1]}: failed: the process ended with exit code -9 (logs/loss-16K.log)",
        f"- loss, 16K: {rows[2]}: failed: ValueError: x (logs/loss-16K.log)",
        f"- loss, 16K: {rows[3]}: failed: took longer than 0 s",
        *(f"- loss, 16K: {row}: failed: ImportError: no y (logs/loss-16K.log)" for row in rows[4:]),
        *(f"- loss, 64K: {row}: failed: UserError: z (logs/loss-64K.log)" for row in rows),
        "- device: NVIDIA H100 80GB HBM3",
        "Nothing is missing.",
    ):
        assert line in text, (line, text)


def test_what_does_not_fit_into_the_time_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = next(sizes.works(sizes.FULL, ["loss"], None))
    monkeypatch.setattr(expected_seconds, "row", lambda *args: 200.0)
    clock = [1000.0]
    monkeypatch.setattr(run, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    scripts = [Scripted([("start", work.rows[0])], "hang", clock)]
    made, started = report(tmp_path, monkeypatch, scripts)
    made.deadline = clock[0] + 2 * 200 + expected_seconds.START_GPU + 1
    made.measure()
    assert [args[1] for args in started] == [
        [*work.rows[:2]]
    ]  # two rows fit, and the time was up in the first
    missing = made.missing()
    assert missing[work.key(work.rows[0])] == 1.5 * 421 and missing[work.key(work.rows[1])] == 200.0
    text = made.write().read_text()
    made.journal.close()
    assert f"Missing ({2 * len(work.rows)} rows, about" in text
    assert f"- {work.key(work.rows[0])}: about 632 s" in text


def test_a_row_that_ends_the_program_twice_is_not_started_again(tmp_path: Path) -> None:
    for again in range(3):
        journal = Journal(tmp_path)
        assert ("step: x" in journal.rows) == (again == 2)
        if again < 2:
            journal.start("step: x")
        journal.close()
    assert "2 times" in journal.rows["step: x"]["reason"]


def test_rows_of_other_machines_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "out") if (tmp_path / "out").mkdir() is None else None
    assert journal is not None
    journal.set_machine(FACTS | {"device": "NVIDIA A100"})
    with pytest.raises(UserError, match="is being written by another run"):
        report(tmp_path, monkeypatch, [])
    journal.close()
    with pytest.raises(UserError, match=r"device NVIDIA A100, and this is NVIDIA H100.*another --output"):
        report(tmp_path, monkeypatch, [])


# ---- predictions -------------------------------------------------------------------------------


def test_predictions_are_those_of_the_plan() -> None:
    gpu = gpu_named("NVIDIA H100 PCIe")
    assert gpu is not None and gpu.bf16 == flops.PEAKS["H100 PCIe"] and gpu_named("Tesla T4") is None
    gpu = gpu_named("NVIDIA H100 80GB HBM3")
    assert gpu is not None and gpu.bf16 == 989e12
    attention = next(sizes.works(sizes.FULL, ["attention"], None)).settings
    one, ring = (
        predictions.attention(attention, {"method": method, "cp": cp, "documents": None}, "cudnn", gpu)
        for method, cp in (("one kernel", 1), ("ring", 8))
    )
    s = 64 * 1024
    forward = 2 * s**2 * 32 * 128 / (0.6 * 989e12)  # half of the square, two products, two FLOPs each
    assert one["forward_ms"] == pytest.approx(1e3 * forward)
    assert one["backward_ms"] == pytest.approx(1e3 * forward * 2.5 * 0.6 / 0.5)
    assert one["both_ms"] < ring["both_ms"] < 1.5 * one["both_ms"]
    packed = {"method": "one kernel", "cp": 1, "documents": 16}
    starts = random_starts(s, 16, attention.seed)  # type: ignore[attr-defined]
    share = sum((b - a) ** 2 for a, b in itertools.pairwise([*starts, s])) / s**2
    assert predictions.attention(attention, packed, "flash", gpu)["forward_ms"] == pytest.approx(
        1e3 * forward * share
    )
    assert (
        predictions.attention(attention, {"method": "te-style", "cp": 8, "documents": None}, "cudnn", gpu)
        == {}
    )
    assert worker.test_figures(
        "FAILED tests/gpu/test_a.py::b - x\n1 failed, 12 passed, 3 skipped in 9.1s", 1
    ) == {
        "passed": 12,
        "failed": 1,
        "skipped": 3,
        "note": "failed: test_a.py::b",
    }
    assert table.relative_error(1.1, 1.0) == pytest.approx(0.1)


def test_every_row_at_full_size_has_an_expected_time() -> None:
    gpu = gpu_named("NVIDIA H200")
    extension = run._Report._extension
    settings = run.ReportSettings(out=Path("x"), minutes=1, groups=(), device="cuda", scale="full")
    made = extension(type("Report", (), {"settings": settings})(), sizes.FULL)
    for work in sizes.works(sizes.FULL, sizes.GROUPS, made):
        seconds = [expected_seconds.row(work, row, True, gpu) for row in work.rows]
        assert min(seconds) > 0 and max(seconds) < 1000, (work.key(""), seconds)


def test_an_installed_package_has_no_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no model to extend: both are looked for in the folder where the report is started."""
    monkeypatch.chdir(tmp_path)
    settings = run.ReportSettings(
        out=tmp_path / "out", minutes=1, groups=("tests", "extension"), device="cuda", scale="full"
    )
    lines: list[str] = []
    report = run._Report(settings, lines.append)
    report.journal.close()
    assert lines == ["extension: not measured without a model; give --model DIR"]
    (work,) = (work for work in report.works if work.group in settings.groups)
    rows: list[tuple[str, dict[str, Any]]] = []
    worker._tests(
        work, work.rows, torch.device("cuda"), None, lambda row, figures, _: rows.append((row, figures))
    )
    note = "not run: this folder is not a clone of the repository, which has the tests"
    assert rows == [("all", {"note": note})]
