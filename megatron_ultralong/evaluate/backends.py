"""What writes the answers. A backend has `tokenizer`, `generate(prompts, tokens)`, `loglikelihood(pairs)` and `describe()`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_ultralong.config import UserError
from megatron_ultralong.evaluate import likelihood

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class HuggingFace:
    """A Hugging Face model directory in plain transformers, greedy."""

    def __init__(self, path: Path, *, device: str = "auto", dtype: str = "auto") -> None:
        """path: directory with config.json, weights and tokenizer. device: auto = cuda where there is one.
        dtype: fp32, bf16, fp16; auto = as stored, but float32 on a CPU. UserError where `path` is no such directory."""
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        config = _read_config(path)
        self.path, self.device = path, device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"--device {device}: this machine has no CUDA device; use --device cpu")
        chosen: Any = DTYPES[dtype] if dtype != "auto" else torch.float32 if self.device == "cpu" else "auto"
        logging.disable_progress_bar()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
            self.model = AutoModelForCausalLM.from_pretrained(path, dtype=chosen, local_files_only=True).to(self.device).eval()
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(f"--model {path}: transformers cannot load it: {str(error).strip().splitlines()[0]}") from None
        # Only our settings count: a sampling temperature in the model's generation config would warn, or change the answers.
        kept = self.model.generation_config
        self.model.generation_config = type(kept)(bos_token_id=kept.bos_token_id, eos_token_id=kept.eos_token_id, pad_token_id=kept.pad_token_id)
        self.max_position: int | None = config.get("max_position_embeddings")

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], tokens: int, stop: Sequence[str] = ()) -> list[list[int]]:
        """What the model writes after each of `prompts` (all of one size), at most `tokens` tokens, greedy; it may end after a text of `stop`."""
        ids = torch.tensor(prompts, device=self.device)  # [b, t]
        eos = self.model.generation_config.eos_token_id
        pad = eos[0] if isinstance(eos, list) else eos if eos is not None else 0
        more: dict[str, Any] = {"stop_strings": list(stop), "tokenizer": self.tokenizer} if stop else {}
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=pad, **more)
        return out[:, ids.shape[1]:].tolist()

    def loglikelihood(self, pairs: Sequence[likelihood.Pair]) -> list[tuple[float, bool]]:
        """(log p of the continuation after the context, whether greedy decoding would write it) of each (context, continuation) of tokens."""
        return likelihood.of_pairs(self.model, pairs, batch_tokens=8192)

    def describe(self) -> dict[str, Any]:
        """What the results say about the model."""
        config = self.model.config
        return {"backend": "transformers", "path": self.path.name or str(self.path), "architecture": type(self.model).__name__,
                "parameters": sum(p.numel() for p in self.model.parameters()), "dtype": str(self.model.dtype).removeprefix("torch."),
                "device": self.device, "max_position": self.max_position,
                "rope": getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)}


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise UserError(f"--model {path}: no such directory")
    try:
        return json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise UserError(f"--model {path}: no config.json in it; give a Hugging Face model directory (tools/convert_hf.py export makes one)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--model {path}: config.json cannot be read: {error}") from None
