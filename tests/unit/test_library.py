"""megatron_ultralong as a library: what is exported, and each function in one process without torchrun."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close
from transformers import AutoConfig, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import megatron_ultralong as mu
from megatron_ultralong import library, shapes
from megatron_ultralong.rope.yarn import YaRN
from tests import processes

ROOT = Path(__file__).parents[2]
BASE = ROOT / "examples" / "demo" / "base"


def test_importing_it_imports_nothing_else():
    code = (
        "import sys, megatron_ultralong as m; "
        "assert not {'torch', 'numpy', 'megatron', 'transformers'} & set(sys.modules); "
        "assert set(m.__all__) <= set(dir(m)); assert m.UserError; "
        "assert 'torch' not in sys.modules; assert m.apply_rope; assert 'torch' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_name_is_exported_and_documented():
    tree = ast.parse(Path(mu.__file__).read_text())
    checked, _ = (node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name for node in checked.body for alias in node.names}
    assert typed | {"__version__"} == set(mu.__all__), "what type checkers see is what there is"
    for name in mu.__all__:
        value = getattr(mu, name)
        assert name == "__version__" or inspect.getdoc(value), name
        if getattr(value, "__module__", "") == library.__name__:
            parameters = inspect.signature(value).parameters
            assert (len(parameters) <= 6 and "rror" in value.__doc__) or name == "read_rope", name
    with pytest.raises(AttributeError, match="has no attribute 'attend'"):
        mu.attend  # noqa: B018


def inputs(length: int = 96) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(1, heads, length, 8, dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2, 6)
    ]


@pytest.mark.parametrize("documents", [None, [0, 10, 61]])
@pytest.mark.parametrize("ranks, ulysses", [(1, 1), (4, 1), (4, 2)])
def test_attention_equals_that_of_the_whole_sequence(documents, ranks, ulysses):
    q, k, v, dout = inputs()
    expected = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    if documents is not None:
        edges = [*documents, 96]
        parts = [
            scaled_dot_product_attention(
                *(x[:, :, a:b] for x in (q, k, v)), is_causal=True, enable_gqa=True, scale=0.3
            )
            for a, b in itertools.pairwise(edges)
        ]
        expected = torch.cat(parts, 2)
    gradients = torch.autograd.grad(expected, (q, k, v), dout)
    held: dict[int, torch.Tensor] = {}

    def rank(group: Any) -> list[torch.Tensor]:
        if ulysses > 1:
            group = mu.split_group(group, ulysses)
        mine = mu.token_positions(96, group, documents)
        held[group.rank] = mine
        local = [x.detach()[:, :, mine].requires_grad_() for x in (q, k, v)]
        scale = None if documents is None else 0.3
        out = mu.attention(*local, group, documents, scale)
        return [out.detach(), *torch.autograd.grad(out, local, dout[:, :, mine])]

    results = list(zip(*mu.run_virtual(rank, ranks), strict=True))
    assert sorted(torch.cat(list(held.values())).tolist()) == list(range(96))
    for shards, whole in zip(results, (expected, *gradients), strict=True):
        joined = mu.join_shards(shards, documents=documents, ulysses=ulysses)
        assert_close(joined, whole, rtol=1e-10, atol=1e-12)


def test_attention_of_one_process():
    """Without a group, and with torch.distributed's group of one rank."""
    q, k, v, _ = inputs()
    expected = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert_close(mu.attention(q, k, v), expected)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        assert mu.token_positions("96", group).tolist() == list(range(96))
        assert_close(mu.attention(q, k, v, group, [0]), expected)
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(mu.UserError, match="document starts"):
        mu.attention(q, k, v, documents=[3])
    with pytest.raises(mu.UserError, match="seq_length=1G: expected a whole number"):
        mu.token_positions("1G")
    with pytest.raises(ValueError, match="are not"):
        mu.attention(q, k[..., :3], v)


