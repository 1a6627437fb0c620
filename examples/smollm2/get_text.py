"""Text to train on where the user has none: the language reference that every Python carries for its help() (PSF licence).

python examples/smollm2/get_text.py --output runs/smollm2/text.jsonl --held-out runs/smollm2/held_out.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from pydoc_data.topics import topics

from megatron_ultralong.runtime import cli

EVERY = 10
"""One topic in so many is held out."""


def write(documents: list[str], file: Path) -> None:
    """JSON lines, under the file's name only when all are written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    os.replace(partial, file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON lines to train on")
    parser.add_argument(
        "--held-out", type=Path, required=True, metavar="FILE", help="JSON lines for the held-out loss"
    )
    args = parser.parse_args()
    texts = [topics[name] for name in sorted(topics)]
    write([text for i, text in enumerate(texts) if i % EVERY], args.output)
    write(texts[::EVERY], args.held_out)


if __name__ == "__main__":
    cli.main(main)
