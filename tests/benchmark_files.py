"""Small files in the official format of each benchmark, with invented contents."""

from __future__ import annotations

import csv
import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

QUESTION = (
    "Which of the seven lighthouses on the northern coast of Velmoria was built first by the harbour guild"
)
CHOICES = ["The grey one", "The tall one", "The one at Skarn", "None of them"]


def jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def parquet(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def mmlu(folder: Path) -> Path:
    """hendrycks/test's csv files."""
    for split, rows in (
        ("test", [[QUESTION + "?", *CHOICES, "C"], ['2 + 2,\n"quoted"', "1", "2", "3", "4", "D"]]),
        ("dev", [["x", *"abcd", "A"]]),
    ):
        path = folder / "data" / split / f"sea_lore_{split}.csv"
        path.parent.mkdir(parents=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    return folder


def mmlu_hub(folder: Path) -> Path:
    """cais/mmlu, with `all` and one subject of it."""
    row = {"question": QUESTION + "?", "subject": "sea_lore", "choices": CHOICES, "answer": 2}
    for name in ("all", "sea_lore"):
        parquet(
            folder / name / "test-00000-of-00001.parquet", [row, {**row, "question": "2 + 2", "answer": 3}]
        )
    parquet(folder / "all" / "dev-00000-of-00001.parquet", [row])
    parquet(folder / "all" / "auxiliary_train-00000-of-00001.parquet", [{**row, "subject": ""}])
    return folder


def mmlu_pro(folder: Path) -> Path:
    row = {
        "question_id": 70,
        "question": "Why?",
        "options": [f"because {i}" for i in range(10)],
        "answer": "I",
        "answer_index": 8,
        "cot_content": "",
        "category": "history",
        "src": "made",
    }
    parquet(folder / "data" / "test-00000-of-00001.parquet", [row])
    parquet(
        folder / "data" / "validation-00000-of-00001.parquet",
        [row | {"question_id": 0, "cot_content": "A: Let's think."}],
    )
    return folder


_MATH = {
    "problem": "What is $1+1$ (test)?",
    "level": "Level 1",
    "type": "Number Theory",
    "solution": "It is $\\boxed{2}$.",
}


def math(folder: Path) -> Path:
    """MATH.tar's json files."""
    for split in ("test", "train"):
        path = folder / "MATH" / split / "number_theory" / "12.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({**_MATH, "problem": f"What is $1+1$ ({split})?"}))
    return folder


def math_hub(folder: Path) -> Path:
    parquet(folder / "number_theory" / "test-00000-of-00001.parquet", [_MATH])
    return folder


def gsm8k(folder: Path) -> Path:
    for name in ("test.jsonl", "train.jsonl", "test_socratic.jsonl", "example_model_solutions.jsonl"):
        jsonl(folder / name, [{"question": f"Ann has 3 nets ({name}).", "answer": "3*2=<<3*2=6>>6\n#### 6"}])
    return folder


def gsm8k_hub(folder: Path) -> Path:
    for name in ("main", "socratic"):
        parquet(
            folder / name / "test-00000-of-00001.parquet",
            [{"question": "Ann has 3 nets (test.jsonl).", "answer": "3*2=<<3*2=6>>6\n#### 6"}],
        )
    return folder


_HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def f(x):\n    """Twice x."""\n',
    "entry_point": "f",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n",
}


def humaneval(folder: Path) -> Path:
    jsonl(folder / "data" / "HumanEval.jsonl.gz", [_HUMANEVAL])
    return folder


def humaneval_hub(folder: Path) -> Path:
    parquet(folder / "openai_humaneval" / "test-00000-of-00001.parquet", [_HUMANEVAL])
    return folder


def ruler(folder: Path) -> Path:
    """What RULER's prepare.py writes: one folder per task."""
    prompts = {
        "niah_single_2": (
            "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the number "
            "afterwards.\nHay. Question: is it hay? One of the special magic numbers for grey-owl is: 77.\n",
            "What is the special magic number for grey-owl mentioned in the provided text?",
            ["77"],
        ),
        "niah_multiquery": (
            "Some special magic numbers are hidden.\nHay.\n",
            "What are all the special magic numbers for a, and b mentioned in the provided text?",
            ["1", "2"],
        ),
        "vt": (
            "Memorize.\n\nVAR AB = 12\nQuestion: Find all variables that are assigned the value 9 in the text above. Answer: \n\nVAR CD = 12\n",
            "Question: Find all variables that are assigned the value 12 in the text above.",
            ["AB"],
        ),
        "qa_1": ("Answer the question.\n\nDocument 1:\nOwls.\n\n", "Question: What bird?", ["owl", "an owl"]),
    }
    for task, (context, question, outputs) in prompts.items():
        jsonl(
            folder / "4096" / "data" / task / "validation.jsonl",
            [
                {
                    "index": 0,
                    "input": context + question,
                    "outputs": outputs,
                    "length": 99,
                    "length_w_model_temp": 120,
                    "answer_prefix": " Answer:",
                }
            ],
        )
    return folder


def lveval(folder: Path, zipped: bool = False) -> Path:
    record = {
        "input": "Who keeps the light?",
        "context": "Mira keeps the light.",
        "answers": ["Mira", "She"],
        "length": 4,
        "dataset": "hotpotwikiqa_mixup",
        "language": "en",
        "answer_keywords": "Mira",
        "confusing_facts": "Mora",
    }
    zh = {**record, "input": "谁看守灯塔？", "dataset": "dureader_mixup", "language": "zh"}
    del zh["answer_keywords"], zh["confusing_facts"]
    paths = [
        jsonl(folder / f"hotpotwikiqa_mixup_{level}.jsonl", [record, record | {"input": "And who else?"}])
        for level in ("16k", "128k")
    ]
    paths.append(jsonl(folder / "dureader_mixup_256k.jsonl", [zh]))
    if zipped:
        for name in ("hotpotwikiqa_mixup", "dureader_mixup"):
            with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
                for path in paths:
                    if path.name.startswith(name):
                        archive.write(path, f"{name}/{path.name}")
                        path.unlink()
    return folder


def infinitebench(folder: Path) -> Path:
    jsonl(
        folder / "passkey.jsonl",
        [
            {
                "id": 0,
                "context": "Grass. The key is 71432.",
                "input": "What is the key?",
                "answer": ["71432"],
                "options": [],
            }
        ],
    )
    jsonl(
        folder / "code_run.jsonl",
        [{"id": 0, "context": "def func_1(x): ...", "input": "func_1(2)", "answer": -3, "options": []}],
    )
    jsonl(
        folder / "longbook_choice_eng.jsonl",
        [
            {
                "id": 3,
                "context": "A book.",
                "input": "Who?",
                "answer": "Ida",
                "options": ["Al", "Bo", "Ida", "Di"],
            }
        ],
    )
    jsonl(
        folder / "math_calc.jsonl",
        [{"id": 0, "context": "1 + 2 + 3", "input": "", "answer": [1, 3, 6], "options": ""}],
    )
    return folder
