"""Reading a Hugging Face Llama directory in place: config.json, safetensors slice by slice, and the small
files beside them.

Names, shapes and dtypes of all tensors are checked from the files' headers before any weight is read.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from megatron_ultralong.config import Model, Rope
from megatron_ultralong.errors import UserError
from megatron_ultralong.model import rope as ropes
from megatron_ultralong.model import weight_mapping

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Everything that belongs to a model but its weights. README.md: the licence field of its header goes into the
# export's card.
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

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_IGNORED = re.compile(
    r"(.*\.)?rotary_emb\.inv_freq"
)  # a buffer that old transformers saved; config.json decides


@dataclass(frozen=True, kw_only=True)
class HFConfig:
    """What config.json says."""

    model: Model
    rope: Rope
    max_position: int
    """max_position_embeddings, tokens."""
    raw: dict[str, Any]
    """config.json as it is."""


def read_config(folder: Path | str) -> HFConfig:
    """config.json of an HF directory. UserError where it is missing or broken, or is no plain Llama."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a directory; download the Hugging Face model first and give its local directory"
        )
    file = folder / "config.json"
    raw = read_json(file)
    _refuse_other_models(raw, file)
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    for key in needed:
        if not isinstance(raw.get(key), int):
            raise UserError(f"{file}: {key}={raw.get(key)!r} should be a whole number")
    heads = raw["num_attention_heads"]
    try:
        # What a config leaves out has transformers' default.
        model = Model(
            hidden_size=raw["hidden_size"],
            ffn_size=raw["intermediate_size"],
            layers=raw["num_hidden_layers"],
            heads=heads,
            kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // max(heads, 1),
            vocab_size=raw["vocab_size"],
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
            init_std=raw.get("initializer_range", 0.02),
        )
        rope = ropes.from_hf(raw)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return HFConfig(model=model, rope=rope, max_position=raw.get("max_position_embeddings", 2048), raw=raw)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. UserError naming the file where it is missing, unreadable or something else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} should hold a JSON object")
    return values


def base_name(folder: Path | str, raw: dict[str, Any]) -> str:
    """Name of the model in an HF directory, for model cards: on the hub where config or cache tell it, else
    the directory's."""
    name = str(raw.get("_name_or_path", ""))
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists():
        return name
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/", f"{Path(folder).absolute()}/")
    return f"{cached[1]}/{cached[2]}" if cached else Path(folder).resolve().name


def load_parameters(
    folder: Path | str,
    model: Model,
    parameters: Mapping[str, Tensor],
    tp_rank: int,
    tp_size: int,
    group: Any = None,
    *,
    show_progress: bool = False,
) -> None:
    """Fill Megatron `parameters` (name with global layer number -> this rank's shard, any float dtype and
    device) in place.

    Only the slices these shards need are read. With `group`, a torch process group of ranks that hold the
    same shards (those of data and context parallelism), its first rank reads and broadcasts; all of them must
    pass the same names in the same order. UserError for weights that do not fit `model`, on every rank of the
    group alike where the headers tell.
    """
    if group is not None and torch.distributed.get_world_size(group) == 1:
        group = None
    reads = group is None or torch.distributed.get_rank(group) == 0
    source = None if group is None else torch.distributed.get_global_rank(group, 0)
    weights, failure = None, None
    if reads:
        try:
            weights = Weights(folder, model)
        except UserError as error:
            failure = str(error)
    if group is not None:
        box = [failure]
        torch.distributed.broadcast_object_list(box, src=source, group=group)
        failure = box[0]
    if failure is not None:
        raise UserError(failure)
    for name, parameter in tqdm(
        parameters.items(), desc="reading weights", unit="tensor", disable=not show_progress
    ):
        with torch.no_grad():
            if weights is not None:
                parameter.copy_(weights.shard(name, tp_rank, tp_size, parameter.dtype))
            if group is not None:
                torch.distributed.broadcast(parameter.detach(), src=source, group=group)
    if weights is not None:
        weights.close()


