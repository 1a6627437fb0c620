"""CLEX in training: the gradient of its network against transformers in float64 under every layout and way of
recomputing, and runs that resume under another layout."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ultralong.config import Data, Memory, Model, Optim, Parallel, Run, Runtime, Train
from megatron_ultralong.model import weight_mapping
from megatron_ultralong.rope.clex import CLEX, TrainedCLEX
from tests.spawn import leave_groups, run_ranks
from tests.text import write_rows
from tests.tiny import hf_model

S, ORIGINAL, BATCH, ITERATION = 64, 16, 4, 3
SCALE = 2  # drawn in that iteration
MODEL = Model(hidden_size=48, ffn_size=80, layers=4, heads=6, kv_heads=2, head_dim=10, vocab_size=97)
ROPE = CLEX(theta=10000.0, original_length=ORIGINAL, factor=4, width=2)
TRAIN = Train(
    seq_length=S, global_batch=BATCH, iterations=ITERATION, lr=1e-3, precision="fp32", seed=5, save_every=2
)
# Chunks that leave an odd rest, and that cut the tokens of two tensor parallel ranks.
LAYOUTS: tuple[tuple[Parallel, Memory], ...] = (
    (Parallel(), Memory(recompute="none", offload="off")),
    (Parallel(tp=2, cp=2), Memory(query_chunks=True, offload="all", layer_chunk=22)),
    (Parallel(cp=2), Memory(offload="all", layer_chunk=22)),
    (Parallel(cp=2), Memory(query_chunks=True, offload="off", layer_chunk=0)),
    (Parallel(tp=2, pp=2), Memory(recompute="full", offload="off")),
    (Parallel(pp=2, vpp=2), Memory(offload="layer_inputs", layer_chunk=10)),
    (Parallel(cp=4, ulysses=2), Memory(offload="off")),
    (Parallel(cp=2, cp_comm_type="all_gather"), Memory(recompute="none", offload="off")),
)


@pytest.mark.slow
@pytest.mark.complete
def test_network_gradient_and_resume(tmp_path: Path) -> None:
    run_ranks(_ranks, 4, str(tmp_path))


def _ranks(rank: int, world: int, folder: str) -> None:
    _gradients()
    _resume(rank, Path(folder))


def _gradients() -> None:
    from megatron_ultralong.model import llama
    from megatron_ultralong.runtime import launch
    from megatron_ultralong.train import optimizer as optim
    from megatron_ultralong.train.loss_normalisation import global_mean
    from megatron_ultralong.train.ode_training import OdeTraining
    from megatron_ultralong.train.step import Trainer, forward_backward

    rows = _rows()
    reference = hf_model(MODEL).double()
    loss, wanted = _reference(reference, rows)
    assert all(float(grad.abs().max()) > 1e-5 for grad in wanted.values())
    for parallel, memory in LAYOUTS:
        ranks = launch.start(Runtime(device="cpu"), parallel)
        chunks = llama.build(MODEL, ROPE, ranks, parallel, memory, "fp32")
        whole = {name: p.data.float() for name, p in reference.named_parameters()}
        for chunk in chunks:
            for name, parameter in llama.named_parameters(chunk).items():
                parameter.data.copy_(weight_mapping.split(name, whole, MODEL, ranks.tp_rank, ranks.tp))
        rotary = llama.unwrap(chunks[0]).rotary
        assert isinstance(rotary.rope, TrainedCLEX)
        network = rotary.rope.weights
        _set_weights(network)
        run = Run(name="test", train=TRAIN, parallel=parallel)
        chunks = optim.data_parallel(chunks, ranks)
        ode = OdeTraining(rotary, TRAIN, Optim(clip=0.0), ranks)
        trainer = Trainer(
            run=run,
            ranks=ranks,
            chunks=chunks,
            optimizer=optim.build(chunks, run.optim, TRAIN, ranks),
            ode=ode,
        )
        for chunk in chunks:
            chunk.zero_grad_buffer()

        with ode.drawn(ITERATION):
            sums = forward_backward(
                trainer, [_batches(rows, ranks) for _ in chunks], run.micro_batches(ranks.dp)
            )
        assert rotary.draw is None
        mean, _, targets = global_mean(sums, ranks)
        assert abs(mean - loss) <= 1e-5 * abs(loss), (parallel, mean, loss)
        assert ode.step(targets, lr_share=0.0)
        norm = float(torch.stack([grad.norm() for grad in wanted.values()]).norm())
        assert ode.scalars["train/rope_scale"] == SCALE
        assert abs(ode.scalars["train/rope_grad_norm"] - norm) < 1e-4 * norm
        for name, grad in wanted.items():
            got = getattr(network, name).grad
            assert float((got - grad).norm() / grad.norm()) < 2e-5, (parallel, memory, name)
        leave_groups()


def _batches(rows: dict[str, torch.Tensor], ranks: Any) -> Iterator[Any]:
    """This rank's micro-batches."""
    from megatron_ultralong.context_parallel import zigzag

    for row in range(ranks.dp_rank, BATCH, ranks.dp):
        yield {name: zigzag.shard(x[row : row + 1], ranks.cp_rank, ranks.cp, 1) for name, x in rows.items()}


