"""RoPE: published figures, angles at 4M positions, rotation and its gradient, and config.json that is
refused."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ultralong import recipes
from megatron_ultralong.context_parallel import zigzag
from megatron_ultralong.errors import UserError
from megatron_ultralong.model import rotary_embedding as ropes
from megatron_ultralong.model.rotary_embedding import apply_rope, cos_sin
from megatron_ultralong.rope.hf_config import from_hf, to_hf
from megatron_ultralong.rope.methods import Llama3, Unscaled, YaRN, same_maths

M = 1024**2
ORIGINAL = "original_max_position_embeddings"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    ORIGINAL: 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
YARN = {"rope_type": "yarn", "factor": 16.0, ORIGINAL: 8192}


class Float64Sizes(TorchDispatchMode):
    """Largest float64 tensor, in elements, that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
            self.largest = max(self.largest, out.numel())
        return out


def refused(config: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        from_hf(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- frequencies -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rope", "ratios"),
    [
        (Llama3(factor=128.0), [1.242, 1.678, 2.349, 3.486, 5.752, 12.231]),
        (YaRN(factor=128.0), [1.242, 1.678, 2.349, 3.486, 5.752, 12.231]),
        (YaRN(factor=128.0, ramp="dimension"), [1.165, 1.396, 1.740, 2.309, 3.433, 6.687]),
    ],
)
def test_only_indices_29_to_34_lie_on_the_ramp(rope, ratios):
    """Llama-3.1 from 8192 positions to 1M: plain frequencies below index 29, divided by 128 from 35 on."""
    plain, factor = Unscaled().inverse_frequencies(128)
    scaled, _ = rope.inverse_frequencies(128)
    assert factor == 1.0 and torch.equal(plain[:29], scaled[:29])
    assert [round(x, 3) for x in (plain / scaled)[29:35].tolist()] == ratios
    torch.testing.assert_close(plain[35:] / scaled[35:], torch.full((29,), 128.0))


def test_rotation_ramp_is_that_of_the_paper():
    """YaRN paper eq. 17-20 in exact arithmetic but for theta's powers, at ends of the ramp that are no
    integers."""
    theta, s, length, alpha, beta = 10000.0, 7.3, 511, 0.7, 11.5
    found, _ = YaRN(
        theta=theta, factor=s, original_length=length, alpha=alpha, beta=beta
    ).inverse_frequencies(96)
    expected = []
    for i in range(48):
        f = theta ** (-2 * i / 96)
        gamma = min(max((length * f / (2 * math.pi) - alpha) / (beta - alpha), 0.0), 1.0)
        expected.append((1 - gamma) * f / s + gamma * f)
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("factor", "expected"), [(128.0, 1.485203), (256.0, 1.554518), (512.0, 1.623832), (1.0, 1.0)]
)
@pytest.mark.parametrize("ramp", ["rotation", "dimension"])
def test_attention_factor(factor, expected, ramp):
    def found(**settings):
        return YaRN(factor=factor, ramp=ramp, **settings).inverse_frequencies(128)[1]

    assert round(found(temperature=True), 6) == expected
    assert found() == 1.0 and found(temperature=True, attention_factor=1.25) == 1.25


def test_settings_without_meaning_are_refused():
    with pytest.raises(UserError, match="head_dim=7 must be even"):
        Unscaled().inverse_frequencies(7)
    with pytest.raises(UserError, match="theta=1.0 must be above 1"):
        YaRN(ramp="dimension", theta=1.0, factor=2.0).inverse_frequencies(64)
    with pytest.raises(UserError, match="attention_factor=-1.0 must be a positive"):
        YaRN(factor=2.0, temperature=True, attention_factor=-1.0).inverse_frequencies(64)


def test_frequencies_stay_on_the_cpu():
    """Also where another default device is set: a GPU's power function has other last bits."""
    with torch.device("meta"):
        for rope in (
            Unscaled(),
            Llama3(factor=8.0),
            YaRN(ramp="dimension", factor=8.0),
        ):
            assert rope.inverse_frequencies(64)[0].device.type == "cpu"


