"""Any OpenAI-compatible endpoint as a backend: vLLM and other servers, GPT-4o, Gemini, Claude.

chat           the user's message; the server knows its model's template. First words of an answer go to the end of the message, or
               as an assistant's message that the server goes on from (`prefill`)
completions    the whole prompt as token ids, exact to the token: for servers with the tokenizer that is given
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends.protocol import (
    Chat,
    Completion,
    Request,
    encode,
    load_tokenizer,
    settings,
)
from megatron_ultralong.evaluate.backends.sampling import Sampling
from megatron_ultralong.io import endpoint_client

NO_ANSWER = ("content_filter", "abort", "error")
"""Reasons of the finish by which a server says that its answer is none."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """Whom to ask, and how."""

    base_url: str
    model: str
    key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable with the key."""
    api: Literal["chat", "completions"] = "chat"
    prefill: Literal["user", "assistant"] = "user"
    """With chat, where an answer's first words go: user = the end of the user's message, which every server
    takes; assistant = a message that the server goes on from (vLLM, Claude)."""
    concurrency: int = 8
    """Requests on their way at a time."""
    timeout: float = 1800.0
    """Seconds for one try."""
    retries: int = 6
    """Tries after the first where the endpoint is busy or broken."""
    backoff: float = 1.0
    """Upper limit of the first wait before another try, seconds."""

    def __post_init__(self) -> None:
        for name, least in (("concurrency", 1), ("retries", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least {least}")
        if not self.timeout > 0:
            raise UserError(f"--timeout {self.timeout}: must be more than 0")
        object.__setattr__(self, "base_url", endpoint_client.check_base_url(self.base_url))
        endpoint_client.api_key(self.key_env, self.base_url)


class Endpoint:
    """A model at a URL. Lengths are measured with the tokenizer given: with chat those of the server differ
    by its template."""

    max_position: int | None = None

    def __init__(
        self, server: Server, tokenizer: Path, *, chat: Chat = "auto", sampling: Sampling = Sampling()
    ) -> None:  # noqa: B008
        if sampling.top_k and server.api == "chat" and server.base_url == endpoint_client.OPENAI:
            raise UserError("--top-k: OpenAI's endpoint does not know it")
        self.server, self.chat, self.sampling = server, chat, sampling
        self.tokenizer = load_tokenizer(tokenizer, "--tokenizer")
        self._measured_with = tokenizer.name

    def check(self, length: int, batch: int) -> None:
        """The server says what it cannot take."""

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """Some at a time, each handed over as it comes; UserError in the end where some got no answer after
        all tries; at once where a request is tokens alone, which a chat does not take."""
        if self.server.api == "chat" and any(
            request.ids is not None and not request.text for request in requests
        ):
            raise UserError(
                "this benchmark makes whole prompts, chat template included, which a chat endpoint would put into a message again; use "
                "--api completions"
            )
        failures: list[endpoint_client.Failure] = []
        refusal: UserError | None = None
        with asyncio.Runner() as runner:
            client = runner.run(self._client())
            tasks: dict[asyncio.Task[Completion], int] = {}
            waiting: Iterator[int] = iter(range(len(requests)))
            try:
                while True:
                    for i in waiting:  # on from where it broke off
                        tasks[runner.get_loop().create_task(self._ask(client, requests[i]))] = i
                        if len(tasks) >= self.server.concurrency:
                            break
                    if not tasks:
                        break
                    done, _ = runner.run(_first(set(tasks)))
                    for task in done:
                        i = tasks.pop(task)
                        try:
                            answer = task.result()
                        except endpoint_client.Failure as failure:
                            failures.append(failure)
                        except (
                            UserError
                        ) as error:  # no more are asked, but those on their way may be paid for
                            refusal, waiting = error, iter(())
                        else:
                            yield i, answer
            finally:
                for task in tasks:
                    task.cancel()
                runner.run(client.close())  # and with this the cancelled come to their end
        if refusal:
            raise refusal
        if failures:
            raise UserError(
                f"{len(failures)} of {len(requests)} requests got no answer from {self.server.base_url}, the last by {failures[-1].kind} "
                f"({failures[-1]}); what was answered is kept, run the same command again to go on"
            )

    async def _client(self) -> endpoint_client.Client:
        s = self.server
        return endpoint_client.Client(
            endpoint_client.Endpoint(
                base_url=s.base_url,
                model=s.model,
                key_env=s.key_env,
                timeout=s.timeout,
                retries=s.retries,
                backoff=s.backoff,
            )
        )

    async def _ask(self, client: endpoint_client.Client, request: Request) -> Completion:
        more: dict[str, Any] = {"stop": list(request.stop)} if request.stop else {}
        extra: dict[str, Any] = {}
        if self.sampling.temperature:
            more |= {"top_p": self.sampling.top_p, "seed": self.sampling.seed}
            extra |= {"top_k": self.sampling.top_k} if self.sampling.top_k else {}
        try:
            if self.server.api == "completions":
                prompt = encode(self.tokenizer, request, self.chat)
                reply = await client.complete(
                    prompt, self.sampling.temperature, request.tokens, **more, extra_body=extra or None
                )
            else:
                messages = [{"role": "user", "content": request.text}]
                if request.prefix and self.server.prefill == "assistant":
                    messages.append({"role": "assistant", "content": request.prefix})
                    extra |= {
                        "continue_final_message": True,
                        "add_generation_prompt": False,
                    }  # for vLLM; Claude's endpoint needs neither
                elif request.prefix:
                    messages[0]["content"] += f"\n{request.prefix}"
                reply = await client.chat(
                    messages, self.sampling.temperature, request.tokens, **more, extra_body=extra or None
                )
        except endpoint_client.Failure as failure:
            if failure.retryable:
                raise
            return Completion(text="", tokens_in=0, tokens_out=0, finish=f"{failure.kind}: {failure}")
        tokens_in, tokens_out = reply.tokens or (0, 0)
        found = Completion(text=reply.text, tokens_in=tokens_in, tokens_out=tokens_out, finish=_finish(reply))
        return found if found.answered else replace(found, text="")  # what a filter left of an answer is none

    def loglikelihood(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        """Endpoints do not say how likely a given text is."""
        raise UserError(
            "an endpoint gives no likelihoods of given answers, which this task compares; ask it tasks that write answers, or use another "
            "--engine"
        )

    def describe(self) -> dict[str, Any]:
        """What the results say about the model."""
        s = self.server
        return {
            "backend": "endpoint",
            "path": s.model,
            "base_url": s.base_url,
            "api": s.api,
            "prefill": s.prefill,
            "lengths_by": self._measured_with,
            "max_position": None,
            "settings": settings(self.sampling, self.chat),
        }

    def close(self) -> None:
        """Nothing to do."""


def _finish(reply: endpoint_client.Reply) -> str:
    """Servers have words of their own for an answer that came to its end (eos_token, end_turn): only what
    says that there is none is kept."""
    if reply.refused:
        return "refused"
    return {"max_tokens": "length"}.get(
        reply.finish or "", reply.finish if reply.finish in ("length", *NO_ANSWER) else "stop"
    )


async def _first(tasks: set[asyncio.Task[Completion]]) -> Any:
    return await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
