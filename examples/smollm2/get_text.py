"""Write training text that needs no download: the language reference of Python's help() (PSF licence).

python examples/smollm2/get_text.py --output runs/smollm2/text.jsonl --held-out runs/smollm2/held_out.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from pydoc_data.topics import topics

from megatron_ultralong.io import atomic_files
from megatron_ultralong.runtime import cli

EVERY = 10
"""One topic in `EVERY` is held out for validation."""


def write(documents: list[str], file: Path) -> None:
    """Write JSON lines, completely or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_files.write_text(file, "".join(json.dumps({"text": text}) + "\n" for text in documents))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON lines to train on")
    parser.add_argument(
        "--held-out", type=Path, required=True, metavar="FILE", help="JSON lines for validation"
    )
    args = parser.parse_args()
    texts = [topics[name] for name in sorted(topics)]
    write([text for i, text in enumerate(texts) if i % EVERY], args.output)
    write(texts[::EVERY], args.held_out)


if __name__ == "__main__":
    cli.main(main)
