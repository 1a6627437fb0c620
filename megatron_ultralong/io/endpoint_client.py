"""Asking an OpenAI-compatible endpoint for one completion, patiently: what may pass is tried again, what will
not ends the run."""

from __future__ import annotations

import asyncio
import os
import re
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import openai
import tenacity

from megatron_ultralong.errors import UserError

OPENAI = "https://api.openai.com/v1"
_LONGEST_WAIT = 60.0  # seconds between two tries, where the endpoint names no time itself
_LONGEST_RETRY_AFTER = 600.0  # seconds
_OF_THE_EXAMPLE = re.compile(  # in the body of a 400: only this request is wrong, not how all are asked
    r"context_length|content_filter|content_policy|invalid_prompt|above_max_length|context length|context size|context window|too long|"
    r"too many tokens|maximum (?:input|prompt|model) length",
    re.IGNORECASE,
)


class Failure(Exception):
    """A request without an answer. `kind` is what reports count by, the text says more."""

    def __init__(self, kind: str, detail: str, *, again: bool = True, retry_after: float = 0.0) -> None:
        super().__init__(detail)
        self.kind = kind
        self.again = again
        """Whether another try may help."""
        self.retry_after = retry_after
        """Seconds that the endpoint wants to be left alone."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the endpoint answered."""

    text: str
    finish: str | None
    """finish_reason: stop, length, content_filter."""
    refused: bool
    """The endpoint itself marks it as a refusal."""
    tokens: tuple[int, int] | None
    """In and out; None where the endpoint does not say."""


