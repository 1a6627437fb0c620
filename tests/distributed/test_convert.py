"""Conversion: import -> export is bit-exact from any layout to any layout; failures leave nothing behind and
reach every rank."""

from __future__ import annotations

import dataclasses
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ultralong import config
from megatron_ultralong.checkpoint import (
    convert,
    max_position,
    run_directory,
    saving,
    sharded,
    streaming,
    training_state,
)
from megatron_ultralong.checkpoint.hf import config as hf_config
from megatron_ultralong.checkpoint.hf import reader as hf_reader
from megatron_ultralong.checkpoint.hf import weight_files
from megatron_ultralong.checkpoint.hf import writer as hf_writer
from megatron_ultralong.checkpoint.hf.assets import AssetFolders
from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.config import Memory, Model, Parallel, Run, Runtime, Train
from megatron_ultralong.errors import UserError
from megatron_ultralong.model import weight_mapping
from megatron_ultralong.rope.base import Rope
from megatron_ultralong.rope.methods import (
    NTK,
    ChangedBase,
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    Unscaled,
    YaRN,
)
from tests import processes
from tests.disk import fill, small_disk
from tests.spawn import leave_groups, run_ranks
from tests.tiny import FAMILY_MODELS, LLAMA3, hf_model

ROOT = Path(__file__).parents[2]
BASE_ROPE = Llama3(theta=10000.0, factor=4.0, original_length=32)
# Odd sizes: vocabulary 97 is padded at TP 2, 3 and 4; head_dim is not hidden / heads.
UNTIED = Model(hidden_size=48, ffn_size=40, layers=4, heads=8, kv_heads=4, head_dim=10, vocab_size=97)
TIED_3_KV = Model(
    hidden_size=72,
    ffn_size=42,
    layers=3,
    heads=9,
    kv_heads=3,
    head_dim=6,
    vocab_size=97,
    tied_embeddings=True,
)


FAMILIES = {name: dataclasses.replace(model, heads=8, kv_heads=4) for name, model in FAMILY_MODELS.items()}


def save_base(folder: Path, model: Model, dtype: torch.dtype, max_shard_size: str) -> dict[str, torch.Tensor]:
    """A random Llama saved by transformers, with small files beside it; returns its tensors by HF name."""
    built = hf_model(model, LLAMA3).to(dtype)
    built.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "LICENSE").write_text("Apache License, Version 2.0\n")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# the base's card\n")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512}))
    return {
        name: tensor for name, tensor in built.state_dict().items() if name in weight_mapping.hf_shapes(model)
    }


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name])
        for name in expected
    )


def stored_dtypes(checkpoint: Path) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in sharded.stored_tensors(checkpoint).items()}


class Layouts:
    """`with layouts(tp, pp)`: Megatron's groups for one layout; the ranks stay."""

    def __init__(self, tp: int, pp: int) -> None:
        self.parallel = Parallel(tp=tp, pp=pp)

    def __enter__(self) -> tuple[Any, Parallel]:
        from megatron_ultralong.runtime import launch

        return launch.start(Runtime(device="cpu"), self.parallel), self.parallel

    def __exit__(self, *_: object) -> None:
        leave_groups()


# ---- four ranks: untied, bf16, sharded ---------------------------------------------------------


