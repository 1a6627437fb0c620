"""Our own model as a backend, over all ranks of a torchrun launch: rank 0 asks, the others follow.

Rank 0 runs the benchmark. Each of its calls is sent to all ranks, which carry it out together; between calls
the others wait.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_ultralong.checkpoint import sharded, training_state
from megatron_ultralong.checkpoint.hf.config import read_config
from megatron_ultralong.checkpoint.hf.reader import load_parameters
from megatron_ultralong.config import Parallel, Runtime
from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends import memory_check
from megatron_ultralong.evaluate.backends.protocol import (
    Chat,
    Completion,
    Request,
    completion,
    encode,
    end_tokens,
    fingerprint,
    load_tokenizer,
    settings,
)
from megatron_ultralong.evaluate.backends.sampling import Sampling, Session
from megatron_ultralong.runtime import agreement, launch

WAIT = timedelta(days=100)
"""For rank 0's next call; should rank 0 end, torchrun ends the others."""
CHUNK = 16384
"""Tokens of a prompt that are read at a time, by all ranks."""


class Megatron:
    """A training checkpoint, or a Hugging Face directory that is read in place. Every rank makes one; all but
    rank 0 then `follow`."""

    def __init__(
        self,
        *,
        path: Path,
        parallel: Parallel,
        tokenizer: Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        chat: Chat = "auto",
        sampling: Sampling = Sampling(),
        chunk: int = CHUNK,
    ) -> None:  # noqa: B008
        """path: a run directory, one iteration, or a Hugging Face directory. tokenizer: its folder, where it
        is not in there. dtype: fp32 or bf16; auto = bf16, but fp32 on a CPU. UserError for what does not fit:
        ranks, model, memory."""
        if device not in ("auto", "cpu", "cuda"):
            raise UserError(f"--device {device}: each rank takes its own; use auto, cpu or cuda")
        if dtype == "fp16":
            raise UserError("--dtype fp16: our own model computes in bf16 or fp32")
        place, model, rope, self.max_position, assets = _find(path)
        self.path, self.chat, self.sampling, self._place = path, chat, sampling, place
        self.tokenizer = load_tokenizer(
            tokenizer or assets, "--tokenizer" if tokenizer else "--model" if place == assets else "--ckpt"
        )
        self.end = end_tokens(assets, self.tokenizer)
        self.ranks = launch.start(Runtime(device=device), parallel)  # type: ignore[arg-type]
        # Between two calls rank 0 may work alone for hours (prompts of 4M tokens, data sets): longer than any
        # collective may take.
        self._calls = torch.distributed.new_group(backend="gloo", timeout=WAIT)
        precision = dtype if dtype != "auto" else "fp32" if self.ranks.device.type == "cpu" else "bf16"
        agreement.on_every_rank(
            lambda: memory_check.check_plan(
                model, parallel, self.ranks.device, chunk=chunk, itemsize=4 if precision == "fp32" else 2
            )
        )

        from megatron_ultralong.model.inference.prefill_decode import InferenceModel
        from megatron_ultralong.model.llama import named_parameters

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
        self._session, self._rope, self._open = Session(reader), rope, True

    # ---- the protocol, on rank 0 ----------------------------------------------------------------

    def check(self, length: int, batch: int) -> None:
        """Keys and values of `batch` prompts that have nothing in common, before any is made. UserError where
        they do not fit."""
        self._together("check", length, batch)

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """All at a time; what their prompts begin with alike is read once, and kept for the next call."""
        prompts = [encode(self.tokenizer, request, self.chat) for request in requests]
        written = self._together(
            "generate",
            prompts,
            [request.tokens for request in requests],
            [request.stop for request in requests],
        )
        for i, (prompt, tokens, request) in enumerate(zip(prompts, written, requests, strict=True)):
            yield i, completion(self.tokenizer, prompt, tokens, request, self.end)

    def loglikelihood(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """For each (context ids, continuation ids) the continuation's summed log-probability, and whether it
        is what greedy decoding writes."""
        return self._together("loglikelihood", [(list(a), list(b)) for a, b in pairs])

    def token_nll(self, ids: Sequence[int]) -> torch.Tensor:
        """-log p of each of `ids` but the first after those before it, float32 [n - 1] on the CPU."""
        return -self._together("scores", list(ids[:1]), list(ids[1:]))[0]

    def describe(self) -> dict[str, Any]:
        """What the results say about the model."""
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
            "settings": settings(self.sampling, self.chat),
            "rope": vars(self._rope),
        }

    def close(self) -> None:
        """Let the other ranks go; not after a failed call, when they have gone."""
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
        self._open = False  # should it fail, the others are somewhere in the middle of it
        torch.distributed.broadcast_object_list([(name, *arguments)], src=0, group=self._calls)
        found = self._do(name, *arguments) if name != "stop" else None
        self._open = name != "stop"
        return found

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
        self, prompts: list[list[int]], tokens: list[int], stops: list[tuple[str, ...]]
    ) -> list[list[int]]:
        def ends(stop: tuple[str, ...]) -> Any:
            # Every rank decides by itself: all have the same tokens.
            return lambda written: (
                written[-1] in self.end
                or (bool(stop) and any(s in self.tokenizer.decode(written) for s in stop))
            )

        total = sum(map(len, prompts)) + sum(tokens)
        hidden = not self.ranks.is_main or total < CHUNK  # short ones have the benchmark's own bar
        with tqdm(
            total=total, unit="token", unit_scale=True, desc="reading", leave=False, disable=hidden or None
        ) as bar:
            return self._session.generate(
                prompts, tokens, [ends(stop) for stop in stops], self.sampling, bar.update
            )


def _find(path: Path) -> tuple[Path, Any, Any, int | None, Path]:
    """(where the weights are, shape, RoPE, positions, folder of config and tokenizer)."""
    if (path / "config.json").is_file():
        config = read_config(path)
        return path, config.model, config.rope, config.max_position, path
    place = sharded.resolve(path)
    state = training_state.read(place)
    return place, state.model, state.rope, state.max_length or None, place / "hf"


def _iteration(place: Path) -> int | None:
    return int(place.name[5:]) if place.name.startswith("iter_") and place.name[5:].isdigit() else None