def _set_weights(network: Any) -> None:
    """A network that is not at its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        network.down.normal_(0.0, 0.3, generator=generator)


def _rows() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, MODEL.vocab_size, (BATCH, S + 1), generator=generator)
    mask = (torch.rand(BATCH, S, generator=generator) > torch.linspace(0.1, 0.8, BATCH)[:, None]).float()
    mask[2] = 0
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask}


class _Rotary(torch.nn.Module):
    """transformers' module with the frequencies and positions of CLEX, differentiable in float64."""

    def __init__(self, frequencies: torch.Tensor, positions: torch.Tensor) -> None:
        super().__init__()
        angles = torch.outer(positions, frequencies)
        self.angles = torch.cat([angles, angles], dim=-1)[None]

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.angles.cos(), self.angles.sin()


def _reference(reference: Any, rows: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of the batch, and the gradients of the network's weights; its own RK4."""
    from megatron_ultralong.train.ode_training import draw

    network = ROPE.network(MODEL.head_dim)
    _set_weights(network)
    scale, positions = draw(4, ORIGINAL, S, (TRAIN.seed, ITERATION))
    assert scale == SCALE and positions[1] % 1, "a scale with a network, and positions between whole ones"
    weights = {name: getattr(network, name).detach().double().requires_grad_() for name in ("up", "down")}
    d, i = MODEL.head_dim, torch.arange(MODEL.head_dim // 2).double()

    def slope(x: torch.Tensor, t: float) -> torch.Tensor:
        alpha = torch.tensor(2 * t - 1, dtype=torch.float64)
        log_ntk = (-2 * i / d) * (torch.log(torch.tensor(10000.0).double()) + d / (d - 2) * torch.log(alpha))
        inside = torch.tanh((x + log_ntk) @ weights["up"]) @ weights["down"]
        return inside - 4 * i / ((d - 2) * alpha)

    x, h = -2 * i / d * torch.log(torch.tensor(10000.0).double()), 0.01
    for n in range(round((scale - 1) / h)):
        t = 1 + n * h
        k1 = slope(x, t)
        k2 = slope(x + h / 2 * k1, t + h / 2)
        k3 = slope(x + h / 2 * k2, t + h / 2)
        k4 = slope(x + h * k3, t + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    assert torch.allclose(x, network.log_frequencies(scale), rtol=0, atol=1e-12)
    reference.model.rotary_emb = _Rotary(x.exp(), torch.from_numpy(positions))
    logits = reference(rows["tokens"]).logits
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), rows["labels"].flatten(), reduction="none"
    )
    loss = (losses * rows["loss_mask"].flatten()).sum() / rows["loss_mask"].sum()
    grads = torch.autograd.grad(loss, list(weights.values()))
    return loss.item(), dict(zip(weights, grads, strict=True))


def _resume(rank: int, folder: Path) -> None:
    """The same losses and network when resumed, to the last bit under the same layout."""
    if rank == 0:
        generator = torch.Generator().manual_seed(0)
        write_rows(folder / "rows", torch.randint(0, 97, (16, S + 1), generator=generator).tolist())
    torch.distributed.barrier()
    first = Parallel(cp=2)
    whole = _train(folder, "whole", first, iterations=5)
    assert float(whole["down"].abs().max()) > 1e-4 and whole["up.step"] == 5 - whole["unscaled"]
    for save, parallel, tolerance in (("same", first, 0.0), ("other", Parallel(tp=2, pp=2), 1e-4)):
        if rank == 0:
            shutil.copytree(folder / "whole" / "iter_0000002", folder / save / "iter_0000002")
        torch.distributed.barrier()
        resumed = _train(folder, save, parallel, iterations=5)
        for name in ("up", "down", "down.exp_avg", "up.step"):
            error = float((resumed[name] - whole[name]).abs().max())
            assert error <= tolerance * float(whole[name].abs().max()), (save, name, error)


def _train(folder: Path, save: str, parallel: Parallel, iterations: int) -> dict[str, Any]:
    """Train with the parts of tools/train.py; return what rope.safetensors has afterwards."""
    from megatron_ultralong.checkpoint import rope_network, run_directory
    from megatron_ultralong.runtime import launch
    from megatron_ultralong.train.ode_training import draw
    from megatron_ultralong.train.run import RunFiles, train_run

    run = Run(
        name="test",
        model=MODEL,
        rope=CLEX(theta=10000.0, original_length=ORIGINAL, factor=4, lr=1e-2),
        parallel=parallel,
        memory=Memory(offload="off"),
        data=Data(),
        train=Train(
            seq_length=S,
            global_batch=BATCH,
            iterations=iterations,
            lr=1e-3,
            precision="fp32",
            seed=5,
            schedule="constant",
            save_every=2,
            keep=0,
        ),
        runtime=Runtime(device="cpu"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "stop", lambda: None)  # leave_groups stops
        train_run(run, RunFiles(data=[str(folder / "rows")], save=folder / save))
    leave_groups()
    newest = run_directory.resolve(folder / save)
    assert newest.name == f"iter_{iterations:07d}"
    scales = [draw(4, ORIGINAL, S, (5, i))[0] for i in range(1, iterations + 1)]
    return {**rope_network.read(newest), "unscaled": scales.count(1)}
