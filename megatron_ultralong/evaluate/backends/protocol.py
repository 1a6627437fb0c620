"""The protocol of a model that answers prompts, and the types that cross it.

    TransformersModel    transformers_model.py    a Hugging Face directory in plain transformers, one process
    ParallelModel        parallel_model.py        this project's model over the ranks of torchrun
    OpenAIEndpoint       openai_endpoint.py       any OpenAI-compatible URL: vLLM, GPT-4o, Gemini, Claude

A request carries its prompt in two forms: as a user message, for endpoints that only take chats, and as the
token ids of the complete prompt, for all others. Where the ids are not given, they are made from the message
(prompts/encode.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from megatron_ultralong.evaluate.prompts.encode import ChatMode, PromptEncoder

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_ultralong.evaluate.backends.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One prompt to answer."""

    id: str
    """Unique among the requests of a run."""
    text: str = ""
    """The user message; without a chat template, the prompt itself."""
    prefix: str = ""
    """The first words of the answer, which the model continues. They are not part of the completion."""
    ids: Sequence[int] | None = None
    """The complete prompt as token ids, including template and prefix; None = made from `text` and
    `prefix`."""
    max_tokens: int
    """Maximum number of tokens to generate."""
    stop: tuple[str, ...] = ()
    """Strings before which the completion ends."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The answer to one request."""

    text: str
    tokens_in: int
    """Tokens of the prompt; 0 where the endpoint does not report them."""
    tokens_out: int
    """Generated tokens, including the end-of-text token."""
    finish: str
    """stop = the answer is complete; length = it reached `max_tokens`; anything else = why an endpoint
    refused the request."""

    @property
    def answered(self) -> bool:
        """False where an endpoint refused the request: it scores 0 and is sent again by the next run."""
        return self.finish in ("stop", "length")


class Backend(Protocol):
    """A model that answers prompts."""

    tokenizer: Any
    """The transformers tokenizer that prompt lengths are measured with."""
    chat: ChatMode
    """Whether messages are put into the tokenizer's chat template."""
    max_position: int | None
    """Maximum positions in the model's config; None = not known."""

    def check(self, length: int, batch: int) -> None:
        """UserError where a batch of `batch` prompts of `length` tokens, answers included, does not fit.
        Called before the first prompt is made."""

    def generate(self, requests: Sequence[GenerationRequest]) -> Iterator[tuple[int, Completion]]:
        """Yield (index of the request, its completion) as soon as each is available, in any order.

        UserError after the last available completion where some requests got none.
        """

    def describe(self) -> dict[str, Any]:
        """The model as results record it: `backend`, `path`, `settings` of generation, ..."""

    def close(self) -> None:
        """Release the model; called after the last request."""


class LikelihoodBackend(Backend, Protocol):
    """A model with local weights: TransformersModel and ParallelModel."""

    def loglikelihood(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """For each (context ids, continuation ids): the summed log-probability of the continuation, and
        whether greedy decoding generates it."""

    def token_nll(self, ids: Sequence[int]) -> Tensor:
        """-log p of each of `ids` but the first, given those before it, float32 [n - 1] on the CPU."""


def identity(backend: Backend) -> dict[str, Any]:
    """The part of `describe` that determines the answers: without device, address and parallel layout."""
    excluded = ("device", "layout", "parameters", "max_position", "base_url")
    return {name: value for name, value in backend.describe().items() if name not in excluded}


def prompt_ids(encoder: Callable[[], PromptEncoder], request: GenerationRequest) -> list[int]:
    """Token ids of a request's complete prompt.

    encoder: returns the encoder; called only where the request has no ids, because making one renders the
    chat template, which may be refused.
    """
    return list(request.ids) if request.ids is not None else encoder().encode(request.text, request.prefix)


def completion(
    tokenizer: Any,
    prompt: Sequence[int],
    generated: Sequence[int],
    request: GenerationRequest,
    end_tokens: frozenset[int],
) -> Completion:
    """Decode generated tokens into a completion, cut before the first of the request's stop strings."""
    text = tokenizer.decode(generated, skip_special_tokens=True)
    stops = [place for place in (text.find(stop) for stop in request.stop) if place >= 0]
    ended = bool(stops) or (len(generated) > 0 and generated[-1] in end_tokens)
    return Completion(
        text=text[: min(stops)] if stops else text,
        tokens_in=len(prompt),
        tokens_out=len(generated),
        finish="stop" if ended else "length",
    )


def generation_settings(sampling: Sampling, chat: ChatMode) -> dict[str, Any]:
    """The `settings` of `Backend.describe`: how answers are generated."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": sampling.seed if sampling.temperature else 0,
        "chat": chat,
    }
