"""A Hugging Face model in plain transformers, in one process: the reference for the other backends."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from megatron_ultralong.checkpoint.hf import weight_files
from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends import likelihood
from megatron_ultralong.evaluate.backends.model_files import (
    end_tokens,
    fingerprint,
    load_tokenizer,
    position_limit,
    read_config,
)
from megatron_ultralong.evaluate.backends.protocol import (
    Completion,
    GenerationRequest,
    completion,
    generation_settings,
    prompt_ids,
)
from megatron_ultralong.evaluate.backends.sampling import Sampling
from megatron_ultralong.evaluate.prompts.encode import ChatMode, PromptEncoder
from megatron_ultralong.runtime.memory import free_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TransformersModel:
    """A Hugging Face model directory in plain transformers."""

    def __init__(
        self,
        path: Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        chat: ChatMode = "auto",
        sampling: Sampling = Sampling(),  # noqa: B008
        tokenizer: Path | None = None,
    ) -> None:
        """path: directory with config.json, weights and tokenizer. device: auto = cuda where available.
        dtype: fp32, bf16, fp16; auto = as stored, but float32 on a CPU. UserError where `path` contains no
        such model."""
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
        self._encoder = cache(partial(PromptEncoder, self.tokenizer, chat))
        try:
            self.model = (
                AutoModelForCausalLM.from_pretrained(path, dtype=chosen, local_files_only=True)
                .to(self.device)
                .eval()
            )
        except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
            weight_files.refuse_damaged(path)  # transformers' own message does not name the file
            raise UserError(
                f"--model {path}: transformers cannot load it: {str(error).strip().splitlines()[0]}"
            ) from None
        # Only our settings apply: a temperature in the model's generation config would change the answers.
        kept = self.model.generation_config
        self.model.generation_config = type(kept)(
            bos_token_id=kept.bos_token_id, eos_token_id=kept.eos_token_id, pad_token_id=kept.pad_token_id
        )
        self.max_position: int | None = position_limit(config)
        self.end_tokens = end_tokens(path, self.tokenizer)

    def check(self, length: int, batch: int) -> None:
        """UserError where the activations of one layer alone, of whole prompts, take more than the free
        memory: transformers would fail hours later, or be killed. A lower bound, without keys and values."""
        config = self.model.config
        experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts"))
        sizes = [getattr(config, name, None) for name in ("hidden_size", "intermediate_size")]
        hidden, ffn = (size if isinstance(size, int) else 0 for size in sizes)
        # The residual and its norm; of the MLP the gated and the other projection. Only prompts of one length
        # are in a batch: one at least.
        token_bytes = 2 * (hidden + (0 if experts else ffn)) * self.model.dtype.itemsize
        needed, free = length * token_bytes, free_bytes(torch.device(self.device))
        if needed > free:
            raise UserError(
                f"{length:,} tokens: plain transformers needs at least {needed / 2**30:,.1f} GiB for the activations of a "
                f"layer, but {free / 2**30:,.1f} GiB are free; shorten --lengths, or use --engine megatron, under torchrun with "
                "several ranks if one is not enough"
            )

    @torch.inference_mode()
    def generate(self, requests: Sequence[GenerationRequest]) -> Iterator[tuple[int, Completion]]:
        """Batch prompts of equal length, so that none is padded; each answer ends on its own. Sampled answers
        are generated one at a time: the random numbers of a batch would depend on its size."""
        prompts = [prompt_ids(self._encoder, request) for request in requests]

        def batch_key(i: int) -> tuple[Any, ...]:
            return (
                len(prompts[i]),
                requests[i].max_tokens,
                requests[i].stop,
                i if self.sampling.temperature else 0,
            )

        order = sorted(range(len(requests)), key=batch_key)
        for (_, max_tokens, stop, _), group in itertools.groupby(order, key=batch_key):
            places = list(group)
            batch = self._generate([prompts[i] for i in places], max_tokens, stop)
            for i, generated in zip(places, batch, strict=True):
                yield i, completion(self.tokenizer, prompts[i], generated, requests[i], self.end_tokens)

    def _generate(self, prompts: list[list[int]], max_tokens: int, stop: tuple[str, ...]) -> list[list[int]]:
        ids = torch.tensor(prompts, device=self.device)  # [b, t]
        sampling = self.sampling
        more: dict[str, Any] = {}
        if sampling.temperature:
            more = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
            torch.manual_seed(sampling.seed_of(prompts[0]))  # a batch of one
        sizes: list[int | None] = [None] * len(prompts)  # of the completed answers

        def ended(every: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            # The same rule as in parallel_model.py: transformers' stop_strings would match the end of the
            # prompt too.
            generated = every[:, ids.shape[1] :]  # [b, n]
            for i, token in enumerate(generated[:, -1].tolist()):
                if sizes[i] is None and (
                    token in self.end_tokens
                    or (stop and any(s in self.tokenizer.decode(generated[i]) for s in stop))
                ):
                    sizes[i] = generated.shape[1]
            return torch.tensor([size is not None for size in sizes], device=self.device)

        pad = min(self.end_tokens, default=0)
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=sampling.temperature > 0,
            pad_token_id=pad,
            eos_token_id=sorted(self.end_tokens) or None,
            stopping_criteria=[ended],
            **more,
        )
        return [row[:size] for row, size in zip(out[:, ids.shape[1] :].tolist(), sizes, strict=True)]

    def loglikelihood(self, pairs: Sequence[likelihood.TokenPair]) -> list[tuple[float, bool]]:
        """See `LikelihoodBackend.loglikelihood`."""
        return likelihood.pair_loglikelihoods(self.model, pairs, batch_tokens=8192)

    def token_nll(self, ids: Sequence[int]) -> torch.Tensor:
        """See `LikelihoodBackend.token_nll`."""
        return likelihood.sequence_nll(self.model, ids)

    def describe(self) -> dict[str, Any]:
        """The model as results record it."""
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
            "settings": generation_settings(self.sampling, self.chat),
            "rope": getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None),
        }

    def close(self) -> None:
        """Nothing to release."""
