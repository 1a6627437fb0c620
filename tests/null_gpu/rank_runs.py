"""What the ranks of check_ranks.py do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import megatron.core.distributed
import megatron.core.optimizer
import megatron.core.pipeline_parallel
import torch
import torch.distributed as dist

from megatron_ultralong.config import Memory, Model, Optim, Parallel, Run, Runtime, Train
from megatron_ultralong.context_parallel import api, comm, ring
from megatron_ultralong.model import llama
from megatron_ultralong.rope.methods import Unscaled
from megatron_ultralong.runtime import launch
from megatron_ultralong.train import optimizer as optim
from megatron_ultralong.train import step
from tests.null_gpu import recording

MODEL = Model(hidden_size=256, ffn_size=512, layers=2, heads=8, kv_heads=4, head_dim=64, vocab_size=512)
LENGTH = 1024
KEPT = Memory(offload="off", layer_chunk=128, loss_chunk=256)
CHUNKED = Memory(offload="all", query_chunks=True, layer_chunk=256, loss_chunk=256)
LAYOUTS: dict[str, tuple[Parallel, Memory, Sequence[int] | None]] = {
    "TP 2, CP 2, query chunks": (Parallel(tp=2, cp=2), CHUNKED, None),
    "TP 2, PP 2": (Parallel(tp=2, pp=2), KEPT, None),
    "CP 4, ring, documents": (Parallel(cp=4), KEPT, (0, 5, 300, 301, 800)),
    "CP 4, all-gather": (Parallel(cp=4, cp_comm_type="all_gather"), KEPT, None),
    "CP 4, all-to-all": (Parallel(cp=4, ulysses=4), KEPT, None),
    "CP 4, all-to-all and ring": (Parallel(cp=4, ulysses=2), replace(KEPT, offload="all"), None),
    "PP 2, CP 2": (Parallel(pp=2, cp=2), KEPT, None),
    "PP 2 interleaved, CP 2": (Parallel(pp=2, vpp=2, cp=2), KEPT, None),
    "DP 2, CP 2": (Parallel(cp=2), Memory(recompute="full", offload="off"), None),
}


def train_steps() -> None:
    """A training and a validation step on every layout."""
    for name, (parallel, memory, starts) in LAYOUTS.items():
        ranks = launch.start(Runtime(device="cuda"), parallel)
        model = replace(MODEL, layers=2 * parallel.vpp)
        micro_batches = 2 * parallel.pp
        train = Train(seq_length=LENGTH, global_batch=micro_batches * ranks.dp, iterations=1, lr=1e-5)
        run = Run(name="x", model=model, parallel=parallel, memory=memory, train=train)
        recording.begin(name)
        chunks = llama.build(model, Unscaled(), ranks, parallel, memory, "bf16")
        chunks = optim.data_parallel(chunks, ranks)
        optimizer = optim.build(chunks, Optim(), train, ranks)
        trainer = step.Trainer(run=run, ranks=ranks, chunks=chunks, optimizer=optimizer)
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        step.forward_backward(trainer, [batches(parallel, starts) for _ in chunks], micro_batches)
        optimizer.step()
        step.validation_loss(trainer, [batches(parallel, starts) for _ in chunks], micro_batches)
        torch.cuda.synchronize()
        for chunk in chunks:
            llama.unwrap(chunk).store.close()
        launch.stop()


def batches(parallel: Parallel, starts: Sequence[int] | None) -> Iterator[Any]:
    s = LENGTH // parallel.cp
    tokens = torch.zeros(1, s, dtype=torch.int64)
    batch = {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(1, s)}
    while True:
        yield batch if starts is None else batch | {"document_starts": torch.tensor(starts)}
