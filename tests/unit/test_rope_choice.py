"""Which RoPE a run trains with: the loaded model's, the recipe's, or one scaled to the sequence length."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ultralong import recipes
from megatron_ultralong.checkpoint import rope_network, training_state
from megatron_ultralong.checkpoint.max_position import max_position
from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.command_settings import override
from megatron_ultralong.config import Model, Run, Train, to_dict
from megatron_ultralong.errors import UserError
from megatron_ultralong.rope.base import Rope
from megatron_ultralong.rope.methods import (
    CLEX,
    METHODS,
    NTK,
    ChangedBase,
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    Unscaled,
    YaRN,
    from_values,
    report,
    settings_of,
)
from megatron_ultralong.train import weights_source
from tests.checkpoints import write_without_tensors

MODEL = Model(hidden_size=16, ffn_size=16, layers=1, heads=2, kv_heads=1, head_dim=8, vocab_size=32)
K, M = 1024, 1024**2
LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
BASE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
}


@pytest.fixture
def llama31(tmp_path: Path) -> Path:
    return hf_directory(tmp_path / "llama31", rope_scaling=LLAMA31)


def hf_directory(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BASE | config))
    return folder


def checkpoint(folder: Path, rope: Rope, max_length: int = 0) -> Path:
    state = TrainingState(model=MODEL, rope=rope, max_length=max_length)
    write_without_tensors(folder / "iter_0000001", state)
    return folder


def run_of(length: int, *settings: str, rope: Rope | None = None) -> Run:
    run = Run(name="x", rope=rope, train=Train(seq_length=length, iterations=1, lr=1.0))
    return override(run, list(settings))


def chosen(run: Run, *, hf: Path | None = None, load: Path | None = None, save: Path | None = None) -> Rope:
    """The RoPE that the run trains with and stores."""
    resolved, source = weights_source.find(run, save or Path("no such folder"), load, hf)
    assert resolved.rope == source.state.rope
    assert resolved.rope is not None
    return resolved.rope


def test_without_settings(llama31: Path, tmp_path: Path) -> None:
    loaded = Llama3(factor=8.0)
    # Kept where it reaches: by its own factor, by the length that the model states, by training.
    for length in (8 * K, 64 * K, 128 * K):
        assert chosen(run_of(length), hf=llama31) == loaded
    # Otherwise the factor counts from 8,192, and replaces Llama's 8.
    assert chosen(run_of(M), hf=llama31) == Llama3(factor=128.0)
    extended = checkpoint(tmp_path / "1m", YaRN(factor=128.0), max_length=M)
    assert chosen(run_of(8 * K), load=extended) == YaRN(factor=128.0)
    assert chosen(run_of(2 * M), load=extended) == YaRN(factor=256.0)
    past = checkpoint(tmp_path / "past", YaRN(factor=128.0), max_length=2 * M)
    assert chosen(run_of(2 * M), load=past) == YaRN(factor=128.0)
    # A model without scaling reaches what config.json says, and gets the paper's YaRN beyond.
    plain = hf_directory(tmp_path / "plain", max_position_embeddings=8192, rope_theta=1e5)
    assert chosen(run_of(8 * K), hf=plain) == Unscaled(theta=1e5)
    assert chosen(run_of(32 * K), hf=plain) == YaRN(theta=1e5, factor=4.0)
    dynamic = hf_directory(
        tmp_path / "dynamic", max_position_embeddings=8192, rope_scaling={"type": "dynamic", "factor": 2.0}
    )
    assert chosen(run_of(M), hf=dynamic) == DynamicNTK(factor=2.0)
    changed = checkpoint(tmp_path / "changed", ChangedBase(theta=8e6), max_length=64 * K)
    assert chosen(run_of(64 * K), load=changed) == ChangedBase(theta=8e6)
    with pytest.raises(
        UserError, match="longer than the 65,536 tokens .* base was chosen for them .* set rope.type"
    ):
        chosen(run_of(512 * K), load=changed)


def test_a_method_without_a_factor(llama31: Path, tmp_path: Path) -> None:
    """Theta and original length are the loaded model's, the factor is that of the length."""
    for kind, expected in (
        ("linear", Linear(factor=128.0)),
        ("ntk", NTK(factor=128.0)),
        ("yarn", YaRN(factor=128.0)),
        ("llama3", Llama3(factor=128.0)),
        ("dynamic", DynamicNTK()),
    ):
        assert chosen(run_of(M, f"rope.type={kind}"), hf=llama31) == expected
    short = hf_directory(tmp_path / "short", max_position_embeddings=4096, rope_theta=1e4)
    found = chosen(run_of(6 * K, "rope.type=linear"), hf=short)
    assert found == Linear(theta=1e4, original_length=4096, factor=1.5)
    # Where the loaded RoPE reaches, a method without factor is that RoPE or a mistake.
    assert chosen(run_of(8 * K, "rope.type=llama3"), hf=llama31) == Llama3(factor=8.0)
    with pytest.raises(UserError, match=r"rope.type=yarn without rope.factor: .*within the 131,072 tokens"):
        chosen(run_of(8 * K, "rope.type=yarn"), hf=llama31)
    with pytest.raises(UserError, match="rope.type=theta requires rope.theta"):
        run_of(512 * K, "rope.type=theta")
    assert chosen(run_of(512 * K, "rope.type=theta", "rope.theta=1.28e8"), hf=llama31) == ChangedBase(
        theta=1.28e8
    )


