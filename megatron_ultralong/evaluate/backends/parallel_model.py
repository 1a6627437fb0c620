"""This project's model over all ranks of a torchrun launch.

Rank 0 runs the benchmark. Each of its calls is broadcast to all ranks, which carry it out together; between
calls the other ranks wait.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from megatron_ultralong.checkpoint import run_directory, sharded
from megatron_ultralong.checkpoint.adapters import read_model_state
from megatron_ultralong.checkpoint.hf.config import read_config
from megatron_ultralong.checkpoint.hf.reader import load_parameters
from megatron_ultralong.checkpoint.megatron_lm import bridge
from megatron_ultralong.config import Parallel, Runtime
from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends import memory_check
from megatron_ultralong.evaluate.backends.decoding import DecodingSession
from megatron_ultralong.evaluate.backends.model_files import (
    end_tokens,
    fingerprint,
    load_tokenizer,
    position_limit,
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
from megatron_ultralong.io.progress import progress_bar
from megatron_ultralong.runtime import agreement, launch

WAIT = timedelta(days=100)
"""Timeout of the wait for rank 0's next call. Where rank 0 fails, torchrun ends the other ranks."""
CHUNK = 16384
"""Tokens of a prompt that all ranks read at a time."""


class ParallelModel:
    """A training checkpoint, or a Hugging Face directory that is read in place. Every rank creates one; all
    but rank 0 then call `follow`."""

    def __init__(
        self,
        *,
        path: Path,
        parallel: Parallel,
        tokenizer: Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        chat: ChatMode = "auto",
        sampling: Sampling = Sampling(),  # noqa: B008
        chunk: int = CHUNK,
    ) -> None:
        """path: a run directory, one iteration, or a Hugging Face directory. tokenizer: its directory where
        `path` does not contain it. dtype: fp32 or bf16; auto = bf16, but fp32 on a CPU. UserError where
        ranks, model or memory do not fit together."""
        if device not in ("auto", "cpu", "cuda"):
            raise UserError(f"--device {device}: each rank uses its own device; use auto, cpu or cuda")
        if dtype == "fp16":
            raise UserError("--dtype fp16: the megatron engine computes in bf16 or fp32")
        place, model, rope, self.max_position, assets = _find(path)
        self.path, self.chat, self.sampling, self._place = path, chat, sampling, place
        self.tokenizer = load_tokenizer(
            tokenizer or assets, "--tokenizer" if tokenizer else "--model" if place == assets else "--load"
        )
        self._encoder = cache(partial(PromptEncoder, self.tokenizer, chat))
        self.end_tokens = end_tokens(assets, self.tokenizer)
        # Between two calls rank 0 may work alone for hours (prompts of 4M tokens, data sets): longer than the
        # timeout of any collective, and no hang.
        self.ranks = launch.start(Runtime(device=device, hang_minutes=0), parallel)  # type: ignore[arg-type]
        self._calls = torch.distributed.new_group(backend="gloo", timeout=WAIT)
        precision = dtype if dtype != "auto" else "fp32" if self.ranks.device.type == "cpu" else "bf16"
        agreement.on_every_rank(
            lambda: memory_check.check_plan(
                model, parallel, self.ranks.device, chunk=chunk, itemsize=4 if precision == "fp32" else 2
            )
        )

        from megatron_ultralong.model import kernel_choices
        from megatron_ultralong.model.inference.prefill_decode import InferenceModel
        from megatron_ultralong.model.llama import named_parameters

        if place != assets:
            self._place = place = run_directory.resolve_verified(path)
            model, rope, self.max_position, assets = _stored(place)
        choices = kernel_choices.apply(self.ranks.device, model, precision)
        if self.ranks.is_main:
            print("\n".join(f"{name}: {choice}" for name, choice in choices.items()), file=sys.stderr)
        reader = InferenceModel(model, rope, self.ranks, parallel, precision, chunk)
        if place == assets:
            load_parameters(
                place,
                model,
                named_parameters(reader.chunk),
                self.ranks.tp_rank,
                self.ranks.tp,
                group=self.ranks.groups.dp_cp,
            )
        else:
            sharded.load(place, [reader.chunk])
        self._session, self._rope, self._open = DecodingSession(reader), rope, True

    # ---- the protocol, on rank 0 ----------------------------------------------------------------

    def check(self, length: int, batch: int) -> None:
        """UserError where the keys and values of `batch` prompts with nothing in common do not fit."""
        self._together("check", length, batch)

    def generate(self, requests: Sequence[GenerationRequest]) -> Iterator[tuple[int, Completion]]:
        """Answer all requests in one batch; the common beginning of their prompts is read once, and kept for
        the next call."""
        prompts = [prompt_ids(self._encoder, request) for request in requests]
        answers = self._together(
            "generate",
            prompts,
            [request.max_tokens for request in requests],
            [request.stop for request in requests],
        )
        for i, (prompt, generated, request) in enumerate(zip(prompts, answers, requests, strict=True)):
            yield i, completion(self.tokenizer, prompt, generated, request, self.end_tokens)

    def loglikelihood(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """See `LikelihoodBackend.loglikelihood`."""
        return self._together("loglikelihood", [(list(a), list(b)) for a, b in pairs])

    def token_nll(self, ids: Sequence[int]) -> torch.Tensor:
        """See `LikelihoodBackend.token_nll`."""
        return -self._together("scores", list(ids[:1]), list(ids[1:]))[0]

    def describe(self) -> dict[str, Any]:
        """The model as results record it."""
        reader, ranks = self._session.reader, self.ranks
        return {
            "backend": "megatron",
            "path": self.path.name or str(self.path),
            "iteration": _iteration(self._place),
            "fingerprint": fingerprint(self._place),
            "dtype": str(reader.dtype).removeprefix("torch."),
            "device": ranks.device.type,
            "layout": {"tp": ranks.tp, "pp": ranks.pp, "cp": ranks.cp, "chunk": reader.chunk_tokens},
            "max_position": self.max_position,
            "settings": generation_settings(self.sampling, self.chat),
            "rope": dataclasses.asdict(self._rope),
        }

    def close(self) -> None:
        """Let the other ranks finish; not after a failed call, which ended them."""
        if self._open and self.ranks.is_main:
            self._together("stop")
            launch.stop()

    # ---- all ranks ------------------------------------------------------------------------------

    def follow(self) -> None:
        """Carry out rank 0's calls until it closes."""
        box: list[Any] = [None]
        while True:
            torch.distributed.broadcast_object_list(box, src=0, group=self._calls)
            name, *arguments = box[0]
            if name == "stop":
                return launch.stop()
            self._do(name, *arguments)

    def _together(self, name: str, *arguments: Any) -> Any:
        assert self.ranks.is_main
        self._open = False  # if the call fails, the other ranks are still in the middle of it
        torch.distributed.broadcast_object_list([(name, *arguments)], src=0, group=self._calls)
        result = self._do(name, *arguments) if name != "stop" else None
        self._open = name != "stop"
        return result

    def _do(self, name: str, *arguments: Any) -> Any:
        calls: dict[str, Any] = {
            "check": self._check,
            "generate": self._generate,
            "loglikelihood": self._session.loglikelihood,
            "scores": self._session.scores,
        }
        return calls[name](*arguments)

    def _check(self, length: int, batch: int) -> None:
        reader, ranks = self._session.reader, self.ranks
        agreement.on_every_rank(
            lambda: memory_check.check_plan(
                reader.model,
                Parallel(tp=ranks.tp, pp=ranks.pp, cp=ranks.cp),
                ranks.device,
                chunk=reader.chunk_tokens,
                itemsize=reader.dtype.itemsize,
                tokens=length * batch,
                loaded=True,
            )
        )

    def _generate(
        self, prompts: list[list[int]], max_tokens: list[int], stops: list[tuple[str, ...]]
    ) -> list[list[int]]:
        def stop_check(stop: tuple[str, ...]) -> Any:
            # Every rank decides for itself: all have the same tokens.
            return lambda generated: (
                generated[-1] in self.end_tokens
                or (bool(stop) and any(s in self.tokenizer.decode(generated) for s in stop))
            )

        total = sum(map(len, prompts)) + sum(max_tokens)
        hidden = not self.ranks.is_main or total < CHUNK  # for short prompts the benchmark's own bar suffices
        with progress_bar("reading", total, "token", hidden=hidden, leave=False) as bar:
            return self._session.generate(
                prompts, max_tokens, [stop_check(stop) for stop in stops], self.sampling, bar.update
            )


def _find(path: Path) -> tuple[Path, Any, Any, int | None, Path]:
    """Locate a model: (path of the weights, model, RoPE, maximum positions, folder of config and
    tokenizer)."""
    if (path / "config.json").is_file():
        config = read_config(path)
        return path, config.model, config.rope, position_limit(config.raw), path
    place = run_directory.resolve(path)
    return place, *_stored(place)


def _stored(place: Path) -> tuple[Any, Any, int | None, Path]:
    state = read_model_state(place)
    longest = state.rope.readable_length(state.max_length) if state.max_length else None
    return state.model, state.rope, longest, bridge.assets(place)


def _iteration(place: Path) -> int | None:
    return int(place.name[5:]) if place.name.startswith("iter_") and place.name[5:].isdigit() else None
