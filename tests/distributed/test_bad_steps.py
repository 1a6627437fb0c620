"""Iterations with a loss or gradient that is not finite, or far above the others: `train.on_bad_step`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ultralong.checkpoint import integrity, run_directory, shard_writer, training_state
from megatron_ultralong.config import Parallel
from megatron_ultralong.errors import UserError
from megatron_ultralong.train import loop
from megatron_ultralong.train.bad_steps import TrainingStopped
from megatron_ultralong.train.checkpoints import Checkpoints
from megatron_ultralong.train.loss_normalisation import MeanLoss
from tests.distributed.test_resume import BATCH, MODEL, _train
from tests.spawn import run_ranks

CONSTANT = {"schedule": "constant"}
INF, NOT_ITS_SQUARES = float("inf"), 1e30


@pytest.mark.complete
def test_bad_steps(tmp_path: Path) -> None:
    run_ranks(_bad_steps, 2, str(tmp_path))


def _bad_steps(rank: int, world: int, name: str) -> None:
    folder = Path(name)
    for weight, what in (
        (INF, "loss is not finite at iteration 4, first on rank 1"),
        (NOT_ITS_SQUARES, "gradient norm is not finite at iteration 4"),
    ):
        _skipped(folder / f"skip {weight}", weight, what)
    _rewound(folder / "rewind")
    _spikes(folder / "spike")
    _too_many(folder)
    _good_is_kept(folder / "good")
    _failed_save_does_not_hide_it(folder / "hidden")


def _run(save: Path, policy: str, **more: Any) -> dict[str, Any]:
    settings = {**CONSTANT, "on_bad_step": policy, **more.pop("settings", {})}
    return _train(
        MODEL, Parallel(), "fp32", save, **{"iterations": 6, "save_every": 1, **more}, settings=settings
    )


def _equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert all(torch.equal(one["weights"][name], weight) for name, weight in other["weights"].items())


def _skipped(save: Path, weight: float, what: str) -> None:
    got = _run(save, "skip", spoilt=(4, weight))
    assert len(got["losses"]) == 5 and got["steps"] == {5}
    assert got["lines"] == [f"warning: {what}; its update is skipped (bad iteration 1 of at most 10)"]
    state = got["state"]
    assert (state.iteration, state.consumed, state.bad_steps) == (6, 6 * BATCH, 1)
    before, after = (integrity.read(save / f"iter_000000{n}") for n in (3, 4))
    assert before is not None and after is not None
    assert before.tensors == after.tensors, "something was updated"
    # As if the run went on from iteration 3 with the batch of iteration 5.
    expected = _run(
        save / "x",
        "stop",
        resume=save / "iter_0000003",
        at={"iteration": 4, "consumed": 4 * BATCH},
    )
    assert expected["losses"] == got["losses"][3:]
    _equal(got, expected)
    # The count outlives a restart.
    again = _run(
        save / "y", "skip", resume=save / "iter_0000004", settings={"max_bad_steps": 2}, spoilt=(5, weight)
    )
    assert again["state"].bad_steps == 2


def _rewound(save: Path) -> None:
    got = _run(save, "rewind", spoilt=(4, INF), save_every=2)
    line = f"warning: loss is not finite at iteration 4, first on rank 1; rewinding to {save}/iter_0000002 (bad iteration 1 of at most 10)"
    assert got["lines"] == [line]
    state = got["state"]
    assert (state.iteration, state.consumed, state.bad_steps) == (6, 8 * BATCH, 1)
    assert state.tokens == training_state.read(save / "iter_0000006").tokens == 6 * BATCH * 32
    expected = _run(save / "x", "stop", resume=save / "iter_0000002", at={"consumed": 4 * BATCH})
    assert got["losses"][3:] == expected["losses"]
    _equal(got, expected)

    # The newest checkpoint is followed by the bad iteration: it may be the reason, and is not used again.
    save = save / "doubtful"
    got = _run(save, "rewind", spoilt=(5, INF), save_every=2)
    assert f"rewinding to {save}/iter_0000002 " in got["lines"][0]
    assert (save / "iter_0000004.rewound").is_dir()
    assert (save / "latest_checkpointed_iteration.txt").read_text().strip() == "6"
    assert run_directory.complete_checkpoints(save)[-1] == save / "iter_0000006"
    assert got["state"].consumed == 9 * BATCH

    with pytest.raises(
        TrainingStopped, match="there is no checkpoint to rewind to: no checkpoint has been saved"
    ):
        _run(save / "none", "rewind", spoilt=(1, INF))


def _spikes(save: Path) -> None:
    """A loss is compared with the median of those before, over a restart too."""
    settings = {"loss_spike": 1.5}
    more: dict[str, Any] = {"iterations": 12, "save_every": 5, "settings": settings}
    got = _with_spike(11, save, "skip", **more)
    (line,) = got["lines"]
    assert re.fullmatch(
        r"warning: loss \d+.* at iteration 11 is above train.loss_spike=1.5 times \d\.\d+, the median of the last 10; "
        r"its update is skipped \(bad iteration 1 of at most 10\)",
        line,
    ), line
    again = _with_spike(
        6, save / "x", "skip", resume=save / "iter_0000005", at=_stored(save / "iter_0000005"), **more
    )
    assert again["lines"] == got["lines"]
    _equal(got, again)
    with pytest.raises(TrainingStopped, match="^loss .* at iteration 11 is above train.loss_spike"):
        _with_spike(11, save / "y", "stop", **more)
    del settings["loss_spike"]
    assert not _with_spike(11, save / "z", "stop", **more)["lines"], "off by default"


def _with_spike(number: int, *arguments: Any, **named: Any) -> dict[str, Any]:
    """A run in which the loss of one iteration, counted from its start, is doubled."""
    counted = iter(range(1, 1000))
    mean = loop.global_mean

    def spike(*values: Any) -> MeanLoss:
        found = mean(*values)
        return found._replace(loss=(2 if next(counted) == number else 1) * found.loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "global_mean", spike)
        return _run(*arguments, **named)


def _stored(checkpoint: Path) -> dict[str, Any]:
    return {"recent_losses": training_state.read(checkpoint).recent_losses}


def _failed_save_does_not_hide_it(save: Path) -> None:
    def full(shards: Any) -> None:
        raise UserError("no space")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer.Shards, "write", full)
        patch.setattr(Checkpoints, "poll", lambda checkpoints, log: None)
        for policy in ("stop", "rewind"):
            with pytest.raises(
                TrainingStopped, match=r"^loss is not finite at iteration 4, first on rank 1; no space; "
            ):
                _run(save / policy, policy, spoilt=(4, INF), save_every=3, settings={"save_failures": 1})


def _good_is_kept(save: Path) -> None:
    """Checkpoints that no finite iteration follows do not replace the last good one."""
    with pytest.raises(TrainingStopped, match=f"the last good one is {save}/iter_0000004$"):
        _run(
            save,
            "skip",
            spoilt=(range(7, 30), INF),
            iterations=20,
            save_every=2,
            settings={"max_bad_steps": 6, "keep": 2},
        )
    kept = [path.name for path in run_directory.complete_checkpoints(save)]
    assert kept == ["iter_0000004", "iter_0000010", "iter_0000012"]


def _too_many(folder: Path) -> None:
    save = folder / "many"
    got = _run(save, "skip", spoilt=(2, INF), iterations=3, settings={"max_bad_steps": 1})
    assert got["state"].bad_steps == 1
    with pytest.raises(
        TrainingStopped,
        match=r"at iteration 4, first on rank 1; it is bad iteration 2 of this run \(train.max_bad_steps=1\); the newest",
    ):
        _run(save, "skip", spoilt=(4, INF), resume=save / "iter_0000003", settings={"max_bad_steps": 1})
