"""What writes the answers: one small protocol, and what its back-ends share.

    HuggingFace       transformers_model.py    a Hugging Face directory in plain transformers, one process
    Megatron          parallel_model.py       our own model, tensor, pipeline and context parallel, under torchrun
    Endpoint          endpoint.py       any OpenAI-compatible URL: vLLM, GPT-4o, Gemini, Claude

A request says a prompt twice where it can: as a user's message, which an engine that knows only chats takes,
and as the tokens of the whole prompt, which is what the others take; of a message alone they make the tokens
(`encode`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from megatron_ultralong.data.sft.chat_template import DATE
from megatron_ultralong.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_ultralong.evaluate.backends.sampling import Sampling

_PIECE, _PIECES = 1 << 12, 256
"""Bytes of a file that are read at a time, and how often, for its fingerprint."""
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
    """stop = it came to an end; length = it was cut off; anything else = why an endpoint gave no answer to
    this request."""

    @property
    def answered(self) -> bool:
        """Not where an endpoint refused the request: that counts as 0, and is asked again by the next run."""
        return self.finish in ("stop", "length")


class Backend(Protocol):
    """What benchmarks need of a model."""

    tokenizer: Any
    """A transformers tokenizer, which lengths are measured with."""
    chat: Chat
    """Whether messages go into the tokenizer's chat template; auto = where it has one."""
    max_position: int | None
    """Positions the model was made for; None = not known."""

    def check(self, length: int, batch: int) -> None:
        """UserError where `batch` prompts of `length` tokens at a time, answers included, are too much. Asked
        before the first is made."""

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """The completions of `requests` with their places among them, each as soon as it is there, in any
        order.

        UserError once all that could be had is handed over, where some got none.
        """

    def describe(self) -> dict[str, Any]:
        """What results say about the model: `backend`, `path`, `settings` of sampling, ...; what decides the
        answers is in `identity`."""

    def close(self) -> None:
        """Once nothing more is asked."""


class Weights(Backend, Protocol):
    """A model whose weights are at hand: HuggingFace and Megatron."""

    def loglikelihood(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """For each (context ids, continuation ids) the continuation's summed log-probability, and whether
        greedy decoding would write it."""

    def token_nll(self, ids: Sequence[int]) -> Tensor:
        """-log p of each of `ids` but the first after those before it, float32 [n - 1] on the CPU."""


def identity(backend: Backend) -> dict[str, Any]:
    """What of `describe` decides the answers: not the machine or its address, nor the layout over it."""
    places = ("device", "layout", "parameters", "max_position", "base_url")
    return {name: value for name, value in backend.describe().items() if name not in places}


def encode(tokenizer: Any, request: Request, chat: Chat) -> list[int]:
    """The tokens of a request's whole prompt."""
    if request.ids is not None:
        return list(request.ids)
    if chat == "no" or (chat == "auto" and not getattr(tokenizer, "chat_template", None)):
        return list(tokenizer.encode(request.text + request.prefix))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": request.text}],
        tokenize=False,
        add_generation_prompt=True,
        date_string=DATE,
    )
    return list(tokenizer.encode(text + request.prefix, add_special_tokens=False))


def completion(
    tokenizer: Any, prompt: Sequence[int], written: Sequence[int], request: Request, end: frozenset[int]
) -> Completion:
    """Written tokens as a completion, cut before the first text of `stop`."""
    text = tokenizer.decode(written, skip_special_tokens=True)
    places = [place for place in (text.find(stop) for stop in request.stop) if place >= 0]
    ended = bool(places) or (len(written) > 0 and written[-1] in end)
    return Completion(
        text=text[: min(places)] if places else text,
        tokens_in=len(prompt),
        tokens_out=len(written),
        finish="stop" if ended else "length",
    )


def end_tokens(path: Path, tokenizer: Any) -> frozenset[int]:
    """Token ids that end an answer, from the model's generation_config.json, config.json and tokenizer: the
    first that names any."""
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
        other = "" if flag == "--tokenizer" else "; give another with --tokenizer DIR"
        raise UserError(
            f"{flag} {path}: transformers cannot load its tokenizer: {str(error).strip().splitlines()[0]}{other}"
        ) from None


def fingerprint(path: Path) -> str:
    """Of a model's files, tokenizer and generation settings among them, from pieces all over them: enough to
    tell two apart, and quick at any size."""
    found = hashlib.sha256()
    names = (
        "*.safetensors",
        "*.distcp",
        "run.json",
        "config.json",
        "generation_config.json",
        "tokenizer*.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    )
    # hf: what a checkpoint keeps of the model it came from
    for file in sorted(
        file for folder in (path, path / "hf") for name in names for file in folder.glob(name)
    ):
        with file.open("rb") as handle:
            size = file.stat().st_size
            found.update(file.name.encode() + size.to_bytes(8, "big"))
            for at in range(0, size, max(_PIECE, size // _PIECES)):
                handle.seek(at)
                found.update(handle.read(_PIECE))
            handle.seek(-min(_PIECE, size), 2)
            found.update(handle.read())
    return found.hexdigest()[:12]


def settings(sampling: Sampling, chat: Chat) -> dict[str, Any]:
    """What `describe` says of how answers are written."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": sampling.seed if sampling.temperature else 0,
        "chat": chat,
    }


def read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise UserError(f"--model {path}: no such directory")
    try:
        return json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise UserError(
            f"--model {path}: no config.json in it; give a Hugging Face model directory (tools/convert_hf.py export makes one)"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"--model {path}: config.json cannot be read: {error}") from None