class Weights:
    """The safetensors files of an HF Llama directory, checked against a model's shape and open for reading
    slices.

    UserError naming the tensor or file: a shard that is missing or damaged, a tensor that is missing, extra,
    misshapen or quantised. Left aside are `rotary_emb.inv_freq` and, in a tied model, an `lm_head.weight`
    equal to the embedding.
    """

    def __init__(self, folder: Path | str, model: Model) -> None:
        self.folder, self.model = Path(folder), model
        self._open: dict[Path, Any] = {}
        self._files = _tensor_files(self.folder, self._open)  # tensor name -> file
        self._check()

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        """One HF tensor, or the block `index` of it: CPU, dtype as stored; it may share the file's memory
        map."""
        try:
            part = self._open[self._files[name]].get_slice(name)
            return part[index or tuple(slice(0, size) for size in part.get_shape())]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._files[name]}: {name} cannot be read: {error}") from None

    def shard(self, name: str, tp_rank: int, tp_size: int, dtype: torch.dtype) -> Tensor:
        """Megatron parameter `name` on `tp_rank` of `tp_size`, CPU, in `dtype`."""
        shard = torch.zeros(weight_mapping.shard_shape(name, self.model, tp_size), dtype=dtype, device="cpu")
        for piece in weight_mapping.pieces(name, self.model, tp_rank, tp_size):
            block = self.read(piece.hf, piece.source)
            if (
                self.model.tied_embeddings
                and piece.hf == weight_mapping.HF_EMBEDDING
                and weight_mapping.HF_OUTPUT in self._files
            ):
                self._check_tied(block, piece.source)
            shard[piece.target] = block.to(dtype)
        return shard

    @property
    def dtype(self) -> torch.dtype:
        """The dtype all tensors share; float32 where they differ or are float16, which Megatron's bfloat16
        would round."""
        stored = {_DTYPES[self._slice(name).get_dtype()] for name in weight_mapping.hf_shapes(self.model)}
        return torch.bfloat16 if stored == {torch.bfloat16} else torch.float32

    def close(self) -> None:
        """Close the files; tensors already read stay valid."""
        self._open.clear()

    def _slice(self, name: str) -> Any:
        return self._open[self._files[name]].get_slice(name)

    def _check(self) -> None:
        expected = weight_mapping.hf_shapes(self.model)
        missing = [name for name in expected if name not in self._files]
        if missing:
            hint = (
                "; if the embeddings are tied, config.json lacks tie_word_embeddings"
                if missing == [weight_mapping.HF_OUTPUT]
                else ""
            )
            raise UserError(f"{self.folder}: tensor {missing[0]} is missing{_more(missing)}{hint}")
        aside = {weight_mapping.HF_OUTPUT} if self.model.tied_embeddings else set()
        extra = [
            name
            for name in self._files
            if name not in expected and name not in aside and not _IGNORED.fullmatch(name)
        ]
        if extra:
            raise UserError(
                f"{self._files[extra[0]]}: the Llama of config.json has no tensor {extra[0]}{_more(extra)}"
            )
        for name in [*expected, *(aside & set(self._files))]:
            shape, want = (
                tuple(self._slice(name).get_shape()),
                expected.get(name, expected[weight_mapping.HF_EMBEDDING]),
            )
            if shape != want:
                raise UserError(
                    f"{self._files[name]}: {name} has shape {list(shape)}, but config.json makes it {list(want)}"
                )
            if self._slice(name).get_dtype() not in _DTYPES:
                raise UserError(
                    f"{self._files[name]}: {name} is stored as {self._slice(name).get_dtype()}; "
                    f"only float weights ({', '.join(_DTYPES)}) can be read"
                )

    def _check_tied(self, embedding: Tensor, index: tuple[slice, ...]) -> None:
        if not torch.equal(embedding, self.read(weight_mapping.HF_OUTPUT, index)):
            raise UserError(
                f"{self._files[weight_mapping.HF_OUTPUT]}: {weight_mapping.HF_OUTPUT} differs from {weight_mapping.HF_EMBEDDING}, "
                "but config.json says tie_word_embeddings; set that to false, or remove the tensor"
            )


