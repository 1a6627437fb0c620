"""CLEX: its start and integration, what an iteration draws, and the frequencies' gradient beside autograd's
graph."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from megatron_ultralong.checkpoint import rope_network
from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.command_settings import override
from megatron_ultralong.config import Data, Model, Optim, Run, Train, check_reach
from megatron_ultralong.errors import UserError
from megatron_ultralong.model.attention import RotaryTable
from megatron_ultralong.model.rotary_embedding import FrequencyGradient, apply_rope, cos_sin
from megatron_ultralong.rope import clex, ode
from megatron_ultralong.rope.clex import CLEX, with_network
from megatron_ultralong.rope.hf_config import from_hf, to_hf
from megatron_ultralong.rope.methods import DynamicNTK, Llama3, Unscaled, YaRN, report, same_maths
from megatron_ultralong.train import weights_source
from megatron_ultralong.train.ode_training import OdeTraining, draw
from tests.checkpoints import write_without_tensors

ROPE = CLEX(theta=10000.0, original_length=512, factor=16)


def trained(rope: CLEX = ROPE, head_dim: int = 16) -> clex.TrainedCLEX:
    """With a network that is not at its start."""
    network = rope.network(head_dim)
    with torch.no_grad():
        network.down.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(1))
    return with_network(rope, network)


def diverged() -> clex.TrainedCLEX:
    rope = trained()
    with torch.no_grad():
        rope.weights.down.mul_(1e4)
    return rope


# ---- frequencies -------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_start_is_ntk_aware_of_scale_2t_minus_1(theta: float) -> None:
    for head_dim in (16, 128):
        rope = dataclasses.replace(ROPE, theta=theta)
        pairs = torch.arange(0, head_dim, 2).double()
        for t in (1, 2, 7.5, 16):
            ntk = -pairs / head_dim * math.log(theta * (2 * t - 1) ** (head_dim / (head_dim - 2)))
            x = rope.network(head_dim).log_frequencies(t).detach()
            assert float((x - ntk).abs().max()) < 4e-10, (head_dim, t)
    assert same_maths(ROPE.frozen(1, 16), Unscaled(theta=10000.0, original_length=512), 16)
    dynamic = DynamicNTK(theta=10000.0, original_length=512, factor=2.0)  # its base grows by 2 n / L - 1
    for n in (100, 513, 4096):
        t = ROPE.scale_of(n)
        ours, theirs = (r.inverse_frequencies(16, length)[0] for r, length in ((ROPE, n), (dynamic, 512 * t)))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_integration(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the derivative of the result itself, and with half the step."""
    rope = dataclasses.replace(ROPE, activation=activation, width=2, theta=500000.0, ode_theta=10000.0)
    network = trained(rope).weights
    up, down = network.up.detach().double(), network.down.detach().double()
    assert up.shape == (8, 32) and float(up.abs().max()) <= 32**-0.5 < 1.02 * float(up.abs().max())
    at = {t: network.log_frequencies(t).detach() for t in (3.99, 4, 4.01)}
    i = torch.arange(8).double()
    log_ntk = -2 * i / 16 * (math.log(10000.0) + 16 / 14 * math.log(7))
    slope = getattr(torch.nn.functional, activation)((at[4] + log_ntk) @ up) @ down - 4 * i / (14 * 7)
    torch.testing.assert_close((at[4.01] - at[3.99]) / 0.02, slope, rtol=1e-4, atol=1e-6)
    assert float((at[4] - rope.network(16).log_frequencies(4)).abs().max()) > 0.05, "the network matters"
    monkeypatch.setattr(ode, "STEP", 0.005)
    torch.testing.assert_close(network.log_frequencies(4).detach(), at[4], rtol=0, atol=2e-9)


