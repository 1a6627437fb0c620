"""Recognise what a path is, and read the RoPE it states."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ultralong.checkpoint.rope_sources import gguf_file, megatron_arguments, megatron_checkpoint
from megatron_ultralong.checkpoint.rope_sources.source import RopeSource
from megatron_ultralong.errors import UserError
from megatron_ultralong.families import FAMILIES
from megatron_ultralong.io import atomic_files, yaml_file
from megatron_ultralong.rope.hf_block import checked_number
from megatron_ultralong.rope.hf_config import from_hf

_EXPECTED = (
    "expected a Hugging Face directory or config.json, a checkpoint, Megatron-LM's arguments "
    "(common.pt, text, YAML or JSON) or a GGUF file"
)


def read_source(path: Path) -> list[RopeSource]:
    """Read the RoPE at `path`; two where it depends on the program's release which one is used. UserError, in
    one line that names `path`, for anything that cannot be read."""
    if not (path.is_dir() or path.is_file()):
        raise UserError(f"{path} does not exist or is no file; {_EXPECTED}")
    try:
        return _directory(path, path) if path.is_dir() else _file(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _directory(folder: Path, name: Path) -> list[RopeSource]:
    """name: the path that messages and the report give."""
    from megatron_ultralong.checkpoint import run_directory
    from megatron_ultralong.checkpoint.megatron_lm import bridge

    if (folder / "config.json").is_file():
        return [from_config(atomic_files.read_json(folder / "config.json"), name)]
    if not (bridge.is_stated(folder) or (folder / "common.pt").is_file()):
        if run_directory.complete_checkpoints(folder):
            folder = run_directory.resolve(folder)
        elif (folder / "release" / "metadata.json").is_file():  # Megatron-LM's name for converted weights
            folder = folder / "release"
        else:
            raise UserError(
                f"{name} has no config.json, run.json, common.pt or complete iter_* folder; {_EXPECTED}"
            )
    if bridge.is_stated(folder):
        return [_checkpoint(folder, name)]
    return megatron_arguments.read(megatron_checkpoint.stored_arguments(folder / "common.pt"), name)


def _file(file: Path) -> list[RopeSource]:
    with file.open("rb") as opened:
        start = opened.read(4)
    if start == gguf_file.MAGIC:
        return [gguf_file.read(file)]
    if file.name in ("run.json", "run_config.yaml"):
        return [_checkpoint(file.parent, file)]
    if zipfile.is_zipfile(file):
        return megatron_arguments.read(megatron_checkpoint.stored_arguments(file), file)
    if file.suffix == ".json":
        values = atomic_files.read_json(file)
        if file.name == "config.json" or "model_type" in values or "architectures" in values:
            return [from_config(values, file)]
        return megatron_arguments.read(values, file)
    if file.suffix in (".yaml", ".yml"):
        values = yaml_file.read(file, "source")
        if not isinstance(values, Mapping):
            raise UserError(f"{file} must map the names of Megatron-LM's arguments to values")
        return megatron_arguments.read(values, file)
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{file} is neither text, a GGUF file nor a torch checkpoint; {_EXPECTED}") from None
    return megatron_arguments.read(megatron_arguments.parse(text), file)


def from_config(config: dict[str, Any], name: Path | str) -> RopeSource:
    """Read the RoPE of the contents of a config.json. name: how messages name it. UserError for a RoPE that
    is not supported, or contradicts itself."""
    try:
        notes = _notes_on_other_models(config)
        if config.get("model_type") in FAMILIES:
            config = {**FAMILIES[config["model_type"]].defaults, **config}
        sizes = {
            key: None if config.get(key) is None else int(checked_number(config, key, ""))
            for key in ("head_dim", "hidden_size", "num_attention_heads", "max_position_embeddings")
        }
        head_dim, hidden, heads, max_position = sizes.values()
        if head_dim is None and hidden and heads:
            head_dim = hidden // heads
        return RopeSource(
            name=str(name),
            kind="Hugging Face",
            rope=from_hf(config),
            head_dim=head_dim,
            max_position=max_position,
            notes=notes,
        )
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _notes_on_other_models(config: dict[str, Any]) -> tuple[str, ...]:
    """Notes on a model of an unknown family. UserError where its RoPE is not stated as a Llama's is."""
    if isinstance(config.get("text_config"), dict):
        raise UserError("the RoPE is that of text_config; write text_config to a config.json and pass that")
    for key in ("rope_local_base_freq", "qk_rope_head_dim"):
        if config.get(key) is not None:
            raise UserError(
                f"{key}={config[key]}: only a RoPE that is the same in all layers and dimensions is supported"
            )
    kind = config.get("model_type")
    if kind is None or kind in FAMILIES:
        return ()
    block = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if config.get("rope_theta") is None and "rope_theta" not in block:
        raise UserError(
            f"rope_theta is missing, and the default of model_type={kind} is not known; add rope_theta"
        )
    return (f"model_type={kind} is read by the rules of a Llama; its own defaults may differ",)


def _checkpoint(folder: Path, name: Path) -> RopeSource:
    from megatron_ultralong.checkpoint import rope_network
    from megatron_ultralong.checkpoint.max_position import max_position
    from megatron_ultralong.checkpoint.megatron_lm import bridge

    state = bridge.read_state(folder)
    config = bridge.assets(folder) / "config.json"
    base = atomic_files.read_json(config) if config.is_file() else {}
    return RopeSource(
        name=str(name),
        kind="checkpoint",
        rope=rope_network.with_weights(folder, state.rope, state.model.head_dim),
        head_dim=state.model.head_dim,
        max_position=max_position(state, base),
    )