def test_four_ranks(tmp_path):
    expected = save_base(tmp_path / "base", UNTIED, torch.bfloat16, "20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 3
    families = {
        name: save_base(tmp_path / name / "base", model, torch.float32, "20KB")
        for name, model in FAMILIES.items()
    }
    run_ranks(_four_ranks, 4, tmp_path)
    for name, tensors in families.items():
        _check_family(tmp_path / name, FAMILIES[name], tensors)

    assert same(tensors_of(tmp_path / "pp4"), expected) and same(tensors_of(tmp_path / "tp4"), expected)
    assert same(tensors_of(tmp_path / "fp32"), {name: tensor.float() for name, tensor in expected.items()})
    assert (
        len(list((tmp_path / "tp4").glob("*.safetensors"))) > 3
        and (tmp_path / "tp4" / weight_files.INDEX).is_file()
    )
    kept = json.loads((tmp_path / "pp4" / "config.json").read_text())
    assert kept["dtype"] == kept["torch_dtype"] == "bfloat16"
    assert kept["eos_token_id"] == 2 and kept["max_position_embeddings"] == 512
    assert json.loads((tmp_path / "fp32" / "config.json").read_text())["dtype"] == "float32"
    assert (
        hf_config.read_config(tmp_path / "pp4").rope == BASE_ROPE
        and hf_config.read_config(tmp_path / "pp4").model == UNTIED
    )
    for name in ("LICENSE", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "pp4" / name).read_bytes() == (tmp_path / "base" / name).read_bytes(), name
    assert "license: apache-2.0" in (tmp_path / "pp4" / "README.md").read_text()

    trained = tmp_path / "trained_hf"
    found = hf_config.read_config(trained)
    assert found.rope == Llama3(theta=10000.0, factor=32.0, original_length=32) and found.max_position == 1024
    assert json.loads((trained / "tokenizer_config.json").read_text())["model_max_length"] == 1024
    stored = json.loads((trained / "training_run.json").read_text())
    assert stored["name"] == "tiny" and stored["train"]["seq_length"] == 1024
    text = (trained / "README.md").read_text()
    for part in (
        "| recipe | tiny |",
        "factor 32 over 32 positions",
        "| sequence length trained at | 1,024 tokens |",
        "| tokens trained on | 28,672 |",
        "| iterations x global batch | 7 x 4 |",
        "| base model | base |",
    ):
        assert part in text, part
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def _check_family(folder: Path, model: Model, tensors: dict[str, torch.Tensor]) -> None:
    """Exports of a family are of its class, bit for bit; trained ones state YaRN for transformers."""
    from transformers import AutoModelForCausalLM

    assert same(tensors_of(folder / "out"), tensors), folder.name
    before, after = (json.loads((folder / x / "config.json").read_text()) for x in ("base", "out"))
    different = {key for key in before if before[key] != after.get(key)}
    assert different <= {"rope_parameters", "layer_types", "transformers_version", "sliding_window"}, (
        different
    )
    trained = hf_config.read_config(folder / "trained_hf")
    assert trained.rope == dataclasses.replace(BASE_ROPE, factor=32.0) and trained.max_position == 1024
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder / "trained_hf", output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(loaded).__name__ == after["architectures"][0] == before["architectures"][0]
    reference = hf_model(model, {**LLAMA3, "factor": 32.0}, max_position=1024)
    tokens = torch.arange(80)[None] % 97
    assert type(loaded) is type(reference)
    assert torch.equal(loaded(tokens).logits, reference(tokens).logits), folder.name


def _four_ranks(rank: int, world: int, folder: Path) -> None:
    base = folder / "base"
    with Layouts(2, 2) as (ranks, parallel):
        for name in FAMILIES:
            convert.import_hf(folder / name / "base", folder / name / "ckpt", ranks, parallel)
        path = convert.import_hf(base, folder / "ckpt", ranks, parallel)
        assert path == folder / "ckpt" / "iter_0000000" and set(stored_dtypes(path).values()) == {
            torch.bfloat16
        }
        convert.import_hf(base, folder / "ckpt32", ranks, parallel, torch.float32)
        with pytest.raises(UserError, match="already exists and is not an empty directory"):
            convert.import_hf(base, folder / "ckpt", ranks, parallel)
        state = training_state.read(path)
        assert state.model == dataclasses.replace(UNTIED) and state.rope == BASE_ROPE and state.base == "base"
    with Layouts(1, 4) as (ranks, parallel):
        convert.export_hf(folder / "ckpt", folder / "pp4", ranks, parallel)
        assert convert.verify(base, folder / "ckpt", ranks, parallel) == []
        convert.export_hf(path, folder / "fp32", ranks, parallel, torch.float32)
        _train(folder, UNTIED, ranks, parallel)
        convert.export_hf(folder / "trained", folder / "trained_hf", ranks, parallel)
        assert convert.verify(folder / "trained_hf", folder / "trained", ranks, parallel) == []
        for name, model in FAMILIES.items():
            convert.export_hf(folder / name / "ckpt", folder / name / "out", ranks, parallel)
            _train(folder / name, model, ranks, parallel)
    with Layouts(4, 1) as (ranks, parallel):
        for name in FAMILIES:
            inside = folder / name
            assert convert.verify(inside / "base", inside / "ckpt", ranks, parallel) == [], name
            convert.export_hf(inside / "trained", inside / "trained_hf", ranks, parallel)
            if name == "qwen3 with biases":
                _change_biases(inside, ranks, parallel)
        convert.export_hf(
            folder / "ckpt32", folder / "tp4", ranks, parallel, torch.bfloat16, shard_bytes=20_000
        )
        # float32 against bfloat16: compared in bfloat16.
        assert convert.verify(base, folder / "ckpt32", ranks, parallel) == []
        expected = _change(folder, rank)
        assert convert.verify(folder / "changed", folder / "ckpt", ranks, parallel) == expected
        _failures(folder, rank, ranks, parallel)


def _change_biases(folder: Path, ranks: Any, parallel: Parallel) -> None:
    """What differs on one rank only is told: a key's bias is split, the norm of keys is on all ranks."""
    names = [f"model.layers.2.self_attn.{part}" for part in ("k_proj.bias", "k_norm.weight")]
    if ranks.is_main:
        tensors = tensors_of(folder / "out")
        tensors[names[0]][35] += 1
        tensors[names[1]][3] += 1
        (folder / "changed").mkdir()
        save_file(tensors, folder / "changed" / weight_files.SINGLE)
        (folder / "changed" / "config.json").write_bytes((folder / "out" / "config.json").read_bytes())
    torch.distributed.barrier()
    told = convert.verify(folder / "changed", folder / "ckpt", ranks, parallel)
    assert sorted(line.split(":")[0] for line in told) == sorted(names)
    assert all(": 1 differ, by up to 1" in line for line in told), told


def _train(folder: Path, model: Model, ranks: Any, parallel: Parallel) -> None:
    """A checkpoint as training leaves it: another RoPE, state, the run."""
    from megatron_ultralong.model import llama

    run = Run(name="tiny", train=Train(seq_length=1024, iterations=7, lr=1e-4, global_batch=4))
    rope = dataclasses.replace(BASE_ROPE, type="yarn", factor=32.0)  # which config.json says as llama3
    dtypes = set(stored_dtypes(run_directory.resolve(folder / "ckpt")).values())
    state = TrainingState(
        model=model,
        rope=rope,
        iteration=7,
        consumed=28,
        tokens=28 * 1024,
        run=config.to_dict(run),
        base="base",
    )
    precision = "bf16" if dtypes == {torch.bfloat16} else "fp32"
    chunks = llama.build(model, state.rope, ranks, parallel, Memory(offload="off"), precision)
    sharded.load(run_directory.resolve(folder / "ckpt"), chunks)
    assets = AssetFolders(base=folder / "ckpt" / "iter_0000000" / "hf")
    saving.save(folder / "trained", state, chunks, None, assets)


def _change(folder: Path, rank: int) -> list[str]:
    """`changed`: `pp4` with one element of a key and two of the output layer changed, on different ranks'
    rows.

    Returns what verify should say.
    """
    key, head = "model.layers.3.self_attn.k_proj.weight", "lm_head.weight"
    before, after = tensors_of(folder / "pp4"), tensors_of(folder / "pp4")
    after[key][25, 3] += 0.25
    after[head][0, 1] += 1
    after[head][96, 1] += 2
    if rank == 0:
        (folder / "changed").mkdir()
        save_file(after, folder / "changed" / weight_files.SINGLE)
        (folder / "changed" / "config.json").write_bytes((folder / "pp4" / "config.json").read_bytes())
    torch.distributed.barrier()
    largest = {name: (before[name].double() - after[name].double()).abs().max() for name in (key, head)}
    return [
        f"{key}: 1 differ, by up to {largest[key]:.3g}",
        f"{head}: 2 differ, by up to {largest[head]:.3g}",
    ]


def _failures(folder: Path, rank: int, ranks: Any, parallel: Parallel) -> None:
    """Rank 0's failures end every rank, at any stage, and leave no directory."""
    write = hf_writer.HFWriter.add
    for where in (weight_mapping.HF_EMBEDDING, "model.layers.2.mlp.up_proj.weight", weight_mapping.HF_OUTPUT):
        with pytest.MonkeyPatch.context() as patch:

            def fail(writer: Any, name: str, tensor: torch.Tensor, where: str = where) -> None:
                if name == where:
                    raise UserError(f"no space left at {where}")
                write(writer, name, tensor)

            patch.setattr(hf_writer.HFWriter, "add", fail)
            with pytest.raises(UserError, match=f"no space left at {where}"):
                convert.export_hf(folder / "ckpt", folder / "failed", ranks, parallel)
            assert not (folder / "failed").exists()
    with pytest.raises(UserError, match="already exists and is not an empty directory"):
        convert.export_hf(folder / "ckpt", folder / "pp4", ranks, parallel)
    with pytest.raises(UserError, match="contains no complete checkpoint"):
        convert.export_hf(folder / "none", folder / "failed", ranks, parallel)


# ---- three ranks: tied, three KV heads, float32 ------------------------------------------------


def test_three_ranks(tmp_path):
    expected = save_base(tmp_path / "base", TIED_3_KV, torch.float32, "1GB")
    save_base(tmp_path / "base16", TIED_3_KV, torch.float16, "1GB")
    mixed = tensors_of(tmp_path / "base16")
    mixed = {name: tensor.float() if "norm" in name else tensor for name, tensor in mixed.items()}
    save_file(mixed, tmp_path / "base16" / weight_files.SINGLE)
    run_ranks(_three_ranks, 3, tmp_path)
    assert same(tensors_of(tmp_path / "pp3"), expected) and same(tensors_of(tmp_path / "tp3"), expected)

    # Each tensor comes back in its own dtype; "as they are stored" is so in a checkpoint too.
    assert same(tensors_of(tmp_path / "fp16"), tensors_of(tmp_path / "base16"))
    assert json.loads((tmp_path / "fp16" / "config.json").read_text())["dtype"] == "float16"
    half = {name: tensor.half() for name, tensor in expected.items()}
    assert same(tensors_of(tmp_path / "selected"), half)

    from transformers import AutoModelForCausalLM

    tokens = torch.arange(40)[None] % 97
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "pp3", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(loaded(tokens).logits, hf_model(TIED_3_KV, LLAMA3)(tokens).logits)


def _three_ranks(rank: int, world: int, folder: Path) -> None:
    from megatron_ultralong.model import llama

    with Layouts(3, 1) as (ranks, parallel):
        convert.import_hf(folder / "base", folder / "ckpt", ranks, parallel)
        convert.import_hf(folder / "base16", folder / "ckpt16", ranks, parallel)
        assert set(stored_dtypes(run_directory.resolve(folder / "ckpt16")).values()) == {
            torch.float16,
            torch.float32,
        }
        # Training computes in bf16 or fp32, whatever the checkpoint has.
        [chunk] = llama.build(TIED_3_KV, Unscaled(), ranks, parallel, Memory(offload="off"), "bf16")
        sharded.load(run_directory.resolve(folder / "ckpt16"), [chunk])
        whole, norm = tensors_of(folder / "base16"), "decoder.layers.2.input_layernorm.weight"
        expected = whole["model.layers.2.input_layernorm.weight"].bfloat16()
        assert torch.equal(llama.named_parameters(chunk)[norm], expected)
    with Layouts(1, 3) as (ranks, parallel):
        convert.export_hf(folder / "ckpt16", folder / "fp16", ranks, parallel)
        convert.export_hf(folder / "ckpt", folder / "selected", ranks, parallel, torch.float16)
        assert convert.verify(folder / "base16", folder / "ckpt16", ranks, parallel) == []
        assert convert.verify(folder / "selected", folder / "ckpt", ranks, parallel) == []
        with pytest.MonkeyPatch.context() as patch:  # as with a large model
            patch.setattr(streaming, "BATCH_BYTES", 20_000)
            convert.export_hf(folder / "ckpt", folder / "pp3", ranks, parallel)
        assert convert.verify(folder / "base", folder / "ckpt", ranks, parallel) == []
        convert.import_hf(folder / "pp3", folder / "again", ranks, parallel)
    with Layouts(3, 1) as (ranks, parallel):
        convert.export_hf(folder / "again", folder / "tp3", ranks, parallel)
        # One reader per group of equal shards: all three ranks ask for TP rank 1's share.
        shapes = {
            name: weight_mapping.shard_shape(name, TIED_3_KV, 3)
            for name in weight_mapping.megatron_names(TIED_3_KV)
        }
        parameters = {name: torch.full(shape, float(rank)) for name, shape in shapes.items()}
        read = hf_reader.HFReader.read
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                hf_reader.HFReader, "read", read if rank == 0 else None
            )  # another rank that reads fails
            hf_reader.load_parameters(
                folder / "base", TIED_3_KV, parameters, 1, 3, group=torch.distributed.group.WORLD
            )
        whole = tensors_of(folder / "base")
        for name, parameter in parameters.items():
            assert torch.equal(parameter, weight_mapping.split(name, whole, TIED_3_KV, 1, 3)), name
        with pytest.raises(UserError, match="is missing"):
            larger = dataclasses.replace(TIED_3_KV, layers=4)
            hf_reader.load_parameters(folder / "base", larger, {}, 1, 3, group=torch.distributed.group.WORLD)


