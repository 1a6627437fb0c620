"""Ask an OpenAI-compatible endpoint: one request, retried where that may help, or many of them
concurrently."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import openai
import tenacity

from megatron_ultralong.errors import UserError

OPENAI = "https://api.openai.com/v1"
_LONGEST_WAIT = 60.0  # seconds between two tries, where the endpoint does not specify it
_LONGEST_RETRY_AFTER = 600.0  # seconds
_ONLY_THIS_REQUEST = re.compile(  # in the body of a 400: other requests may succeed
    r"context_length|content_filter|content_policy|invalid_prompt|above_max_length|context length|context size|"
    r"context window|too long|too many tokens|maximum (?:input|prompt|model) length",
    re.IGNORECASE,
)


Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Failure(Exception):
    """A request without an answer. Reports count by `kind`; the message has the details."""

    def __init__(self, kind: str, detail: str, *, retryable: bool = True, retry_after: float = 0.0) -> None:
        super().__init__(detail)
        self.kind = kind
        self.retryable = retryable
        """Whether another try may help."""
        self.retry_after = retry_after
        """Seconds to wait before it, as requested by the endpoint."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The endpoint's answer to a request."""

    text: str
    finish: str | None
    """finish_reason: stop, length, content_filter."""
    refused: bool
    """The endpoint itself marks it as a refusal."""
    tokens: tuple[int, int] | None
    """Tokens of prompt and completion; None where the endpoint does not report them."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One model at one address, with timeouts and retries."""

    base_url: str
    model: str
    key_env: str
    """Name of the environment variable with the key."""
    timeout: float
    """Seconds for one try."""
    retries: int
    """Tries after the first."""
    backoff: float
    """Upper limit of the first wait before another try, seconds; it doubles."""


