"""What an export has besides weights: config.json, model card, notices, the run; from a checkpoint's state
and its base model's small files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megatron_ultralong.checkpoint.hf import model_card, schema
from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.config import to_dict
from megatron_ultralong.errors import UserError, first_line


def base_config(assets: Path, family: str) -> dict[str, Any]:
    """The base model's config.json as the checkpoint carries it in the folder `assets`; only the special
    tokens where it is missing or of another family than `family`. UserError where neither can be read."""
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    if (assets / "config.json").is_file():
        raw = schema.read(assets / "config.json")
        return raw if raw.get("model_type") == family else {key: raw[key] for key in special if key in raw}
    if not (assets / "tokenizer_config.json").is_file():
        return {}
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(assets, local_files_only=True)
    except Exception as error:  # transformers raises almost anything here
        raise UserError(
            f"{assets}: transformers cannot load its tokenizer: {first_line(error)}; repair it, or remove its "
            "tokenizer_config.json and add bos_token_id and eos_token_id to the export's config.json"
        ) from None
    return {key: getattr(tokenizer, key) for key in special}


def texts(
    out: Path, assets: Path, state: TrainingState, max_position: int, dtype: torch.dtype
) -> dict[str, str]:
    """File name -> text of the files that an export into `out` adds to those of its base model."""
    run = state.stored_run()
    base = state.base or (run.base if run else "")
    card = model_card.ModelCard(
        name=out.parent.name if out.name == "hf" else out.name,
        base=base,
        license=model_card.base_license(assets, base),
        run=run,
        model=state.model,
        rope=state.rope,
        max_position=max_position,
        iterations=state.iteration,
        tokens=state.tokens,
        dtype=dtype,
    )
    files = {"README.md": card.text(), **model_card.notice(card.license)}
    if run is not None:
        files["training_run.json"] = json.dumps(to_dict(run), indent=2) + "\n"
    return files
