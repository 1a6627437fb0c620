"""Peak memory of a step at full size, by PyTorch's allocator, and by planning/memory.py.

In Llama-3.1-8B's widths. What kernels allocate through PyTorch is counted, and what cuDNN's front end asks
for; not what cuDNN's engines take themselves, nor NCCL. Weights, their gradients and the optimizer are in
neither figure.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from megatron_ultralong import shapes
from megatron_ultralong.config import Data, Memory, Parallel, Run, Train
from megatron_ultralong.context_parallel import api
from megatron_ultralong.context_parallel.placement import Placement
from megatron_ultralong.lora import Lora
from megatron_ultralong.measure import step
from megatron_ultralong.model import llama
from megatron_ultralong.model.layer import offload
from megatron_ultralong.model.llama import NO_LORA
from megatron_ultralong.planning import memory as planned_memory
from megatron_ultralong.rope.methods import Unscaled
from tests.distributed.test_planned_memory import FakeCommunicator
from tests.packed import placed

K, GIB = 1024, 2**30
CUDA = torch.device("cuda", 0)
# The loss of a small vocabulary is no more than the layers, so that both are seen.
MODEL = replace(shapes.LLAMA_3_1_8B, layers=4, vocab_size=4 * K)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """How attention is computed."""

    cudnn: bool = False
    deterministic: bool = False
    document_length: float | None = None
    """Tokens of each document of a packed row; up to 1, as a share of the row."""
    ranks_per_node: int = 1
    """Of the ring's ranks."""

    def placement(self, tokens: int, ranks: int) -> Placement | None:
        """Of a row of `tokens` on the ranks of a ring."""
        if self.document_length is None:
            return None
        length = self.document_length if self.document_length > 1 else self.document_length * tokens
        return placed(range(0, tokens, int(length)), tokens, ranks, self.ranks_per_node)


KERNELS = {
    "cuDNN": Kernel(cudnn=True),
    "flash": Kernel(),
    "flash, deterministic": Kernel(deterministic=True),
    "documents": Kernel(document_length=2 * K),
    "two documents": Kernel(document_length=0.78),
    "documents, deterministic": Kernel(document_length=2 * K, deterministic=True),
    "two documents, deterministic": Kernel(document_length=0.94, deterministic=True),
    "short documents": Kernel(document_length=100),
}
MODES = {name: memory for name, memory in step.SETTINGS.items() if name != "save-on-cpu"}
"""Every combination of recompute, offload and query chunks that there is."""


def least_ratio(kernel: str) -> float:
    """Return the least of measured / planned that is accepted of one of `KERNELS`."""
    # A plan does not know how many documents there are: with many short ones several calls share the memory
    # of one.
    return 0.6 if kernel == "short documents" else 0.9


@contextmanager
def using(kernel: Kernel) -> Iterator[None]:
    torch.backends.cuda.enable_cudnn_sdp(kernel.cudnn)
    torch.use_deterministic_algorithms(kernel.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_cudnn_sdp(True)


def measured(
    ranks: Any, memory: Memory, kernel: Kernel, parallel: Parallel, tokens: int, lora: Lora = NO_LORA
) -> int:
    """Return the bytes at the peak of a step on `tokens` tokens of this rank."""
    p = parallel
    groups = api.ContextGroups(
        ring=FakeCommunicator(p.cp // p.ulysses),
        ulysses=FakeCommunicator(p.ulysses),
        cp_comm_type=p.cp_comm_type,
    )
    placement = kernel.placement(tokens * p.cp, p.cp // p.ulysses)
    with pytest.MonkeyPatch.context() as patch, using(kernel):
        patch.setattr(api, "split_group", lambda *args, **kwargs: groups)
        patch.setattr(offload, "host_bytes", lambda: 2**50)  # never touched
        (chunk,) = llama.build(MODEL, Unscaled(), ranks, Parallel(), memory, "bf16", lora=lora)
        for parameter in chunk.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        row = torch.zeros(1, tokens + 1, dtype=torch.int64, device=CUDA)
        mask = torch.ones(1, tokens, device=CUDA)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        chunk(row[:, :-1], row[:, 1:], loss_mask=mask, placement=placement).backward()
        peak = torch.cuda.max_memory_allocated() - before
        llama.unwrap(chunk).store.close()
    del chunk, parameter
    gc.collect()
    torch.cuda.empty_cache()
    return peak


def planned(memory: Memory, kernel: Kernel, parallel: Parallel, tokens: int, lora: Lora = NO_LORA) -> int:
    """Return the same by planning/memory.py."""
    run = replace(_run_of(memory, kernel, parallel, tokens), lora=lora)
    backend = "cudnn" if kernel.cudnn else "flash"
    parts = planned_memory.gpu_memory(run, MODEL, parallel.cp, backend)
    return planned_memory.total(
        {part: size for part, size in parts.items() if part not in step.CONSTANT_PARTS}
    )


def _run_of(memory: Memory, kernel: Kernel, parallel: Parallel, tokens: int) -> Run:
    """A run with `tokens` tokens of a sequence on each context parallel rank."""
    return Run(
        name="x",
        model=MODEL,
        memory=memory,
        parallel=parallel,
        data=Data(documents="joined" if kernel.document_length is None else "masked"),
        train=Train(
            seq_length=tokens * parallel.cp,
            global_batch=1,
            iterations=1,
            lr=1.0,
            deterministic=kernel.deterministic,
        ),
    )
