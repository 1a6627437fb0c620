"""A small training step on every rank by itself, from the same seed: a device that computes otherwise shows.

Two parts: a matrix product that is repeated and must have the same bits each time, and a step of a small
Llama (forward, backward, AdamW) whose loss and gradient norm must agree over all ranks.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from megatron_ultralong.check_cluster.findings import Findings, by_value, on_ranks
from megatron_ultralong.measure.timing import run_seconds
from megatron_ultralong.runtime import agreement

REPEATS = {"cuda": 50, "cpu": 2}
SIZE = {"cuda": 4096, "cpu": 256}
"""Rows and columns of the matrices."""
TOLERANCE = {"cuda": 1e-3, "cpu": 1e-6}
"""Relative: on GPUs backward kernels of attention may add in another order each time."""
SLOW = 1.5
"""Times the median step of all GPUs, from which one counts as slow."""
HIDDEN, HEADS, LAYERS, VOCABULARY, LENGTH = 256, 8, 2, 512, 256


def check(device: torch.device, hosts: list[str]) -> Findings:
    """Compute on every rank and compare. Every rank calls it."""
    mine = {"product": product(device), **step(device)}
    if device.type == "cuda":
        mine["seconds"] = min(run_seconds(lambda: step(device), device) for _ in range(5))
    everywhere = agreement.gather(mine)
    problems = []
    unsteady = [rank for rank, one in enumerate(everywhere) if one["product"] is None]
    if unsteady:
        problems.append(
            f"{on_ranks(unsteady, hosts)}: the same matrix product gives different results; replace this device"
        )
    (usual, _), *others = by_value([one["product"] for one in everywhere]).items()
    for value, ranks in others:
        if value is not None and usual is not None:
            problems.append(
                f"{on_ranks(ranks, hosts)}: a matrix product differs from that of the other ranks; replace this device"
            )
    for name, what in (
        ("loss", "loss"),
        ("grad_norm", "gradient norm"),
        ("weights", "weights after the step"),
    ):
        values = [one[name] for one in everywhere]
        middle = statistics.median(values)
        bound = TOLERANCE[device.type] * abs(middle)
        wrong = [rank for rank, value in enumerate(values) if not abs(value - middle) <= bound]
        if wrong:
            problems.append(
                f"{on_ranks(wrong, hosts)}: {what} {values[wrong[0]]:.8g} where other ranks have {middle:.8g} "
                "for the same input; replace this device or leave its host out"
            )
    lines = [
        f"loss {everywhere[0]['loss']:.6f}, grad norm {everywhere[0]['grad_norm']:.6f}: "
        f"{'the same on all ranks' if not problems else 'not the same on all ranks'}"
    ]
    if device.type == "cuda":
        seconds = [one["seconds"] for one in everywhere]
        middle = statistics.median(seconds)
        lines.append(f"{middle * 1e3:.1f} ms a step, {max(seconds) * 1e3:.1f} ms on the slowest rank")
        slow = [rank for rank, value in enumerate(seconds) if value > SLOW * middle]
        if slow:
            problems.append(
                f"{on_ranks(slow, hosts)}: a step takes {max(seconds) / middle:.1f} times as long as on other ranks; "
                "see clocks and temperature in nvidia-smi -q"
            )
    return Findings(
        title="same step", lines=tuple(lines), figures={"ranks": everywhere}, problems=tuple(problems)
    )


def product(device: torch.device) -> float | None:
    """The sum of a matrix product; None if it has other bits when it is computed again."""
    size, generator = SIZE[device.type], torch.Generator().manual_seed(1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    first = a @ b
    same = all(torch.equal(a @ b, first) for _ in range(REPEATS[device.type]))
    return float(first.double().sum()) if same else None


def step(device: torch.device) -> dict[str, float]:
    """Loss, gradient norm, and sum of absolute weights after one step of AdamW."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
    )
    generator = torch.Generator().manual_seed(2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model: Any = LlamaForCausalLM(config)
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, VOCABULARY, (1, LENGTH), generator=generator).to(device)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    weights = sum(float(parameter.detach().double().abs().sum()) for parameter in model.parameters())
    return {"loss": float(loss.detach()), "grad_norm": float(norm.detach()), "weights": weights}
