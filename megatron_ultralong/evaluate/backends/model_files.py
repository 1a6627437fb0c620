"""Files of a model directory: config, tokenizer, end-of-text tokens and fingerprint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_ultralong.checkpoint.megatron_lm import bridge
from megatron_ultralong.errors import UserError
from megatron_ultralong.io.git_lfs import refuse_pointer

_SAMPLE_BYTES, _SAMPLES = 1 << 12, 256
"""Size and number of the samples that a file's fingerprint is made of."""


def read_config(path: Path) -> dict[str, Any]:
    """Read config.json of a Hugging Face model directory."""
    if not path.is_dir():
        raise UserError(f"--model {path}: no such directory")
    try:
        return json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise UserError(
            f"--model {path}: contains no config.json; give a Hugging Face model directory (`ultralong convert export` makes one)"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"--model {path}: config.json cannot be read: {error}") from None


def position_limit(config: dict[str, Any]) -> int | None:
    """Positions that a model's config.json allows, tokens; None = any number, or not stated."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "dynamic" in (rope.get("rope_type"), rope.get("type")):
        return None  # max_position_embeddings is the length before scaling
    return config.get("max_position_embeddings")


def load_tokenizer(path: Path, flag: str = "--model") -> Any:
    """Load a transformers tokenizer. flag: the option that named `path`, for messages."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        refuse_pointer(path / "tokenizer.json")
        other = "" if flag == "--tokenizer" else "; give another with --tokenizer DIR"
        raise UserError(
            f"{flag} {path}: transformers cannot load its tokenizer: {str(error).strip().splitlines()[0]}{other}"
        ) from None


def end_tokens(path: Path, tokenizer: Any) -> frozenset[int]:
    """Token ids that end an answer: from generation_config.json, config.json or the tokenizer, the first that
    defines any."""
    for name in ("generation_config.json", "config.json"):
        try:
            ids = json.loads((path / name).read_text()).get("eos_token_id")
        except (OSError, ValueError):
            continue
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset() if tokenizer.eos_token_id is None else frozenset([tokenizer.eos_token_id])


def fingerprint(path: Path) -> str:
    """Hash samples of a model's weights, tokenizer and generation settings: enough to distinguish two models,
    and fast at any size."""
    digest = hashlib.sha256()
    names = (
        "*.safetensors",
        "*.distcp",
        "run.json",
        "run_config.yaml",
        "config.json",
        "generation_config.json",
        "tokenizer*.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    )
    for file in sorted(
        file for folder in (path, bridge.assets(path)) for name in names for file in folder.glob(name)
    ):
        with file.open("rb") as handle:
            size = file.stat().st_size
            digest.update(file.name.encode() + size.to_bytes(8, "big"))
            for offset in range(0, size, max(_SAMPLE_BYTES, size // _SAMPLES)):
                handle.seek(offset)
                digest.update(handle.read(_SAMPLE_BYTES))
            handle.seek(-min(_SAMPLE_BYTES, size), 2)
            digest.update(handle.read())
    return digest.hexdigest()[:12]