@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_gradient_of_the_solution(activation: str) -> None:
    """Against differences along random directions, over more than one block of steps of the backward."""
    rope = dataclasses.replace(ROPE, activation=activation, width=2)
    network, generator = trained(rope).weights, torch.Generator().manual_seed(2)
    scale = 1 + 2.5 * ode._BLOCK * ode.STEP
    weight = torch.randn(8, generator=generator, dtype=torch.float64)
    (network.log_frequencies(scale) * weight).sum().backward()
    for parameter in (network.up, network.down):
        direction = torch.randn(parameter.shape, generator=generator)
        at = []
        for step in (-1e-4, 1e-4):
            before = parameter.detach().clone()
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                at.append(((network.log_frequencies(scale) * weight).sum(), parameter - before))
                parameter.copy_(before)
        along = (at[1][1] - at[0][1]).double()  # as rounded to float32
        assert parameter.grad is not None
        wanted = (parameter.grad.double() * along).sum()
        assert abs(float(at[1][0] - at[0][0] - wanted)) < 5e-5 * abs(float(wanted)), activation


def test_tables_follow_the_weights() -> None:
    rope = trained()
    before = rope.inverse_frequencies(16, 4096)[0]
    assert torch.equal(rope.inverse_frequencies(16, 4096)[0], before)
    assert not torch.equal(before, ROPE.inverse_frequencies(16, 4096)[0])
    table = rope.frozen(8, 16)
    assert torch.equal(table.inverse_frequencies(16)[0], before) and table.covered_length() == 4096
    with torch.no_grad():
        rope.weights.down.mul_(2)
    assert not torch.equal(rope.inverse_frequencies(16, 4096)[0], before)
    assert "scales 1 to 16 over 512 positions" in report(rope, 16, 4096)


def test_export_of_a_table() -> None:
    table = trained().frozen(5, 16)
    config = to_hf(table, 2560, 16)
    assert config["max_position_embeddings"] == 2560
    block = config["rope_scaling"]
    assert block["short_factor"] == block["long_factor"] and block["factor"] == 5.0
    assert block["attention_factor"] == block["short_mscale"] == block["long_mscale"] == 1.0
    assert same_maths(from_hf(config), table, 16)


# ---- bad input ---------------------------------------------------------------------------------


