"""What writes the answers: one small protocol, and plain transformers behind it.

    HuggingFace       here              a Hugging Face directory in plain transformers, one process
    Megatron          megatron.py       our own model, tensor, pipeline and context parallel, under torchrun
    Endpoint          endpoint.py       any OpenAI-compatible URL: vLLM, GPT-4o, Gemini, Claude

A request says a prompt twice where it can: as a user's message, which an engine that knows only chats takes, and as the tokens of the
whole prompt, which is what the others take; of a message alone they make the tokens (`encode`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from megatron_ultralong.config import UserError
from megatron_ultralong.evaluate.decode import Sampling

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Chat = Literal["auto", "yes", "no"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question."""

    id: str
    """Of its own among the requests of a run."""
    text: str = ""
    """The user's message; without a chat template the prompt itself."""
    prefix: str = ""
    """The answer's first words, which the model goes on from; they are no part of the completion."""
    ids: Sequence[int] | None = None
    """The whole prompt as tokens, template and prefix included; None = made of `text` and `prefix`."""
    tokens: int
    """Written at most."""
    stop: tuple[str, ...] = ()
    """Texts before which the completion ends."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One answer."""

    text: str
    tokens_in: int
    """Of the prompt; 0 where the engine does not say."""
    tokens_out: int
    """Written, the last one (end of text) included."""
    finish: str
    """stop = it came to an end; length = it was cut off; anything else = why an endpoint gave no answer to this request."""


class Backend(Protocol):
    """What benchmarks need of a model."""

    tokenizer: Any
    """A transformers tokenizer, which lengths are measured with."""
    chat: Chat
    """Whether messages go into the tokenizer's chat template; auto = where it has one."""
    max_position: int | None
    """Positions the model was made for; None = not known."""

    def check(self, length: int, batch: int) -> None:
        """UserError where `batch` prompts of `length` tokens at a time, answers included, are too much. Asked before the first is made."""

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """The completions of `requests` with their places among them, each as soon as it is there, in any order.

        UserError once all that could be had is handed over, where some got none.
        """

    def describe(self) -> dict[str, Any]:
        """What results say about the model: `backend`, `path`, `settings` of sampling, ...; what decides the answers is in `identity`."""

    def close(self) -> None:
        """Once nothing more is asked."""


def identity(backend: Backend) -> dict[str, Any]:
    """What of `describe` decides the answers: not the machine, nor the layout over it."""
    return {name: value for name, value in backend.describe().items() if name not in ("device", "layout", "parameters", "max_position")}


def encode(tokenizer: Any, request: Request, chat: Chat) -> list[int]:
    """The tokens of a request's whole prompt."""
    if request.ids is not None:
        return list(request.ids)
    if chat == "no" or (chat == "auto" and not getattr(tokenizer, "chat_template", None)):
        return list(tokenizer.encode(request.text + request.prefix))
    text = tokenizer.apply_chat_template([{"role": "user", "content": request.text}], tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text + request.prefix, add_special_tokens=False))


def completion(tokenizer: Any, prompt: Sequence[int], written: Sequence[int], request: Request, end: frozenset[int]) -> Completion:
    """Written tokens as a completion, cut before the first text of `stop`."""
    text = tokenizer.decode(written, skip_special_tokens=True)
    places = [place for place in (text.find(stop) for stop in request.stop) if place >= 0]
    ended = bool(places) or (len(written) > 0 and written[-1] in end)
    return Completion(text=text[:min(places)] if places else text, tokens_in=len(prompt), tokens_out=len(written), finish="stop" if ended else "length")


def end_tokens(path: Path, tokenizer: Any) -> frozenset[int]:
    """Token ids that end an answer, from the model's generation_config.json, config.json and tokenizer: the first that names any."""
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((path / name).read_text()).get("eos_token_id")
        except (OSError, ValueError):
            continue
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset() if tokenizer.eos_token_id is None else frozenset([tokenizer.eos_token_id])


def load_tokenizer(path: Path, flag: str = "--model") -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{flag} {path}: transformers cannot load its tokenizer: {str(error).strip().splitlines()[0]}") from None


def fingerprint(path: Path) -> str:
    """Of a model's files, from their ends: enough to tell two models apart, and quick at any size."""
    found = hashlib.sha256()
    for file in sorted([*path.glob("*.safetensors"), *path.glob("*.distcp"), *path.glob("run.json"), *path.glob("config.json")]):
        with file.open("rb") as handle:
            found.update(file.name.encode() + file.stat().st_size.to_bytes(8, "big"))
            handle.seek(-min(2**16, file.stat().st_size), 2)
            found.update(handle.read())
    return found.hexdigest()[:12]


