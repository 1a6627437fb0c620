"""tools/benchmark.py step, its search for the longest sequence, and generate, in a process of their own for
Megatron's groups."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from megatron_ultralong.config import Memory, Model
from megatron_ultralong.errors import UserError
from megatron_ultralong.rope.methods import Unscaled

MODEL = Model(hidden_size=32, ffn_size=64, layers=4, heads=4, kv_heads=2, head_dim=8, vocab_size=96)
S = 256


def test_step(tmp_path: Path) -> None:
    mp.start_processes(
        _one_process, (tmp_path,), nprocs=1, start_method="spawn"
    )  # it starts and ends its own process group


def _one_process(index: int, folder: Path) -> None:
    from megatron_ultralong.measure import report, step

    def settings(names: list[str], **more: object) -> step.StepSettings:
        return step.StepSettings(
            model=MODEL, settings=names, precision="fp32", layer_chunk=64, loss_chunk=64, repeats=1, **more
        )  # type: ignore[arg-type]

    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    result = step.run(settings(list(step.SETTINGS), lengths=[S]), cpu, "the command")
    report.write_json(result, folder / "step.json")
    report.plot(result, folder / "step.png")
    values = json.loads((folder / "step.json").read_text())
    assert (
        values["about"]["command"] == "the command"
        and "4 layers" in values["about"]["shape"]
        and (folder / "step.png").exists()
    )
    rows = {row["setting"]: row for row in values["rows"]}
    assert list(rows) == list(step.SETTINGS)
    for row in rows.values():
        assert (
            row["seconds"] > 0
            and row["tokens_per_second"] > 0
            and "mfu" not in row
            and ("note" in row) == (row["setting"] == "save-on-cpu")
        )
        assert row["peak_bytes"] > row["bytes_per_token"] * S, "peak_bytes includes weights and gradients"
    token = {name: row["bytes_per_token"] for name, row in rows.items()}
    assert (
        token["none"]
        > token["full"]
        > token["all-but-attention"]
        > token["offload-layer-inputs"]
        > token["offload-all"]
    )
    # Of four layers, two are offloaded: per token the input, or also output and logsumexp.
    assert token["all-but-attention"] - token["offload-layer-inputs"] == pytest.approx(
        2 * MODEL.hidden_size * 4, rel=0.1
    )
    for name in ("none", "full", "all-but-attention"):
        assert rows[name]["host_bytes"] == 0 and 0.3 < rows[name]["measured_over_planned"] < 2
    layer = S * MODEL.hidden_size * 4
    assert rows["offload-layer-inputs"]["host_bytes"] == MODEL.layers * layer
    assert rows["offload-all"]["host_bytes"] == MODEL.layers * (2 * layer + S * MODEL.heads * 4)
    assert "planned_bytes" not in rows["save-on-cpu"]

    # A complete step takes the same memory; its optimizer is AdamW.
    whole = step.run(
        settings(["all-but-attention", "query-chunks-offload"], lengths=[S], optimizer=True), cpu, "x"
    ).rows
    for row in whole:
        assert 0 < row["optimizer_seconds"] < row["seconds"]
        assert row["bytes_per_token"] == token[row["setting"]]
    assert "optimizer_seconds" not in rows["all-but-attention"]
    _host_adam_is_adam()

    limit = int(rows["all-but-attention"]["peak_bytes"])
    longest = step.run(
        settings(
            ["none", "all-but-attention", "offload-all"],
            lengths=[S // 4],
            longest=True,
            granularity=32,
            limit=limit,
        ),
        cpu,
        "x",
    ).rows
    tokens = [row["tokens"] for row in longest]
    assert tokens[0] < S and tokens[1] == S and tokens[2] > S and all(n % 32 == 0 for n in tokens)
    for row in longest:
        assert (
            0 < row["fails_at"] - row["tokens"] <= 32
            and "out of memory" in row["note"]
            and row["peak_bytes"] <= limit
        )
    nothing = step.run(settings(["none"], lengths=[S], limit=1000), cpu, "x").rows
    assert nothing[0]["note"] == "out of memory" and "seconds" not in nothing[0]

    _store_frees_its_memory()
    _checkpoint(folder)
    _generation(folder)
    _train(folder)


def _train(folder: Path) -> None:
    """Beside transformers: equal losses, from a directory and from random weights, in every setting."""
    from megatron_ultralong.measure import report, train_step
    from tests.tiny import hf_model

    hf_model(MODEL, {"rope_type": "default", "rope_theta": 5000.0}).save_pretrained(folder / "hf")
    with pytest.raises(UserError, match="leave out --model"):
        train_step.shape_of(folder / "hf", 2)
    model, rope = train_step.shape_of(folder / "hf", None)
    assert model.layers == MODEL.layers and rope.theta == 5000.0
    assert train_step.shape_of(None, 2)[0].layers == 2 and train_step.shape_of(None, None)[0].layers == 30

    def settings(**more: object) -> train_step.TrainSettings:
        values = {"hf": folder / "hf", "model": model, "rope": rope, "lengths": [S, S // 2]}
        values |= {"settings": ["none", "recompute"], "precision": "fp32", "repeats": 2}
        return train_step.TrainSettings(**values | {"layer_chunk": 64, "loss_chunk": 64} | more)  # type: ignore[arg-type]

    named: list[str] = []
    result = train_step.run(settings(), torch.device("cpu"), "the command", named.append)
    report.write_json(result, folder / "train.json")
    report.plot(result, folder / "train.png")
    rows = json.loads((folder / "train.json").read_text())["rows"]
    assert named == [f"{name}, {length}" for length in (256, 128) for name in ("none", "recompute")]
    pairs = [f"{who}, {name}" for name in named for who in ("ours", "transformers")]
    assert [row["name"] for row in rows] == pairs and [row["ours"] for row in rows] == [True, False] * 4
    for row in rows:
        assert row["tokens_per_second"] == row["tokens"] / row["seconds"] > 0 and row["bytes_moved"] > 0
        assert row["loss_difference"] < 1e-5 and row["loss"] > 4
        assert row["ours"] or row["ratio"] == 1
    for ours in (True, False):
        losses = [row["loss"] for row in rows if row["tokens"] == S and row["ours"] == ours]
        assert losses == [pytest.approx(losses[0], rel=1e-6)] * 2, "equal under both settings"
    theirs = train_step._plain_model(settings(), S, torch.device("cpu")).state_dict()
    theirs["model.norm.weight"].mul_(1.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step, "_our_step", _with_weights(train_step._our_step, theirs))
        with pytest.raises(UserError, match=r"recompute, 128: the losses .* differ"):
            train_step.run(settings(lengths=[128], settings=["recompute"]), torch.device("cpu"), "x")
    few = {"hf": None, "model": replace(MODEL, layers=1), "lengths": [64], "settings": ["none"], "repeats": 1}
    for precision in ("fp32", "bf16"):
        [ours, _] = train_step.run(settings(**few, precision=precision), torch.device("cpu"), "x").rows
        assert ours["loss_difference"] < train_step.LARGEST_DIFFERENCE[precision]
    for wrong in ({"settings": ["full"]}, {"repeats": 0}, {"lengths": [0]}):
        with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
            settings(**wrong)


def _with_weights(our_step: Any, weights: dict[str, torch.Tensor]) -> Any:
    """`our_step` with other weights."""
    return lambda name, length, settings, ranks, given: our_step(name, length, settings, ranks, weights)


def _checkpoint(folder: Path) -> None:
    from megatron_ultralong.measure import checkpoint, report

    (folder / "disk").mkdir()
    settings = checkpoint.CheckpointSettings(
        model=MODEL, rope=Unscaled(), tokens=S, precision="fp32", folder=folder / "disk", repeats=2
    )
    named: list[str] = []
    result = checkpoint.run(settings, torch.device("cpu"), "the command", named.append)
    assert named == ["save, training waits", "save, in the background", "load"]
    report.write_json(result, folder / "checkpoint.json")
    report.plot(result, folder / "checkpoint.png")
    waits, background, load = json.loads((folder / "checkpoint.json").read_text())["rows"]
    assert (
        waits["waited"] == pytest.approx(waits["seconds"], rel=0.1) and waits["bytes"] == background["bytes"]
    )
    assert 0 < background["waited"] < background["seconds"] and "steps" not in waits
    for row in (waits, background, load):
        assert 0 < row["files"] < 1 and 0 < row["tensors"] < 1
    assert not list((folder / "disk").iterdir()), "nothing is left"
    with pytest.raises(UserError, match="--seq-length 0 must be"):
        replace(settings, tokens=0)
    assert "hash of files" in report.text(result)


def _generation(folder: Path) -> None:
    from megatron_ultralong.measure import generation, report

    settings = generation.GenerationSettings(
        model=MODEL, lengths=[S, 4 * S], sequences=3, written=4, chunk=64, precision="fp32", repeats=2
    )
    result = generation.run(settings, torch.device("cpu"), "the command")
    report.write_json(result, folder / "generate.json")
    report.plot(result, folder / "generate.png")
    short, long = json.loads((folder / "generate.json").read_text())["rows"]
    for row, length in ((short, S), (long, 4 * S)):
        assert row["tokens"] == length and row["prefill_tokens_per_second"] == pytest.approx(
            length / row["prefill_seconds"]
        )
        assert (
            row["decode_tokens_per_second"] == pytest.approx(3 / row["decode_seconds"])
            and row["decode_seconds"] > 0
        )
        assert row["kv_bytes"] == 2 * MODEL.layers * MODEL.kv_heads * MODEL.head_dim * 4 * length
        assert 0.5 < row["peak_bytes"] / row["planned_bytes"] < 1.3
    # Only keys and values grow with the prompt, because it is read in chunks.
    assert long["peak_bytes"] - short["peak_bytes"] == pytest.approx(
        long["kv_bytes"] - short["kv_bytes"], rel=0.05
    )
    with pytest.raises(UserError, match="--written 0 must be at least 1"):
        generation.GenerationSettings(
            model=MODEL, lengths=[S], sequences=1, written=0, chunk=64, precision="fp32"
        )


def _host_adam_is_adam() -> None:
    from megatron_ultralong.measure.host_adam import HostAdam

    generator = torch.Generator().manual_seed(0)
    ours = [
        torch.nn.Parameter(torch.randn(5, 3, generator=generator)),
        torch.nn.Parameter(torch.randn(7, generator=generator)),
    ]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    host, adam = HostAdam(ours, torch.device("cpu")), torch.optim.AdamW(theirs, lr=1e-5)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            q.grad = torch.randn(p.shape, generator=generator)
            p.grad = q.grad.clone()
        host.step()
        adam.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
            assert not p.grad.any()
    assert len(host.seconds) == 3


def _store_frees_its_memory() -> None:
    from megatron_ultralong.model.layer.offload import HostStore

    assert Memory().offload == "auto"
    store = HostStore(torch.device("cpu"))
    kept = [store.offload([torch.full((10,), float(i))]) for i in range(4)]
    assert store.bytes == 160
    assert [float(k.fetch()[0][0]) for k in reversed(kept)] == [3, 2, 1, 0]
    store.close()
    assert store.bytes == 0
    assert float(store.offload([torch.ones(10)]).fetch()[0][0]) == 1 and store.bytes == 40
