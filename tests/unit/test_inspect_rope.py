"""tools/inspect_rope.py: what each kind of source states, which sources agree, and what is refused."""

from __future__ import annotations

import argparse
import enum
import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from megatron_ultralong import config
from megatron_ultralong.checkpoint.rope_sources import compare, read, report
from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.errors import UserError
from megatron_ultralong.rope.methods import Llama3, YaRN
from tests.checkpoints import write_without_tensors

ROOT = Path(__file__).parents[2]
SHAPE = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "rope_theta": 500000.0}
ORIGINAL = "original_max_position_embeddings"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    ORIGINAL: 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
STATED = "--position-embedding-type rope --rotary-base 500000 --kv-channels 128 --seq-length 8192"


def write_hf(folder: Path, scaling: dict[str, Any] | None, max_position: int = 131072) -> Path:
    folder.mkdir()
    values = {**SHAPE, "max_position_embeddings": max_position, "rope_scaling": scaling}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def write_text(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


def write_gguf(file: Path, divisors: list[float] | None = None, arch: str = "llama", **keys: Any) -> Path:
    writer = gguf.GGUFWriter(file, arch)
    writer.add_context_length(131072)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(128)
    for key, value in keys.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"{arch}.rope.scaling.{key}", value)
    writer.add_tensor("output_norm.weight", np.ones(32, dtype=np.float32))
    if divisors:
        writer.add_tensor("rope_freqs.weight", np.array(divisors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def llama3_divisors() -> list[float]:
    """Llama-3.1's scaling as divisors of the unscaled frequencies, in float64."""
    divisors = []
    for i in range(64):
        wavelength = 2 * math.pi * 500000.0 ** (2 * i / 128)
        kept = min(max((8192 / wavelength - 1) / 3, 0), 1)
        divisors.append(1 / ((1 - kept) / 8 + kept))
    return divisors


def computed(*paths: Path, head_dim: int | None = None, length: int | None = None) -> list[compare.Computed]:
    return [compare.compute(source, head_dim, length) for path in paths for source in read.read_source(path)]


def close(*paths: Path) -> list[list[int]]:
    (agreement,) = compare.compare(computed(*paths))
    return agreement.close


def refused(path: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        computed(path, **settings)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


# ---- one Llama-3.1 from every kind of source ---------------------------------------------------


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return write_hf(tmp_path / "hf", LLAMA3)


def write_checkpoint(folder: Path) -> Path:
    """A run directory with run.json and what marks an iteration as complete."""
    model = config.Model(
        hidden_size=4096, ffn_size=64, layers=1, heads=32, kv_heads=8, head_dim=128, vocab_size=64
    )
    state = TrainingState(model=model, rope=YaRN(factor=8.0), iteration=3)
    write_without_tensors(folder / "iter_0000003", state)
    return folder


def test_llama3_from_every_kind_of_source(tmp_path, hf):
    common = tmp_path / "megatron" / "common.pt"
    common.parent.mkdir()
    stated = argparse.Namespace(
        position_embedding_type="rope",
        rotary_base=500000,
        use_rope_scaling=True,
        kv_channels=None,
        hidden_size=4096,
        num_attention_heads=32,
        params_dtype=torch.bfloat16,
    )
    torch.save({"args": stated, "iteration": 3}, common)
    sources = [
        hf,
        hf / "config.json",
        write_checkpoint(tmp_path / "run"),
        common.parent,
        write_text(tmp_path / "args.sh", f'ARGS="{STATED} \\\n  --use-rope-scaling" # --rotary-base 1'),
        write_text(tmp_path / "args.yaml", "model:\n  --rotary-base: 500000\n  use_rope_scaling: true\n"),
        write_gguf(tmp_path / "m.gguf", llama3_divisors()),
    ]
    found = computed(*sources, head_dim=128)
    (agreement,) = compare.compare(found)
    assert agreement.identical == [[0, 1, 2, 3, 4, 5], [6]] and agreement.close == [[*range(7)]]
    assert found[0].ramp() == [29, 30, 31, 32, 33, 34] and found[0].ratios[-1] == 8
    assert [one.source.head_dim for one in found] == [128, 128, 128, 128, 128, None, 128]
    assert [one.source.max_position for one in found[:3]] == [131072, 131072, 65536]


def test_methods_of_config_json(tmp_path):
    longrope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 64,
        "long_factor": [2.0] * 64,
        ORIGINAL: 4096,
        "factor": 32.0,
    }
    sources = [
        write_hf(tmp_path / "default", None),
        write_hf(tmp_path / "yarn", {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 32768}),
        write_hf(tmp_path / "linear", {"rope_type": "linear", "factor": 4.0}),
        write_hf(tmp_path / "longrope", longrope),
    ]
    default, yarn, linear, short = computed(*sources)
    assert set(default.ratios) == {1.0} and set(linear.ratios) == {4.0} and set(short.ratios) == {1.0}
    assert yarn.ratios[0] == 1 and yarn.ratios[-1] == 4
    assert yarn.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    assert set(computed(sources[3], length=4097)[0].ratios) == {2.0}
    (agreement,) = compare.compare([default, yarn, linear, short])
    differences = [(d.first, d.other, d.index) for d in agreement.differences]
    assert differences == [(0, 1, yarn.ramp()[0]), (0, 2, 0), (0, 3, None)]
    assert "differ: [1] and [4] only in the attention factor" in report.text(
        [default, yarn, linear, short], [agreement]
    )


# ---- Megatron-LM -------------------------------------------------------------------------------


def test_stated_factor_may_be_ignored(tmp_path, hf):
    """What the arguments state, and factor 8, which releases without the fix use."""
    text = f"{STATED} --use-rope-scaling --rope-scaling-factor 32"
    stated, ignored = computed(write_text(tmp_path / "args.txt", text))
    assert stated.source.factor() == 32 and "#6305" in stated.source.notes[0]
    assert torch.equal(ignored.frequencies, computed(hf)[0].frequencies)
    stated, ignored = computed(
        write_text(tmp_path / "linear.txt", f"{STATED} --rotary-seq-len-interpolation-factor=4")
    )
    assert set(stated.ratios) == {4.0} and set(ignored.ratios) == {1.0}


def test_equal_to_megatron_core(tmp_path):
    """Megatron-Core's own frequencies: Llama-3.1's scaling bit for bit, YaRN with its defaults."""
    from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as yarn
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    stated = computed(
        write_text(tmp_path / "llama3.txt", f"{STATED} --use-rope-scaling --rope-scaling-factor 32")
    )[0]
    theirs = RotaryEmbedding(
        128, 1.0, rotary_base=500000, rope_scaling=True, rope_scaling_factor=32, use_cpu_initialization=True
    )
    assert torch.equal(stated.frequencies, theirs.inv_freq)

    text = (
        "--position-embedding-type yarn --rotary-base 150000 --rotary-scaling-factor 32 --kv-channels 64 "
        "--yarn-beta-fast 16 --no-yarn-correction-range-round-to-int"
    )
    (found,) = computed(write_text(tmp_path / "yarn.txt", text))
    low, high = yarn._yarn_find_correction_range(16, 1, 64, 150000, 4096, False)
    kept = 1 - yarn._yarn_linear_ramp_mask(low, high, 32, device=torch.device("cpu"))
    powers = 150000 ** (torch.arange(0, 64, 2, dtype=torch.float32) / 64)
    expected = 1.0 / (32 * powers) * (1 - kept) + 1.0 / powers * kept
    torch.testing.assert_close(found.frequencies, expected, rtol=1e-6, atol=0)
    assert found.attention_factor == yarn._yarn_get_concentration_factor(32, 1.0, 0.0)


class Color(enum.Enum):
    RED = 1


def test_common_pt_runs_no_code(tmp_path, monkeypatch):
    """Enums of Megatron-LM are left out; anything else is refused by name."""
    file = tmp_path / "common.pt"
    stated = argparse.Namespace(rotary_base=10000, max_position_embeddings=4096, backend=Color.RED)
    torch.save({"args": stated}, file)
    assert f"{Color.__module__}.Color" in refused(file, head_dim=128)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "megatron.enums", argparse.Namespace(Color=Color))
        patch.setattr(Color, "__module__", "megatron.enums")
        torch.save({"args": stated}, file)
    assert computed(file, head_dim=128)[0].source.rope.theta == 10000
    torch.save({"iteration": 1}, file)
    assert "no args" in refused(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("--num-layers 2", "states no RoPE"),
        ("--rotary-base $BASE --kv-channels 128 --seq-length 1", "'$BASE' is not a number"),
        ("--rotary-base 10000 --kv-channels 63 --seq-length 1", "head_dim=63 must be even"),
        ("--rotary-base 10000 --use-rope-scaling", "--head-dim"),
        ("--rotary-base 10000 --kv-channels 64", "--seq-length"),
        (f"{STATED} --rotary-percent 0.5", "--rotary-percent 0.5"),
        ("--position-embedding-type learned_absolute", "learned_absolute"),
        (f"{STATED} --multi-latent-attention", "--multi-latent-attention"),
    ],
)
def test_refused_arguments(tmp_path, text, said):
    assert said in refused(write_text(tmp_path / "args.txt", text))


