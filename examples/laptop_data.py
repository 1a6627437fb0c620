"""Write raw data sets from text that comes with Python: documents, conversations in published formats, and
benchmark questions, some of which are planted in them.

    python examples/laptop_data.py runs/laptop_data/raw [--mib 3]

    text/library.jsonl.zst      the standard library's modules, one per document (all texts: PSF licence)
    text/reference.parquet      the language reference, one topic per document
    text/packages/*.txt         modules of some packages, and Python's licence, one per file
    chat/modules.json           ShareGPT format: what is the module for, and which functions does it have
    chat/functions.jsonl        Alpaca format: write the function that does this
    chat/numbers.parquet        question and answer: what does this mathematical function do
    benchmark.jsonl             questions of an invented benchmark; every other one is planted in the data
    tokenizer/                  the demo's, with a chat template and its tokens

To exercise the reports, the data also has an empty document, a duplicate, and lines that cannot be read.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import math
import statistics
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow
import pyarrow.parquet
import zstandard
from transformers import AutoTokenizer

from megatron_ultralong.runtime import cli

BASE = Path(__file__).resolve().parent / "demo" / "base"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|eot_id|>{% endgeneration %}{% else %}{{ m.content }}<|eot_id|>{% endif %}{% endfor %}"
)
PLACES = (
    "the harbour",
    "the old mill",
    "the school of Skarn",
    "the north gate",
    "the orchard",
    "the glass works",
    "the ferry",
    "the tower",
)
QUESTIONS = [
    f"At {place} there are {12 + 7 * i} crates of {3 + i} lamps each, and {5 + i} lamps are broken; "
    "how many lamps still burn tonight?"
    for i, place in enumerate(PLACES)
]
"""The invented benchmark. Questions with even numbers are planted."""


def modules(folder: Path, most: int) -> Iterator[tuple[str, str]]:
    """Yield (name, source) of the library's modules, short and long ones, up to `most` bytes."""
    size = 0
    for path in sorted(folder.glob("*.py"), key=lambda path: (hash_of(path.name), path.name)):
        text = path.read_text(encoding="utf-8")
        if size + len(text) <= most:
            size += len(text)
            yield path.stem, text


def hash_of(name: str) -> int:
    """A number for an order that is not alphabetical, and the same in each run."""
    return sum(ord(letter) * 31**i for i, letter in enumerate(name)) % 1009


def about_modules(sources: Iterable[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    for name, text in sources:
        tree = ast.parse(text)
        functions = [
            node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        ]
        doc = ast.get_docstring(tree)
        if doc and functions:
            listed = "\n".join(f"- `{node.name}`: {first_line(node)}" for node in functions)
            said = (f"What is Python's module `{name}` for?", doc, "Which functions does it have?", listed)
            yield {
                "id": name,
                "conversations": [
                    {"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(said)
                ],
            }


def about_functions(sources: Iterable[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    for name, text in sources:
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
                arguments = ", ".join(argument.arg for argument in node.args.args)
                yield {
                    "instruction": f"Write a Python function `{node.name}({arguments})`, as in `{name}`.",
                    "input": ast.get_docstring(node),
                    "output": f"```python\n{ast.get_source_segment(text, node)}\n```",
                }


def about_numbers() -> Iterator[dict[str, Any]]:
    for module in (math, statistics):
        for name, function in inspect.getmembers(module, callable):
            if not name.startswith("_") and inspect.getdoc(function):
                yield {
                    "question": f"What does `{module.__name__}.{name}` do?",
                    "answer": inspect.getdoc(function),
                }


def first_line(node: ast.FunctionDef) -> str:
    return (ast.get_docstring(node) or "not documented").split("\n")[0]


# ---- files -------------------------------------------------------------------------------------


def write(folder: Path, most: int) -> None:
    """Write all files. most: bytes of modules."""
    library = Path(sysconfig.get_path("stdlib"))
    sources = list(modules(library, most))
    for name in ("text/packages", "chat"):
        (folder / name).mkdir(parents=True, exist_ok=True)

    documents = [{"id": name, "text": text} for name, text in sources]
    documents[1]["text"] += f"\n# {QUESTIONS[0]}\n"
    lines = [
        *map(json.dumps, documents),
        json.dumps(documents[0]),
        json.dumps({"id": "empty", "text": ""}),
        '{"id": "cut short", "text": "no',
    ]
    (folder / "text" / "library.jsonl.zst").write_bytes(
        zstandard.compress(("\n".join(lines) + "\n").encode())
    )
    reference = [{"topic": name, "text": topics[name]} for name in sorted(topics)]
    reference[2]["text"] += f"\n{QUESTIONS[2].upper()}\n"
    parquet(folder / "text" / "reference.parquet", reference)
    for path in sorted(
        [*library.glob("LICENSE.txt"), *(library / "asyncio").glob("*.py"), *(library / "email").glob("*.py")]
    ):
        target = folder / "text" / "packages" / f"{path.parent.name}.{path.stem}.txt"
        target.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")

    asked = list(about_modules(sources))
    asked[0]["conversations"] += [
        {"from": "human", "value": f"One thing more: {QUESTIONS[4]}"},
        {"from": "gpt", "value": "All that are whole."},
    ]
    (folder / "chat" / "modules.json").write_text(json.dumps(asked), encoding="utf-8")
    tasks = list(about_functions(sources))
    tasks[0]["output"] += f"\n\n{QUESTIONS[6]}"
    broken = [
        {"instruction": "Say nothing.", "output": ""},
        {"something": "else"},
        tasks[1],
    ]  # the last one is a duplicate
    (folder / "chat" / "functions.jsonl").write_text(
        "".join(json.dumps(task) + "\n" for task in [*tasks, *broken]), encoding="utf-8"
    )
    parquet(folder / "chat" / "numbers.parquet", list(about_numbers()))
    (folder / "benchmark.jsonl").write_text(
        "".join(
            json.dumps({"text": question, "id": f"lamps {i}"}) + "\n" for i, question in enumerate(QUESTIONS)
        ),
        encoding="utf-8",
    )


def parquet(path: Path, records: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)


def tokenizer(folder: Path) -> None:
    made: Any = AutoTokenizer.from_pretrained(BASE, local_files_only=True)
    made.add_special_tokens(
        {
            "pad_token": "<|finetune_right_pad_id|>",
            "additional_special_tokens": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        }
    )
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="where the files are written")
    parser.add_argument("--mib", type=float, default=3, help="MiB of the library's modules (default: 3)")
    args = parser.parse_args()
    write(args.folder, int(args.mib * (1 << 20)))
    tokenizer(args.folder / "tokenizer")


if __name__ == "__main__":
    cli.main(main)