class Client:
    """One model at one endpoint. Used inside a running event loop."""

    def __init__(
        self,
        base_url: str,
        model: str,
        key_env: str,
        *,
        timeout: float,
        retries: int,
        max_tokens: int,
        backoff: float,
    ) -> None:
        """timeout: seconds for one try. retries: tries after the first. backoff: upper limit of the first
        wait, seconds; it doubles."""
        self._model, self._key_env, self._base_url, self._timeout = model, key_env, base_url, timeout
        self._key = key(key_env, base_url)
        self._client = openai.AsyncOpenAI(
            base_url=base_url, api_key=self._key or "none", max_retries=0, timeout=timeout
        )
        # OpenAI's newer models take only the new name, many local servers only the old one.
        self._limit = {"max_completion_tokens" if base_url == OPENAI else "max_tokens": max_tokens}
        growing = tenacity.wait_random_exponential(multiplier=backoff, max=_LONGEST_WAIT)
        self._retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(retries + 1),
            reraise=True,
            retry=tenacity.retry_if_exception(_again),
            wait=lambda state: growing(state) + _retry_after(state),
        )

    async def close(self) -> None:
        await self._client.close()

    async def ask(
        self,
        messages: list[dict[str, str]],
        temperature: float | None,
        max_tokens: int | None = None,
        **more: Any,
    ) -> Reply:
        """The answer to `messages`. max_tokens: None = the client's; more: other fields of the request, those
        that OpenAI's client does not know in `extra_body`. Failure after the last try; UserError for what no
        try mends (key, model, address, settings)."""
        limit = self._limit if max_tokens is None else dict.fromkeys(self._limit, max_tokens)
        return await self._patiently(
            self._client.chat.completions.create,
            messages=messages,
            **limit,
            **_given(temperature=temperature),
            **more,
        )

    async def complete(
        self, prompt: str | list[int], temperature: float | None, max_tokens: int, **more: Any
    ) -> Reply:
        """What follows `prompt` (text or token ids, as it is: no chat template); the rest as `ask`. Its white
        space stays."""
        return await self._patiently(
            self._client.completions.create,
            prompt=prompt,
            max_tokens=max_tokens,
            **_given(temperature=temperature),
            **more,
        )

    async def _patiently(self, create: Any, **asked: Any) -> Reply:
        return await self._retrying.copy()(
            self._once, create, asked
        )  # a copy: it keeps the state of its call

    async def _once(self, create: Any, asked: dict[str, Any]) -> Reply:
        try:
            async with asyncio.timeout(self._timeout):  # the client's own limit is one between two bytes
                found = await create(model=self._model, **asked)
        except (TimeoutError, openai.APITimeoutError):
            raise Failure("timeout", f"no answer in {self._timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise Failure("connection", self._safe(f"{error} {error.__cause__ or ''}")) from None
        except openai.APIStatusError as error:
            raise self._judged(error) from None
        except (openai.APIError, ValueError) as error:
            raise Failure("garbage body", self._safe(str(error))) from None
        return _reply(found, chat="messages" in asked)

    def _judged(self, error: openai.APIStatusError) -> Failure | UserError:
        status, said = error.status_code, self._safe(error.message)
        where = f"{self._base_url} answers {status}"
        if status == 401:
            todo = (
                f"the key in {self._key_env} is not accepted"
                if self._key
                else f"a key is needed; put it into {self._key_env}, or see --key-env"
            )
            return UserError(f"{where}: {todo}")
        if status == 403:
            return UserError(f"{where}: the key in {self._key_env} may not use model {self._model!r}: {said}")
        if status == 404:
            return UserError(
                f"{where}: no model {self._model!r} there, or no such address; check --model and --base-url"
            )
        if error.code == "insufficient_quota":
            return UserError(f"{where}: the account of the key in {self._key_env} has no quota left: {said}")
        if status in (408, 409, 429) or status >= 500:
            return Failure(
                f"HTTP {status}", said, retry_after=_seconds(error.response.headers.get("retry-after"))
            )
        if status == 413 or _OF_THE_EXAMPLE.search(f"{error.code} {said}"):
            return Failure(f"HTTP {status}", said, again=False)
        return UserError(f"{where} and will not be asked again: {said}")

    def _safe(self, text: str) -> str:
        """One short line without the key, which some servers repeat."""
        line = " ".join(text.split())
        return (line.replace(self._key, "***") if self._key else line)[:300]


def key(key_env: str, base_url: str) -> str:
    """The key; empty where none is set, which OpenAI's own endpoint refuses. UserError for a key that no
    header can carry."""
    found = os.environ.get(key_env, "").strip()
    if not found and base_url == OPENAI:
        raise UserError(
            f"{key_env} is not set: put the key into it, name another variable with --key-env, or a local server with --base-url"
        )
    if not (found.isascii() and found.isprintable()):
        raise UserError(f"{key_env} holds signs that no key has; set it again")
    return found


def checked_url(url: str) -> str:
    """--base-url without a last slash. UserError for one that cannot be used, or that holds a secret, which
    reports would show."""
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        whole = False
    if not whole:
        raise UserError("--base-url: expected something like http://localhost:8000/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            "--base-url: give scheme, host, port and path only; a key belongs into the variable that --key-env names"
        )
    return url.rstrip("/")


def _reply(found: Any, chat: bool) -> Reply:
    """Checked by hand: the client takes any JSON for an answer."""
    try:
        choice = found.choices[0]
        message, finish = choice.message if chat else choice, choice.finish_reason
        text, refused = message.content if chat else message.text, bool(getattr(message, "refusal", None))
        text = "" if text is None else text
        text.encode()  # half of a surrogate pair is no text
    except (AttributeError, IndexError, TypeError, UnicodeEncodeError):
        raise Failure(
            "garbage body", f"no choices with a {'message' if chat else 'text'} in the answer"
        ) from None
    if chat:  # Models that think aloud: what counts comes after.
        text = re.sub(r"\A\s*<think>.*?</think>", "", text, flags=re.DOTALL).strip()
    try:
        tokens = (int(found.usage.prompt_tokens), int(found.usage.completion_tokens))
    except (AttributeError, TypeError, ValueError):
        tokens = None
    return Reply(text=text, finish=finish, refused=refused, tokens=tokens)


def _given(**settings: Any) -> dict[str, Any]:
    """Those that are set: what is None is the endpoint's own choice."""
    return {name: value for name, value in settings.items() if value is not None}


def _again(error: BaseException) -> bool:
    return isinstance(error, Failure) and error.again


def _retry_after(state: tenacity.RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    return error.retry_after if isinstance(error, Failure) else 0.0


def _seconds(header: str | None) -> float:
    """Of a Retry-After header, which gives seconds or a date."""
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