class HuggingFace:
    """A Hugging Face model directory in plain transformers."""

    def __init__(self, path: Path, *, device: str = "auto", dtype: str = "auto", chat: Chat = "auto",
                 sampling: Sampling = Sampling(), tokenizer: Path | None = None) -> None:  # noqa: B008
        """path: directory with config.json, weights and tokenizer. device: auto = cuda where there is one.
        dtype: fp32, bf16, fp16; auto = as stored, but float32 on a CPU. UserError where `path` is no such directory."""
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        config = read_config(path)
        self.path, self.chat, self.sampling = path, chat, sampling
        self.device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"--device {device}: this machine has no CUDA device; use --device cpu")
        chosen: Any = DTYPES[dtype] if dtype != "auto" else torch.float32 if self.device == "cpu" else "auto"
        logging.disable_progress_bar()
        self.tokenizer = load_tokenizer(tokenizer or path)
        try:
            self.model = AutoModelForCausalLM.from_pretrained(path, dtype=chosen, local_files_only=True).to(self.device).eval()
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(f"--model {path}: transformers cannot load it: {str(error).strip().splitlines()[0]}") from None
        # Only our settings count: a sampling temperature in the model's generation config would warn, or change the answers.
        kept = self.model.generation_config
        self.model.generation_config = type(kept)(bos_token_id=kept.bos_token_id, eos_token_id=kept.eos_token_id, pad_token_id=kept.pad_token_id)
        self.max_position: int | None = config.get("max_position_embeddings")
        self.end = end_tokens(path, self.tokenizer)

    def check(self, length: int, batch: int) -> None:
        """Transformers says what it cannot do."""

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """Prompts of one size at a time, so that none is padded; those of a group end together, at the latest `tokens`."""
        prompts = [encode(self.tokenizer, request, self.chat) for request in requests]

        def kind(i: int) -> tuple[Any, ...]:
            return len(prompts[i]), requests[i].tokens, requests[i].stop, self.sampling.temperature and prompts[i]

        for (_, tokens, stop, _), group in itertools.groupby(sorted(range(len(requests)), key=kind), key=kind):
            places = list(group)
            for i, written in zip(places, self._write([prompts[i] for i in places], tokens, stop), strict=True):
                yield i, completion(self.tokenizer, prompts[i], written, requests[i], self.end)

    def _write(self, prompts: list[list[int]], tokens: int, stop: tuple[str, ...]) -> list[list[int]]:
        ids = torch.tensor(prompts, device=self.device)  # [b, t]
        sampling = self.sampling
        more: dict[str, Any] = {}
        if sampling.temperature:
            more = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
            torch.manual_seed(sampling.seed % 2**31 * 2**32 + zlib.crc32(repr(prompts).encode()))
        if stop:
            more |= {"stop_strings": list(stop), "tokenizer": self.tokenizer}
        pad = min(self.end, default=0)
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=sampling.temperature > 0,
                                  pad_token_id=pad, eos_token_id=sorted(self.end) or None, **more)
        return [self._cut(row) for row in out[:, ids.shape[1]:].tolist()]

    def _cut(self, row: list[int]) -> list[int]:
        """Without what fills an answer up that ended before the others of its group."""
        first = next((i for i, token in enumerate(row) if token in self.end), len(row))
        return row[:first + 1]

    def describe(self) -> dict[str, Any]:
        """What the results say about the model."""
        config = self.model.config
        return {"backend": "transformers", "path": self.path.name or str(self.path), "fingerprint": fingerprint(self.path),
                "architecture": type(self.model).__name__,
                "parameters": sum(p.numel() for p in self.model.parameters()), "dtype": str(self.model.dtype).removeprefix("torch."),
                "device": self.device, "max_position": self.max_position, "settings": settings(self.sampling, self.chat),
                "rope": getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)}

    def close(self) -> None:
        """Nothing to do."""


def settings(sampling: Sampling, chat: Chat) -> dict[str, Any]:
    """What `describe` says of how answers are written."""
    return {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k, "seed": sampling.seed if sampling.temperature else 0,
            "chat": chat}


def read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise UserError(f"--model {path}: no such directory")
    try:
        return json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise UserError(f"--model {path}: no config.json in it; give a Hugging Face model directory (tools/convert_hf.py export makes one)") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--model {path}: config.json cannot be read: {error}") from None