def test_rope_table_is_that_of_transformers(tmp_path):
    config = AutoConfig.from_pretrained(BASE)
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    config.max_position_embeddings = 4096
    config.save_pretrained(tmp_path)
    positions = torch.tensor([5, 0, 4095])
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    sources: list[Any] = [
        str(tmp_path),
        tmp_path / "config.json",
        json.loads((tmp_path / "config.json").read_text()),
        config,
    ]
    for source in sources:
        cos, sin = mu.rope_table(source, positions)
        assert cos.dtype == torch.float32 and cos.shape == (3, 16)
        # transformers multiplies in float32: at position 4,095 that is 2e-4 rad.
        for ours, theirs in zip((cos, sin), expected, strict=True):
            assert_close(ours, theirs[0, :, :16].float(), rtol=0, atol=5e-4)
    assert_close(mu.rope_table(tmp_path, "4K")[0][positions], cos, rtol=0, atol=0)
    rope = mu.read_rope(tmp_path)
    assert rope.type == "llama3" and rope.factor == 8.0
    assert_close(mu.rope_table(rope, positions, head_dim=32)[1], sin, rtol=0, atol=0)
    # The angle of pair 0 is the position itself; with temperature, times the attention factor.
    cos, _ = mu.rope_table(YaRN(factor=4.0, temperature=True), torch.tensor([4_000_001]), head_dim=128)
    factor = YaRN(factor=4.0, temperature=True).multiplier()
    assert (
        factor > 1 and abs(cos[0, 0].item() - factor * torch.tensor(4_000_001.0).double().cos().item()) < 1e-6
    )
    x = torch.randn(1, 2, 3, 32)
    turned = mu.apply_rope(x, *mu.rope_table(tmp_path, positions))
    assert_close(turned[:, :, 1], x[:, :, 1]) and assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    for source, message in (
        (YaRN(factor=4.0), "give head_dim"),
        (tmp_path / "absent", "does not exist"),
        (
            {"model_type": "llama", "rope_scaling": {"rope_type": "mrope"}},
            "config: rope_scaling: RoPE type 'mrope'",
        ),
    ):
        with pytest.raises(mu.UserError, match=message):
            mu.rope_table(source, positions)


def test_plan_takes_recipes_names_directories_and_shapes(tmp_path):
    by_name = mu.plan("llama-3.1-8b", gpus=256, seq_length="1M")
    by_shape = mu.plan(shapes.LLAMA_3_1_8B, gpus=256, seq_length=2**20, gpu="H100")
    assert by_name.fits and by_name.values["plans"] == by_shape.values["plans"]
    assert repr(by_name) == str(by_name) and str(by_name).startswith("llama-3.1-8b: 1,048,576 tokens")
    assert str(by_shape).startswith("model of 32 layers, hidden 4096, 32 heads: 1,048,576 tokens")
    assert mu.plan(BASE, gpus=1, seq_length="4K").fits and mu.plan(str(BASE), gpus=1, seq_length="4K").fits
    recipe = mu.plan("ultralong_1m", gpus=256, settings=["parallel.tp=8"])
    assert recipe.whole is not None and recipe.values["plans"]["best"]["layout"]["tp"] == 8
    assert not mu.plan("ultralong_4m", gpus=128, settings=["parallel.tp=1", "memory.recompute=none"]).fits
    own = tmp_path / "own.py"
    own.write_text(
        "from megatron_ultralong import recipes\n\n\ndef own():\n    return recipes.get('ultralong_1m')\n"
    )
    assert mu.plan(own, gpus=256).fits
    with pytest.raises(mu.UserError, match="did you mean llama-3.1-8b"):
        mu.plan("llama-3.1-9b", gpus=8, seq_length="1M")
    with pytest.raises(mu.UserError, match="give seq_length, like '1M'"):
        mu.plan(shapes.LLAMA_3_1_8B, gpus=8)


