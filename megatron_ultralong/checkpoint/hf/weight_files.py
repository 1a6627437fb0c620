"""Which safetensors files of a Hugging Face directory have which tensors, and what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files
from megatron_ultralong.io.git_lfs import refuse_pointer

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r".*-\d{5}-of-(\d{5})\.safetensors")
_LAYER = re.compile(r"(.*\blayers\.)(\d+)\.")


def tensor_files(folder: Path, opened: dict[Path, Any]) -> dict[str, Path]:
    """Tensor name -> file, from the single file if present, as in transformers, otherwise from the index.
    Fills `opened` with the open files. UserError where files are missing or damaged."""
    single, index = folder / SINGLE, folder / INDEX
    for file in (single, index):
        _refuse_dangling(file)
    if single.is_file():
        opened[single] = _open(single)
        return dict.fromkeys(opened[single].keys(), single)
    if not index.is_file():
        raise UserError(_nothing_in(folder))
    listed = atomic_files.read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise UserError(f"{index} has no weight_map of tensor names to files")
    tensors = {}
    for name in sorted(set(listed.values())):
        file = folder / name
        _refuse_dangling(file)
        if not file.is_file():
            raise UserError(f"{folder}: shard {name}, which {INDEX} names, is missing")
        opened[file] = _open(file)
        stored = set(opened[file].keys())
        for tensor in (tensor for tensor, where in listed.items() if where == name):
            if tensor not in stored:
                raise UserError(f"{file}: tensor {tensor}, which {INDEX} lists there, is missing")
        # Tensors that the index does not list are checked like the others.
        tensors.update(dict.fromkeys(sorted(stored - listed.keys()), file))
    return {**tensors, **{tensor: folder / name for tensor, name in listed.items()}}


def notes(folder: Path) -> list[str]:
    """What a user should know about files that are not read, in lines."""
    if (folder / SINGLE).is_file() and (folder / INDEX).is_file():
        return [
            f"{folder} contains both {SINGLE} and {INDEX}; {SINGLE} is read, as transformers does; remove the one that is "
            "out of date"
        ]
    return []


def hint(expected: Collection[str], found: Collection[str]) -> str:
    """What may explain that a directory has the tensors `found` in place of `expected`; empty = nothing."""
    model, files = _layers(expected), _layers(found)
    if model and files and files != model and set(_prefixes(expected)) & set(_prefixes(found)):
        return f"; the files have {files} layers, but config.json says num_hidden_layers={model}"
    ending = next(name for name in expected if _LAYER.search(name)).removeprefix("model.")
    for name in found:
        if name.endswith(ending) and name.removesuffix(ending) != "model.":
            prefix = name.removesuffix(ending)
            if prefix.endswith("model."):
                return f'; names here begin with "{prefix}" in place of "model.": rename the tensors'
            return f'; names here begin with "{prefix}layers" in place of "model.layers": rename the tensors'
    return ""


def _layers(names: Collection[str]) -> int:
    """Number of layers, by the highest in any tensor's name."""
    return max((int(match[2]) + 1 for name in names if (match := _LAYER.match(name))), default=0)


def _prefixes(names: Collection[str]) -> list[str]:
    return [match[1] for name in names if (match := _LAYER.match(name))]


def _nothing_in(folder: Path) -> str:
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    for entry in entries:
        if entry.suffix == ".safetensors":
            _refuse_dangling(entry)
    shards = [entry.name for entry in entries if _SHARD.fullmatch(entry.name)]
    if shards:
        return f"{folder} contains shards ({shards[0]}), but no {INDEX}, which names them; copy it too"
    other = [entry.name for entry in entries if entry.suffix in (".bin", ".pth", ".gguf", ".safetensors")]
    only = f" (only {other[0]}; save the model again with transformers' save_pretrained)" if other else ""
    return f"{folder} contains neither {SINGLE} nor {INDEX}{only}"


def _refuse_dangling(file: Path) -> None:
    if file.is_symlink() and not file.exists():
        raise UserError(
            f"{file} is a link to {file.readlink()}, which does not exist; download the model again"
        )


def refuse_damaged(folder: Path) -> None:
    """UserError where a safetensors file of `folder` has no readable header."""
    for file in sorted(folder.glob("*.safetensors")):
        _open(file)


def _open(file: Path) -> Any:
    refuse_pointer(file)
    try:
        return safe_open(str(file), "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or not a safetensors file; copy it again ({error})") from None