def copy_assets(
    source: Path | str,
    target: Path | str,
    *,
    skip: tuple[str, ...] = (),
    tokenizer: bool = True,
    others: bool = True,
) -> list[str]:
    """Copy an HF directory's small files (`ASSETS`: config, tokenizer, chat template, licence ...), never
    weights; follows links.

    `skip` names files to leave out; `tokenizer` and `others` say whether the tokenizer's files and all others
    are copied. Creates `target`; returns the names copied, sorted. UserError where `source` is no directory.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise UserError(f"{source} is not a directory")
    target.mkdir(parents=True, exist_ok=True)
    copied = []
    for entry in sorted(source.iterdir()):
        name = entry.name.lower()
        if not (tokenizer if any(fnmatch(name, p) for p in TOKENIZER) else others):
            continue
        if (
            entry.name in skip
            or not any(fnmatch(name, p) for p in ASSETS)
            or any(fnmatch(name, p) for p in _WEIGHTS)
        ):
            continue
        if entry.is_dir() and name == "additional_chat_templates":
            shutil.copytree(entry, target / entry.name, dirs_exist_ok=True)
        elif entry.is_file() and entry.stat().st_size <= _LARGEST_ASSET:
            shutil.copyfile(entry, target / entry.name)
        else:
            continue
        copied.append(entry.name)
    return copied


def _refuse_other_models(raw: dict[str, Any], file: Path) -> None:
    kind, architectures = raw.get("model_type"), raw.get("architectures") or ["LlamaForCausalLM"]
    if kind != "llama" or "LlamaForCausalLM" not in architectures:
        raise UserError(
            f"{file}: model_type={kind}, architectures={architectures}; only LlamaForCausalLM can be read"
        )
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise UserError(f"{file}: {key}=true; only a Llama without biases can be read")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{file}: hidden_act={raw['hidden_act']}; only silu can be read")
    if raw.get("quantization_config"):
        raise UserError(f"{file}: the weights are quantised; use the original bf16 or fp32 model")


def _tensor_files(folder: Path, opened: dict[Path, Any]) -> dict[str, Path]:
    """Tensor name -> file, from the single file if there is one, as transformers prefers, else from the
    index. Fills `opened`."""
    if (folder / SINGLE).is_file():
        opened[folder / SINGLE] = _open(folder / SINGLE)
        return dict.fromkeys(opened[folder / SINGLE].keys(), folder / SINGLE)
    if not (folder / INDEX).is_file():
        there = folder.iterdir() if folder.is_dir() else []
        other = sorted(p.name for p in there if p.suffix in (".bin", ".pth", ".gguf", ".safetensors"))
        hint = f" (only {other[0]}; save the model again with transformers' save_pretrained)" if other else ""
        raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}{hint}")
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise UserError(f"{folder / INDEX} has no weight_map of tensor names to files")
    files = {}
    for file in sorted(set(index.values())):
        if not (folder / file).is_file():
            raise UserError(f"{folder}: shard {file}, which {INDEX} names, is missing")
        opened[folder / file] = _open(folder / file)
        names = set(opened[folder / file].keys())
        for name in (name for name, where in index.items() if where == file):
            if name not in names:
                raise UserError(f"{folder / file}: tensor {name}, which {INDEX} places there, is missing")
        files.update(
            dict.fromkeys(sorted(names - index.keys()), folder / file)
        )  # strays: checked like the rest
    return {**files, **{name: folder / file for name, file in index.items()}}


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or no safetensors file; copy it again ({error})") from None


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
