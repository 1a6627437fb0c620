"""Concurrent requests for all answers that the request log lacks, until it is complete or the run has to
stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from megatron_ultralong.data.refine import validate
from megatron_ultralong.data.refine.next_step import RefinedExample, RewriteRequest, next_step
from megatron_ultralong.data.refine.prompts import RewritePrompts
from megatron_ultralong.data.refine.read import RefineExample
from megatron_ultralong.data.refine.settings import RefineSettings
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import endpoint_client
from megatron_ultralong.io.progress import progress_bar
from megatron_ultralong.io.request_log import RequestLog

MAX_CONSECUTIVE_FAILURES = 20
GRACE = 5.0
"""Seconds that a stopped run waits for requests in flight."""
_RETRY_TEMPERATURE = 0.7
"""Least temperature of a second attempt: at 0 it would repeat the first."""


def request_all(
    examples: Iterable[RefineExample],
    count: int,
    settings: RefineSettings,
    prompts: RewritePrompts,
    log: RequestLog,
    show_progress: bool,
) -> None:
    """Send requests until the log has all answers or the budget is spent. count: examples, for the progress
    bar.

    UserError if further requests are pointless. KeyboardInterrupt after Ctrl-C or SIGTERM.
    """

    async def run() -> bool:
        client = endpoint_client.Client(
            endpoint_client.Endpoint(
                base_url=settings.base_url,
                model=settings.model,
                key_env=settings.key_env,
                timeout=settings.timeout,
                retries=settings.retries,
                backoff=settings.backoff,
            )
        )
        with progress_bar("refining", count, "example", hidden=not show_progress) as bar:
            requester = _Requester(settings, prompts, log, client, bar)
            stop = requester.interrupted
            try:
                with _signals_set(stop):
                    answers = endpoint_client.ask_many(
                        requester.refine, examples, settings.concurrency, stop=stop, grace=GRACE
                    )
                    async with contextlib.aclosing(answers):
                        async for _ in answers:
                            pass
            finally:
                await client.close()
        return stop.is_set()

    if asyncio.run(run()):
        raise KeyboardInterrupt(
            f"{log.path} contains every answer so far; run the same command again to resume"
        )


@contextlib.contextmanager
def _signals_set(event: asyncio.Event) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM set `event`. Only the main thread can handle signals; in other threads this does
    nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, names = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(name) for name in names]
    for name in names:
        loop.add_signal_handler(name, event.set)
    try:
        yield
    finally:
        for name, handler in zip(names, before, strict=True):
            loop.remove_signal_handler(name)
            signal.signal(name, handler)


class _Requester:
    """The state that the concurrent requests of one run share."""

    def __init__(
        self,
        settings: RefineSettings,
        prompts: RewritePrompts,
        log: RequestLog,
        client: endpoint_client.Client,
        bar: Any,
    ) -> None:
        self.settings, self.prompts, self.log, self.client, self.bar = settings, prompts, log, client, bar
        self.interrupted = asyncio.Event()
        self._ended = self._budget_spent()
        self._consecutive_failures = 0
        self._counts: Counter[str] = Counter()
        self._locks: defaultdict[tuple[str, int], asyncio.Lock] = defaultdict(asyncio.Lock)
        """Of each request in flight: equal examples send it once."""

    async def refine(self, example: RefineExample) -> None:
        """Send the requests of an example until it is refined or the run stops. UserError if further requests
        are pointless."""
        while not self._stopped():
            step = next_step(example, self.settings, self.prompts, self.log)
            if isinstance(step, RefinedExample):
                self.bar.update()
                return
            name = (step.key, step.attempt)
            async with self._locks[name]:
                now = next_step(example, self.settings, self.prompts, self.log)
                if now == step and not self._stopped():
                    try:
                        await self._request(step)
                    except UserError:
                        self._ended = True
                        raise
            self._locks.pop(name, None)

    def _stopped(self) -> bool:
        return self.interrupted.is_set() or self._ended

    async def _request(self, request: RewriteRequest) -> None:
        domain, settings = request.example.record["domain"], self.settings
        temperature = settings.temperature
        if request.attempt and temperature is not None:
            temperature = max(temperature, _RETRY_TEMPERATURE)
        record: dict[str, Any] = {
            "key": request.key,
            "id": request.example.record["id"],
            "attempt": request.attempt,
        }
        try:
            reply = await self.client.chat(
                self.prompts.messages(domain, request.history, request.answer),
                temperature,
                settings.max_tokens,
            )
        except endpoint_client.Failure as failure:
            self.log.add({**record, "failed": failure.kind, "detail": str(failure)})
            self._note_failure(failure)
            return
        self._consecutive_failures = 0
        rejected = validate.rejection_reason(
            reply, request.answer, domain=domain, tags=self.prompts.tags(domain)
        )
        tokens_in, tokens_out = reply.tokens or (0, 0)
        record |= {"answer": reply.text, **({"rejected": rejected} if rejected else {})}
        self.log.add({**record, "tokens_in": tokens_in, "tokens_out": tokens_out})
        self._show("rejected" if rejected else "refined")
        if settings.budget is not None:
            if reply.tokens is None:
                raise UserError(
                    f"{settings.base_url} does not report the tokens of an answer, so --budget cannot be kept; leave it out"
                )
            self._ended |= self._budget_spent()

    def _note_failure(self, failure: endpoint_client.Failure) -> None:
        # A failure of one example only says nothing about the endpoint.
        self._consecutive_failures += failure.retryable
        self._show("failed")
        if self._consecutive_failures >= MAX_CONSECUTIVE_FAILURES:
            raise UserError(
                f"{self._consecutive_failures} requests in a row failed, the last with {failure.kind} ({failure}); once "
                f"{self.settings.base_url} works again, run the same command with --retry-failed"
            )

    def _budget_spent(self) -> bool:
        cost = self.settings.cost(self.log.tokens_in, self.log.tokens_out)
        return cost is not None and self.settings.budget is not None and cost >= self.settings.budget

    def _show(self, outcome: str) -> None:
        self._counts[outcome] += 1
        cost = self.settings.cost(self.log.tokens_in, self.log.tokens_out)
        self.bar.set_postfix(
            tokens_in=self.log.tokens_in,
            tokens_out=self.log.tokens_out,
            **({} if cost is None else {"usd": f"{cost:.2f}"}),
            rejected=self._counts["rejected"],
            failed=self._counts["failed"],
            refresh=False,
        )