# ---- one rank --------------------------------------------------------------------------------


def test_one_rank(tmp_path):
    """One rank reads parts of Megatron's tensors by a path of its own."""
    expected = save_base(tmp_path / "base", UNTIED, torch.bfloat16, "1GB")
    run_ranks(_one_rank, 1, tmp_path)
    for size in (1, 20_000, streaming.BATCH_BYTES):
        assert same(tensors_of(tmp_path / f"out{size}"), expected)


def _one_rank(rank: int, world: int, folder: Path) -> None:
    with Layouts(1, 1) as (ranks, parallel):
        read, alive, most = hf_reader.HFReader.shard, weakref.WeakSet(), []
        with pytest.MonkeyPatch.context() as patch:

            def shard(*arguments: Any) -> torch.Tensor:
                tensor = read(*arguments)
                alive.add(tensor)
                most.append(len(alive))
                return tensor

            def save(out: Path, state: Any, chunks: Any, *arguments: Any, **named: Any) -> Path:
                assert {parameter.device.type for parameter in chunks[0].parameters()} == {"meta"}
                return save_all(out, state, chunks, *arguments, **named)

            save_all = saving.save
            patch.setattr(saving, "save", save)
            patch.setattr(hf_reader.HFReader, "shard", shard)
            convert.import_hf(folder / "base", folder / "ckpt", ranks, parallel)
        # Two threads write; each has one tensor and may be asking for the next.
        assert len(most) > 20 and max(most) <= 4
        for size in (1, 20_000, streaming.BATCH_BYTES):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(streaming, "BATCH_BYTES", size)
                convert.export_hf(folder / "ckpt", folder / f"out{size}", ranks, parallel)
                assert convert.verify(folder / "base", folder / "ckpt", ranks, parallel) == []


