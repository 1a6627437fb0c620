"""The base model with another RoPE and no training, as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

from megatron_ultralong import config, recipes
from megatron_ultralong.checkpoint.hf import config as hf_config
from megatron_ultralong.checkpoint.hf import dtypes
from megatron_ultralong.checkpoint.max_position import max_position
from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.command_settings import override
from megatron_ultralong.io import atomic_files
from megatron_ultralong.rope.clex import CLEX
from megatron_ultralong.train import weights_source


def write(base: Path, out: Path, recipe: str, settings: list[str]) -> None:
    """Write `out`: links to the files of `base`, and its config.json with the RoPE and length that training
    `recipe` with `settings` from `base` would have. UserError for settings that do not fit."""
    run, source = weights_source.find(override(recipes.get(recipe), settings), out, None, base)
    hf = hf_config.read_config(base)
    rope = source.state.rope
    if isinstance(rope, CLEX):
        rope = rope.frozen(rope.scale_of(run.train.seq_length), hf.model.head_dim)
    state = TrainingState(model=hf.model, rope=rope, max_length=run.train.seq_length, run=config.to_dict(run))
    dtype = next(dtype for dtype, name in dtypes.NAMES.items() if name == _dtype(hf.raw))
    new = hf_config.export_config(hf.model, rope, max_position(state, hf.raw), dtype, hf.raw)
    with atomic_files.whole_folder(out) as folder:
        for file in base.resolve().iterdir():
            if file.name != "config.json" and file.is_file():
                (folder / file.name).symlink_to(file)
        atomic_files.write_json(folder / "config.json", new)


def _dtype(raw: dict[str, object]) -> str:
    return str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
