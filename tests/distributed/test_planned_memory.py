"""Bytes that a step of two layers of Llama-3.1-8B with embedding and loss holds, counted, against plan.py's sums and a bound.

Counted at the real shape and without its work: tensors are fake (they have shapes and storages, no data), so only what kernels hold
inside is not seen. Other context parallel ranks are fake as well: what is sent to them goes nowhere.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ultralong import plan, plan_layer
from megatron_ultralong.config import Memory, Parallel, Rope, Run, Runtime, Train
from megatron_ultralong.recipes import LLAMA_3_1_8B
from tests.spawn import run_ranks

K = 1024
KEPT = Memory(checkpoint="attention", offload="off", layer_chunk=8 * K, loss_chunk=4 * K)
CHUNKED = replace(KEPT, offload="attention", query_chunks=True)


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations made, at most at one time; without bytes' own tensors, which stand for host memory here."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._outside: set[int] = set()
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and x.dtype != torch.uint8:
                storage = x.untyped_storage()
                if storage._cdata not in self._known and storage._cdata not in self._outside:
                    self._known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def without(self, *tensors: torch.Tensor) -> Alive:
        """These were there before."""
        self._outside = {x.untyped_storage()._cdata for x in tensors}
        return self

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class Peers:
    """One of `size` ranks whose transfers are over at once."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = size - 1, size

    def start(self, send: torch.Tensor, receive: torch.Tensor) -> Any:
        return self

    all_to_all = all_gather = reduce_scatter = start

    def wait(self) -> None:
        pass


def counted(ranks: Any, memory: Memory, tokens: int, layers: int = 2, parallel: Parallel | None = None) -> int:
    """Peak bytes of a step on `tokens` of a rank's tokens, beyond weights and their gradients."""
    from megatron_ultralong.context_parallel import attend
    from megatron_ultralong.model import llama

    p = parallel or Parallel()
    groups = attend.ContextGroups(ring=Peers(p.cp // p.ulysses), ulysses=Peers(p.ulysses), way=p.cp_way)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attend, "split", lambda *args, **kwargs: groups)
        [chunk] = llama.build(replace(LLAMA_3_1_8B, layers=layers), Rope(), ranks, Parallel(), memory, "bf16")
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        for module in chunk.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(fake.from_tensor(parameter.data))
                    module._parameters[name].grad = torch.zeros_like(module._parameters[name])
        row, mask = torch.zeros(1, tokens + 1, dtype=torch.int64), torch.ones(1, tokens)
        weights = list(chunk.parameters())
        with Alive().without(row, mask, *weights, *(weight.grad for weight in weights)) as alive:
            chunk(row[:, :-1], row[:, 1:], mask).backward()
    return alive.most


def planned(memory: Memory, tokens: int, layers: int = 2, parallel: Parallel | None = None) -> int:
    """The same by plan.py, without what it adds for the inside of kernels."""
    p, model = parallel or Parallel(), replace(LLAMA_3_1_8B, layers=layers)
    run = Run(name="x", memory=memory, parallel=p, train=Train(seq_length=tokens * p.cp, global_batch=1, iterations=1, lr=1.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_layer, "_kernel", lambda shape, rows: 0)
        parts = plan.memory(run, model, p.cp)
    return plan.total({part: size for part, size in parts.items() if part not in ("weights", "gradients (fp32)", "optimizer (fp32)")})


CASES: dict[str, tuple[Memory, int, Parallel]] = {
    "default": (KEPT, 2, Parallel()),
    "offloaded": (replace(KEPT, offload="attention"), 4, Parallel()),
    "inputs offloaded": (replace(KEPT, offload="checkpoints"), 4, Parallel()),
    "query chunks": (replace(CHUNKED, offload="off"), 2, Parallel()),
    "query chunks, offloaded": (CHUNKED, 2, Parallel()),
    "query chunks in a ring": (CHUNKED, 2, Parallel(cp=4)),
    "ring": (KEPT, 2, Parallel(cp=4)),
    "gather": (KEPT, 2, Parallel(cp=4, cp_way="gather")),
    "all-to-all": (KEPT, 2, Parallel(cp=4, ulysses=4)),
    "all-to-all, KV heads twice": (KEPT, 2, Parallel(cp=16, ulysses=16)),
    "all-to-all and ring": (KEPT, 2, Parallel(cp=8, ulysses=4)),
    "all-to-all and gather": (KEPT, 2, Parallel(cp=8, ulysses=4, cp_way="gather")),
}


def test_plans_are_what_is_counted() -> None:
    run_ranks(_plans, 1)


def _plans(rank: int, world: int) -> None:
    from megatron_ultralong.runtime import launch

    ranks = launch.start(Runtime(device="cpu"), Parallel())
    tokens, found = 64 * K, {}
    for name, (memory, layers, parallel) in CASES.items():
        found[name] = counted(ranks, memory, tokens, layers, parallel), planned(memory, tokens, layers, parallel)
        print(f"{name}: counted {found[name][0] / tokens / K:.2f} KiB a token, planned {found[name][1] / tokens / K:.2f}: {found[name][0] / found[name][1]:.3f}", flush=True)
    off = {name: f"{have / want:.3f}" for name, (have, want) in found.items() if not 0.9 <= have / want <= 1.1}
    assert not off, off


def test_longest_sequences_take_24_kib_a_token() -> None:
    run_ranks(_longest, 1)


def _longest(rank: int, world: int) -> None:
    from megatron_ultralong.runtime import launch

    ranks = launch.start(Runtime(device="cpu"), Parallel())
    short, long = (counted(ranks, CHUNKED, tokens) for tokens in (128 * K, 256 * K))
    print(short / 128 / K / K, long / 256 / K / K, (long - short) / 128 / K / K, flush=True)
    assert long - short <= 21 * K * 128 * K
    # What does not grow with the sequence counts too, from a million tokens on.
    assert long + 768 * K * (long - short) / (128 * K) <= 24 * K * 1024 * K
