"""The small files of a Hugging Face directory: tokenizer, chat template, licence; everything except
weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError, first_line
from megatron_ultralong.io import atomic_files

TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges*",
    "*.jinja",
    "chat_template*",
    "additional_chat_templates",
)
# README.md: the licence field of its header goes into the export's model card.
ASSETS = (
    "config.json",
    "generation_config.json",
    *TOKENIZER,
    "licen[sc]e*",
    "notice*",
    "copying*",
    "use_policy*",
    "readme.md",
)
_WEIGHTS = (
    "*.safetensors",
    "*.bin",
    "*.pth",
    "*.pt",
    "*.ckpt",
    "*.gguf",
    "*.onnx",
    "*.h5",
    "*.msgpack",
    "*.index.json",
)
_LARGEST_ASSET = 256 * 1024**2  # bytes; a tokenizer is at most tens of MB


@dataclass(frozen=True, kw_only=True)
class AssetFolders:
    """Folders whose small files go into `hf/` of each checkpoint."""

    base: Path | None = None
    """Folder of the base model."""
    tokenizer: Path | None = None
    """Folder whose tokenizer replaces that of `base`."""

    def copy_to(self, target: Path) -> None:
        """Copy the small files to `target`, which is created if there are any."""
        if self.base is not None:
            copy_assets(self.base, target, tokenizer=self.tokenizer is None)
        if self.tokenizer is not None:
            copy_assets(self.tokenizer, target, others=self.base is None)


def copy_assets(
    source: Path | str,
    target: Path | str,
    *,
    skip: tuple[str, ...] = (),
    tokenizer: bool = True,
    others: bool = True,
) -> list[str]:
    """Copy the small files of an HF directory (`ASSETS`), never weights; follow links.

    skip: names of files to leave out. tokenizer, others: whether to copy the tokenizer's files, and all
    others. Creates `target`; returns the names copied, sorted. UserError where `source` is not a directory.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise UserError(f"{source} is not a directory")
    target.mkdir(parents=True, exist_ok=True)
    copied = []
    for entry in sorted(source.iterdir()):
        name = entry.name.lower()
        if not (tokenizer if _matches(name, TOKENIZER) else others):
            continue
        if entry.name in skip or not _matches(name, ASSETS) or _matches(name, _WEIGHTS):
            continue
        if entry.is_dir() and name == "additional_chat_templates":
            # Not by copytree, whose errors have a form of their own.
            (target / entry.name).mkdir(exist_ok=True)
            for template in sorted(entry.glob("*.jinja")):
                shutil.copyfile(template, target / entry.name / template.name)
        elif entry.is_file() and entry.stat().st_size <= _LARGEST_ASSET:
            shutil.copyfile(entry, target / entry.name)
        else:
            continue
        copied.append(entry.name)
    return copied


def write_assets(folder: Path, base: Path | None, config: dict[str, Any], extra: Mapping[str, str]) -> None:
    """Write config.json, the small files of `base` except its model card, and `extra` (file name -> text)
    into `folder`.

    The tokenizer's files are made readable for transformers 4 and 5 alike, and its model_max_length is raised
    to max_position_embeddings; otherwise it would warn about every long text. UserError where a file cannot
    be written.
    """
    try:
        if base is not None:
            copy_assets(base, folder, skip=("config.json", "README.md"))
        (folder / "config.json").write_text(to_json(config), encoding="utf-8")
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            file = folder / name
            if file.is_file():
                before = atomic_files.read_json(file)
                after = _for_all_releases(before, (folder / "tokenizer.json").is_file())
                longest = after.get("model_max_length")
                if isinstance(longest, int) and longest < config["max_position_embeddings"]:
                    after["model_max_length"] = config["max_position_embeddings"]
                if after != before:
                    file.write_text(to_json(after), encoding="utf-8")
        for name, text in extra.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise atomic_files.cannot_write(str(folder), error) from None


def _for_all_releases(settings: dict[str, Any], complete: bool) -> dict[str, Any]:
    """Settings of a tokenizer as transformers 4 reads them too, which is also what transformers 5 reads.

    complete: tokenizer.json is there, which any release reads without a class or code of the model's."""
    settings = dict(settings)
    # Of a tokenizer saved by transformers 5; 4 has neither this class nor a list of this name.
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        tokens = settings.pop("extra_special_tokens")
        settings.setdefault("additional_special_tokens", tokens)
    if complete and settings.pop("auto_map", None) is not None:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    return settings


def tokenizer_note(folder: Path, vocab_size: int) -> list[str]:
    """A line where the tokenizer in `folder` has ids beyond the model's vocabulary."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return []
    import tokenizers

    try:
        vocabulary = tokenizers.Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    except Exception as error:  # tokenizers raises bare Exceptions
        return [f"{file} cannot be read: {first_line(error)}"]
    token = max(vocabulary, key=lambda token: vocabulary[token], default="")
    if vocabulary.get(token, -1) < vocab_size:
        return []
    return [
        f"the tokenizer of {folder} has ids up to {vocabulary[token]} ({token!r}), but the model's vocabulary ends at "
        f"{vocab_size - 1}: text with these tokens cannot be trained on or generated"
    ]


def to_json(values: dict[str, Any]) -> str:
    """Indented JSON, as transformers writes it."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