def test_a_factor_that_does_not_reach(llama31: Path, tmp_path: Path) -> None:
    plain = hf_directory(tmp_path / "plain", max_position_embeddings=8192)
    with pytest.raises(
        UserError, match=r"train.seq_length=9216 is longer .*set another rope.type, like yarn with"
    ):
        chosen(run_of(9 * K, "rope.type=none"), hf=plain)
    assert chosen(run_of(8 * K, "rope.type=none"), hf=plain) == Unscaled()
    for settings in (["rope.type=yarn", "rope.factor=128"], ["rope.type=none"]):
        with pytest.raises(
            UserError, match=r"train.seq_length=2097152 is longer than .*rope.allow_short=true"
        ):
            chosen(run_of(2 * M, *settings), hf=llama31)
        found = chosen(run_of(2 * M, *settings, "rope.allow_short=true"), hf=llama31)
        assert found.type == settings[0].partition("=")[2] and found.allow_short


def test_a_recipe_follows_the_length() -> None:
    run = recipes.get("ultralong_1m")
    longer = override(run, ["train.seq_length=2M"])
    assert isinstance(run.rope, YaRN) and longer.rope == dataclasses.replace(run.rope, factor=256.0)
    assert "rope.factor=256" in longer.notes
    assert override(run, ["train.seq_length=64K"]).rope == dataclasses.replace(run.rope, factor=8.0)
    assert override(run, ["train.seq_length=64K", "rope.factor=128"]).rope == run.rope
    assert override(run, ["train.seq_length=2M", "rope.type=linear"]).rope == Linear(factor=256.0)
    # A changed base is always stated, and the factor of dynamic scaling is another quantity.
    assert override(run, ["rope.type=dynamic"]).rope == DynamicNTK()
    assert override(run, ["rope.type=theta", "rope.theta=8e6"]).rope == ChangedBase(theta=8e6)
    changed = override(recipes.get("prolong_64k"), ["rope.type=linear", "rope.factor=8"]).rope
    assert changed == Linear(theta=None, factor=8.0), "no scaling on top of a changed base"
    insisted = override(run, ["train.seq_length=2M", "rope.factor=128", "rope.allow_short=true"])
    assert insisted.rope == run.rope and insisted.rope is not None and insisted.rope.allow_short
    for settings, message in (
        (
            ["train.seq_length=2M", "rope.factor=128"],
            "train.seq_length=2097152 is longer than the 1048576 tokens",
        ),
        (
            ["train.seq_length=4K"],
            "shorter than the 8192 tokens before scaling, so that rope.factor=128 cannot follow",
        ),
    ):
        with pytest.raises(UserError, match=message):
            override(run, settings)


def test_resuming_keeps_what_was_resolved(tmp_path: Path) -> None:
    for name, stored in (("yarn", YaRN(factor=4.0)), ("linear", Linear(factor=4.0))):
        save = checkpoint(tmp_path / name, stored, max_length=32 * K)
        for settings in (
            [],
            [f"rope.type={name}"],
            [f"rope.type={name}", "rope.factor=4", "rope.theta=500000"],
        ):
            assert chosen(run_of(32 * K, *settings), save=save) == stored
        with pytest.raises(UserError, match="use a new --save folder"):
            chosen(run_of(32 * K, f"rope.type={name}", "rope.factor=8"), save=save)
        with pytest.raises(UserError, match="use a new --save folder"):
            chosen(run_of(32 * K, "rope.type=ntk"), save=save)


def test_resuming_at_a_longer_length(tmp_path: Path) -> None:
    """Also where nothing states a factor."""
    save = checkpoint(tmp_path / "run", YaRN(factor=4.0), max_length=32 * K)
    for settings in ([], ["rope.type=yarn"]):
        with pytest.raises(UserError, match="train.seq_length=65536 is longer than the 32768 tokens"):
            chosen(run_of(64 * K, *settings), save=save)
    assert chosen(run_of(64 * K, "rope.type=yarn", "rope.allow_short=true"), save=save) == YaRN(factor=4.0)


