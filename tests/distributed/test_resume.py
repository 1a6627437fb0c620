"""Save and resume: bit for bit on the same layout, within 1e-5 on another, and what the optimizer's step
counts say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from megatron_ultralong.config import Memory, Model, Optim, Parallel, Run, Runtime, Train
from megatron_ultralong.errors import UserError
from megatron_ultralong.rope.methods import YaRN
from tests.spawn import leave_groups, run_ranks

MODEL = Model(
    hidden_size=32, ffn_size=64, layers=4, heads=4, kv_heads=2, head_dim=8, vocab_size=61, init_std=0.2
)
TIED = replace(MODEL, tied_embeddings=True)
BIASES = replace(MODEL, qkv_bias=True, attention_output_bias=True, mlp_bias=True)
QWEN3 = replace(MODEL, family="qwen3", qk_norm=True, qkv_bias=True, attention_output_bias=True)
ROPE = YaRN(theta=10000.0, factor=4.0, original_length=16)
S, BATCH = 32, 4


@pytest.mark.slow
@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.complete), "bf16"])
def test_resume(tmp_path: Path, precision: str) -> None:
    run_ranks(_resume, 4, str(tmp_path), precision)


def _resume(rank: int, world: int, folder: str, precision: str) -> None:
    first = Parallel(cp=2)  # x dp 2
    models = {"untied": MODEL, "tied": TIED, "biases": BIASES, "qwen3": QWEN3}
    for name, model in list(models.items())[: 4 if precision == "fp32" else 1]:
        save = Path(folder) / name
        whole = _train(model, first, precision, save / "whole", iterations=5, save_every=2)
        assert [p.name for p in sorted((save / "whole").glob("iter_*"))] == [
            "iter_0000002",
            "iter_0000004",
            "iter_0000005",
        ]
        assert not list((save / "whole").glob(".*partial"))

        again = _train(
            model, first, precision, save / "again", iterations=5, resume=save / "whole" / "iter_0000002"
        )
        assert again["losses"] == whole["losses"][2:]
        assert all(torch.equal(again["weights"][name], weight) for name, weight in whole["weights"].items())
        assert again["steps"] == {5}

        layouts = (Parallel(tp=2, pp=2), Parallel(pp=2, vpp=2), Parallel(tp=2, cp=2), Parallel())
        for other in layouts if model in (MODEL, TIED) else layouts[:1]:
            moved = _train(
                model, other, precision, save / "other", iterations=5, resume=save / "whole" / "iter_0000002"
            )
            tolerance = 1e-5 if precision == "fp32" else 2e-2
            for ours, theirs in zip(moved["losses"], whole["losses"][2:], strict=True):
                assert abs(ours - theirs) <= tolerance * abs(theirs), (
                    other,
                    moved["losses"],
                    whole["losses"][2:],
                )
            assert moved["steps"] == {5}, moved["steps"]


def test_bad_checkpoints_and_figures_are_refused(tmp_path: Path) -> None:
    run_ranks(_refused, 2, str(tmp_path))


def _refused(rank: int, world: int, folder: str) -> None:
    _agreement(rank)
    save = Path(folder) / "run"
    _train(MODEL, Parallel(tp=2), "fp32", save, iterations=1)
    wrong = {
        "vocab_size": replace(MODEL, vocab_size=67),
        "ffn_size": replace(MODEL, ffn_size=128),
        "layers": replace(MODEL, layers=2),
    }
    for model in wrong.values():
        with pytest.raises(UserError, match="iter_0000001"):
            _train(
                model,
                Parallel(tp=2),
                "fp32",
                Path(folder) / "wrong",
                iterations=2,
                resume=save / "iter_0000001",
            )
        leave_groups()
    # Weights alone, where run.json does not tell the vocabulary: Megatron itself would cut or pad them in
    # silence.
    from megatron_ultralong.checkpoint import sharded
    from megatron_ultralong.model import llama
    from megatron_ultralong.runtime import launch

    ranks = launch.start(Runtime(device="cpu"), Parallel(tp=2))
    for vocab_size, fits in ((61, True), (60, False), (64, False), (30, False)):
        chunks = llama.build(
            replace(MODEL, vocab_size=vocab_size), ROPE, ranks, Parallel(tp=2), Memory(offload="off"), "fp32"
        )
        if fits:
            sharded.load(save / "iter_0000001", chunks)
            continue
        with pytest.raises(
            UserError, match=f"62 rows, which is not a padded size of the model's vocabulary of {vocab_size}"
        ):
            sharded.load(save / "iter_0000001", chunks)
    assert [sharded._pads(rows, 97) for rows in (97, 98, 100, 128, 256, 96, 101)] == [
        True,
        True,
        True,
        True,
        True,
        False,
        False,
    ]
    leave_groups()
    _not_finite(Path(folder))


def _agreement(rank: int) -> None:
    """What one rank meets, all ranks raise; a fault of the program keeps its type where it occurs."""
    from megatron_ultralong.runtime import agreement

    def fails(on: tuple[int, ...], kind: type[Exception]) -> Any:
        def act() -> int:
            if rank in on:
                raise kind(f"of rank {rank}\nsecond line" if kind is OSError else f"of rank {rank}")
            return rank

        return act

    assert agreement.on_every_rank(fails((), UserError)) == rank
    for on, first in (((1,), 1), ((0, 1), 0)):
        with pytest.raises(UserError, match=f"^of rank {first}$"):
            agreement.on_every_rank(fails(on, UserError))
    with pytest.raises(OSError if rank == 1 else UserError) as error:
        agreement.on_every_rank(fails((1,), OSError))
    assert rank == 1 or str(error.value) == "rank 1 failed: OSError: of rank 1"
    assert agreement.on_main_rank(fails((1,), UserError)) == 0, "rank 1 does nothing"
    with pytest.raises(UserError, match="^of rank 0$"):
        agreement.on_main_rank(fails((0,), UserError))
    device = torch.device("cpu")
    firsts = [agreement.first_rank_where(rank in on, device) for on in ((), (1,), (0, 1))]
    assert firsts == [None, 1, 0]


def _not_finite(folder: Path) -> None:
    """A loss or gradient that is not finite stops all ranks, names the one it began on, and is not saved."""
    from megatron_ultralong.train.bad_steps import TrainingStopped

    for number, (weight, clip, said) in enumerate(
        (
            (float("inf"), 0.5, "loss is not finite at iteration 4, first on rank 1"),
            (
                1e30,
                0.5,
                "gradient norm is not finite at iteration 4",
            ),  # the loss itself is, but not the squares of its gradients
            (1e30, 0.0, "gradient norm is not finite at iteration 4"),
        )
    ):
        save = folder / f"stopped{number}"
        with pytest.raises(
            TrainingStopped, match=f"^{said}; the last good checkpoint is {save}/iter_0000002$"
        ):
            _train(MODEL, Parallel(), "fp32", save, iterations=8, save_every=2, clip=clip, spoilt=(4, weight))
        assert [p.name for p in save.iterdir() if "iter_" in p.name] == ["iter_0000002"]

    # The iteration after a checkpoint is the one that fails: it may be the checkpoint's fault.
    for save_every, good in (
        (2, "none before it is known to be good"),
        (1, f"the last good one is {folder}/doubtful1/iter_0000001"),
    ):
        save = Path(folder) / f"doubtful{save_every}"
        doubtful = (
            f"the newest checkpoint is {save}/iter_0000002, which no finite iteration has followed; {good}"
        )
        with pytest.raises(
            TrainingStopped, match=f"^loss is not finite at iteration 3, first on rank 1; {doubtful}$"
        ):
            _train(
                MODEL, Parallel(), "fp32", save, iterations=8, save_every=save_every, spoilt=(3, float("inf"))
            )


def _train(
    model: Model,
    parallel: Parallel,
    precision: str,
    save: Path,
    *,
    iterations: int,
    save_every: int = 0,
    resume: Path | None = None,
    clip: float = 0.5,
    spoilt: tuple[int | range, float] | None = None,
    settings: Mapping[str, Any] = MappingProxyType({}),
    at: Mapping[str, int] = MappingProxyType({}),
    log: Any = None,
) -> dict[str, Any]:
    """A short run on rows that are a function of their number; losses as logged, weights of this rank,
    optimizer steps.

    spoilt: (iteration or iterations, weight of one token's loss on rank 1). settings: of `Train`. at: fields
    of the state that it starts from. log: a `Losses`.
    """
    from megatron_ultralong.checkpoint import optimizer_state, sharded, training_state
    from megatron_ultralong.checkpoint.hf.assets import AssetFolders
    from megatron_ultralong.checkpoint.training_state import TrainingState
    from megatron_ultralong.context_parallel import zigzag
    from megatron_ultralong.model import init, llama
    from megatron_ultralong.runtime import launch
    from megatron_ultralong.train import loop
    from megatron_ultralong.train import optimizer as optim
    from megatron_ultralong.train.checkpoints import Checkpoints
    from megatron_ultralong.train.step import Trainer

    train = Train(
        seq_length=S,
        global_batch=BATCH,
        iterations=iterations,
        lr=1e-2,
        warmup=min(2, iterations - 1),
        precision=precision,
        save_every=save_every,
        **{"keep": 0, **settings},
    )
    run = Run(
        name="test",
        model=model,
        rope=ROPE,
        parallel=parallel,
        memory=Memory(offload="off", loss_chunk=24),
        optim=Optim(clip=clip),
        train=train,
    )
    ranks = launch.start(Runtime(device="cpu"), parallel)
    try:
        chunks = llama.build(model, ROPE, ranks, parallel, run.memory, precision)
        if resume is None:
            for chunk in chunks:
                init.initialise(llama.named_parameters(chunk), model, 1, ranks.tp_rank, ranks.tp)
        chunks = optim.data_parallel(chunks, ranks)
        optimizer = optim.build(chunks, run.optim, train, ranks)
        state = TrainingState(model=model, rope=ROPE)
        if resume is not None:
            sharded.load(resume, chunks, optimizer)
            state = training_state.read(resume)
        state = dataclasses.replace(state, **at)

        bad, weight = spoilt or (range(0), 0.0)
        bad = range(bad, bad + 1) if isinstance(bad, int) else bad

        def batches(consumed: int) -> Any:
            while True:
                for row in range(consumed + ranks.dp_rank, consumed + BATCH, ranks.dp):
                    generator = torch.Generator().manual_seed(row)
                    tokens = torch.randint(0, model.vocab_size, (1, S + 1), generator=generator)
                    mask = (torch.rand(1, S, generator=generator) > 0.3).float()
                    if ranks.rank == 1 and row // BATCH + 1 in bad:
                        mask[0, 0] = weight
                    parts = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask}
                    yield {name: zigzag.shard(x, ranks.cp_rank, ranks.cp, 1) for name, x in parts.items()}
                consumed += BATCH

        log = log or Losses()
        state = loop.train(
            Trainer(run=run, ranks=ranks, chunks=chunks, optimizer=optimizer),
            state,
            loop.TrainingData(training=lambda consumed: [batches(consumed) for _ in chunks]),
            Checkpoints(save, AssetFolders(), train, ranks.heartbeat),
            log,
        )
        return {
            "losses": log.losses,
            "lines": log.lines,
            "state": state,
            "steps": optimizer_state.steps(optimizer),
            "weights": {
                name: p.detach().clone()
                for chunk in chunks
                for name, p in llama.named_parameters(chunk).items()
            },
        }
    finally:
        leave_groups()


class Losses:
    """Stands for the run's log, and keeps losses and lines."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.lines: list[str] = []

    def begin(self, iteration: int) -> None: ...

    def step(self, state: Any, *, mean: Any, **unused: Any) -> None:
        self.losses.append(mean.loss)

    def flush(self) -> None:
        pass

    def saved(self, iteration: int, seconds: float, waited: float) -> None:
        pass

    def not_saved(self, iteration: int, error: str) -> None:
        pass

    def note(self, line: str) -> None:
        self.lines.append(line)

    def bad_step(self, state: Any, line: str) -> None:
        self.lines.append(line)
