"""Bytes that a step of two layers of Llama-3.1-8B with embedding and loss holds, counted, against
planning/memory.py's sums and a bound.

Counted at the real shape and without its work: tensors are on the meta device, where they have shapes and
storages but no data, so only what kernels hold inside is not seen. Other context parallel ranks are fake:
what is sent to them goes nowhere.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_ultralong import shapes
from megatron_ultralong.config import Memory, Model, Parallel, Run, Runtime, Train
from megatron_ultralong.planning import layer_memory
from megatron_ultralong.planning.memory import gpu_memory, total
from megatron_ultralong.rope.methods import Unscaled
from tests.spawn import run_ranks

K = 1024
LLAMA_3_1_8B = replace(shapes.LLAMA_3_1_8B, layers=2)
# The loss of a small vocabulary is no more than the layers, so that both are seen.
LAYERS, MORE = replace(LLAMA_3_1_8B, vocab_size=4 * K), replace(LLAMA_3_1_8B, vocab_size=4 * K, layers=4)
KEPT = Memory(recompute="all_but_attention", offload="off", layer_chunk=8 * K, loss_chunk=4 * K)
CHUNKED = replace(KEPT, offload="all", query_chunks=True)


META = torch.device("meta")


def _storages(tensors: Any) -> set[int]:
    return {x.untyped_storage()._cdata for x in tree_iter(tensors) if isinstance(x, torch.Tensor)}


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations made, at most at one time; without those of bytes, which are the
    host's memory here."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") is not None:  # the host's memory too
            kwargs = {**kwargs, "device": META}
        result = function(*args, **kwargs)
        for x in tree_iter(result):
            if not isinstance(x, torch.Tensor) or x.dtype == torch.uint8:
                continue
            storage = x.untyped_storage()
            if storage._cdata not in self._known and storage._cdata not in _storages((args, kwargs)):
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class FakeCommunicator:
    """One of `size` ranks whose transfers end at once."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = size - 1, size

    def send_recv(self, send: Any, receive: Any) -> Any:
        return self

    exchange = all_to_all = all_gather = reduce_scatter = send_recv

    def wait(self) -> None:
        pass


def counted(ranks: Any, memory: Memory, model: Model, tokens: int, parallel: Parallel | None = None) -> int:
    """Peak bytes of a step on `tokens` of a rank's tokens, beyond weights and their gradients."""
    from megatron_ultralong.context_parallel import api
    from megatron_ultralong.context_parallel.kernels import select
    from megatron_ultralong.model import llama

    p = parallel or Parallel()
    groups = api.ContextGroups(
        ring=FakeCommunicator(p.cp // p.ulysses),
        ulysses=FakeCommunicator(p.ulysses),
        cp_comm_type=p.cp_comm_type,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "split_group", lambda *args, **kwargs: groups)
        patch.setattr(select, "choose", lambda *args: "cpu")  # also for tensors without data
        [chunk] = llama.build(model, Unscaled(), ranks, Parallel(), memory, "bf16")
        for module in chunk.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(parameter.data.to(META))
                    module._parameters[name].grad = torch.zeros_like(module._parameters[name])
        row = torch.zeros(1, tokens + 1, dtype=torch.int64, device=META)
        with Alive() as alive:
            chunk(row[:, :-1], row[:, 1:], torch.ones(1, tokens, device=META)).backward()
    return alive.most


def planned(memory: Memory, model: Model, tokens: int, parallel: Parallel | None = None) -> int:
    """The same by planning/memory.py, without what it adds for the inside of kernels."""
    p = parallel or Parallel()
    run = Run(
        name="x",
        memory=memory,
        parallel=p,
        train=Train(seq_length=tokens * p.cp, global_batch=1, iterations=1, lr=1.0),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_memory, "_kernel_workspace", lambda *sizes: 0)
        parts = gpu_memory(run, model, p.cp)
    return total(
        {
            part: size
            for part, size in parts.items()
            if part not in ("weights", "gradients (fp32)", "optimizer (fp32)")
        }
    )


QK_NORM = replace(shapes.QWEN3_8B, layers=2, vocab_size=4 * K)
BIASES = replace(LAYERS, qkv_bias=True, attention_output_bias=True, mlp_bias=True)
CASES: dict[str, tuple[Memory, Model, Parallel]] = {
    "loss": (KEPT, LLAMA_3_1_8B, Parallel()),
    "default": (KEPT, LAYERS, Parallel()),
    "offloaded": (replace(KEPT, offload="all"), MORE, Parallel()),
    "inputs offloaded": (replace(KEPT, offload="layer_inputs"), MORE, Parallel()),
    "query chunks": (replace(CHUNKED, offload="off"), LAYERS, Parallel()),
    "query chunks, offloaded": (CHUNKED, LAYERS, Parallel()),
    "query chunks in a ring": (replace(CHUNKED, layer_chunk=2 * K), LAYERS, Parallel(cp=4)),
    "ring": (KEPT, LAYERS, Parallel(cp=4)),
    "gather": (KEPT, LAYERS, Parallel(cp=4, cp_comm_type="all_gather")),
    "all-to-all": (KEPT, LAYERS, Parallel(cp=4, ulysses=4)),
    "all-to-all, KV heads twice": (KEPT, LAYERS, Parallel(cp=16, ulysses=16)),
    "all-to-all and ring": (KEPT, LAYERS, Parallel(cp=8, ulysses=4)),
    "norms of queries and keys": (KEPT, QK_NORM, Parallel()),
    "norms, query chunks": (CHUNKED, QK_NORM, Parallel()),
    "biases": (KEPT, BIASES, Parallel()),
    "all-to-all and gather": (KEPT, LAYERS, Parallel(cp=8, ulysses=4, cp_comm_type="all_gather")),
}


@pytest.mark.slow
@pytest.mark.complete
def test_plans_are_what_is_counted() -> None:
    run_ranks(_plans, 1)


def _plans(rank: int, world: int) -> None:
    from megatron_ultralong.runtime import launch

    ranks = launch.start(Runtime(device="cpu"), Parallel())
    tokens, found = 64 * K, {}
    for name, (memory, model, parallel) in CASES.items():
        found[name] = (
            counted(ranks, memory, model, tokens, parallel),
            planned(memory, model, tokens, parallel),
        )
        have, want = (size / tokens / K for size in found[name])
        print(f"{name}: counted {have:.2f} KiB a token, planned {want:.2f}: {have / want:.3f}", flush=True)
    _longest(ranks)
    off = {
        name: f"{have / want:.3f}" for name, (have, want) in found.items() if not 0.9 <= have / want <= 1.1
    }
    assert not off, off


def _longest(ranks: Any) -> None:
    """The longest sequences take at most 24 KiB per token: all that a step of 1M tokens holds, including what
    does not grow with the sequence (weight gradients of a layer, the MLP and the logits of a chunk).

    From 256K tokens on it grows by the same number of bytes with each token.
    """
    sizes = [counted(ranks, CHUNKED, LLAMA_3_1_8B, tokens) for tokens in (256 * K, 320 * K)]
    have = sizes[1] + (sizes[1] - sizes[0]) * (1024 - 320) // 64
    print(
        f"counted {have / 1024 / K / K:.2f} KiB a token, planned {planned(CHUNKED, LLAMA_3_1_8B, 1024 * K) / 1024 / K / K:.2f}",
        flush=True,
    )
    assert have == 22_133_374_984 <= 24 * K * 1024 * K, have  # as counted with 1M tokens
