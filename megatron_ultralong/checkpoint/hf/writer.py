"""Writing a Hugging Face Llama directory: safetensors streamed tensor by tensor, config.json with the trained
RoPE, small files.

Everything goes into a hidden sibling of the output directory, which is renamed when all of it is on the disk;
an export that is interrupted, even by a kill, leaves no directory that looks whole.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from megatron_ultralong.checkpoint.hf import reader as hf
from megatron_ultralong.config import Model, Rope
from megatron_ultralong.errors import UserError
from megatron_ultralong.model import rope as ropes

SHARD_BYTES = 5 * 10**9  # transformers' and the hub's usual size

_NAMES = {
    torch.float32: ("F32", "float32"),
    torch.bfloat16: ("BF16", "bfloat16"),
    torch.float16: ("F16", "float16"),
}


class HFWriter:
    """Streams tensors into `out_dir`: `add` each of `shapes` in order, put small files into `folder`, then
    `finish`.

    Use it in a `with` block: leaving it without `finish` removes what was written. One tensor is in memory at
    a time. UserError before any work where `out_dir` is not empty, cannot be written or has too little space.
    """

    def __init__(
        self,
        out_dir: Path | str,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.out_dir, self.dtype = Path(out_dir).resolve(), dtype
        self._shards = plan_shards(
            {name: prod(shape) * dtype.itemsize for name, shape in shapes.items()}, shard_bytes
        )
        self._shapes = dict(shapes)
        self._todo = [(number, name) for number, names in enumerate(self._shards) for name in names]
        self._todo.reverse()  # next one last
        self._file: BinaryIO | None = None
        check_output(self.out_dir)
        self.folder = self._stage(sum(prod(shape) for shape in shapes.values()) * dtype.itemsize)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, converted to the export's dtype. ValueError if it is not the next one, or of
        another shape."""
        number, expected = self._todo.pop() if self._todo else (0, "none")
        if name != expected or tuple(tensor.shape) != self._shapes[name]:
            raise ValueError(
                f"next tensor should be {expected} {self._shapes.get(expected)}, not {name} {tuple(tensor.shape)}"
            )
        data = (
            tensor.detach()
            .to(device="cpu", dtype=self.dtype)
            .contiguous()
            .flatten()
            .view(torch.uint8)
            .numpy()
        )
        try:
            if name == self._shards[number][0]:
                self._file = self._begin(number)
            assert self._file is not None
            self._file.write(memoryview(data))
            if name == self._shards[number][-1]:
                _close_synced(self._file)
                self._file = None
        except OSError as error:
            raise UserError(
                f"cannot write {self.out_dir}: {error.strerror or error}; nothing was left there"
            ) from None

    def finish(self) -> Path:
        """Write the index, put everything on the disk, and give the directory its name. Returns it."""
        if self._todo:
            raise ValueError(f"{len(self._todo)} tensors were not added, next {self._todo[-1][1]}")
        try:
            if len(self._shards) > 1:
                total = sum(prod(shape) for shape in self._shapes.values())
                index = {
                    "metadata": {"total_parameters": total, "total_size": total * self.dtype.itemsize},
                    "weight_map": {
                        name: self._shard_name(i) for i, names in enumerate(self._shards) for name in names
                    },
                }
                write_json(self.folder / hf.INDEX, index)
            for path in self.folder.rglob("*"):
                _sync(path)
            _sync(self.folder)
            check_output(self.out_dir)  # again: it may have been filled meanwhile
            os.rename(self.folder, self.out_dir)
            _sync(self.out_dir.parent)
        except OSError as error:
            raise UserError(
                f"cannot write {self.out_dir}: {error.strerror or error}; nothing was left there"
            ) from None
        return self.out_dir

    def abandon(self) -> None:
        """Remove what was written; does nothing after `finish`."""
        if self._file is not None:
            self._file.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()

    def _stage(self, size: int) -> Path:
        parent = self.out_dir.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(parent).free
            if free < size:
                raise UserError(
                    f"{self.out_dir}: the export takes {size / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free there"
                )
            folder = Path(tempfile.mkdtemp(prefix=f".{self.out_dir.name}.partial-", dir=parent))
            umask = os.umask(0)
            os.umask(umask)
            folder.chmod(0o777 & ~umask)  # mkdtemp makes it private
            return folder
        except OSError as error:
            raise UserError(f"cannot write {self.out_dir}: {error.strerror or error}") from None

    def _shard_name(self, number: int) -> str:
        return (
            f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"
            if len(self._shards) > 1
            else hf.SINGLE
        )

    def _begin(self, number: int) -> BinaryIO:
        """Open a shard and write its header: length (8 bytes, little endian), JSON padded to 8 bytes; then
        follow the data."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name in self._shards[number]:
            end = start + prod(self._shapes[name]) * self.dtype.itemsize
            header[name] = {
                "dtype": _NAMES[self.dtype][0],
                "shape": list(self._shapes[name]),
                "data_offsets": [start, end],
            }
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = (self.folder / self._shard_name(number)).open("wb")
        file.write(len(text).to_bytes(8, "little") + text)
        return file


def plan_shards(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Tensor names a shard, in order, each shard at most `shard_bytes` of data (a larger tensor has one to
    itself)."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def check_output(out_dir: Path) -> None:
    """UserError unless `out_dir` is absent or an empty directory."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(
            f"{out_dir} already exists and is not an empty directory; choose another or remove it"
        )


def write_small_files(
    folder: Path, base: Path | None, config: dict[str, Any], extra: Mapping[str, str]
) -> None:
    """Write config.json, the base's small files but its own card, and `extra` (file name -> text: model card,
    run) into `folder`.

    The tokenizer's model_max_length is raised to max_position_embeddings, or it would warn about every long
    text.
    """
    try:
        if base is not None:
            hf.copy_assets(base, folder, skip=("config.json", "README.md"))
        write_json(folder / "config.json", config)
        tokenizer = folder / "tokenizer_config.json"
        if tokenizer.is_file():
            values = hf.read_json(tokenizer)
            if (
                isinstance(values.get("model_max_length"), int)
                and values["model_max_length"] < config["max_position_embeddings"]
            ):
                write_json(tokenizer, {**values, "model_max_length": config["max_position_embeddings"]})
        for name, text in extra.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from None


def export_config(
    model: Model, rope: Rope, max_position: int, dtype: torch.dtype, base: dict[str, Any] | None = None
) -> dict[str, Any]:
    """config.json of an export, for transformers 4.4x to 5.x: `base`, the base model's, with shape, RoPE,
    length and dtype set.

    `max_position` in tokens. UserError where config.json has no words for `rope`.
    """
    kept = {
        key: value
        for key, value in (base or {}).items()
        if key
        not in ("rope_theta", "rope_scaling", "rope_parameters", "_name_or_path", "transformers_version")
    }
    name = _NAMES[dtype][1]
    return {
        **kept,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied_embeddings,
        "initializer_range": model.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": max_position,
        **ropes.to_hf(rope, max_position),
        "torch_dtype": name,
        "dtype": name,
    }


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Indented JSON, as transformers writes it."""
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _close_synced(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