class Client:
    """Sends requests to an endpoint. Used inside a running event loop."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._key = api_key(endpoint.key_env, endpoint.base_url)
        self._client = openai.AsyncOpenAI(
            base_url=endpoint.base_url,
            api_key=self._key or "none",
            max_retries=0,
            timeout=endpoint.timeout,
        )
        # OpenAI's newer models accept only the new name, many local servers only the old one.
        self._limit = "max_completion_tokens" if endpoint.base_url == OPENAI else "max_tokens"
        exponential = tenacity.wait_random_exponential(multiplier=endpoint.backoff, max=_LONGEST_WAIT)
        self._retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(endpoint.retries + 1),
            reraise=True,
            retry=tenacity.retry_if_exception(lambda e: isinstance(e, Failure) and e.retryable),
            wait=lambda state: exponential(state) + _retry_after(state),
        )

    async def close(self) -> None:
        await self._client.close()

    async def chat(
        self, messages: list[dict[str, str]], temperature: float | None, max_tokens: int, **fields: Any
    ) -> Reply:
        """The model's answer to `messages`.

        temperature: None = the endpoint's default. fields: further fields of the request, those that OpenAI's
        client does not know in `extra_body`. Failure after the last try; UserError where no try can help
        (key, model, address, settings).
        """
        return await self._ask(
            self._client.chat.completions.create,
            messages=messages,
            temperature=temperature,
            **{self._limit: max_tokens},
            **fields,
        )

    async def complete(
        self, prompt: str | list[int], temperature: float | None, max_tokens: int, **fields: Any
    ) -> Reply:
        """The text after `prompt` (text or token ids, without a chat template), white space included; the
        rest as in `chat`."""
        return await self._ask(
            self._client.completions.create,
            prompt=prompt,
            temperature=temperature,
            max_tokens=max_tokens,
            **fields,
        )

    async def _ask(self, create: Any, **fields: Any) -> Reply:
        if fields["temperature"] is None:
            del fields["temperature"]
        return await self._retrying.copy()(self._try, create, fields)  # a copy: it has the state of its call

    async def _try(self, create: Any, fields: dict[str, Any]) -> Reply:
        endpoint = self._endpoint
        try:
            # The client's own timeout limits the time between two bytes.
            async with asyncio.timeout(endpoint.timeout):
                response = await create(model=endpoint.model, **fields)
        except (TimeoutError, openai.APITimeoutError):
            raise Failure("timeout", f"no answer in {endpoint.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise Failure("connection", self._redact(f"{error} {error.__cause__ or ''}")) from None
        except openai.APIStatusError as error:
            raise self._classify(error) from None
        except (openai.APIError, ValueError) as error:
            raise Failure("garbage body", self._redact(str(error))) from None
        return _parse(response, chat="messages" in fields)

    def _classify(self, error: openai.APIStatusError) -> Failure | UserError:
        """Whether another try may help, only this request is wrong, or no request can succeed."""
        endpoint, status, message = self._endpoint, error.status_code, self._redact(error.message)
        answer = f"{endpoint.base_url} answers {status}"
        if status == 401:
            advice = (
                f"the key in {endpoint.key_env} is not accepted"
                if self._key
                else f"a key is required; put it into {endpoint.key_env}, or see --key-env"
            )
            return UserError(f"{answer}: {advice}")
        if status == 403:
            return UserError(
                f"{answer}: the key in {endpoint.key_env} may not use model {endpoint.model!r}: {message}"
            )
        if status == 404:
            return UserError(
                f"{answer}: no model {endpoint.model!r}, or no such address; check --model and --base-url"
            )
        if error.code == "insufficient_quota":
            return UserError(
                f"{answer}: the account of the key in {endpoint.key_env} has no quota left: {message}"
            )
        if status in (408, 409, 429) or status >= 500:
            wait = _seconds(error.response.headers.get("retry-after"))
            return Failure(f"HTTP {status}", message, retry_after=wait)
        if status == 413 or _ONLY_THIS_REQUEST.search(f"{error.code} {message}"):
            return Failure(f"HTTP {status}", message, retryable=False)
        return UserError(f"{answer}, which another try will not change: {message}")

    def _redact(self, text: str) -> str:
        """One short line without the key, which some servers repeat."""
        line = " ".join(text.split())
        return (line.replace(self._key, "***") if self._key else line)[:300]


async def ask_many(
    ask: Callable[[Item], Awaitable[Answer]],
    items: Iterable[Item],
    concurrency: int,
    *,
    stop: asyncio.Event | None = None,
    grace: float | None = None,
) -> AsyncGenerator[tuple[Item, Answer | Failure], None]:
    """Yield each item with its answer, or with the Failure that `ask` raised, in order of completion.

    concurrency: calls of `ask` in flight at a time. No more items are taken once `stop` is set, or after any
    other exception, which is raised at the end; calls in flight may have been paid for, and have `grace`
    seconds to end (None = as long as they take). Use it inside contextlib.aclosing, so that leaving the loop
    early cancels them.
    """
    completed = asyncio.Queue[tuple[Item, Answer | Failure] | None]()
    stop, failed, errors = stop or asyncio.Event(), asyncio.Event(), list[Exception]()

    def until_stopped() -> Iterator[Item]:
        for item in items:
            if stop.is_set() or errors:
                return
            yield item

    rest = until_stopped()

    async def work() -> None:
        try:
            for item in rest:  # all take from the same iterator
                try:
                    completed.put_nowait((item, await ask(item)))
                except Failure as failure:
                    completed.put_nowait((item, failure))
                await asyncio.sleep(0)  # `ask` may have had its answer already: let the others run
        except Exception as error:
            errors.append(error)
            failed.set()
        finally:
            completed.put_nowait(None)

    async def cancel_after_grace() -> None:
        ends = [asyncio.create_task(event.wait()) for event in (stop, failed)]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
        await asyncio.sleep(grace or 0)
        for worker in workers:
            worker.cancel()

    workers = [asyncio.create_task(work()) for _ in range(concurrency)]
    tasks = workers if grace is None else [*workers, asyncio.create_task(cancel_after_grace())]
    try:
        for _ in workers:
            while (pair := await completed.get()) is not None:
                yield pair
        if errors:
            raise errors[0]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def iterate(generator: AsyncGenerator[Item, None]) -> Iterator[Item]:
    """Iterate over an async generator in code that is not async; it is closed however the iteration ends."""
    end: Any = object()

    async def advance() -> Item:
        return await anext(generator, end)

    async def close() -> None:
        await generator.aclose()

    with asyncio.Runner() as runner:
        try:
            while (item := runner.run(advance())) is not end:
                yield item
        finally:
            runner.run(close())


def api_key(key_env: str, base_url: str) -> str:
    """The key in the environment variable `key_env`; "" where it is not set, which OpenAI's own endpoint does
    not allow. UserError for a key that no HTTP header can contain."""
    value = os.environ.get(key_env, "").strip()
    if not value and base_url == OPENAI:
        raise UserError(
            f"{key_env} is not set: put the key into it, name another variable with --key-env, or a local server with --base-url"
        )
    if not (value.isascii() and value.isprintable()):
        raise UserError(f"{key_env} contains characters that no key has; set it again")
    return value


def check_base_url(url: str) -> str:
    """--base-url without a trailing slash. UserError where it is not an address, or contains a secret, which
    reports would show."""
    try:
        split = urlsplit(url)
        valid = split.scheme in ("http", "https") and split.hostname and split.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise UserError("--base-url: expected something like http://localhost:8000/v1")
    if "@" in split.netloc or split.query or split.fragment:
        raise UserError(
            "--base-url: give scheme, host, port and path only; put the key into the variable that --key-env names"
        )
    return url.rstrip("/")


def _parse(response: Any, chat: bool) -> Reply:
    """The reply in a response. Checked by hand: the client accepts any JSON."""
    try:
        choice = response.choices[0]
        message, finish = choice.message if chat else choice, choice.finish_reason
        text, refused = message.content if chat else message.text, bool(getattr(message, "refusal", None))
        text = "" if text is None else text
        text.encode()  # a lone surrogate is not text
    except (AttributeError, IndexError, TypeError, UnicodeEncodeError):
        raise Failure(
            "garbage body", f"no choices with a {'message' if chat else 'text'} in the answer"
        ) from None
    if chat:  # reasoning models: the answer follows the thoughts
        text = re.sub(r"\A\s*<think>.*?</think>", "", text, flags=re.DOTALL).strip()
    try:
        tokens = (int(response.usage.prompt_tokens), int(response.usage.completion_tokens))
    except (AttributeError, TypeError, ValueError):
        tokens = None
    return Reply(text=text, finish=finish, refused=refused, tokens=tokens)


def _retry_after(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    return error.retry_after if isinstance(error, Failure) else 0.0


def _seconds(header: str | None) -> float:
    """Of a Retry-After header, which contains seconds or a date."""
    if not header:
        return 0.0
    try:
        wait = float(header)
    except ValueError:
        try:
            wait = parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(0.0, wait), _LONGEST_RETRY_AFTER)
