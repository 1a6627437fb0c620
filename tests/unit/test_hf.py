"""Reading and writing HF directories: slices, checks that name what is wrong, exports that are whole or
absent."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_ultralong.checkpoint.hf import assets as hf_assets
from megatron_ultralong.checkpoint.hf import config as hf_config
from megatron_ultralong.checkpoint.hf import dtypes as hf_dtypes
from megatron_ultralong.checkpoint.hf import model_card, weight_files
from megatron_ultralong.checkpoint.hf import reader as hf_reader
from megatron_ultralong.checkpoint.hf import writer as hf_writer
from megatron_ultralong.checkpoint.max_position import max_position
from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.config import Model, Run, Train
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files
from megatron_ultralong.model import weight_mapping
from megatron_ultralong.rope.methods import Llama3, Unscaled, YaRN
from megatron_ultralong.shapes import LLAMA_3_1_8B
from tests.disk import fill, small_disk

MODEL = Model(hidden_size=72, ffn_size=42, layers=2, heads=9, kv_heads=3, head_dim=6, vocab_size=97)
TIED = dataclasses.replace(MODEL, tied_embeddings=True)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 72,
    "intermediate_size": 42,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 6,
    "vocab_size": 97,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
ROPE = Llama3(theta=10000.0, factor=8.0, original_length=512)


def random_tensors(model: Model = MODEL, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape).to(dtype) for name, shape in weight_mapping.hf_shapes(model).items()}


def write_model(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1, **config: object) -> Path:
    """An HF directory; tensors are dealt out over `shards` files like cards."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    if shards == 1:
        save_file(tensors, folder / weight_files.SINGLE)
        return folder
    index: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        names = list(tensors)[i::shards]
        save_file({name: tensors[name] for name in names}, folder / file)
        index |= dict.fromkeys(names, file)
    (folder / weight_files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def empty_parameters(model: Model, tp: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    shapes = {
        name: weight_mapping.shard_shape(name, model, tp) for name in weight_mapping.megatron_names(model)
    }
    return {name: torch.full(shape, float("nan"), dtype=dtype) for name, shape in shapes.items()}


# ---- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize(("model", "tp"), [(MODEL, 1), (MODEL, 3), (TIED, 3)])
def test_load_equals_split_of_the_whole_tensors(tmp_path, shards, model, tp):
    tensors = random_tensors(model)
    folder = write_model(tmp_path / "m", tensors, shards, tie_word_embeddings=model.tied_embeddings)
    for rank in range(tp):
        parameters = empty_parameters(model, tp)
        hf_reader.load_parameters(folder, hf_config.read_config(folder).model, parameters, rank, tp)
        for name, parameter in parameters.items():
            assert torch.equal(parameter, weight_mapping.split(name, tensors, model, rank, tp)), (name, rank)


def test_load_converts_fills_parameters_in_place_and_knows_transformer_engine_names(tmp_path):
    tensors = random_tensors(TIED)
    folder = write_model(tmp_path / "m", tensors, tie_word_embeddings=True)
    te, last = "decoder.layers.0.mlp.linear_fc1.layer_norm_weight", weight_mapping.OUTPUT
    parameters = {
        te: torch.nn.Parameter(torch.empty(72, dtype=torch.bfloat16)),
        last: torch.nn.Parameter(torch.empty(33, 72)),
    }
    before = parameters[te].data_ptr()
    hf_reader.load_parameters(folder, TIED, parameters, 2, 3)
    assert (
        parameters[te].data_ptr() == before
        and parameters[te].requires_grad
        and parameters[te].grad_fn is None
    )
    assert torch.equal(parameters[te], tensors["model.layers.0.post_attention_layernorm.weight"].bfloat16())
    # Rank 2 of 3 holds vocabulary rows 66..96 and two rows of padding.
    assert (
        torch.equal(parameters[last][:31], tensors["model.embed_tokens.weight"][66:])
        and not parameters[last][31:].any()
    )


def test_only_the_needed_slices_are_read(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "m", random_tensors())
    asked: dict[str, int] = {}
    read = hf_reader.HFReader.read

    def counted(self, name, index=()):
        block = read(self, name, index)
        asked[name] = asked.get(name, 0) + block.numel()
        return block

    monkeypatch.setattr(hf_reader.HFReader, "read", counted)
    hf_reader.load_parameters(folder, MODEL, empty_parameters(MODEL, 3), 1, 3)
    for name, shape in weight_mapping.hf_shapes(MODEL).items():
        whole = torch.Size(shape).numel()
        share = (
            33 * 72
            if name in (weight_mapping.HF_EMBEDDING, weight_mapping.HF_OUTPUT)
            else whole
            if len(shape) == 1
            else whole // 3
        )
        assert asked[name] == share, name


def test_dtypes_of_the_stored_weights(tmp_path):
    tensors, norm = random_tensors(), "decoder.final_layernorm.weight"
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        reader = hf_reader.HFReader(write_model(tmp_path / str(dtype), stored), MODEL)
        assert reader.dtypes() == dict.fromkeys(weight_mapping.megatron_names(MODEL), dtype)
    stored = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    for name in ("model.norm.weight", "model.layers.1.mlp.down_proj.weight"):
        stored[name] = tensors[name]
    stored["model.layers.0.self_attn.k_proj.weight"] = tensors[name].new_zeros(18, 72, dtype=torch.float16)
    found = hf_reader.HFReader(write_model(tmp_path / "mixed", stored), MODEL).dtypes()
    # Megatron has one tensor for all layers, and one for q, k and v.
    wide = {norm} | {
        f"decoder.layers.{i}.{name}.weight"
        for i in (0, 1)
        for name in ("mlp.linear_fc2", "self_attention.linear_qkv")
    }
    assert {name for name, dtype in found.items() if dtype == torch.float32} == wide
    assert set(found.values()) == {torch.bfloat16, torch.float32}


def test_float16_keeps_values_finite(tmp_path):
    tensors = random_tensors(dtype=torch.bfloat16)
    tensors["model.norm.weight"][5] = 70000.0
    folder = write_model(tmp_path / "m", tensors)
    reader = hf_reader.HFReader(folder, MODEL)
    with pytest.raises(UserError, match="model.norm.weight has values up to 7.01e.04, and float16"):
        reader.shard("decoder.final_layernorm.weight", 0, 1, torch.float16)
    tensors["model.norm.weight"][5] = float("inf")  # as it was
    assert torch.isinf(hf_dtypes.converted(tensors["model.norm.weight"], torch.float16, "a")[5])


def test_names_set_aside(tmp_path):
    tensors = random_tensors(TIED) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    head = {weight_mapping.HF_OUTPUT: tensors[weight_mapping.HF_EMBEDDING].clone()}
    folder = write_model(tmp_path / "equal", tensors | head, tie_word_embeddings=True)
    hf_reader.load_parameters(folder, TIED, empty_parameters(TIED, 3), 2, 3)
    head[weight_mapping.HF_OUTPUT][90] += 1
    folder = write_model(tmp_path / "differs", tensors | head, tie_word_embeddings=True)
    hf_reader.load_parameters(folder, TIED, empty_parameters(TIED, 3), 0, 3)  # row 90 is rank 2's
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight"):
        hf_reader.load_parameters(folder, TIED, empty_parameters(TIED, 3), 2, 3)


def test_wrong_sets_of_tensors_are_named(tmp_path):
    good = random_tensors()
    q = "model.layers.1.self_attn.q_proj.weight"

    def error(name, tensors, shards=2, **config):
        folder = write_model(tmp_path / name, tensors, shards, **config)
        with pytest.raises(UserError) as caught:
            hf_reader.load_parameters(folder, hf_config.read_config(folder).model, {}, 0, 1)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
        return str(caught.value)

    assert f"tensor {q} is missing" in error("missing", {k: v for k, v in good.items() if k != q})
    more = error("more layers", good | {}, num_hidden_layers=3)
    assert "and 8 more" in more and "have 2 layers, but config.json says num_hidden_layers=3" in more
    fewer = error("fewer layers", good | {}, num_hidden_layers=1)
    assert "unexpected tensor" in fewer and "have 2 layers, but config.json says num_hidden_layers=1" in fewer
    for prefix in ("language_model.", "module.", ""):
        renamed = {prefix + name.removeprefix("" if prefix else "model."): t for name, t in good.items()}
        other = error(f"prefix {prefix}", renamed)
        named = f'"{prefix}model." in place of "model."' if prefix else '"layers" in place of "model.layers"'
        assert f"names here begin with {named}: rename the tensors" in other
    assert "lacks tie_word_embeddings" in error(
        "untied", {k: v for k, v in good.items() if k != weight_mapping.HF_OUTPUT}
    )
    bias = "model.layers.0.self_attn.q_proj.bias"
    extra = error("extra", good | {bias: torch.zeros(54)})
    assert "model-00002-of-00002.safetensors" in extra and f"unexpected tensor {bias}" in extra
    wrong = error("shape", good | {q: torch.zeros(54, 71)})
    assert f"{q} has shape [54, 71], but config.json implies [54, 72]" in wrong
    assert "[97, 72], but config.json implies [98, 72]" in error("vocabulary", good, vocab_size=98)
    assert "stored as I8" in error("int8", good | {q: torch.zeros(54, 72, dtype=torch.int8)}, 1)


def test_damaged_files_are_named(tmp_path):
    folder = write_model(tmp_path / "m", random_tensors(), 3)
    second = folder / "model-00002-of-00003.safetensors"
    whole = second.read_bytes()

    def error():
        with pytest.raises(UserError) as caught:
            hf_reader.HFReader(folder, MODEL)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    second.write_bytes(whole[: len(whole) // 2])
    assert "model-00002-of-00003.safetensors is damaged" in error()
    second.write_bytes(b"not safetensors at all")
    assert "model-00002-of-00003.safetensors is damaged" in error()
    second.unlink()
    assert "shard model-00002-of-00003.safetensors" in error() and "missing" in error()
    save_file({"other": torch.zeros(1)}, second)
    assert "which model.safetensors.index.json lists there, is missing" in error()
    (folder / weight_files.INDEX).write_text("{")
    assert "model.safetensors.index.json cannot be read" in error()
    (folder / weight_files.INDEX).unlink()
    assert (
        "contains shards (model-00001-of-00003.safetensors), but no model.safetensors.index.json" in error()
    )
    (folder / "pytorch_model.bin").write_text("")
    for stale in folder.glob("*.safetensors"):
        stale.unlink()
    assert "only pytorch_model.bin" in error()
    (folder / "pytorch_model.bin").unlink()
    assert "contains neither" in error()
    for name in ("model-00001-of-00003.safetensors", weight_files.INDEX, weight_files.SINGLE):
        (folder / name).symlink_to("../../blobs/1234")
        assert f"{name} is a link to ../../blobs/1234, which does not exist" in error()


def test_a_single_file_beside_an_index_is_said(tmp_path):
    folder = write_model(tmp_path / "m", random_tensors(), 2)
    assert weight_files.notes(folder) == []
    save_file(random_tensors(), folder / weight_files.SINGLE)
    [line] = weight_files.notes(folder)
    assert "model.safetensors is read" in line and "remove the one that is out of date" in line


def test_config_of_a_llama(tmp_path):
    folder = write_model(
        tmp_path / "m",
        random_tensors(),
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    )
    found = hf_config.read_config(folder)
    assert (
        found.model == MODEL
        and found.rope == ROPE
        and found.max_position == 512
        and found.raw["hidden_act"] == "silu"
    )
    (folder / "config.json").write_text(
        json.dumps(
            {
                key: value
                for key, value in CONFIG.items()
                if key
                not in (
                    "num_key_value_heads",
                    "head_dim",
                    "tie_word_embeddings",
                    "rms_norm_eps",
                    "hidden_act",
                )
            }
        )
    )
    found = hf_config.read_config(folder)
    assert (
        found.model.kv_heads,
        found.model.head_dim,
        found.model.tied_embeddings,
        found.model.norm_eps,
    ) == (9, 8, False, 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM"),
        ({"model_type": "mistral"}, "only MistralForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"compression_config": {"format": "pack-quantized"}}, "quantised"),
        ({"hidden_size": "72"}, "hidden_size='72' must be a whole number"),
        ({"num_attention_heads": 0}, "at least 1"),
        ({"num_key_value_heads": 2}, "not a multiple"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, "proportional"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' must be an object"),
        (
            {"max_position_embeddings": "512"},
            "max_position_embeddings='512' must be a whole number; write it w",
        ),
        ({"max_position_embeddings": 512.5}, "max_position_embeddings=512.5 must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True must be a whole number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5' must be a number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be a number"),
        ({"rope_theta": "500000"}, "rope_theta='500000' must be a number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' must be true or false; write it w"),
        ({"attention_bias": 0}, "attention_bias=0 must be true or false"),
        ({"architectures": "LlamaForCausalLM"}, "architectures='LlamaForCausalLM' must be a list of names"),
        ({"eos_token_id": ["2"]}, "must be a token id or a list of them"),
        ({"hidden_act": ["silu"]}, "must be a text"),
    ],
)
def test_config_of_something_else_is_refused(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(UserError, match=message) as caught:
        hf_config.read_config(tmp_path)
    assert "config.json" in str(caught.value) and "\n" not in str(caught.value)


def test_odd_configs_that_are_clear(tmp_path):
    """Floats for whole numbers; null for what has a default."""
    odd = {
        "hidden_size": 72.0,
        "head_dim": 6.0,
        "num_key_value_heads": None,
        "max_position_embeddings": None,
        "rms_norm_eps": None,
        "tie_word_embeddings": None,
        "initializer_range": None,
        "rope_scaling": None,
        "eos_token_id": [1.0, 2],
        "quantization_config": None,
        "architectures": None,
    }
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **odd}))
    found = hf_config.read_config(tmp_path)
    assert found.model == dataclasses.replace(MODEL, kv_heads=9, norm_eps=1e-6)
    assert type(found.model.head_dim) is int and found.max_position == 2048
    assert found.raw["eos_token_id"] == [1, 2]
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to("nowhere.json")
    with pytest.raises(UserError, match="config.json is a link to nowhere.json, which does not exist"):
        hf_config.read_config(tmp_path)


# Keys of config.json as published for models of this shape (written out from their model cards and
# repositories, not copied): a name, the keys, and how this project describes the RoPE.
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128009,
}
PUBLISHED = [
    *(
        (
            f"Llama-3.1-8B-UltraLong-{size}",
            {
                "rope_theta": 500000.0,
                "max_position_embeddings": length,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            f"llama3, theta 500,000, factor {factor:g} over 8,192 positions, alpha 1, beta 4",
        )
        for size, length, factor in (("1M", 1073152, 128.0), ("2M", 2146304, 256.0), ("4M", 4292608, 512.0))
    ),
    *(
        (
            name,
            {"rope_theta": theta, "max_position_embeddings": length, "rope_scaling": None},
            f"unscaled, theta {theta:,.10g}",
        )
        for name, theta, length in (
            ("Llama-3-8B-ProLong-64k", 8e6, 65536),
            ("Llama-3-8B-ProLong-512k", 1.28e8, 524288),
            ("Llama-3-8B-Instruct-Gradient-1048k", 3580165449.0, 1048576),
            ("Llama-3-8B-Instruct-Gradient-4194k", 45200000000.0, 4194304),
        )
    ),
]


@pytest.mark.parametrize(
    ("name", "keys", "described"), PUBLISHED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_published_configs_come_back_unchanged(tmp_path, name, keys, described):
    published = {**LLAMA_8B, **keys}
    (tmp_path / "config.json").write_text(json.dumps(published))
    read = hf_config.read_config(tmp_path)
    assert read.rope.describe() == described
    assert dataclasses.replace(read.model, init_std=0.02) == LLAMA_3_1_8B
    length = max_position(TrainingState(model=read.model, rope=read.rope, base=name), read.raw)
    exported = hf_config.export_config(read.model, read.rope, length, torch.bfloat16, read.raw)
    assert {key: exported[key] for key in published} == published
    assert set(exported) - set(published) == {"head_dim", "attention_bias", "mlp_bias", "dtype"}


def test_base_name(tmp_path):
    assert (
        hf_config.base_name(tmp_path / "mine", {"_name_or_path": "meta-llama/Llama-3.1-8B"})
        == "meta-llama/Llama-3.1-8B"
    )
    assert (
        hf_config.base_name(tmp_path / "models--meta-llama--Llama-3.2-1B" / "snapshots" / "4e20de36", {})
        == "meta-llama/Llama-3.2-1B"
    )
    for private in ("/home/me/model", "./model", "~/model", ""):
        assert hf_config.base_name(tmp_path / "Llama-3.1-8B", {"_name_or_path": private}) == "Llama-3.1-8B"


def test_config_missing_or_broken(tmp_path):
    with pytest.raises(UserError, match="config.json is missing"):
        hf_config.read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="it is not a JSON object"):
        hf_config.read_config(tmp_path)
    with pytest.raises(UserError, match="is not a directory; download"):
        hf_config.read_config("meta-llama/Llama-3.1-8B-Instruct")


def test_assets_are_all_but_weights(tmp_path):
    source, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    source.mkdir(), blobs.mkdir()
    wanted = [
        "LICENSE",
        "NOTICE.txt",
        "README.md",
        "USE_POLICY.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    ]
    left = [
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "consolidated.00.pth",
        "m.gguf",
        "tokenizer.bin",
        "a.py",
    ]
    for name in wanted + left:
        (blobs / name).write_text(name)
        os.symlink(blobs / name, source / name)  # as the hub's cache does
    (source / "original").mkdir()
    (source / "original" / "tokenizer.model").write_text("x")
    assert hf_assets.copy_assets(source, tmp_path / "hf") == wanted
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == wanted
    assert (
        not (tmp_path / "hf" / "LICENSE").is_symlink()
        and (tmp_path / "hf" / "LICENSE").read_text() == "LICENSE"
    )
    with pytest.raises(UserError, match="not a directory"):
        hf_assets.copy_assets(tmp_path / "none", tmp_path / "hf2")


# ---- writing -----------------------------------------------------------------------------------


def write_all(out: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype, shard_bytes: int) -> Path:
    with hf_writer.HFWriter(
        out, {name: tuple(t.shape) for name, t in tensors.items()}, dtype, shard_bytes
    ) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        hf_assets.write_assets(writer.folder, None, hf_config.export_config(MODEL, ROPE, 4096, dtype), {})
        return writer.finish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [10**9, 30_000])
def test_written_files_are_plain_safetensors(tmp_path, dtype, shard_bytes):
    tensors = random_tensors(dtype=dtype)
    out = write_all(tmp_path / "out", tensors, dtype, shard_bytes)
    files = sorted(out.glob("*.safetensors"))
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (len(files) > 2) == (shard_bytes == 30_000)
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == tensors.keys() and all(
        found[n].dtype == dtype and torch.equal(found[n], tensors[n]) for n in tensors
    )
    with safe_open(files[0], "pt") as first:
        assert first.metadata() == {"format": "pt"}
    if len(files) > 1:
        index = json.loads((out / weight_files.INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert list(index["weight_map"]) == list(tensors)
        assert all(
            torch.equal(load_file(out / file)[name], tensors[name])
            for name, file in index["weight_map"].items()
        )
        assert [f.name for f in files] == [
            f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
        ]
    parameters = empty_parameters(MODEL, 1, dtype)
    hf_reader.load_parameters(out, hf_config.read_config(out).model, parameters, 0, 1)
    assert all(
        torch.equal(p, weight_mapping.split(name, tensors, MODEL, 0, 1)) for name, p in parameters.items()
    )


def test_shards_hold_at_most_what_they_may():
    assert hf_writer.plan_shards({"a": 3, "b": 3, "c": 5, "d": 9, "e": 1}, 6) == [
        ["a", "b"],
        ["c"],
        ["d"],
        ["e"],
    ]
    assert hf_writer.plan_shards({"a": 3}, 6) == [["a"]]


def test_an_interrupted_export_leaves_nothing(tmp_path):
    tensors = random_tensors()
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    with (
        pytest.raises(KeyboardInterrupt),
        hf_writer.HFWriter(tmp_path / "out", shapes, torch.float32, 30_000) as writer,
    ):
        writer.add(weight_mapping.HF_EMBEDDING, tensors[weight_mapping.HF_EMBEDDING])
        assert [p.name.startswith(".out.partial-") for p in tmp_path.iterdir()] == [True]
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    # A killed one leaves a hidden folder, which the next export removes; not one that is in use.
    killed, live = tmp_path / ".out.partial-killed", tmp_path / ".out.partial-live"
    for folder in (killed, live, tmp_path / ".out2.partial-other"):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(2_000_000))
    lock = atomic_files.lock_folder(live)
    with hf_writer.HFWriter(tmp_path / "out", shapes, torch.float32) as writer:
        assert writer.notes == [f"removed what an interrupted export to {tmp_path}/out had left (0.002 GB)"]
        assert not killed.exists() and not (tmp_path / "out").exists()
        with hf_writer.HFWriter(tmp_path / "out", shapes, torch.float32) as second:
            assert second.notes == [] and writer.folder.is_dir()
    os.close(lock)
    write_all(tmp_path / "out", tensors, torch.float32, 10**9)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out2.partial-other", "out"]


def test_a_full_disk_ends_an_export_in_one_line(tmp_path):
    tensors = random_tensors()
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    with small_disk(tmp_path / "disk", 2) as disk:
        out = disk / "out"
        for act in ("add", "small files"):
            with (
                pytest.raises(
                    UserError, match=f"^{out}.* cannot be written: No space left on device$"
                ) as caught,
                hf_writer.HFWriter(out, shapes, torch.float32) as writer,
            ):
                fill(disk)
                if act == "add":
                    for name, tensor in tensors.items():
                        writer.add(name, tensor)
                with atomic_files.under_final_name(writer.folder, out):
                    hf_assets.write_assets(writer.folder, None, {"max_position_embeddings": 1}, {"a": "b"})
            assert ".partial" not in str(caught.value) and [p.name for p in disk.iterdir()] == ["filler"]
            (disk / "filler").unlink()
        fill(disk, leave=100_000)
        with pytest.raises(UserError, match="the export needs 0.000\\d+ GB, but only .* GB are free"):
            hf_writer.HFWriter(out, shapes, torch.float32)


def test_writer_insists_on_the_plan(tmp_path):
    shapes = {"a": (2, 3), "b": (4,)}
    for name, tensor in (("b", torch.zeros(4)), ("a", torch.zeros(3, 2))):
        writer = hf_writer.HFWriter(tmp_path / "out", shapes, torch.float32)
        with pytest.raises(ValueError, match="next tensor should be a"), writer:
            writer.add(name, tensor)
    with hf_writer.HFWriter(tmp_path / "out", shapes, torch.float32) as writer:
        writer.add("a", torch.zeros(2, 3))
        with pytest.raises(ValueError, match="1 tensors were not added"):
            writer.finish()
    assert list(tmp_path.iterdir()) == []


def test_output_that_cannot_be_written(tmp_path, monkeypatch):
    shapes = {"a": (2, 3)}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    (tmp_path / "file").write_text("")
    for out in ("full", "file"):
        with pytest.raises(UserError, match="already exists and is not an empty directory"):
            hf_writer.HFWriter(tmp_path / out, shapes, torch.float32)
    with pytest.raises(UserError, match="below cannot be written"):
        hf_writer.HFWriter(tmp_path / "file" / "below", shapes, torch.float32)
    with pytest.raises(UserError, match="GB are free"):
        hf_writer.HFWriter(tmp_path / "large", {"a": (10**9, 10**9)}, torch.float32)

    def full(*_args):
        raise OSError(28, "No space left on device")

    writer = hf_writer.HFWriter(tmp_path / "out", shapes, torch.float32)
    with pytest.raises(UserError, match="No space left on device"), writer:
        monkeypatch.setattr(hf_writer.HFWriter, "_begin", full)
        writer.add("a", torch.zeros(2, 3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]
    (tmp_path / "empty").mkdir()
    monkeypatch.undo()
    write_all(tmp_path / "empty", {"a": torch.zeros(2)}, torch.float32, 100)
    assert (tmp_path / "empty" / weight_files.SINGLE).is_file()


def test_export_config_keeps_the_bases_other_keys_and_says_the_trained_rope(tmp_path):
    base = {
        **CONFIG,
        "eos_token_id": [1, 2],
        "_name_or_path": "/home/me/model",
        "torch_dtype": "float16",
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"},
    }
    config = hf_config.export_config(MODEL, ROPE, 4096, torch.bfloat16, base)
    assert config["eos_token_id"] == [1, 2] and "_name_or_path" not in config
    assert "auto_map" not in config
    assert (
        config["torch_dtype"] == config["dtype"] == "bfloat16" and config["max_position_embeddings"] == 4096
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = hf_config.read_config(tmp_path)
    assert again.rope == ROPE and again.model == MODEL and again.max_position == 4096


def test_small_files_of_the_base_go_along(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir(), out.mkdir()
    for name in ("LICENSE", "chat_template.jinja", "generation_config.json", "README.md", "config.json"):
        (base / name).write_text(f"base's {name}")
    (base / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": 512, "chat_template": "{{ messages }}"})
    )
    hf_assets.write_assets(out, base, {"max_position_embeddings": 4096}, {"README.md": "card"})
    assert (out / "README.md").read_text() == "card"
    assert json.loads((out / "config.json").read_text()) == {"max_position_embeddings": 4096}
    assert (out / "LICENSE").read_text() == "base's LICENSE" and (out / "chat_template.jinja").is_file()
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    assert tokenizer == {"model_max_length": 4096, "chat_template": "{{ messages }}"}


def test_tokenizers_of_transformers_5_are_written_for_4(tmp_path):
    def exported(name: str, settings: dict[str, object], *others: str) -> dict[str, object]:
        base, out = tmp_path / name, tmp_path / f"{name}-out"
        base.mkdir(), out.mkdir()
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            (base / file).write_text(json.dumps(settings))
        for file in others:
            (base / file).write_text("{}")
        hf_assets.write_assets(out, base, {"max_position_embeddings": 4096}, {})
        written = json.loads((out / "tokenizer_config.json").read_text())
        assert written == json.loads((out / "special_tokens_map.json").read_text())
        return written

    five = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "extra_special_tokens": ["<a>"]}
    four = {"backend": "tokenizers", "additional_special_tokens": ["<a>"]}
    assert exported("5", five) == {**four, "tokenizer_class": "PreTrainedTokenizerFast"}
    named = {"tokenizer_class": "LlamaTokenizerFast", "extra_special_tokens": {"image_token": "<a>"}}
    assert exported("4", named) == named
    custom = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}}
    assert exported("json", custom, "tokenizer.json") == {"tokenizer_class": "PreTrainedTokenizerFast"}
    assert exported("code", custom) == custom


def test_a_tokenizer_larger_than_the_vocabulary_is_said(tmp_path):
    from tokenizers import Tokenizer, models

    folder = write_model(tmp_path / "m", random_tensors())
    assert hf_assets.tokenizer_note(folder, 97) == []
    tokenizer = Tokenizer(models.BPE(vocab={f"t{i}": i for i in range(97)}, merges=[]))
    tokenizer.save(str(folder / "tokenizer.json"))
    assert hf_assets.tokenizer_note(folder, 97) == []
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    [note] = hf_reader.HFReader(folder, MODEL).notes()
    assert "has ids up to 97 ('<pad>'), but the model's vocabulary ends at 96" in note
    (folder / "tokenizer.json").write_text("{")
    [line] = hf_assets.tokenizer_note(folder, 97)
    assert "tokenizer.json cannot be read" in line


# ---- card --------------------------------------------------------------------------------------


def test_card_of_a_llama_says_what_its_licence_asks(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: llama3.1\nlanguage:\n- en\n---\n# Meta's card\nlicense: mit\n"
    )
    (tmp_path / "LICENSE").write_text("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n...")
    license = model_card.base_license(tmp_path)
    assert license == model_card.License(header=(("license", "llama3.1"),), files=("LICENSE",), llama="3.1")
    run = Run(
        name="ultralong_1m",
        base="meta-llama/Llama-3.1-8B-Instruct",
        train=Train(seq_length=2**20, iterations=125, lr=3e-5, global_batch=8),
    )
    rope = YaRN(factor=128.0)
    text = model_card.ModelCard(
        name="my-1M",
        base=run.base,
        license=license,
        run=run,
        model=MODEL,
        rope=rope,
        max_position=2**20,
        iterations=125,
        tokens=125 * 8 * 2**20,
        dtype=torch.bfloat16,
    ).text()
    rope_row = (
        "| RoPE | yarn, theta 500,000, factor 128 over 8,192 positions, alpha 1, beta 4, ramp over rotations, "
        "without attention temperature |"
    )
    for part in (
        "base_model: meta-llama/Llama-3.1-8B-Instruct\nlicense: llama3.1\n",
        "# Llama-my-1M\n\n**Built with Llama**",
        "| recipe | ultralong_1m |",
        rope_row,
        "| tokens trained on | 1,048,576,000 |",
        "1,048,576 tokens",
        "125 x 8",
        "bfloat16",
    ):
        assert part in text, part
    assert (
        "Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright"
        in model_card.notice(license)["NOTICE"]
    )
    assert model_card.notice(dataclasses.replace(license, files=("LICENSE", "Notice.txt"))) == {}


def test_card_of_another_llama_shaped_model(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (tmp_path / "LICENSE.txt").write_text("Apache License, Version 2.0")
    license = model_card.base_license(tmp_path)
    assert license.llama == "" and model_card.notice(license) == {}
    text = model_card.ModelCard(
        name="smol-64k",
        base="",
        license=license,
        run=None,
        model=MODEL,
        rope=Unscaled(),
        max_position=512,
        iterations=0,
        tokens=0,
        dtype=torch.float32,
    ).text()
    assert "Built with Llama" not in text and "base_model:" not in text
    assert "license: apache-2.0" in text and "`LICENSE.txt`" in text
    assert "| base model | not recorded |" in text and "| recipe | none (converted, not trained) |" in text
    text = model_card.ModelCard(
        name="small",
        base="",
        license=model_card.License(),
        run=None,
        model=MODEL,
        rope=Unscaled(),
        max_position=512,
        iterations=0,
        tokens=0,
        dtype=torch.float32,
    ).text()
    assert "# small\n" in text and "No base model is recorded." in text
    assert (
        model_card.base_license(None).files == ()
        and model_card.base_license(None, "meta-llama/Llama-3.2-1B").llama == "3.2"
    )
    assert model_card.base_license(tmp_path / "none", "meta-llama/Meta-Llama-3-8B").llama == "3"