# ---- the command, one process ------------------------------------------------------------------


def command(*args: object) -> processes.CompletedProcess[str]:
    return processes.run([sys.executable, ROOT / "tools" / "convert_hf.py", *args], capture_output=True)


def hub_cache(folder: Path, cache: Path) -> Path:
    """Move the files of `folder` into a cache of the hub's form and return the snapshot: links, relative to
    themselves, to files of other names."""
    blobs, snapshot = (
        cache / "models--org--tiny" / "blobs",
        cache / "models--org--tiny" / "snapshots" / "1a2b",
    )
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    folder.rmdir()
    return snapshot


def test_command_there_and_back(tmp_path):
    expected = save_base(tmp_path / "base", TIED_3_KV, torch.bfloat16, "30KB")
    base = hub_cache(tmp_path / "base", tmp_path / "cache")
    assert len(list(base.glob("*.safetensors"))) > 1 and all(file.is_symlink() for file in base.iterdir())
    interrupted = [tmp_path / "ckpt" / ".iter_0000000.partial-killed", tmp_path / ".out.partial-killed"]
    for folder in interrupted:
        folder.mkdir(parents=True)
        (folder / "large").write_text("what a killed process left")
    done = command("import", "--load-hf", base, "--output", tmp_path / "ckpt")
    note = "note: removed what an interrupted {} had left (2.6e-08 GB)"
    assert note.format(f"import to {tmp_path / 'ckpt'}") in done.stderr.splitlines()
    assert done.returncode == 0 and done.stdout == f"wrote {tmp_path / 'ckpt' / 'iter_0000000'}\n", (
        done.stderr
    )
    stored = tmp_path / "ckpt" / "iter_0000000"
    assert training_state.read(stored).base == "org/tiny"
    assert not any(file.is_symlink() for file in stored.rglob("*")) and (stored / "hf" / "LICENSE").is_file()
    done = command("export", "--load", tmp_path / "ckpt", "--output", tmp_path / "out", "--dtype", "fp32")
    assert done.returncode == 0, done.stderr
    assert note.format(f"export to {tmp_path / 'out'}") in done.stderr.splitlines()
    assert not any(folder.exists() for folder in interrupted)
    assert same(tensors_of(tmp_path / "out"), {name: tensor.float() for name, tensor in expected.items()})
    tensors = tensors_of(tmp_path / "out")
    tensors["model.norm.weight"][7] += 1
    save_file(tensors, tmp_path / "out" / weight_files.SINGLE)
    done = command("verify", "--load-hf", tmp_path / "out", "--load", tmp_path / "ckpt")
    assert done.returncode == 1 and done.stdout.startswith("differs: model.norm.weight: 1 differ, by up to 1")
    assert done.stdout.count("\n") == 1


