"""Perplexity by position of a model split over ranks, against transformers in one process."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ultralong import recipes
from megatron_ultralong.command_settings import override
from megatron_ultralong.config import Model, Parallel, Run
from megatron_ultralong.evaluate.backends import likelihood
from megatron_ultralong.evaluate.scorers import loss_by_position
from megatron_ultralong.evaluate.tasks import perplexity
from megatron_ultralong.evaluate.tasks.perplexity_in_training import during_training
from megatron_ultralong.planning import memory as plan
from tests import processes
from tests.spawn import leave_groups, run_ranks
from tests.text import write_rows
from tests.tiny import hf_model

ROOT = Path(__file__).parents[2]
MODEL = Model(hidden_size=32, ffn_size=64, layers=4, heads=4, kv_heads=2, head_dim=8, vocab_size=97)
S, ROWS = 64, 5
LAYOUTS = (Parallel(cp=2), Parallel(tp=2), Parallel(pp=2), Parallel())
SHAPE = (
    "hidden_size",
    "ffn_size",
    "layers",
    "heads",
    "kv_heads",
    "head_dim",
    "vocab_size",
    "tied_embeddings",
)
SETTINGS = [
    *(f"model.{name}={getattr(MODEL, name)}" for name in SHAPE),
    f"train.seq_length={S}",
    "train.global_batch=4",
    "memory.loss_chunk=24",
    "runtime.device=cpu",
    "train.save_every=0",
]


def reference(model: Any, prefix: str) -> dict[str, Any]:
    """The same of transformers, whose own test is tests/unit/test_perplexity.py."""

    class Backend:
        def token_nll(self, ids: list[int]) -> torch.Tensor:
            return likelihood.sequence_nll(model, ids)

        def describe(self) -> dict[str, Any]:
            return {}

    return perplexity.measure(
        Backend(), perplexity.read_rows([prefix], range(97)), perplexity.PerplexitySettings(lengths=(S,))
    ).extra["by_length"][str(S)]


def assert_equal(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got["tokens"] == want["tokens"] > 0
    for name in ("by_position", "by_sixteenth"):
        assert len(got[name]) == len(want[name]) > 1
        for mine, theirs in zip(got[name], want[name], strict=True):
            assert mine["tokens"] == theirs["tokens"] and mine["nll"] == pytest.approx(
                theirs["nll"], abs=1e-4
            ), (name, mine, theirs)


def test_every_way_of_splitting_gives_the_buckets_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_by_position, "FIRST", 16)
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(0, MODEL.vocab_size, (ROWS, S + 1), generator=generator)
    masks = (torch.rand(ROWS, S + 1, generator=generator) > 0.2).int()
    prefix = write_rows(tmp_path / "rows", rows.tolist(), masks.tolist())
    model = hf_model(MODEL)
    model.save_pretrained(tmp_path / "base")
    run_ranks(_ranks, 2, tmp_path)
    want = reference(model, prefix)
    lines = [json.loads(line) for line in (tmp_path / "perplexity.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(len(LAYOUTS)))
    for line in lines:
        assert_equal(line, want)


def _ranks(rank: int, world: int, folder: Path) -> None:
    from megatron_ultralong.checkpoint.hf import config as hf_config
    from megatron_ultralong.checkpoint.hf import reader as hf_reader
    from megatron_ultralong.model import llama
    from megatron_ultralong.runtime import launch
    from megatron_ultralong.train.step import Trainer, token_losses

    loss_by_position.FIRST = 16
    prepare = during_training([str(folder / "rows")], folder)
    for number, parallel in enumerate(LAYOUTS):
        run: Run = override(
            recipes.get("tiny"),
            [
                *SETTINGS,
                f"parallel.tp={parallel.tp}",
                f"parallel.pp={parallel.pp}",
                f"parallel.cp={parallel.cp}",
            ],
        )
        ranks = launch.start(run.runtime, parallel)
        found = hf_config.read_config(folder / "base")
        run = plan.settle_offload(run, MODEL, world, None)
        chunks = llama.build(found.model, found.rope, ranks, parallel, run.memory, run.train.precision)
        for chunk in chunks:
            hf_reader.load_parameters(
                folder / "base",
                found.model,
                llama.named_parameters(chunk),
                ranks.tp_rank,
                ranks.tp,
                group=ranks.groups.dp_cp,
            )
        scalars = prepare(run, None, MODEL.vocab_size)(
            number,
            ranks,
            functools.partial(token_losses, Trainer(run=run, ranks=ranks, chunks=chunks, optimizer=None)),
        )
        assert set(scalars) == {"perplexity/all", "perplexity/0-16", "perplexity/16-32", "perplexity/32-64"}
        leave_groups()


def test_training_writes_it_when_the_held_out_loss_is_due(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    generator = torch.Generator().manual_seed(3)
    rows = write_rows(
        tmp_path / "rows", torch.randint(0, MODEL.vocab_size, (8, S + 1), generator=generator).tolist()
    )
    hf_model(MODEL).save_pretrained(tmp_path / "base")
    command = [
        sys.executable,
        "tools/train.py",
        "--recipe",
        "tiny",
        "--set",
        *SETTINGS,
        "train.iterations=5",
        "train.eval_every=2",
        "train.eval_rows=3",
        "train.lr=0.01",
        "train.warmup=0",
        "--load-hf",
        str(tmp_path / "base"),
        "--data",
        rows,
        "--perplexity",
        rows,
        "--save",
        str(tmp_path / "run"),
    ]
    done = processes.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "perplexity.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [2, 4, 5] and done.stdout.count(
        " evaluation at iteration "
    ) == 3
    assert lines[0]["nll"] > lines[2]["nll"] and lines[2]["tokens"] == 3 * S
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("perplexity/all")] == [2, 4, 5]
    from transformers import LlamaForCausalLM

    processes.run(
        [
            sys.executable,
            "tools/convert_hf.py",
            "export",
            "--load",
            str(tmp_path / "run"),
            "--output",
            str(tmp_path / "hf"),
            "--dtype",
            "fp32",
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    want = reference(
        LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval(),
        write_rows(
            tmp_path / "first",
            torch.randint(0, MODEL.vocab_size, (8, S + 1), generator=torch.Generator().manual_seed(3))[
                :3
            ].tolist(),
        ),
    )
    assert lines[2]["nll"] == pytest.approx(want["nll"], abs=1e-4)
    for mine, theirs in zip(lines[2]["by_sixteenth"], want["by_sixteenth"], strict=True):
        assert mine["nll"] == pytest.approx(theirs["nll"], abs=1e-4)
