"""Any OpenAI-compatible endpoint as a backend: vLLM and other servers, GPT-4o, Gemini, Claude.

chat          sends the user message; the server applies its model's chat template. The answer's first words
              go to the end of the message, or into an assistant message that the server continues (`prefill`)
completions   sends the complete prompt as token ids, exact to the token, to servers with the given tokenizer
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends.model_files import load_tokenizer
from megatron_ultralong.evaluate.backends.protocol import (
    Completion,
    GenerationRequest,
    generation_settings,
    prompt_ids,
)
from megatron_ultralong.evaluate.backends.sampling import Sampling
from megatron_ultralong.evaluate.prompts.encode import ChatMode, PromptEncoder
from megatron_ultralong.io import endpoint_client

NO_ANSWER = ("content_filter", "abort", "error")
"""Finish reasons by which a server reports that it gave no answer."""


@dataclass(frozen=True, kw_only=True)
class EndpointSettings:
    """An endpoint and how it is called."""

    base_url: str
    model: str
    key_env: str = "OPENAI_API_KEY"
    """Environment variable that contains the API key."""
    api: Literal["chat", "completions"] = "chat"
    prefill: Literal["user", "assistant"] = "user"
    """With chat, where the answer's first words go: user = the end of the user message, which every server
    accepts; assistant = an assistant message that the server continues (vLLM, Claude)."""
    concurrency: int = 8
    """Concurrent requests."""
    timeout: float = 1800.0
    """Seconds per attempt."""
    retries: int = 6
    """Attempts after the first where the endpoint is busy or fails."""
    backoff: float = 1.0
    """Upper limit of the first wait before another attempt, seconds."""

    def __post_init__(self) -> None:
        for name, least in (("concurrency", 1), ("retries", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least {least}")
        if not self.timeout > 0:
            raise UserError(f"--timeout {self.timeout}: must be more than 0")
        object.__setattr__(self, "base_url", endpoint_client.check_base_url(self.base_url))
        endpoint_client.api_key(self.key_env, self.base_url)


class OpenAIEndpoint:
    """A model at a URL. Lengths are measured with the given tokenizer; with chat, the server's template adds
    to them."""

    max_position: int | None = None

    def __init__(
        self,
        settings: EndpointSettings,
        tokenizer: Path,
        *,
        chat: ChatMode = "auto",
        sampling: Sampling = Sampling(),  # noqa: B008
    ) -> None:
        if sampling.top_k and settings.api == "chat" and settings.base_url == endpoint_client.OPENAI:
            raise UserError("--top-k: OpenAI's endpoint does not support it")
        self.settings, self.chat, self.sampling = settings, chat, sampling
        self.tokenizer = load_tokenizer(tokenizer, "--tokenizer")
        self._encoder = cache(partial(PromptEncoder, self.tokenizer, chat))
        self._measured_with = tokenizer.name

    def check(self, length: int, batch: int) -> None:
        """Not checked: the server refuses what it cannot take."""

    def generate(self, requests: Sequence[GenerationRequest]) -> Iterator[tuple[int, Completion]]:
        """Send `concurrency` requests at a time and yield each answer as it arrives.

        UserError at the end where some requests got no answer after all attempts, and at once where a request
        consists of token ids only, which a chat endpoint does not accept.
        """
        if self.settings.api == "chat" and any(one.ids is not None and not one.text for one in requests):
            raise UserError(
                "this benchmark makes complete prompts, chat template included, which a chat endpoint would put into a "
                "message again; use --api completions"
            )
        failures: list[endpoint_client.Failure] = []
        for i, answer in endpoint_client.iterate(self._answers(requests)):
            if isinstance(answer, endpoint_client.Failure):
                failures.append(answer)
            else:
                yield i, answer
        if failures:
            raise UserError(
                f"{len(failures)} of {len(requests)} requests got no answer from {self.settings.base_url}, the last because of "
                f"{failures[-1].kind} ({failures[-1]}); answers are kept, run the same command again to resume"
            )

    async def _answers(
        self, requests: Sequence[GenerationRequest]
    ) -> AsyncGenerator[tuple[int, Completion | endpoint_client.Failure], None]:
        s = self.settings
        client = endpoint_client.Client(
            endpoint_client.Endpoint(
                base_url=s.base_url,
                model=s.model,
                key_env=s.key_env,
                timeout=s.timeout,
                retries=s.retries,
                backoff=s.backoff,
            )
        )

        async def ask(i: int) -> Completion:
            return await self._ask(client, requests[i])

        answers = endpoint_client.ask_many(ask, range(len(requests)), s.concurrency)
        try:
            async with contextlib.aclosing(answers):
                async for pair in answers:
                    yield pair
        finally:
            await client.close()

    async def _ask(self, client: endpoint_client.Client, request: GenerationRequest) -> Completion:
        more: dict[str, Any] = {"stop": list(request.stop)} if request.stop else {}
        extra: dict[str, Any] = {}
        if self.sampling.temperature:
            more |= {"top_p": self.sampling.top_p, "seed": self.sampling.seed}
            extra |= {"top_k": self.sampling.top_k} if self.sampling.top_k else {}
        try:
            if self.settings.api == "completions":
                reply = await client.complete(
                    prompt_ids(self._encoder, request),
                    self.sampling.temperature,
                    request.max_tokens,
                    **more,
                    extra_body=extra or None,
                )
            else:
                messages = [{"role": "user", "content": request.text}]
                if request.prefix and self.settings.prefill == "assistant":
                    messages.append({"role": "assistant", "content": request.prefix})
                    extra |= {
                        "continue_final_message": True,
                        "add_generation_prompt": False,
                    }  # vLLM needs both, Claude's endpoint neither
                elif request.prefix:
                    messages[0]["content"] += f"\n{request.prefix}"
                reply = await client.chat(
                    messages, self.sampling.temperature, request.max_tokens, **more, extra_body=extra or None
                )
        except endpoint_client.Failure as failure:
            if failure.retryable:
                raise
            return Completion(text="", tokens_in=0, tokens_out=0, finish=f"{failure.kind}: {failure}")
        tokens_in, tokens_out = reply.tokens or (0, 0)
        answer = Completion(
            text=reply.text, tokens_in=tokens_in, tokens_out=tokens_out, finish=_finish(reply)
        )
        return (
            answer if answer.answered else replace(answer, text="")
        )  # what remains of a filtered answer is not an answer

    def loglikelihood(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """UserError: endpoints do not return the likelihood of a given text."""
        raise UserError(
            "an endpoint does not return likelihoods of given answers, which this task compares; choose tasks that generate "
            "answers, or another --engine"
        )

    def describe(self) -> dict[str, Any]:
        """The model as results record it."""
        s = self.settings
        return {
            "backend": "endpoint",
            "path": s.model,
            "base_url": s.base_url,
            "api": s.api,
            "prefill": s.prefill,
            "lengths_by": self._measured_with,
            "max_position": None,
            "settings": generation_settings(self.sampling, self.chat),
        }

    def close(self) -> None:
        """Nothing to release."""


def _finish(reply: endpoint_client.Reply) -> str:
    """Servers have various names for a complete answer (eos_token, end_turn): all but "length" and
    `NO_ANSWER` become "stop"."""
    if reply.refused:
        return "refused"
    return {"max_tokens": "length"}.get(
        reply.finish or "", reply.finish if reply.finish in ("length", *NO_ANSWER) else "stop"
    )