# ---- angles ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rope", [Unscaled(), YaRN(factor=512.0, ramp="dimension", temperature=True)])
def test_angles_at_4m_positions(rope):
    """Against cos and sin of the exact product of position and float32 frequency, at 50 digits; float32
    products fail this."""
    frequencies, attention_factor = rope.inverse_frequencies(128)
    positions = torch.tensor(
        [0, 1, 8191, M - 1, M + 1, 2 * M - 1, 2**24 - 1, 4 * M - 4097, 4 * M - 2, 4 * M - 1]
    )
    cos, sin = cos_sin(positions, frequencies, attention_factor)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == sin.shape == (10, 64)
    worst = worst_in_float32 = 0.0
    with mpmath.workdps(50):
        for row, position in enumerate(positions.tolist()):
            for column, frequency in enumerate(frequencies.tolist()):
                angle = mpmath.mpf(frequency) * position
                for table, function in ((cos, mpmath.cos), (sin, mpmath.sin)):
                    worst = max(
                        worst, abs(float(table[row, column].item() / attention_factor - function(angle)))
                    )
                naive = torch.tensor(float(position)) * torch.tensor(frequency)  # as float32 code has it
                worst_in_float32 = max(
                    worst_in_float32, abs(float(math.cos(naive.item()) - mpmath.cos(angle)))
                )
    assert worst < 1e-6
    assert worst_in_float32 > 0.05


