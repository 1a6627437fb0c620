"""Asking for every answer that the journal lacks, some at a time, until all are there or there is a reason to
stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

from megatron_ultralong.data.refine import validate
from megatron_ultralong.data.refine.next_step import Request, Result, Settings, advance
from megatron_ultralong.data.refine.prompts import Prompts
from megatron_ultralong.data.refine.read import Example
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import endpoint_client
from megatron_ultralong.io.request_log import RequestLog

FAILURES_IN_A_ROW = 20
"""Requests that fail one after another before the run gives up."""
GRACE = 5.0
"""Seconds that a stopped run waits for answers on their way."""
_OTHER_WAY = 0.7  # least temperature of a second attempt: at 0 it would be the first once more


def ask_all(
    examples: Iterable[Example],
    count: int,
    settings: Settings,
    prompts: Prompts,
    journal: RequestLog,
    show_progress: bool,
) -> None:
    """UserError where asking on has no use. KeyboardInterrupt after Ctrl-C or SIGTERM."""

    async def ask() -> bool:
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
        with tqdm(total=count, unit="example", desc="refining", disable=not show_progress) as bar:
            run = _Run(settings, prompts, journal, client, bar)
            try:
                with _signals(run.interrupted):
                    await run.all(examples)
            finally:
                await client.close()
        return run.interrupted.is_set()

    if asyncio.run(ask()):
        raise KeyboardInterrupt(
            f"{journal.path} holds every answer so far; run the same command again to go on from it"
        )


@contextlib.contextmanager
def _signals(interrupted: asyncio.Event) -> Iterator[None]:
    """Ctrl-C and SIGTERM set `interrupted`, in the main thread; elsewhere they are not ours to answer."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, names = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(name) for name in names]
    for name in names:
        loop.add_signal_handler(name, interrupted.set)
    try:
        yield
    finally:
        for name, handler in zip(names, before, strict=True):
            loop.remove_signal_handler(name)
            signal.signal(name, handler)


class _Run:
    """All requests of one run, some at a time."""

    def __init__(
        self,
        settings: Settings,
        prompts: Prompts,
        journal: RequestLog,
        client: endpoint_client.Client,
        bar: Any,
    ) -> None:
        self.settings, self.prompts, self.journal, self.client, self.bar = (
            settings,
            prompts,
            journal,
            client,
            bar,
        )
        self.interrupted = asyncio.Event()
        self.out_of_budget = self._reached()
        self._row = 0
        self._counts: Counter[str] = Counter()
        self._locks: defaultdict[tuple[str, int], asyncio.Lock] = defaultdict(asyncio.Lock)
        """Two equal examples ask once."""

    async def all(self, examples: Iterable[Example]) -> None:
        """Ask until nothing is left, the budget is used up or the run is interrupted. UserError where asking
        on has no use."""
        rest = iter(examples)
        workers = [asyncio.create_task(self._work(rest)) for _ in range(self.settings.concurrency)]
        everything = asyncio.gather(*workers)
        stop = asyncio.create_task(self.interrupted.wait())
        ends: set[asyncio.Future[Any]] = {everything, stop}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not everything.done():
            await asyncio.wait({everything}, timeout=GRACE)
        done = everything.done()
        for task in (*workers, stop):
            task.cancel()
        await asyncio.gather(*workers, stop, everything, return_exceptions=True)
        if done:
            everything.result()

    async def _work(self, rest: Iterator[Example]) -> None:
        for example in rest:  # all workers take from the same
            await asyncio.sleep(
                0
            )  # thousands may be in the journal already: signals and answers are heard in between
            while not self._stopped():
                step = advance(example, self.settings, self.prompts, self.journal)
                if isinstance(step, Result):
                    self.bar.update()
                    break
                name = (step.key, step.attempt)
                async with self._locks[name]:
                    now = advance(example, self.settings, self.prompts, self.journal)
                    if now == step and not self._stopped():
                        await self._ask(step)
                self._locks.pop(name, None)
            if self._stopped():
                return

    def _stopped(self) -> bool:
        return self.interrupted.is_set() or self.out_of_budget

    async def _ask(self, request: Request) -> None:
        domain, settings = request.example.record["domain"], self.settings
        temperature = settings.temperature
        if request.attempt and temperature is not None:
            temperature = max(temperature, _OTHER_WAY)
        record: dict[str, Any] = {
            "key": request.key,
            "id": request.example.record["id"],
            "attempt": request.attempt,
        }
        try:
            reply = await self.client.chat(
                self.prompts.ask(domain, request.before, request.answer), temperature, settings.max_tokens
            )
        except endpoint_client.Failure as failure:
            self.journal.add({**record, "failed": failure.kind, "detail": str(failure)})
            self._row += failure.retryable  # what is wrong with one example says nothing of the endpoint
            self._show("failed")
            if self._row >= FAILURES_IN_A_ROW:
                raise UserError(
                    f"{self._row} requests in a row failed, the last by {failure.kind} ({failure}); when {settings.base_url} is "
                    "well again, run the same command with --retry-failed"
                ) from None
            return
        self._row = 0
        reason = validate.reason_against(
            reply.text,
            request.answer,
            domain=domain,
            finish=reply.finish,
            refused=reply.refused,
            tags=self.prompts.tags(domain),
        )
        tokens_in, tokens_out = reply.tokens or (0, 0)
        self.journal.add(
            {
                **record,
                "answer": reply.text,
                **({"rejected": reason} if reason else {}),
                "tokens_in": tokens_in,
                "tokens_out": tokens_out,
            }
        )
        self._show("rejected" if reason else "refined")
        if settings.budget is not None:
            if reply.tokens is None:
                raise UserError(
                    f"{settings.base_url} does not say how many tokens an answer took, so --budget cannot be kept; leave it out"
                )
            self.out_of_budget = self._reached()

    def _reached(self) -> bool:
        cost = self.settings.cost(self.journal.tokens_in, self.journal.tokens_out)
        return cost is not None and self.settings.budget is not None and cost >= self.settings.budget

    def _show(self, what: str) -> None:
        self._counts[what] += 1
        journal, cost = self.journal, self.settings.cost(self.journal.tokens_in, self.journal.tokens_out)
        usd = {} if cost is None else {"usd": f"{cost:.2f}"}
        self.bar.set_postfix(
            tokens_in=journal.tokens_in,
            tokens_out=journal.tokens_out,
            **usd,
            rejected=self._counts["rejected"],
            failed=self._counts["failed"],
            refresh=False,
        )