def test_refused(tmp_path: Path) -> None:
    rope = trained()
    for act, message in (
        (lambda: CLEX(factor=1), "rope.factor=1 must be a whole number from 2 on"),
        (lambda: CLEX(factor=2.5), "rope.factor=2.5 must be a whole number from 2 on"),
        (lambda: CLEX(width=0), "rope.width=0 must be at least 1"),
        (lambda: CLEX(lr=-1.0), "rope.lr=-1.0 must be 0 or more"),
        (lambda: CLEX(allow_short=True), "rope.type=clex has no frequencies beyond rope.factor"),
        (lambda: check_reach(ROPE, 8192, 8700), r"rope.type=clex covers here; set rope.factor=17$"),
        (lambda: diverged().inverse_frequencies(16, 8192), "scale 16 are beyond float32; train it again with a lower"),
        (lambda: CLEX(ode_theta=1.0), "rope.ode_theta=1.0 must be above 1"),
        (lambda: rope.frozen(17, 16), "scale 17 is outside of 1 to rope.factor=16"),
        (lambda: rope.frozen(0.5, 16), "scale 0.5 is outside of 1 to rope.factor=16"),
        (lambda: rope.inverse_frequencies(16, 16 * 512 + 1), "8193 tokens needs scale 17, but rope.factor=16"),
        (lambda: rope.inverse_frequencies(32), "CLEX was trained for head_dim=16, not 32"),
        (lambda: ROPE.network(2), "model.head_dim=2 must be above 2"),
        (lambda: to_hf(ROPE, 8192, 16), "export --clex-scale T"),
        (lambda: rope_network.read(tmp_path), "rope.safetensors is missing"),
        (lambda: override(Run(name="r", train=Train(seq_length=8, iterations=1, lr=1)), ["rope.type=clex", "rope.law=length"]),
         "rope.law is a setting of rope.type=ntk"),
        (lambda: Run(name="r", rope=ROPE, train=Train(seq_length=8, iterations=1, lr=1),
                     data=Data(documents="masked", positions="document")), "set data.positions=row"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message) as error:
            act()
        assert "\n" not in str(error.value)


def test_settings_follow_the_run(tmp_path: Path) -> None:
    assert CLEX().for_length(None, 8192 * 3 + 1).covered_length() == 4 * 8192, "a factor follows the length"
    run = Run(
        name="r", rope=YaRN(factor=8.0, original_length=512), train=Train(seq_length=4096, iterations=1, lr=1)
    )
    changed = override(run, ["rope.type=clex", "train.seq_length=1000"])
    assert isinstance(changed.rope, CLEX) and changed.rope.factor == 2 and "rope.factor=2" in changed.notes

    # The learning rate is the run's, not that of the checkpoint it starts or continues from.
    place, stored = tmp_path / "iter_0000001", dataclasses.replace(ROPE, lr=0.1)
    model = Model(hidden_size=16, ffn_size=16, layers=1, heads=1, kv_heads=1, head_dim=16, vocab_size=32)
    write_without_tensors(place, TrainingState(model=model, rope=stored, max_length=8192))
    (place / rope_network.FILE).touch()
    train = Train(seq_length=512, iterations=1, lr=1)
    for rope, lr in ((None, 0.1), (CLEX(theta=None, original_length=None, lr=0.3), 0.3)):
        run = Run(name="r", rope=rope, train=train)
        for save, load in ((tmp_path, None), (tmp_path / "new", tmp_path)):
            found = weights_source.find(run, save, load, None)[0].rope
            assert found == ROPE and isinstance(found, CLEX) and found.lr == lr


def test_verified_at_the_scale_of_the_export() -> None:
    for hf, scale in (
        (ROPE.frozen(2.5, 16), 2.5),
        (dataclasses.replace(ROPE.frozen(2, 16), factor=40.0), 16),
        (Llama3(factor=32.0), None),
    ):
        assert rope_network.compared_scale(hf, ROPE) == scale
    assert rope_network.compared_scale(ROPE.frozen(2, 16), YaRN(factor=2.0)) is None
    for clex_scale in (2.0, 17.0):
        with pytest.raises(UserError, match="--clex-scale is for rope.type=clex; here has rope.type=yarn"):
            rope_network.exported(Path("here"), YaRN(factor=2.0), 16, clex_scale)


def test_damaged_network(tmp_path: Path) -> None:
    rope = trained()
    tensors = {name: getattr(rope.weights, name).detach() for name in rope_network.WEIGHTS}
    rope_network.write(tmp_path, tensors)
    read = rope_network.with_weights(tmp_path, ROPE, 16)
    assert torch.equal(read.inverse_frequencies(16, 999)[0], rope.inverse_frequencies(16, 999)[0])
    for damaged in (
        {"up": tensors["up"]},
        {**tensors, "up": tensors["up"][:4]},
        {**tensors, "up": tensors["up"] * math.nan},
    ):
        rope_network.write(tmp_path, damaged)
        with pytest.raises(
            UserError,
            match=r"(is missing|has shape \[4, 16\]|has values that are not finite); it must be finite numbers of shape \[(8, 16|16, 8)\]",
        ):
            rope_network.with_weights(tmp_path, ROPE, 16)
    (tmp_path / rope_network.FILE).write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=r"rope.safetensors cannot be read \(.*\); it holds the network"):
        rope_network.read(tmp_path)


