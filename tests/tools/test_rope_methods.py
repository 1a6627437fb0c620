"""Every RoPE method through the tools: trained from a Hugging Face model, exported, verified, read back."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_ultralong.checkpoint import rope_network, training_state
from megatron_ultralong.config import Model
from tests import processes
from tests.text import write_rows
from tests.tiny import hf_model

TOOLS = Path(__file__).parents[2] / "tools"
MODEL = Model(hidden_size=32, ffn_size=48, layers=1, heads=2, kv_heads=2, head_dim=8, vocab_size=61)
ORIGINAL, LENGTH = 32, 128
# Settings, and max_position_embeddings of the export.
METHODS = {
    "linear": ((), LENGTH),
    "ntk": (("rope.law=length",), LENGTH),
    "dynamic": (("rope.factor=2",), ORIGINAL),
    "longrope": (("rope.factors=1,1.5,2.5,4",), LENGTH),
    "theta": (("rope.theta=2e5",), LENGTH),
    "clex": (("rope.lr=1e-2", "train.seed=1", "train.schedule=constant"), LENGTH),
}


def run(tool: str, *arguments: object) -> Any:
    done = processes.run([sys.executable, TOOLS / tool, *arguments], capture_output=True)
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    return done


@pytest.mark.slow
def test_trained_exported_and_read(tmp_path: Path) -> None:
    hf_model(MODEL, max_position=ORIGINAL).save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    write_rows(tmp_path / "rows", torch.randint(0, 61, (4, LENGTH + 1), generator=generator).tolist())
    seen = set()
    for kind, (settings, max_position) in METHODS.items():
        save, out = tmp_path / kind, tmp_path / f"{kind}-hf"
        common = (
            "train.iterations=1",
            "train.warmup=0",
            "train.global_batch=2",
            f"train.seq_length={LENGTH}",
        )
        done = run(
            "train.py", "--recipe", "ultralong_1m_sft", "--load-hf", tmp_path / "base", "--data", tmp_path / "rows",
            "--save", save, "--set", *common, "parallel.tp=1", "runtime.device=cpu", "train.precision=fp32",
            "data.documents=joined", f"rope.type={kind}", *settings,
        )  # fmt: skip
        line = next(line for line in done.stdout.splitlines() if line.startswith("RoPE: "))
        assert "index 3: " in line and "attention factor" in line
        rope = training_state.read(save / "iter_0000001").rope
        assert (rope.type, rope.theta, rope.original_length) == (
            kind,
            2e5 if kind == "theta" else 1e4,
            ORIGINAL,
        )
        run("convert_hf.py", "export", "--load", save, "--output", out, "--dtype", "fp32")
        run("convert_hf.py", "verify", "--load-hf", out, "--load", save)
        written = json.loads((out / "config.json").read_text())
        assert written["max_position_embeddings"] == max_position
        theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(out))
        theirs(torch.zeros(1), torch.arange(LENGTH)[None])
        rope = rope_network.with_weights(save / "iter_0000001", rope, MODEL.head_dim)
        frequencies, attention_factor = rope.inverse_frequencies(MODEL.head_dim, LENGTH)
        assert torch.equal(theirs.inv_freq, frequencies) and theirs.attention_scaling == attention_factor
        seen.add(tuple(frequencies.tolist()))
        LlamaForCausalLM.from_pretrained(out)
    assert len(seen) == len(METHODS)
