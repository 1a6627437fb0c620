"""Plain transformers as a backend: one process, the reference for the others."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends import likelihood
from megatron_ultralong.evaluate.backends.protocol import (
    Chat,
    Completion,
    Request,
    completion,
    encode,
    end_tokens,
    fingerprint,
    load_tokenizer,
    read_config,
    settings,
)
from megatron_ultralong.evaluate.backends.sampling import Sampling

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class HuggingFace:
    """A Hugging Face model directory in plain transformers."""

    def __init__(
        self,
        path: Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        chat: Chat = "auto",
        sampling: Sampling = Sampling(),
        tokenizer: Path | None = None,
    ) -> None:  # noqa: B008
        """path: directory with config.json, weights and tokenizer. device: auto = cuda where there is one.
        dtype: fp32, bf16, fp16; auto = as stored, but float32 on a CPU. UserError where `path` is no such
        directory."""
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        config = read_config(path)
        self.path, self.chat, self.sampling = path, chat, sampling
        self.device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"--device {device}: this machine has no CUDA device; use --device cpu")
        try:
            torch.zeros(1, device=self.device)
        except RuntimeError as error:
            raise UserError(
                f"--device {device}: cannot be used ({str(error).strip().splitlines()[0]}); use auto, cpu or cuda"
            ) from None
        chosen: Any = DTYPES[dtype] if dtype != "auto" else torch.float32 if self.device == "cpu" else "auto"
        logging.disable_progress_bar()
        self.tokenizer = load_tokenizer(tokenizer or path)
        try:
            self.model = (
                AutoModelForCausalLM.from_pretrained(path, dtype=chosen, local_files_only=True)
                .to(self.device)
                .eval()
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(
                f"--model {path}: transformers cannot load it: {str(error).strip().splitlines()[0]}"
            ) from None
        # Only our settings count: a sampling temperature in the model's generation config would warn, or
        # change the answers.
        kept = self.model.generation_config
        self.model.generation_config = type(kept)(
            bos_token_id=kept.bos_token_id, eos_token_id=kept.eos_token_id, pad_token_id=kept.pad_token_id
        )
        self.max_position: int | None = config.get("max_position_embeddings")
        self.end = end_tokens(path, self.tokenizer)

    def check(self, length: int, batch: int) -> None:
        """Transformers says what it cannot do."""

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """Prompts of one size at a time, so that none is padded; each answer ends by itself. Sampled ones are
        written one at a time: the random numbers of a batch would depend on its size."""
        prompts = [encode(self.tokenizer, request, self.chat) for request in requests]

        def kind(i: int) -> tuple[Any, ...]:
            return (
                len(prompts[i]),
                requests[i].tokens,
                requests[i].stop,
                i if self.sampling.temperature else 0,
            )

        for (_, tokens, stop, _), group in itertools.groupby(
            sorted(range(len(requests)), key=kind), key=kind
        ):
            places = list(group)
            for i, written in zip(
                places, self._write([prompts[i] for i in places], tokens, stop), strict=True
            ):
                yield i, completion(self.tokenizer, prompts[i], written, requests[i], self.end)

    def _write(self, prompts: list[list[int]], tokens: int, stop: tuple[str, ...]) -> list[list[int]]:
        ids = torch.tensor(prompts, device=self.device)  # [b, t]
        sampling = self.sampling
        more: dict[str, Any] = {}
        if sampling.temperature:
            more = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
            torch.manual_seed(sampling.seed_of(prompts[0]))  # of the one there is
        sizes: list[int | None] = [None] * len(prompts)  # of the answers that have ended

        def ended(every: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            # As our own model's answers end (parallel_model.py): transformers' stop_strings would look at the
            # end of the prompt too.
            written = every[:, ids.shape[1] :]  # [b, n]
            for i, token in enumerate(written[:, -1].tolist()):
                if sizes[i] is None and (
                    token in self.end or (stop and any(s in self.tokenizer.decode(written[i]) for s in stop))
                ):
                    sizes[i] = written.shape[1]
            return torch.tensor([size is not None for size in sizes], device=self.device)

        pad = min(self.end, default=0)
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=sampling.temperature > 0,
            pad_token_id=pad,
            eos_token_id=sorted(self.end) or None,
            stopping_criteria=[ended],
            **more,
        )
        return [row[:size] for row, size in zip(out[:, ids.shape[1] :].tolist(), sizes, strict=True)]

    def loglikelihood(self, pairs: Sequence[likelihood.Pair]) -> list[tuple[float, bool]]:
        """(log p of the continuation after the context, whether greedy decoding would write it) of each
        (context, continuation) of tokens."""
        return likelihood.of_pairs(self.model, pairs, batch_tokens=8192)

    def token_nll(self, ids: Sequence[int]) -> torch.Tensor:
        """-log p of each of `ids` but the first after those before it, float32 [n - 1] on the CPU."""
        return likelihood.of_row(self.model, ids)

    def describe(self) -> dict[str, Any]:
        """What the results say about the model."""
        config = self.model.config
        return {
            "backend": "transformers",
            "path": self.path.name or str(self.path),
            "fingerprint": fingerprint(self.path),
            "architecture": type(self.model).__name__,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.device,
            "max_position": self.max_position,
            "settings": settings(self.sampling, self.chat),
            "rope": getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None),
        }

    def close(self) -> None:
        """Nothing to do."""
