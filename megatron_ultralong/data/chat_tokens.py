"""Rendered conversations to token ids and which of them are trained on, by any number of processes."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from typing import Any

import numpy
from numpy.typing import NDArray

from megatron_ultralong.config import UserError
from megatron_ultralong.data.chat import Rendered

BATCH = 1 << 19
"""Characters encoded in one go."""

Encoded = tuple[NDArray[numpy.int32], NDArray[numpy.uint8]]
"""(ids [n], 1 where a token is trained on [n])."""


def encode(backend: Any, batch: list[Rendered]) -> list[Encoded]:
    """The tokens of each text, all of it at once: what encoding the template's whole output gives. backend: a tokenizers.Tokenizer.

    A token is trained on where any of its characters is.
    """
    found = []
    for rendered, encoding in zip(batch, backend.encode_batch([r.text for r in batch], add_special_tokens=False), strict=True):
        starts, ends = numpy.array(encoding.offsets, numpy.int64).reshape(-1, 2).T
        begins, stops = numpy.array(rendered.spans, numpy.int64).reshape(-1, 2).T
        span = numpy.searchsorted(stops, starts, side="right")  # the first that ends after the token's start
        trained = (span < len(stops)) & (ends > numpy.append(begins, 0)[span])
        found.append((numpy.array(encoding.ids, numpy.int32), trained.astype(numpy.uint8)))
    return found


def encode_all(rendered: Iterable[Rendered], backend: Any, workers: int) -> Iterator[Encoded]:
    """`encode` of all, in order. workers: processes; 1 = this one, with the tokenizer's own threads."""
    if workers == 1:
        for batch in _batches(rendered):
            yield from encode(backend, batch)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(backend.to_str(),))
    waiting: deque[Any] = deque()
    try:
        for batch in _batches(rendered):
            waiting.append(pool.submit(_work, batch))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError("a tokenizer process ended suddenly (out of memory?); try again with fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def fitting(trained: NDArray[numpy.uint8], most: int) -> int:
    """Tokens of the longest beginning that ends with an answer and is no longer than `most`; 0 where there is none."""
    ends = numpy.flatnonzero(numpy.diff(trained, append=numpy.uint8(0)) == 255) + 1  # uint8: from 1 to 0 is 255
    fit = ends[ends <= most]
    return int(fit[-1]) if len(fit) else 0


def _batches(rendered: Iterable[Rendered]) -> Iterator[list[Rendered]]:
    batch: list[Rendered] = []
    size = 0
    for one in rendered:
        batch.append(one)
        size += len(one.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ---- processes -------------------------------------------------------------------------------------------------

_backend: Any = None
"""A worker process's own tokenizer."""


def _start_worker(tokenizer: str) -> None:
    global _backend
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer

    import tokenizers

    _backend = tokenizers.Tokenizer.from_str(tokenizer)
    main = parent_process()
    assert main is not None

    def end_with_main() -> None:  # a killed main process would leave its workers waiting forever
        connection.wait([main.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_main, daemon=True).start()


def _work(batch: list[Rendered]) -> list[Encoded]:
    return encode(_backend, batch)
