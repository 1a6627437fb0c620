"""Every benchmark on our own model over two context parallel ranks, against transformers in one process: the
same answers and figures."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ultralong.config import Parallel
from megatron_ultralong.evaluate.pipeline import stages
from megatron_ultralong.evaluate.pipeline.results import BenchmarkResult
from megatron_ultralong.evaluate.tasks import infinitebench, lveval, perplexity
from megatron_ultralong.evaluate.tasks.niah import run as niah
from megatron_ultralong.evaluate.tasks.niah.prompts import NiahSettings
from megatron_ultralong.evaluate.tasks.ruler import run as ruler
from megatron_ultralong.evaluate.tasks.ruler.settings import RulerSettings
from megatron_ultralong.evaluate.tasks.standard import run as standard
from tests import benchmark_files as made
from tests.spawn import run_ranks
from tests.text import write_jsonl
from tests.tools.test_standard import write_tasks
from tests.unit.test_infinitebench import data as infinitebench_files

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

ROOT = Path(__file__).parents[2]
BASE = ROOT / "examples" / "demo" / "base"
TASKS = ("passkey", "kv_retrieval", "code_debug", "math_find")
"""Of InfiniteBench: those whose answers are short; the model has 512 positions."""


def scores_of(result: BenchmarkResult) -> list[dict[str, Any]]:
    return [one.to_json() for one in result.scores]


def every_benchmark(backend: Any, files: Path, out: Path) -> dict[str, Any]:
    """What each of them makes of the model, answers and figures."""
    out.mkdir()
    found: dict[str, Any] = {}
    grid = NiahSettings(lengths=(200, 333), depths=(0.0, 100.0), trials=2, digits=5)
    found["niah"] = [
        trial["prediction"]
        for trial in niah.run(backend, grid, answers=out / "niah.predictions.jsonl").extra["trials"]
    ]
    settings = RulerSettings(out=out / "ruler", tasks=("niah_single_1", "vt"), lengths=(900, 1000), samples=2)
    ruler.prepare(settings, backend.tokenizer)
    ruler.predict(settings, backend)
    found["ruler"] = scores_of(ruler.score(settings))
    found["ruler answers"] = [
        json.loads(line)["pred"]
        for path in sorted((out / "ruler" / "predictions").rglob("*00.jsonl"))
        for line in path.read_text().splitlines()
    ]
    for name, benchmark, choice in (
        ("lveval", lveval, lveval.LVEvalSettings()),
        ("infinitebench", infinitebench, infinitebench.InfiniteBenchSettings(tasks=TASKS)),
    ):
        benchmark.prepare(out, files / name, choice)
        stages.predict(backend, out, name)
        found[name] = scores_of(benchmark.results(out))
        found[f"{name} answers"] = [
            json.loads(line)["prediction"]
            for line in (out / f"{name}.predictions.jsonl").read_text().splitlines()[1:]
        ]
    result, samples = standard.run(
        backend,
        standard.StandardSettings(tasks=("many", "digit", "write", "whole"), include_path=files / "tasks"),
        out,
    )
    found["standard"] = {
        "scores": scores_of(result),
        "texts": [s["answers"] for s in samples if s["task"] == "write"],
    }
    found["likelihoods"] = [
        value
        for s in samples
        if s["task"] in ("many", "digit")
        for answer in s["answers"]
        for value in answer[0]
    ]
    rows = perplexity.read_rows([str(files / "books.jsonl")], backend.tokenizer)
    found["nll"] = [
        part["nll"]
        for part in perplexity.measure(
            backend, rows, perplexity.PerplexitySettings(lengths=(300, 100), rows=2)
        )
        .extra["by_length"]
        .values()
    ]
    return found


def test_two_context_parallel_ranks_answer_as_transformers(tmp_path: Path) -> None:
    made.lveval(tmp_path / "lveval")
    infinitebench_files(tmp_path / "infinitebench", TASKS)
    write_tasks(tmp_path / "tasks")
    write_jsonl(
        tmp_path / "books.jsonl",
        [f"The pass key of Ada is {i}. The grass is green in spring. " * 60 for i in (12345, 99821)],
    )
    run_ranks(_ranks, 2, tmp_path)
    ours, theirs = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("ours", "theirs"))
    for name in ("likelihoods", "nll"):
        assert ours.pop(name) == pytest.approx(theirs.pop(name), abs=1e-4, rel=1e-5), name
    assert ours == theirs
    assert "niah" in ours and sum(len(ours[name]) for name in ours if "answers" in name) > 20
    kept = [
        json.loads(line)
        for line in (tmp_path / "ours" / "ruler" / "predictions" / "vt" / "1000.jsonl")
        .read_text()
        .splitlines()
    ]
    assert {"pred", "text_sha256", "model", "outputs"} <= kept[0].keys() and kept[0]["model"]["settings"][
        "temperature"
    ] == 0
    journal = (
        (tmp_path / "ours" / "ruler" / "predictions" / "vt" / "1000.journal.jsonl")
        .read_text()
        .splitlines()[1:]
    )
    assert len(journal) == 2 and all(len(json.loads(line)["prompt_sha256"]) == 64 for line in journal)


def _ranks(rank: int, world: int, folder: Path) -> None:
    import datasets

    from megatron_ultralong.evaluate.backends.parallel_model import ParallelModel
    from megatron_ultralong.evaluate.backends.transformers_model import TransformersModel
    from megatron_ultralong.runtime import launch

    datasets.config.HF_DATASETS_CACHE = folder / "datasets"
    datasets.disable_progress_bars()
    theirs = (
        every_benchmark(TransformersModel(BASE, device="cpu"), folder, folder / "hf") if rank == 0 else None
    )
    backend = ParallelModel(path=BASE, parallel=Parallel(cp=world), device="cpu", chunk=64)
    launch.stop = lambda: None  # the spawner ends the group
    waiting = backend._calls._get_backend(torch.device("cpu")).options._timeout
    assert waiting > timedelta(days=30), "rank 0 may make prompts for hours while the others wait"
    if not backend.ranks.is_main:
        backend.follow()
        return
    ours = every_benchmark(backend, folder, folder / "ours")
    backend.close()
    for name, found in (("ours", ours), ("theirs", theirs)):
        (folder / f"{name}.json").write_text(json.dumps(found))
