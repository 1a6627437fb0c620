"""A folder with the models, data and runs that the documents' commands name, each as small as it can be."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import torch
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_ultralong.config import Model
from megatron_ultralong.official_files.infinitebench import TASKS
from megatron_ultralong.official_files.lveval import LEVELS, SETS
from tests import benchmark_files, chat, processes
from tests.benchmark_files import jsonl, parquet
from tests.text import text, write_rows
from tests.tiny import hf_model
from tests.unit.test_infinitebench import data as infinitebench_files

ROOT = Path(__file__).parents[2]
S = 256
"""Tokens of a row, of any recipe."""
SHAPE = Model(hidden_size=32, ffn_size=64, layers=2, heads=8, kv_heads=2, head_dim=8, vocab_size=512)
LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN3 = replace(SHAPE, family="qwen3", qk_norm=True)
QWEN2 = replace(SHAPE, family="qwen2", qkv_bias=True)
MODELS = {
    "Llama-3.1-8B-Instruct": (SHAPE, LLAMA31, 131072),
    "Llama-3.1-8B-1M": (SHAPE, {**LLAMA31, "factor": 128.0}, 1048576),
    "Llama-3.1-8B-UltraLong-1M-Instruct": (SHAPE, {**LLAMA31, "factor": 128.0}, 1048576),
    "SmolLM2-135M-Instruct": (SHAPE, {"rope_type": "default", "rope_theta": 100000.0}, 8192),
    "Qwen3-8B": (QWEN3, {"rope_type": "default", "rope_theta": 1000000.0}, 40960),
    "Qwen2.5-7B-Instruct": (QWEN2, {"rope_type": "default", "rope_theta": 1000000.0}, 32768),
}
"""Shape, RoPE and positions."""


def make(folder: Path) -> Path:
    """Write everything into `folder`, and return it."""
    (folder / "tools").symlink_to(ROOT / "tools")
    shutil.copytree(ROOT / "examples", folder / "examples")  # a command writes there
    for seed, (name, (shape, rope, positions)) in enumerate(MODELS.items()):
        model = hf_model(shape, rope, seed=seed, max_position=positions, bos_token_id=400, eos_token_id=405)
        model.save_pretrained(folder / "models" / name)
        chat.save_tokenizer(folder / "models" / name)
    documents(folder)
    rows(folder)
    benchmarks(folder)
    from_the_documents(folder)
    train(folder, "runs/1m/pretrain", "ultralong_1m")
    (folder / "runs" / "ultralong_1m").symlink_to("1m")  # as the cluster's scripts name it
    train(folder, "runs/1m/lora", "ultralong_1m", "lora.rank=2")
    evaluate(folder, "models/Llama-3.1-8B-1M", "runs/1m")
    shutil.copytree(folder / "runs/1m/niah", folder / "runs/1m/results/niah")
    shutil.copytree(folder / "runs/1m/niah", folder / "runs/base/niah")
    shutil.copytree(folder / "models/SmolLM2-135M-Instruct", folder / "runs/smollm2/base")
    return folder


def documents(folder: Path) -> None:
    """Raw text in the forms of data sets: long documents, and conversations."""
    records = [{"id": i, "text": text(i, 900), "content": text(i, 900)} for i in range(8)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    for name in ("text/part.jsonl.zst", "math/part.jsonl.zst", "more_code.jsonl.zst"):
        (folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / "data/text/part.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (folder / "data/more_code.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    jsonl(folder / "data/books/test.jsonl", records)
    parquet(folder / "data/code/part.parquet", records)
    (folder / "book.txt").write_text(text(20, 20000))
    (folder / "lengths.txt").write_text("".join(f"{100 * i}\n" for i in range(1, 60)))
    (folder / "essays.txt").write_text(text(21, 20000))
    talks = [chat.asked(seed) for seed in range(6)]
    jsonl(folder / "data/chat/part.jsonl", talks)
    jsonl(folder / "data/chat/slim_orca/part.jsonl", talks)
    talk = "".join(json.dumps(record) + "\n" for record in talks)
    (folder / "data/math/part.jsonl.zst").write_bytes(zstandard.compress(talk.encode()))
    (folder / "corpus").mkdir()
    builder = IndexedDatasetBuilder(str(folder / "corpus/web_text_document.bin"), dtype=numpy.int32)
    for length in (300, 500):
        builder.add_document(torch.arange(length) % 300, [length])
    builder.finalize(str(folder / "corpus/web_text_document.idx"))


def rows(folder: Path) -> None:
    """Packed rows of S + 1 tokens, as if made with the models' tokenizer."""
    generator = torch.Generator().manual_seed(0)
    for name in ("1m/text", "1m/chat", "smol/text", "smol/held_out", "qwen/text", "256k/text", "text"):
        (folder / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
        tokens = torch.randint(0, 400, (4, S + 1), generator=generator).tolist()
        write_rows(folder / "runs" / name, tokens, [[1] * (S + 1)] * 4, starts=[[0, 100]] * 4, seq_length=S)


def benchmarks(folder: Path) -> None:
    """Official files of the benchmarks."""
    data = folder / "data"
    for name in ("mmlu", "gsm8k", "ruler"):
        getattr(benchmark_files, name)(data / name)
    for name in SETS:
        record = {
            "input": "Who keeps the light?",
            "context": "Mira keeps the light.",
            "answers": ["Mira"],
            "answer_keywords": "Mira",
            "confusing_facts": "Mora",
            "length": 4,
            "dataset": name,
            "language": "zh"
            if "zh" in name or name in ("cmrc_mixup", "lic_mixup", "dureader_mixup")
            else "en",
        }
        for level in LEVELS:
            jsonl(data / "LVEval" / f"{name}_{level}.jsonl", [record])
    infinitebench_files(data / "InfiniteBench", TASKS)
    squad = {"question": "Which bird?", "answers": [{"text": "owl"}], "is_impossible": False}
    contexts = [
        {"context": f"{text(i, 20)} An owl sits on tower {i}.", "qas": [squad | {"id": str(i)}]}
        for i in range(30)
    ]
    (folder / "dev-v2.0.json").write_text(
        json.dumps({"version": "v2.0", "data": [{"title": "Birds", "paragraphs": contexts}]})
    )
    hotpot = [
        {
            "question": f"Which bird sits on tower {i}?",
            "answer": "owl",
            "context": [["Tower", [f"An owl sits on tower {i}."]]],
        }
        for i in range(30)
    ]
    (folder / "hotpot_dev_distractor_v1.json").write_text(json.dumps(hotpot))


def from_the_documents(folder: Path) -> None:
    """Files that the documents show and their commands read: source lists, recipes, conversations."""
    page = (ROOT / "docs/how-to-prepare-documents.md").read_text(encoding="utf-8")
    sources = block(page, "yaml", "tokens: 1B").replace("tokens: 1B", "tokens: 4000")
    # Its lengths are those of real documents.
    (folder / "text.yaml").write_text(sources.replace("4K", "400").replace("8K", "800"))
    page = (ROOT / "docs/how-to-prepare-instruction-data.md").read_text(encoding="utf-8")
    (folder / "chat.yaml").write_text(block(page, "yaml", "chat.yaml"))
    for seed, name in enumerate(("slim_orca/a.jsonl", "orca_math/a.jsonl")):
        jsonl(folder / name, [chat.asked(100 * seed + i) for i in range(6)])
    jsonl(folder / "share_gpt.json", []).write_text(
        json.dumps(
            [
                {
                    "conversations": [
                        {"from": "human", "value": f"Say {i}."},
                        {"from": "gpt", "value": f"{i}!"},
                    ]
                }
                for i in range(6)
            ]
        )
    )
    pairs = [{"query": f"What is {i} + {i}?", "response": f"It is {2 * i}."} for i in range(6)]
    (folder / "MetaMathQA-395K.json").write_text(json.dumps(pairs))
    code = "".join(json.dumps({"problem": f"Print {i}.", "solution": f"print({i})"}) + "\n" for i in range(6))
    (folder / "magicoder.jsonl.zst").write_bytes(zstandard.compress(code.encode()))
    jsonl(folder / "two_turns.jsonl", [chat.asked(50, turns=2)])
    page = (ROOT / "docs/getting-started-laptop.md").read_text(encoding="utf-8")
    recipes = block(page, "python", "def to_2k")
    page = (ROOT / "docs/how-to-add-a-recipe.md").read_text(encoding="utf-8")
    imports = "from megatron_ultralong.config import Parallel, Runtime, Train\n"
    (folder / "my_recipes.py").write_text(f"{imports}{recipes}\n\n{block(page, 'python', 'def llama_512k')}")


def block(page: str, kind: str, phrase: str) -> str:
    """The code block of a page that contains a phrase."""
    blocks = re.findall(rf"^```{kind}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    return next(found for found in blocks if phrase in found)


def train(folder: Path, save: str, recipe: str, *settings: str) -> None:
    """A run of two iterations on one rank."""
    done = processes.run(
        [
            *(
                sys.executable,
                "tools/train.py",
                "--recipe",
                recipe,
                "--load-hf",
                "models/Llama-3.1-8B-Instruct",
            ),
            *("--data", "runs/1m/text", "--save", save, "--set", f"train.seq_length={S}", "rope.factor=128"),
            *(
                "parallel.tp=1",
                "parallel.cp=1",
                "train.iterations=2",
                "train.warmup=0",
                "train.global_batch=1",
            ),
            *("runtime.device=cpu", "train.precision=fp32", "memory.offload=off", *settings),
        ],
        cwd=folder,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def evaluate(folder: Path, model: str, out: str) -> None:
    """Results for a report."""
    done = processes.run(
        [
            *(
                sys.executable,
                "tools/evaluate.py",
                "niah",
                "--model",
                model,
                "--lengths",
                "512",
                "--depths",
                "50",
            ),
            *("--trials", "1", "--device", "cpu", "--out", f"{out}/niah"),
        ],
        cwd=folder,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
