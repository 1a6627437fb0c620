"""Other packages' rings, where installed, on the same virtual ranks and with the same kernels.

None of them is a dependency. PyTorch's own ring (torch.distributed.tensor.experimental, a private interface:
checked with torch 2.13) also runs on threads, which share a process group from PyTorch's tests. It is given
our kernels, so that only the schedules differ. ring-flash-attn and yunchang are in peers_flash.py.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ultralong.context_parallel.kernels import select as kernels
from megatron_ultralong.context_parallel.placement import Placement
from megatron_ultralong.measure import peers_flash
from megatron_ultralong.measure.virtual_run import AttentionMethod, ThreadContext

TIMEOUT = 600.0
"""Seconds after which a rank of another package is considered hung."""


def methods(cp: int, dtype: torch.dtype) -> Iterator[AttentionMethod]:
    """Yield the rows of each package; the note of a row without `make` says why it cannot be run."""
    missing = _no_torch_ring()
    for rotate in ("allgather", "alltoall"):
        name = f"PyTorch's context parallel ({rotate}), CP {cp}"
        make = None if missing else partial(_torch_ring, rotate)
        yield AttentionMethod(
            key=f"torch {rotate}",
            name=name,
            cp=cp,
            make=make,
            ours=False,
            note=missing,
            runner=ThreadedRankRunner,
        )
    # flash_attn has no float32 kernels. In float32 these packages would use one buffer for inputs and sums,
    # and return wrong gradients.
    for package in peers_flash.PACKAGES:
        missing = peers_flash.missing(package) or (
            "needs --dtype bf16, as flash_attn does" if dtype == torch.float32 else ""
        )
        yield AttentionMethod(
            key=package,
            name=f"{package}, zigzag, CP {cp}",
            cp=cp,
            make=None if missing else partial(peers_flash.zigzag, package),
            ours=False,
            note=missing or peers_flash.note(package),
        )


# ---- PyTorch's own -----------------------------------------------------------------------------


def _no_torch_ring() -> str:
    """Why PyTorch's ring cannot be called here; empty if it can."""
    try:
        from torch.distributed.tensor.experimental._context_parallel import _attention
        from torch.testing._internal.distributed import multi_threaded_pg
    except ImportError:
        return f"not in torch {torch.__version__}: pip install 'torch>=2.10'"
    needed = (
        (_attention, "_templated_ring_attention"),
        (_attention, "_templated_ring_attention_backward"),
        (_attention, "set_rotate_method"),
        (multi_threaded_pg, "_install_threaded_pg"),
    )
    absent = [name for module, name in needed if not hasattr(module, name)]
    return f"torch {torch.__version__} has no {absent[0]}" if absent else ""


def _torch_ring(rotate: str, group: dist.ProcessGroup, placement: Placement | None) -> tuple[Any, Any]:
    """(forward, backward) of this rank: zigzag ("load balance") order and float32 sums, PyTorch's
    defaults."""
    from torch.distributed.tensor.experimental._context_parallel import _attention

    assert placement is None
    _attention.set_rotate_method(rotate)

    def kernel(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        return kernels.forward(query, key, value, is_causal)

    def kernel_backward(
        *,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        is_causal: bool,
    ) -> kernels.QKVGradients:
        return kernels.backward(grad_out, query, key, value, out, logsumexp, is_causal)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = _attention._templated_ring_attention(group, 2, kernel, q, k, v, True)[:2]
        return out, lse

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> kernels.QKVGradients:
        dq, dk, dv = _attention._templated_ring_attention_backward(
            group, 2, kernel_backward, dout, "grad_out", q, k, v, out, lse, True
        )[:3]
        return dq, dk, dv

    return forward, backward


class ThreadedRankRunner:
    """Runs ranks as threads that live until `close` and share a torch ProcessGroup from PyTorch's own tests.

    Only one may exist at a time in a process.
    """

    sent: int | None = None

    def __init__(self, cp: int) -> None:
        from torch.testing._internal.distributed import multi_threaded_pg

        if dist.is_initialized():
            raise RuntimeError("torch.distributed is in use in this process")
        self.cp, self._module = cp, multi_threaded_pg
        multi_threaded_pg._install_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(True)
        store = dist.HashStore()
        self._work: list[queue.Queue[Any]] = [queue.Queue() for _ in range(cp)]
        self._done: queue.Queue[tuple[int, Any, BaseException | None]] = queue.Queue()
        self._threads = [
            threading.Thread(target=self._serve, args=(rank, store), daemon=True) for rank in range(cp)
        ]
        for thread in self._threads:
            thread.start()

    def run(
        self, function: Callable[[Any, int], Any], context: ThreadContext = contextlib.nullcontext
    ) -> list[Any]:
        for work in self._work:
            work.put((function, context))
        results: list[Any] = [None] * self.cp
        for _ in range(self.cp):
            rank, result, failure = self._done.get(timeout=TIMEOUT)
            if failure is not None:
                # Other ranks may wait in a collective for this rank forever: end them.
                self._module.ProcessLocalGroup.exception_handle(failure)
                raise failure
            results[rank] = result
        return results

    def close(self) -> None:
        for work in self._work:
            work.put(None)
        for thread in self._threads:
            thread.join(timeout=10.0)
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        self._module._uninstall_threaded_pg()

    def _serve(self, rank: int, store: dist.Store) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=self.cp, store=store)
        except BaseException as failure:
            self._done.put((rank, None, failure))
            return
        while (work := self._work[rank].get()) is not None:
            function, context = work
            try:
                with torch.no_grad(), context():
                    self._done.put((rank, function(dist.group.WORLD, rank), None))
            except BaseException as failure:
                self._done.put((rank, None, failure))
        # The rest of the group ends with this thread. `dist.destroy_process_group` fails in torch 2.11 and in
        # some later versions: it clears attributes that PyTorch's stand-in for threads does not have
        # (pytorch/pytorch, pull requests 175099 and 196786).
        torch._C._distributed_c10d._unregister_all_process_groups()