# ---- GGUF --------------------------------------------------------------------------------------


def test_gguf_scaling(tmp_path):
    plain = write_gguf(tmp_path / "plain.gguf")
    linear = write_gguf(tmp_path / "linear.gguf", type="linear", factor=4.0)
    yarn = write_gguf(tmp_path / "yarn.gguf", type="yarn", factor=4.0, original_context_length=32768.0)
    scaling = {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 32768}
    sources = [
        plain,
        write_hf(tmp_path / "default", None),
        linear,
        write_hf(tmp_path / "linear", {"rope_type": "linear", "factor": 4.0}),
        yarn,
        write_hf(tmp_path / "yarn", scaling),
    ]
    assert close(*sources) == [[0, 1], [2, 3], [4, 5]]
    assert close(plain, write_gguf(tmp_path / "long.gguf", type="longrope")) == [[0, 1]]
    # What convert_hf_to_gguf.py writes and llama.cpp does not use for a Qwen3, and the factor that it uses.
    keys = {"type": "yarn", "factor": 4.0, "original_context_length": 32768.0}
    ignored = {"yarn_attn_factor": 1.0, "yarn_beta_fast": 4.0, "yarn_beta_slow": 2.0}
    written = write_gguf(tmp_path / "written.gguf", arch="qwen3", **ignored, **keys)
    assert close(yarn, written) == [[0, 1]]
    used = computed(write_gguf(tmp_path / "used.gguf", attn_factor=2.0, **keys))[0].attention_factor
    assert used == pytest.approx(2 * (0.1 * math.log(4) + 1))
    both = write_gguf(tmp_path / "both.gguf", llama3_divisors(), type="linear", factor=2.0)
    assert computed(both)[0].ratios[-1] == 16 and "times 2" in computed(both)[0].source.describe()


