"""Texts for the grids of this folder that need no download.

python examples/ablations/texts.py reference --output reference.jsonl
python examples/ablations/texts.py chat --tokenizer examples/demo/base --output chat.jsonl
python examples/ablations/texts.py tokenizer --tokenizer examples/demo/base --output tokenizer

reference: the language reference of Python's help() (PSF licence) as one long document. chat: conversations
with one question about a pass key in at most 500 tokens. tokenizer: a given one, with a chat template that
adds no words.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from pydoc_data.topics import topics

from transformers import AutoTokenizer

from megatron_ultralong.evaluate.tasks.niah import prompts
from megatron_ultralong.io import atomic_files
from megatron_ultralong.runtime import cli

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
SHORTEST, LONGEST = 100, 500
"""Tokens of a conversation."""


def reference() -> list[dict[str, object]]:
    return [{"text": "\n\n".join(topics[name] for name in sorted(topics))}]


def chat(tokenizer: Path, count: int, seed: int) -> list[dict[str, object]]:
    """Conversations in the form `messages`."""
    rng = random.Random(seed)
    settings = prompts.NiahSettings(lengths=(LONGEST,), depths=(0,), seed=seed)
    builder = prompts.NiahPromptBuilder(AutoTokenizer.from_pretrained(tokenizer), settings)
    made: list[dict[str, object]] = []
    for trial in range(count):
        prompt = builder.prompt(rng.randint(SHORTEST, LONGEST), rng.uniform(0, 100), trial)
        answer = prompt.prefix + prompts.answer(prompt.answer)
        made.append(
            {
                "messages": [
                    {"role": "user", "content": prompt.text},
                    {"role": "assistant", "content": answer},
                ]
            }
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("reference", "chat", "tokenizer"))
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="tokenizer that sizes are measured with"
    )
    parser.add_argument("--count", type=int, default=1000, help="conversations (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=100, help="seed of the conversations")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    if args.kind != "reference" and args.tokenizer is None:
        parser.error("give --tokenizer DIR")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.kind == "tokenizer":
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        tokenizer.chat_template = TEMPLATE
        with atomic_files.whole_folder(args.output) as folder:
            tokenizer.save_pretrained(folder)
        return
    records = reference() if args.kind == "reference" else chat(args.tokenizer, args.count, args.seed)
    atomic_files.write_text(args.output, "".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    cli.main(main)
