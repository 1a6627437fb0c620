"""What the ranks of check_ranks.py do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from pytest import MonkeyPatch

from megatron_ultralong.config import Memory, Model, Optim, Parallel, Run, Runtime, Train
from megatron_ultralong.context_parallel import api, comm, ring
from megatron_ultralong.model import llama
from megatron_ultralong.rope.methods import Unscaled
from megatron_ultralong.runtime import launch
from megatron_ultralong.train import optimizer as optim
from megatron_ultralong.train import step
from megatron_ultralong.train.stopwatch import PARTS, Stopwatch
from tests.null_gpu import recording
from tests.packed import placed

MODEL = Model(hidden_size=256, ffn_size=512, layers=2, heads=8, kv_heads=4, head_dim=64, vocab_size=512)
LENGTH = 1024
KEPT = Memory(offload="off", layer_chunk=128, loss_chunk=256)
CHUNKED = Memory(offload="all", query_chunks=True, layer_chunk=256, loss_chunk=256)
LAYOUTS: dict[str, tuple[Parallel, Memory, Sequence[int] | None]] = {
    "TP 2, CP 2, query chunks": (Parallel(tp=2, cp=2), CHUNKED, None),
    "TP 2, PP 2": (Parallel(tp=2, pp=2), KEPT, None),
    "CP 4, ring, documents": (Parallel(cp=4), KEPT, (0, 5, 300, 301, 800)),
    "CP 4, ring, documents, two nodes": (Parallel(cp=4), KEPT, (0, 5, 300, 301)),
    "CP 4, documents, query chunks": (Parallel(cp=4), CHUNKED, (0, 5, 300, 301, 800)),
    "CP 4, all-to-all and ring, documents": (Parallel(cp=4, ulysses=2), KEPT, (0, 130, 700)),
    "CP 4, all-gather": (Parallel(cp=4, cp_comm_type="all_gather"), KEPT, None),
    "CP 4, all-to-all": (Parallel(cp=4, ulysses=4), KEPT, None),
    "CP 4, all-to-all and ring": (Parallel(cp=4, ulysses=2), replace(KEPT, offload="all"), None),
    "PP 2, CP 2": (Parallel(pp=2, cp=2), KEPT, None),
    "PP 2 interleaved, CP 2": (Parallel(pp=2, vpp=2, cp=2), KEPT, None),
    "DP 2, CP 2": (Parallel(cp=2), Memory(recompute="full", offload="off"), None),
}


def everything() -> None:
    train_steps()
    attention_with_bugs()


def train_steps() -> None:
    """A training and a validation step on every layout."""
    for name, (parallel, memory, starts) in LAYOUTS.items():
        ranks_per_node = 2 if name.endswith("two nodes") else 1
        ranks = launch.start(Runtime(device="cuda"), parallel)
        model = replace(MODEL, layers=2 * parallel.vpp)
        micro_batches = 2 * parallel.pp
        train = Train(seq_length=LENGTH, global_batch=micro_batches * ranks.dp, iterations=1, lr=1e-5)
        run = Run(name="x", model=model, parallel=parallel, memory=memory, train=train)
        recording.begin(name)
        chunks = llama.build(model, Unscaled(), ranks, parallel, memory, "bf16")
        chunks = optim.data_parallel(chunks, ranks)
        optimizer = optim.build(chunks, Optim(), train, ranks)
        watch = Stopwatch(ranks.device)
        watch.attach(optimizer)
        trainer = step.Trainer(run=run, ranks=ranks, chunks=chunks, optimizer=optimizer, watch=watch)
        watch.begin()
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        step.forward_backward(
            trainer, [batches(parallel, starts, ranks_per_node) for _ in chunks], micro_batches
        )
        with watch.part("optimizer"):
            optimizer.step()
        timing = watch.end(ranks)
        assert len(timing.ranks) == ranks.world and set(timing.parts) <= set(PARTS)
        assert {"forward", "backward", "optimizer"} <= set(timing.parts)
        assert ("context parallel" in timing.parts) == (parallel.cp > 1), timing.parts
        assert ("pipeline" in timing.parts) == (parallel.pp > 1), timing.parts
        step.validation_loss(
            trainer, [batches(parallel, starts, ranks_per_node) for _ in chunks], micro_batches
        )
        torch.cuda.synchronize()
        for chunk in chunks:
            llama.unwrap(chunk).store.close()
        launch.stop()


def batches(parallel: Parallel, starts: Sequence[int] | None, ranks_per_node: int) -> Iterator[Any]:
    s = LENGTH // parallel.cp
    tokens = torch.zeros(1, s, dtype=torch.int64)
    batch = {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(1, s)}
    while True:
        yield batch | {"placement": placed(starts, LENGTH, parallel.cp // parallel.ulysses, ranks_per_node)}


# ---- attention alone, with planted bugs --------------------------------------------------------


def attention_with_bugs() -> None:
    """Forward and backward of attention on CP 4, without a bug and with each of `BUGS`."""
    ranks = launch.start(Runtime(device="cuda"), Parallel(cp=4))
    methods = {
        method: api.split_group(ranks.groups.cp, ulysses, comm_type)
        for method, (ulysses, comm_type) in METHODS.items()
    }
    for method, groups in methods.items():
        for bug, plant in [("", no_bug), *BUGS.get(method, {}).items()]:
            with MonkeyPatch.context() as patch:
                plant(patch)
                recording.begin(f"{method} {bug}".strip())
                q, k, v = (
                    torch.empty(1, heads, LENGTH // 4, 64, device="cuda", dtype=torch.bfloat16)
                    .zero_()
                    .requires_grad_()
                    for heads in (8, 4, 4)
                )
                api.attention(q, k, v, groups).sum().backward()
                torch.cuda.synchronize()
    launch.stop()


METHODS: dict[str, tuple[int, Literal["p2p", "all_gather"]]] = {
    "ring": (1, "p2p"),
    "all-gather": (1, "all_gather"),
    "all-to-all": (4, "p2p"),
    "all-to-all and ring": (2, "p2p"),
}


def no_bug(patch: MonkeyPatch) -> None:
    pass


def not_waited_for(patch: MonkeyPatch) -> None:
    """What is received is read, and what is sent written, at any time."""
    patch.setattr(comm._Works, "wait", lambda self: None)


def reused_one_hop_early(patch: MonkeyPatch) -> None:
    """The hop after the next is received into the buffer that is being used."""

    def rotate(k: torch.Tensor, v: torch.Tensor, group: Any) -> Iterator[Any]:
        here = torch.stack((k, v))
        arriving = torch.empty_like(here)
        for hop in range(group.size):
            transfer = None
            if hop < group.size - 1:
                group.send_recv(here, arriving).wait()
                transfer = group.send_recv(arriving, here)
            yield (group.rank - hop) % group.size, here
            if transfer is not None:
                transfer.wait()

    patch.setattr(ring, "rotate", rotate)


def freed_before_sent(patch: MonkeyPatch) -> None:
    """A copy is sent, and given up once another stream than its own has waited for the transfer: PyTorch
    keeps what it sends only until then."""
    all_gather = comm.ProcessGroupCommunicator.all_gather

    def copied(self: Any, send: torch.Tensor, receive: torch.Tensor) -> Any:
        transfer = all_gather(self, send.clone(), receive)
        with torch.cuda.stream(torch.cuda.Stream()):
            transfer.wait()
        return transfer

    patch.setattr(comm.ProcessGroupCommunicator, "all_gather", copied)


def sent_before_received(patch: MonkeyPatch) -> None:
    """Every rank sends, and receives once that has ended."""

    def send_recv(self: Any, send: torch.Tensor, receive: torch.Tensor) -> Any:
        return comm._Works(
            [
                dist.isend(send, dist.get_global_rank(self.group, (self.rank + 1) % self.size), self.group),
                dist.irecv(
                    receive, dist.get_global_rank(self.group, (self.rank - 1) % self.size), self.group
                ),
            ]
        )

    patch.setattr(comm.ProcessGroupCommunicator, "send_recv", send_recv)


def other_order_on_one_rank(patch: MonkeyPatch) -> None:
    """Rank 1 returns the logsumexp before the output; the others after it."""
    all_to_all = comm.ProcessGroupCommunicator.all_to_all
    calls: list[tuple[Any, torch.Tensor, torch.Tensor]] = []

    def swapped(self: Any, send: torch.Tensor, receive: torch.Tensor) -> Any:
        calls.append((self, send, receive))
        if self.rank == 1 and len(calls) == 2:
            return comm._Works([])
        transfer = all_to_all(self, send, receive)
        return (
            comm._Works([transfer, all_to_all(*calls[1])]) if self.rank == 1 and len(calls) == 3 else transfer
        )

    patch.setattr(comm.ProcessGroupCommunicator, "all_to_all", swapped)


BUGS: dict[str, dict[str, Callable[[MonkeyPatch], None]]] = {
    "ring": {
        "not waited for": not_waited_for,
        "reused one hop early": reused_one_hop_early,
        "sent before received": sent_before_received,
    },
    "all-gather": {"not waited for": not_waited_for, "freed before sent": freed_before_sent},
    "all-to-all": {"not waited for": not_waited_for, "other order on one rank": other_order_on_one_rank},
    "all-to-all and ring": {"sent before received": sent_before_received},
}