def test_refused_gguf(tmp_path):
    assert "qwen2moe" in refused(write_gguf(tmp_path / "qwen.gguf", arch="qwen2moe"))
    assert "96" in refused(write_gguf(tmp_path / "short.gguf", [1.0] * 48 + [2.0] * 48))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes((tmp_path / "qwen.gguf").read_bytes()[:40])
    assert "cannot be read as GGUF" in refused(broken)


# ---- the report --------------------------------------------------------------------------------


def test_other_refusals(tmp_path):
    assert "does not exist" in refused(tmp_path / "nothing")
    assert "has no config.json" in refused(tmp_path)
    run = write_checkpoint(tmp_path / "run")
    (run / "iter_0000003" / "run.json").unlink()  # as newer Megatron-LM leaves it
    with pytest.raises(UserError, match=r"common\.pt is missing"):
        read.read_source(run)
    binary = tmp_path / "model.safetensors"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    assert "neither text" in refused(binary)
    for wrong, said in (
        ({"text_config": {"rope_theta": 1e6}}, "text_config"),
        ({"model_type": "gpt2", "n_embd": 768}, "rope_theta is missing"),
        (
            {"model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4},
            "rope_local_base_freq",
        ),
    ):
        assert said in refused(write_text(tmp_path / "config.json", json.dumps(wrong)))
    partial = {**LLAMA3, "low_freq_factor": 9.0}
    assert "low_freq_factor" in refused(write_hf(tmp_path / "wrong", partial))


def test_head_dims_are_not_compared(tmp_path, hf):
    other = write_text(tmp_path / "args.txt", "--rotary-base 500000 --use-rope-scaling --kv-channels 64")
    found = computed(hf, other)
    agreements = compare.compare(found)
    assert [a.head_dim for a in agreements] == [64, 128]
    assert "not compared, because head dimensions differ: [2]: 64, [1]: 128" in report.text(found, agreements)


def test_tool(tmp_path, hf, monkeypatch, capsys):
    """The printed report, its JSON, and the exit code."""
    wide = write_hf(tmp_path / "wide", {**LLAMA3, "factor": 16.0})
    out = tmp_path / "rope.json"
    monkeypatch.setattr(sys, "argv", ["inspect_rope.py", str(hf), str(wide), "--json", str(out)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "tools" / "inspect_rope.py"), run_name="__main__")
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert Llama3(factor=16.0).describe() in printed and "differ: [1] and [2] first at index 29" in printed
    values = json.loads(out.read_text())
    assert [source["factor"] for source in values["sources"]] == [8, 16]
    assert len(values["sources"][0]["inverse_frequencies"]) == 64
    assert values["comparisons"][0]["differences"] == [{"sources": [0, 1], "first_index": 29}]
