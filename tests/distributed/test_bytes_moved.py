"""Bytes that a training step reads and writes outside matrix products and attention, counted, against a
budget: a temporary tensor, a copy or a zeroed buffer more is seen here, on any machine."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp

from megatron_ultralong.config import Model
from megatron_ultralong.measure.bytes_moved import BytesMoved

# SmolLM2-135M's proportions.
H, V, T = 48, 64, 32
MODEL = Model(hidden_size=H, ffn_size=128, layers=1, heads=3, kv_heads=1, head_dim=16, vocab_size=V)
LAYER_WEIGHTS = H * (2 * 48 + 2 * 16 + 3 * 128) + 2 * H
BUDGET = {"none": 106.5, "recompute": 160.5}
"""Per token and layer, in reads or writes of the hidden states. With torch's own operations in place of
model/elementwise.py and split_and_rotate: 150 without recompute, 228 with it."""
PER_WEIGHT = 17.1
"""Per weight of a layer and step, in reads or writes of the weight: gradients zeroed (1), added (3), averaged
(2), their norm (1), clipped (2), AdamW (8). With what Megatron and torch do by default: 36."""


def test_counter() -> None:
    x, y = torch.ones(4, 8), torch.ones(8)
    with BytesMoved() as counted:
        torch.add(x, y)  # 32 + 8 read, 32 written
        torch.mul(x, x[:, :1].expand(4, 8), out=x)  # 32 + 4, 32
        x.mul_(2)  # 32, 32
        x.copy_(y)  # 8, 32
        x.zero_()  # 32
        torch.empty(100).view(10, 10).t()
        torch.mm(x, x.t())
    assert counted.by_operation == {
        "add.Tensor": 4 * 72,
        "mul.out": 4 * 68,
        "mul_.Tensor": 4 * 64,
        "copy_.default": 4 * 40,
        "zero_.default": 4 * 32,
    }
    assert counted.total == 4 * 276
    weights = [torch.ones(5, requires_grad=True), torch.ones(7, requires_grad=True)]
    adam = torch.optim.AdamW(weights, fused=True)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    adam.step()
    with BytesMoved() as counted:
        adam.step()
    # Read: weights, gradients and both moments; written: the same. And the counts of steps.
    assert counted.by_operation["_fused_adamw_.default"] == pytest.approx(4 * 8 * 12, abs=4 * 4)


def test_budget() -> None:
    mp.start_processes(_one_process, nprocs=1, start_method="spawn")


def _one_process(index: int) -> None:
    from megatron_ultralong.config import Parallel, Runtime
    from megatron_ultralong.runtime import launch

    torch.set_num_threads(1)
    ranks = launch.start(Runtime(device="cpu"), Parallel())
    for name, budget in BUDGET.items():
        one, longer, deeper, both = (
            _counted(name, layers, tokens, ranks) for layers in (1, 2) for tokens in (T, 2 * T)
        )
        per_token = (both - deeper - longer + one) / T
        per_layer = deeper - one - per_token * T
        found = per_token / (4 * H), per_layer / (4 * LAYER_WEIGHTS)
        print(f"{name}: {found[0]:.1f} per token and layer, {found[1]:.1f} per weight", flush=True)
        assert budget - 2 < found[0] <= budget, (name, found)
        assert PER_WEIGHT - 0.5 < found[1] <= PER_WEIGHT, (name, found)
    launch.stop()


def _counted(name: str, layers: int, tokens: int, ranks: object) -> int:
    from dataclasses import replace

    from megatron_ultralong.measure import train_step
    from megatron_ultralong.rope.methods import Unscaled

    settings = train_step.TrainSettings(
        hf=None,
        model=replace(MODEL, layers=layers),
        rope=Unscaled(original_length=128),
        lengths=[tokens],
        settings=[name],
        precision="fp32",
        layer_chunk=0,
        loss_chunk=0,
    )
    weights = train_step._plain_model(settings, tokens, torch.device("cpu")).state_dict()
    step = train_step._our_step(name, tokens, settings, ranks, weights)
    row = torch.randint(V, (1, tokens + 1))
    step(row)
    with BytesMoved() as counted:
        step(row)
    return counted.total