def test_command_refuses_in_one_line(tmp_path):
    save_base(tmp_path / "base", TIED_3_KV, torch.float32, "1GB")
    for args, message in (
        (
            ("import", "--load-hf", tmp_path / "base", "--output", tmp_path / "ckpt", "--tp", 3),
            "--tp 3 does not match the 1 ranks started",
        ),
        (
            ("export", "--load", tmp_path / "base", "--output", tmp_path / "out"),
            "contains no complete checkpoint",
        ),
        (
            ("export-megatron", "--load-hf", tmp_path / "base", "--output", tmp_path / "out"),
            "Megatron-LM cannot express this model's RoPE (llama3, theta 10,000, factor 4 over 32 positions",
        ),
        (
            ("export-megatron", "--load-hf", tmp_path / "base", "--output", tmp_path / "base"),
            "base already exists and is not an empty directory",
        ),
    ):
        done = command(*args)
        assert done.returncode == 2 and done.stderr.startswith("error: "), done.stderr
        assert done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]
    with small_disk(tmp_path / "disk", 2) as disk:
        fill(disk, leave=60_000)
        done = command("import", "--load-hf", tmp_path / "base", "--output", disk / "ckpt")
        assert done.returncode == 2 and [p.name for p in disk.iterdir()] == ["filler"]
        [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert f"checkpoint {disk}/ckpt/iter_0000000 cannot be written: it needs 0.00" in line


# ---- no ranks ----------------------------------------------------------------------------------


def test_layout_of_a_conversion():
    assert convert.layout(UNTIED, 1) == Parallel()
    assert convert.layout(UNTIED, 4) == Parallel(tp=1, pp=4) and convert.layout(UNTIED, 4, tp=2) == Parallel(
        tp=2, pp=2
    )
    assert convert.layout(UNTIED, 8) == Parallel(tp=2, pp=4) and convert.layout(
        TIED_3_KV, 3, pp=1
    ) == Parallel(tp=3, pp=1)
    for arguments, message in (
        ((UNTIED, 4, 3), "--tp 3 does not match the 4"),
        ((UNTIED, 2, 2, 2), "--tp 2 x --pp 2 does not match the 2"),
        ((UNTIED, 1, 2, 1), "--tp 2 x --pp 1 does not match the 1"),
        ((UNTIED, 4, None, 0), "--pp 0 does not match the 4"),
        ((TIED_3_KV, 2), "this model cannot be split over 2 ranks .*layers=3 is not divisible"),
        ((TIED_3_KV, 2, 2), "this model cannot be split over 2 ranks .*heads=9 is not divisible"),
    ):
        with pytest.raises(UserError, match=message):
            convert.layout(*arguments)


def test_max_position_of_an_export():
    def of(rope: Rope, trained: int = 0, base: Rope | None = None, length: int = 0, before: int = 0) -> int:
        """trained: sequence length of the run, 0 = only imported. base, length: of the base model. before:
        the longest length so far."""
        run = config.to_dict(Run(name="tiny", train=Train(seq_length=trained or 1, iterations=1, lr=1e-4)))
        state = TrainingState(model=UNTIED, rope=rope, run=run if trained else None, max_length=before)
        return convert.max_position(
            state, hf_config.export_config(UNTIED, base, length, torch.float32) if base else {}
        )

    llama31, llama3 = Llama3(factor=8.0), Unscaled()
    assert of(llama31, base=llama31, length=131072) == 131072
    assert of(llama31) == 65536 and of(llama3) == 2048
    # RoPE unchanged: the base model's value, or what was trained.
    assert of(llama31, 8192, llama31, 131072) == 131072
    assert of(YaRN(factor=8.0), 8192, llama31, 131072) == 131072  # the same frequencies
    assert of(llama31, 262144, llama31, 131072) == 262144
    assert of(llama3, 3000, llama3, 8192) == 8192 and of(llama3, 30000, llama3, 8192) == 30000
    # Another RoPE: factor x original length, also below the base model's value.
    for rope in (YaRN(factor=4.0), Llama3(factor=4.0), Linear(factor=4.0)):
        assert of(rope, 8192, llama31, 131072) == of(rope, 8192) == 32768
        assert of(rope, 8192, llama31, 131072, before=131072) == 32768
    factors = (2.0,) * 5
    assert of(LongRoPE(factor=4.0, factors=factors), 8192, llama31, 131072) == 32768
    assert of(YaRN(factor=2.0, original_length=512), 3000, llama3, 512) == 3000  # trained past its range
    assert of(YaRN(factor=2.0, original_length=512, ramp="dimension"), 3000, llama3, 512) == 1024
    # Without a factor that clients know: what was trained.
    for rope in (NTK(factor=8.0), ChangedBase(theta=1e8)):
        assert of(rope, 3000, llama31, 131072) == of(rope, 3000) == 3000
        assert of(rope, 3000, llama31, 131072, before=16384) == 16384
    assert of(DynamicNTK(), 65536, llama31, 131072) == of(DynamicNTK(), 65536) == 8192

    assert max_position.note(131072, {"max_position_embeddings": 131072}) == max_position.note(512, {}) == []
    [line] = max_position.note(32768, {"max_position_embeddings": 131072})
    assert line.startswith("max_position_embeddings is 32,768, below the base model's 131,072")