# ---- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "original"), [(64, 64), (64, 8), (60, 8), (64, 100), (2, 8), (1, 8), (3, 3)]
)
def test_draw(length: int, original: int) -> None:
    scales, k = Counter[int](), max(1, length // original)
    for iteration in range(60):
        t, positions = draw(5, original, length, (7, iteration))
        again = draw(5, original, length, (7, iteration))
        assert again[0] == t and numpy.array_equal(again[1], positions)
        scales[t] += 1
        assert positions.shape == (length,) and positions.dtype == numpy.float64 and positions[0] == 0
        if length > 1:
            assert positions[-1] == length * t // k - 1
        inner = positions[:-1]
        assert (numpy.diff(inner) > 0).all() and numpy.allclose(inner * k, numpy.round(inner * k))
        assert positions.max() < length * t / k
        if t == 1:
            assert numpy.allclose(inner * k, numpy.arange(length - 1))
    assert set(scales) == {1, 2, 3, 4, 5}


def test_samples_are_uniform() -> None:
    """Every position is taken about equally often: 10 of 28, 2,000 times."""
    taken = Counter[float]()
    for iteration in range(8000):
        t, positions = draw(5, 12, 12, (1, iteration))
        if t == 2:
            taken.update(positions[1:-1].tolist())
    counts = [taken[float(i)] for i in range(1, 23)]
    mean = sum(counts) / len(counts)
    assert sum(counts) == 10 * (sum(counts) // 10) and mean > 600
    assert max(abs(count - mean) for count in counts) < 5 * math.sqrt(mean)


def ode_training() -> OdeTraining:
    train = Train(seq_length=64, iterations=9, lr=1.0, seed=1)
    return OdeTraining(RotaryTable(ROPE, 16), train, Optim(), SimpleNamespace(device=torch.device("cpu")))  # type: ignore[arg-type]


def test_a_gradient_beyond_float32_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.fill_(1e300))
    ode = ode_training()
    before = ode.tensors()
    with ode.drawn(1):
        pass
    assert not ode.step(64, 1.0)
    after = ode.tensors()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_damaged_optimizer(tmp_path: Path) -> None:
    ode = ode_training()
    state = {"step": torch.tensor(3.0), "exp_avg": torch.ones(8, 16), "exp_avg_sq": torch.ones(8, 16)}
    tensors = ode.tensors() | {f"up.{key}": value for key, value in state.items()}
    rope_network.write(tmp_path, tensors)
    ode.load_optimizer(tmp_path)
    assert ode.tensors().keys() == tensors.keys()
    for damaged in ({"up.exp_avg": torch.ones(16, 8)}, {"up.exp_avg": torch.full((8, 16), math.nan)}):
        rope_network.write(tmp_path, tensors | damaged)
        with pytest.raises(UserError, match=r"up.exp_avg must be finite numbers of shape \[8, 16\]"):
            ode.load_optimizer(tmp_path)
    del tensors["up.exp_avg"]
    rope_network.write(tmp_path, tensors)
    with pytest.raises(UserError, match="up.exp_avg must be"):
        ode.load_optimizer(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_frequency_gradient(dtype: torch.dtype) -> None:
    """The sum beside the graph is what autograd has through cos and sin."""
    torch.manual_seed(0)
    positions = torch.tensor([0.0, 0.375, 7.5, 100.25, 4095.0], dtype=torch.float64)
    frequencies = ROPE.inverse_frequencies(16, 4096)[0]
    cos, sin = cos_sin(positions, frequencies, 1.0)
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(2, 3, 5, 16, dtype=torch.float64).to(dtype)
    total = torch.ones(8, dtype=torch.float64)  # added to
    (apply_rope(x, cos, sin, FrequencyGradient(total, positions)) * weight).sum().backward()

    wanted = frequencies.double().requires_grad_()
    angles = torch.outer(positions, wanted)
    first, second = x.detach().double().chunk(2, dim=-1)
    rotated = torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )
    (rotated * weight.double()).sum().backward()
    assert wanted.grad is not None
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert float((total - 1 - wanted.grad).norm() / wanted.grad.norm()) < tolerance