def test_passkey_prompt_is_exact(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    prompt = mu.passkey_prompt(tokenizer, 700, 50)
    for same in (mu.passkey_prompt(str(BASE), "700", 50.0), mu.passkey_prompt(BASE, 700, chat="no")):
        assert same == prompt
    assert len(prompt.tokens) + prompt.answer_tokens == 700
    assert prompt.answer in prompt.text and prompt.answer.isdigit()
    assert len(repr(prompt)) < 300, "a notebook shows it without its thousands of tokens"
    assert prompt.answer in tokenizer.decode(prompt.tokens[prompt.needle_at :][:40])
    assert abs(prompt.needle_at / 700 - 0.5) < 0.06
    assert mu.passkey_prompt(BASE, 700, trial=1).answer != prompt.answer
    assert "in the cellar" in mu.passkey_prompt(BASE, 700, haystack="A dog sleeps in the cellar.").text
    for arguments, message in (
        ({"length": 5}, "too short"),
        ({"length": 700, "depth": 101}, "0 to 100"),
        ({"length": 700, "chat": "yes"}, "has no chat template"),
        ({"length": 700, "tokenizer": tmp_path}, "cannot load its tokenizer"),
    ):
        with pytest.raises(mu.UserError, match=message):
            mu.passkey_prompt(**{"tokenizer": BASE, **arguments})


def test_the_notebook_runs(monkeypatch, capsys):
    """examples/library.ipynb, cell by cell in this process; it also converts a checkpoint there and back."""
    monkeypatch.setattr(library.subprocess, "run", processes.run)
    monkeypatch.chdir(ROOT / "examples")
    notebook = json.loads((ROOT / "examples" / "library.ipynb").read_text())
    state: dict[str, Any] = {"__name__": "__main__"}
    last: dict[str, Any] = {}
    for cell in notebook["cells"]:
        assert not cell.get("outputs"), "cleared, so that no figure in it is out of date"
        if cell["cell_type"] == "code":
            *body, end = ast.parse("".join(cell["source"])).body
            exec(compile(ast.Module(body, []), cell["id"], "exec"), state)
            if isinstance(end, ast.Expr):
                last[cell["id"]] = eval(compile(ast.Expression(end.value), cell["id"], "eval"), state)
            else:
                exec(compile(ast.Module([end], []), cell["id"], "exec"), state)
    errors = [value for value in last.values() if isinstance(value, torch.Tensor) and value.dim() == 0]
    assert len(errors) == 2 and max(errors) < 1e-5
    out = capsys.readouterr().out
    assert "1,048,576 tokens per sequence" in out and "wrote" in out
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(
        next(value for value in last.values() if isinstance(value, list) and "config.json" in value)
    )
    hf = state["hf"]
    with pytest.raises(mu.UserError, match=r"exists|is not empty|in use"):
        mu.export_hf(str(state["checkpoint"]), str(hf))
    with pytest.raises(mu.UserError, match="absent"):
        mu.import_hf("absent", hf.parent / "new")
    assert not (hf.parent / "new").exists()


def test_lengths_and_documents_are_whole_numbers():
    """Also numpy's and a tensor's; anything else is refused, and is not kept for the next call."""
    documents = [0, 3]
    for wrong in (8.0, None, "", 0, -4, [8]):
        with pytest.raises(mu.UserError, match="^seq_length="):
            mu.token_positions(wrong)  # type: ignore[arg-type]
        with pytest.raises(mu.UserError, match="^seq_length="):
            mu.token_positions(wrong, documents=documents)  # type: ignore[arg-type]
    for right in (8, "8", np.int64(8), torch.tensor(8)):
        for starts in (documents, np.array(documents), torch.tensor(documents)):
            held = mu.token_positions(right, documents=starts)  # type: ignore[arg-type]
            assert held.dtype == torch.int64 and held.tolist() == list(range(8))
    library._place.cache_clear()
    for _ in range(3):
        mu.token_positions(8, documents=torch.tensor(documents))  # type: ignore[arg-type]
    assert library._place.cache_info().misses == 1
    for starts in ([0, 2.5], [0.0, 3.0], 0, ["0"]):
        with pytest.raises(mu.UserError, match="^documents="):
            mu.token_positions(8, documents=starts)  # type: ignore[arg-type]
    yarn = YaRN(factor=4.0, original_length=64)
    assert mu.rope_table(yarn, np.int64(3), head_dim=8)[0].shape == (3, 4)  # type: ignore[arg-type]
    for wrong in (4.0, None, [0, 1], -1):
        with pytest.raises(mu.UserError, match="^positions="):
            mu.rope_table(yarn, wrong, head_dim=8)  # type: ignore[arg-type]


def test_shards_that_do_not_fit_together():
    shards = [torch.arange(4), torch.arange(4)]
    for wrong, ulysses in (([], 1), ([torch.arange(4), torch.arange(2)], 1), (shards, 3), (shards, 0)):
        with pytest.raises(ValueError, match="shards of shapes"):
            mu.join_shards(wrong, 0, [0, 3], ulysses)


def test_one_setting_of_a_plan():
    """Without a list around it."""
    plans = [mu.plan("tiny", gpus=2, settings=one) for one in ("parallel.tp=2", ["parallel.tp=2"])]
    assert str(plans[0]) == str(plans[1])


def test_conversion_of_names_that_look_like_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(mu.UserError, match="^--base is not a directory"):
        mu.import_hf("--base", "-out")
    with pytest.raises(mu.UserError, match="^argument --dtype: invalid choice: 'int8'"):
        mu.import_hf("base", "out", dtype="int8")  # type: ignore[arg-type]