def test_what_a_model_states_outlives_a_short_run(llama31: Path, tmp_path: Path) -> None:
    """Llama-3.1 reads 131,072 tokens with 8 x 8,192, also after a run at 8K that kept its RoPE."""
    _, source = weights_source.find(run_of(8 * K), Path("no such folder"), None, llama31)
    assert source.state.max_length == 128 * K
    trained = checkpoint(tmp_path / "8k", source.state.rope, max_length=source.state.max_length)
    assert chosen(run_of(128 * K), load=trained) == Llama3(factor=8.0)
    run = to_dict(run_of(8 * K))
    base = json.loads((llama31 / "config.json").read_text())
    assert max_position(dataclasses.replace(source.state, run=run), base) == 128 * K
    # A run that changes the RoPE has not trained it at the base model's length.
    changed = run_of(16 * K, "rope.type=yarn", "rope.factor=2", "rope.original_length=none")
    _, source = weights_source.find(changed, Path("no such folder"), trained, None)
    assert source.state.max_length == 0
    # A checkpoint of an earlier release recorded its training only; its config states more.
    old = checkpoint(tmp_path / "old", Llama3(factor=8.0), max_length=8 * K)
    (old / "iter_0000001" / "hf").mkdir()
    (old / "iter_0000001" / "hf" / "config.json").write_text((llama31 / "config.json").read_text())
    assert chosen(run_of(128 * K), load=old) == Llama3(factor=8.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["rope.type=dynamic", "rope.factor=none"], "rope.factor=None must be at least 1"),
        (["train.seq_length=1__0"], "expected a whole number"),
        (["train.seq_length=²"], "expected a whole number"),
    ],
)
def test_odd_settings(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_of(64, *settings)


def test_odd_numbers() -> None:
    with pytest.raises(UserError, match="is too large: theta would not be a number"):
        NTK(factor=1e30, original_length=7, law="length").inverse_frequencies(64)
    with pytest.raises(UserError, match="is too large: theta would not be a number"):
        NTK(factor=1e300).inverse_frequencies(4)


@pytest.mark.parametrize("value", [None, "131072", 1.5])
def test_odd_max_positions(tmp_path: Path, value: Any) -> None:
    folder = hf_directory(tmp_path / "odd", max_position_embeddings=value, rope_scaling=LLAMA31)
    if value is None:  # Llama's default
        assert chosen(run_of(64 * K), hf=folder) == Llama3(factor=8.0)
    else:
        with pytest.raises(UserError, match="max_position_embeddings"):
            chosen(run_of(64 * K), hf=folder)


def test_every_method_is_stored_and_read_back(tmp_path: Path) -> None:
    ropes: dict[str, Rope] = {
        "none": Unscaled(theta=1e4),
        "theta": ChangedBase(theta=8e6, original_length=512),
        "linear": Linear(factor=1.5),
        "ntk": NTK(factor=3.0, law="length"),
        "dynamic": DynamicNTK(factor=2.0, original_length=100),
        "llama3": Llama3(factor=2.0, alpha=0.5, beta=7.0),
        "yarn": YaRN(factor=2.0, ramp="dimension", temperature=True, attention_factor=1.5, truncate=False),
        "longrope": LongRoPE(factor=2.0, factors=(1.0, 1.5, 2.0, 4.0), short_factors=(1.0, 1.0, 1.0, 2.0)),
        "clex": CLEX(theta=1e4, factor=3, width=2, activation="silu", ode_theta=500.0, lr=1e-3),
    }
    assert set(ropes) == set(METHODS)
    for name, rope in ropes.items():
        folder = checkpoint(tmp_path / name, rope)
        if isinstance(rope, CLEX):
            with pytest.raises(UserError, match=r"lacks rope.safetensors, the network of rope.type=clex"):
                training_state.read(folder / "iter_0000001")
            (folder / "iter_0000001" / rope_network.FILE).touch()
        assert training_state.read(folder / "iter_0000001").rope == rope
        assert report(rope, 8, 64).startswith(rope.describe())
        # A setting of another method is refused by name; run.json of format 1 has those of every method.
        for other in set(METHODS) - {name}:
            for setting in set(settings_of(METHODS[other])) - set(settings_of(METHODS[name])):
                values = {**dataclasses.asdict(rope), setting: 1}
                with pytest.raises(UserError, match=f"rope.{setting} is a setting of rope.type=") as error:
                    from_values(values)
                assert f"rope.type={name} has" in str(error.value)
                assert from_values(values, ignore_others=True) == rope


def test_report_names_the_ramp() -> None:
    line = report(YaRN(factor=128.0), 128, M)
    assert "ramp 29-34: / 1.242 to / 12.2314" in line and "attention factor 1" in line
    assert "index 63: " in line and "(/ 128)" in line and "\n" not in line


def test_factors_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "factors.json").write_text("[1, 1.5, 2, 4]")
    expected = LongRoPE(theta=None, original_length=None, factors=(1.0, 1.5, 2.0, 4.0))
    for text in (f"{tmp_path}/factors.json", "1,1.5,2,4"):
        assert run_of(64, "rope.type=longrope", f"rope.factors={text}").rope == expected
    (tmp_path / "wrong.json").write_text('{"factors": [1]}')
    with pytest.raises(UserError, match="the file must hold a list of numbers"):
        run_of(64, "rope.type=longrope", f"rope.factors={tmp_path}/wrong.json")
    with pytest.raises(UserError, match="rope.factors has 4 numbers, but model.head_dim=16 needs 8"):
        LongRoPE(factor=2.0, factors=expected.factors).inverse_frequencies(16)