def test_table_does_not_depend_on_chunks_and_their_float64_is_small(monkeypatch):
    frequencies, _ = Unscaled().inverse_frequencies(128)
    positions = torch.arange(4 * M - 40_000, 4 * M)
    with Float64Sizes() as sizes:
        cos, sin = cos_sin(positions, frequencies, 1.5)
    assert cos.numel() > 2 * ropes._CHUNK >= 2 * sizes.largest > 0
    for chunk in (1, 7 * 64):
        monkeypatch.setattr(ropes, "_CHUNK", chunk)
        few_cos, few_sin = cos_sin(positions[:100], frequencies, 1.5)
        assert torch.equal(few_cos, cos[:100]) and torch.equal(few_sin, sin[:100])


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_a_rank_computes_only_its_own_positions(cp):
    frequencies, _ = Llama3(factor=8.0).inverse_frequencies(16)
    whole = cos_sin(torch.arange(48), frequencies, 1.0)
    for rank in range(cp):
        mine = cos_sin(zigzag.positions(48, rank, cp), frequencies, 1.0)
        for table, reference in zip(mine, whole):
            assert table.shape == (48 // cp, 8) and torch.equal(table, zigzag.shard(reference, rank, cp, 0))


def test_positions_must_be_whole_numbers():
    for wrong in (torch.arange(3.0), torch.arange(3, dtype=torch.int32), torch.arange(4).view(2, 2)):
        with pytest.raises(ValueError, match="int64"):
            cos_sin(wrong, torch.ones(2), 1.0)


def test_scores_depend_on_the_distance_only_up_to_4m():
    """q.k of one pair of vectors, moved along the sequence: float32 to float32 rounding, bf16 to bf16
    rounding."""
    torch.manual_seed(0)
    frequencies, _ = YaRN(factor=512.0).inverse_frequencies(128)
    q, k = torch.randn(1, 1, 128), torch.randn(300, 1, 128)  # one query, 300 keys
    distances = torch.randint(0, 5000, (300,))

    def scores(q_position: int, dtype: torch.dtype) -> torch.Tensor:
        q_rotated = apply_rope(q.to(dtype), *cos_sin(torch.tensor([q_position]), frequencies, 1.0))
        k_cos, k_sin = cos_sin(q_position - distances, frequencies, 1.0)
        k_rotated = apply_rope(k.to(dtype).transpose(0, 1), k_cos, k_sin).transpose(0, 1)
        assert q_rotated.dtype == k_rotated.dtype == dtype
        return (q_rotated.double() * k_rotated.double()).sum(dim=(1, 2))

    def scores_in_float32(q_position: int) -> torch.Tensor:
        """As code has it that multiplies position and frequency in float32."""
        q_angles, k_angles = (
            torch.outer(p.float(), frequencies) for p in (torch.tensor([q_position]), q_position - distances)
        )
        k_rotated = apply_rope(k.transpose(0, 1), k_angles.cos(), k_angles.sin()).transpose(0, 1)
        return (apply_rope(q, q_angles.cos(), q_angles.sin()) * k_rotated).sum(dim=(1, 2))

    assert (
        scores_in_float32(4 * M - 1) - scores(5000, torch.float32)
    ).abs().max() > 0.1  # what this test is to find
    for offset in (M - 3, 2 * M + 1, 4 * M - 1):
        torch.testing.assert_close(
            scores(offset, torch.float32), scores(5000, torch.float32), rtol=0, atol=2e-5
        )
        # Rounding q and k to 8 bits, by up to 2^-9 of each element, moves a score of 128 products by 0.03
        # (one sigma) at most.
        difference = scores(offset, torch.bfloat16) - scores(5000, torch.bfloat16)
        assert difference.abs().max() < 0.15 and difference.square().mean().sqrt() < 0.04


# ---- rotation ----------------------------------------------------------------------------------


def test_rotation_by_hand():
    """Two pairs, (x0, x2) and (x1, x3), turned by a quarter and by 60 degrees."""
    cos, sin = torch.tensor([[0.0, 0.5]]), torch.tensor([[1.0, math.sqrt(0.75)]])
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    expected = [[[-3.0, 2 * 0.5 - 4 * math.sqrt(0.75), 1.0, 4 * 0.5 + 2 * math.sqrt(0.75)]]]
    torch.testing.assert_close(apply_rope(x, cos, sin), torch.tensor(expected))


def test_gradient():
    torch.manual_seed(0)
    cos, sin = cos_sin(
        torch.tensor([3, 500, 4 * M]),
        *YaRN(factor=512.0, temperature=True).inverse_frequencies(6),
    )
    x = torch.randn(2, 2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, cos, sin), (x,))
    assert torch.autograd.gradgradcheck(lambda x: apply_rope(x, cos, sin), (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_backward_is_the_rotation_back_and_keeps_only_cos_and_sin(dtype):
    torch.manual_seed(0)
    cos, sin = cos_sin(torch.arange(5), *Unscaled().inverse_frequencies(16))
    kept: list[int] = []
    leaf = torch.randn(5, 2, 3, 16, dtype=dtype, requires_grad=True)  # [s, b, h, d], as Megatron has it
    x = leaf.permute(1, 2, 0, 3)  # [b, h, s, d]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = apply_rope(x, cos, sin)
    assert kept == [cos.data_ptr(), sin.data_ptr()]
    assert out.dtype == dtype and out.shape == x.shape and out.stride() == x.stride()
    first, second = x.detach().float().chunk(2, dim=-1)
    reference = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(out.detach().float(), reference, rtol=ulp / 2, atol=1e-6)  # rounded once
    out.backward(out.detach())
    torch.testing.assert_close(leaf.grad, leaf.detach(), rtol=2 * ulp, atol=4 * ulp)  # there and back again


def test_shapes_that_do_not_fit():
    for x_shape, table_shape in (((2, 3, 8), (3, 8)), ((2, 3, 8), (2, 4)), ((2, 3, 8), (1, 4))):
        with pytest.raises(ValueError, match="does not fit"):
            apply_rope(torch.zeros(x_shape), torch.zeros(table_shape), torch.zeros(table_shape))


# ---- config.json -------------------------------------------------------------------------------


def test_what_configs_say():
    length = {"max_position_embeddings": 8192}
    assert from_hf({}) == from_hf({"rope_scaling": None}) == Unscaled(theta=10000.0, original_length=2048)
    assert (
        from_hf({"rope_theta": 500000, **length})
        == from_hf({"rope_parameters": {"rope_theta": 500000.0}, **length})
        == Unscaled(theta=500000.0, original_length=8192)
    )
    llama31 = Llama3(theta=500000.0, factor=8.0, original_length=8192, alpha=1.0, beta=4.0)
    old, new = (
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
        {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
    )
    assert from_hf(old) == from_hf(new) == from_hf({**old, **new}) == llama31
    yarn = YaRN(
        ramp="dimension",
        theta=10000.0,
        factor=16.0,
        original_length=8192,
        beta=32.0,
        temperature=True,
    )
    assert from_hf({"rope_scaling": YARN}) == yarn
    assert not from_hf({"rope_scaling": {**YARN, "attention_factor": 1.0}}).temperature
    assert (
        from_hf({"rope_scaling": {**YARN, "attention_factor": 0.1 * math.log(16.0) + 1.0}}).attention_factor
        is None
    )
    outside = {"rope_scaling": {**YARN, ORIGINAL: None}, ORIGINAL: 4096}
    assert from_hf(outside).original_length == 4096
    assert (
        from_hf({"rope_scaling": {"type": "yarn", "factor": 2.0}}).original_length == 2048
    )  # Llama's default


@pytest.mark.parametrize("kind", ["proportional", "su", "ntk", ["yarn"]])
@pytest.mark.parametrize(
    "style", ["rope_scaling.type", "rope_scaling.rope_type", "rope_parameters.rope_type"]
)
def test_unknown_types_are_refused_by_name(kind, style):
    block, key = style.split(".")
    assert f"RoPE type {kind!r} is not supported" in refused(
        {block: {key: kind, "factor": 2.0, "rope_theta": 10000.0}}
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: partial rotation"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
            "rope_parameters.partial_rotary_factor=0.25",
        ),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn' must be an object"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differs between layers"),
        ({"rope_scaling": {"factor": 8.0}}, "unknown key 'factor' for RoPE type default"),
        (
            {"rope_scaling": {**LLAMA3, "attention_factor": 1.2}},
            "unknown key 'attention_factor' for RoPE type llama3",
        ),
        ({"rope_scaling": {**YARN, "attn_factor": 1.2}}, "unknown key 'attn_factor' for RoPE type yarn"),
        ({"rope_scaling": {**LLAMA3, "type": "linear"}}, "rope_type=llama3 and type=linear contradict"),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "factor": 32.0}},
            "rope_scaling and rope_parameters contradict",
        ),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling and rope_parameters contradict",
        ),
        (
            {"rope_theta": 10000.0, "rope_parameters": {"rope_theta": 500000.0}},
            "rope_parameters.rope_theta=500000.0 contradict",
        ),
        (
            {"rope_scaling": YARN, ORIGINAL: 4096},
            f"{ORIGINAL}=8192 contradicts the top-level {ORIGINAL}=4096",
        ),
        ({"rope_scaling": {**YARN, ORIGINAL: 81.5}}, "must be a whole number"),
        ({"rope_theta": "500000"}, "rope_theta='500000' must be a positive number"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0 must be a positive number"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "rope_scaling: low_freq_factor is missing"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {**YARN, "factor": True}}, "factor=True must be a positive number"),
        ({"rope_scaling": {**YARN, "factor": math.nan}}, "factor=nan must be a positive number"),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, "factor=0.5 must be at least 1"),
        (
            {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}},
            "low_freq_factor=4 must be below high_freq_factor=4",
        ),
        ({"rope_scaling": {**YARN, "beta_slow": 40}}, "beta_slow=40 must be below beta_fast=32"),
        ({"rope_scaling": {**YARN, "truncate": 1}}, "truncate=1 must be true or false"),
        ({"rope_scaling": {**YARN, "attention_factor": 0}}, "attention_factor=0 must be a positive number"),
    ],
)
def test_configs_that_are_refused(config, message):
    assert message in refused(config)


def test_exported_keys():
    assert to_hf(Unscaled(theta=10000.0), 512, 128) == {
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "rope_scaling": None,
    }
    scaling = {**LLAMA3, "factor": 128.0}
    exported = to_hf(YaRN(factor=128.0), M, 128)
    assert exported == {"max_position_embeddings": M, "rope_theta": 500000.0, "rope_scaling": scaling}
    yarn = {"rope_type": "yarn", "factor": 128.0, ORIGINAL: 8192, "beta_fast": 4.0, "beta_slow": 1.0}
    ours = YaRN(ramp="dimension", factor=128.0)
    assert to_hf(ours, M, 128)["rope_scaling"] == {**yarn, "attention_factor": 1.0}
    with_temperature = YaRN(ramp="dimension", factor=128.0, temperature=True, truncate=False)
    assert to_hf(with_temperature, M, 128)["rope_scaling"] == {**yarn, "truncate": False}


def test_what_config_json_cannot_say():
    with pytest.raises(
        UserError,
        match=r"cannot express YaRN over rotations with attention temperature.*rope.temperature=false",
    ):
        to_hf(YaRN(factor=128.0, temperature=True), M, 128)
    with pytest.raises(
        UserError,
        match=r"max_position_embeddings=1073152 must be rope.factor x rope.original_length = 1048576",
    ):
        to_hf(YaRN(ramp="dimension", factor=128.0), 1073152, 128)
    with pytest.raises(UserError, match="max_position_embeddings=0"):
        to_hf(Unscaled(), 0, 128)


def test_same_maths():
    yarn = YaRN(factor=128.0)
    assert same_maths(yarn, Llama3(factor=128.0), 128)
    assert not same_maths(yarn, Llama3(factor=256.0), 128)
    assert not same_maths(yarn, YaRN(factor=128.0, temperature=True), 128)


@pytest.mark.parametrize(
    ("name", "factor"), [("ultralong_1m", 128.0), ("ultralong_2m", 256.0), ("ultralong_4m", 512.0)]
)
def test_papers_recipes_export_as_llama3(name, factor):
    run = getattr(recipes, name)()
    scaling = to_hf(run.rope, run.train.seq_length, 128)["rope_scaling"]
    assert (scaling["rope_type"], scaling["factor"], scaling[ORIGINAL]) == ("llama3", factor, 8192)
