"""Logits, loss and every gradient under each layout against transformers in one process, for every family."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_ultralong.config import Memory, Model, Parallel, Run, Runtime, Train
from megatron_ultralong.model import weight_mapping
from megatron_ultralong.planning.memory import gpu_memory, stage_parameters
from megatron_ultralong.rope.base import Rope
from megatron_ultralong.rope.hf_config import from_hf
from megatron_ultralong.rope.methods import Llama3
from tests.packed import held, placed
from tests.spawn import leave_groups, run_ranks
from tests.tiny import FAMILY_MODELS, LLAMA3, SMALL, hf_model

ROPE = Llama3(theta=10000.0, factor=4.0, original_length=32)
S = 64
UNTIED, TIED = SMALL, replace(SMALL, tied_embeddings=True)
# Chunks that leave an odd rest, and that cut the tokens of two tensor parallel ranks.
MEMORY = (
    Memory(offload="layer_inputs", layer_chunk=10, loss_chunk=12),
    Memory(offload="all", layer_chunk=0, loss_chunk=12),
    Memory(recompute="full", offload="off", layer_chunk=10, loss_chunk=12),
    Memory(recompute="none", offload="off", loss_chunk=0),
    Memory(query_chunks=True, offload="all", layer_chunk=10),
    Memory(query_chunks=True, offload="off", layer_chunk=0),
)


@pytest.mark.slow
def test_the_largest_layout_equals_transformers() -> None:
    """TP 2 x PP 2 x CP 2, interleaved too."""
    run_ranks(_layouts, 8)


@pytest.mark.slow
@pytest.mark.complete
def test_every_layout_equals_transformers() -> None:
    """TP x PP x CP in {1, 2} but the largest, interleaved too; data parallel ranks fill up."""
    run_ranks(_layouts, 4)


def _layouts(rank: int, world: int) -> None:
    """On 8 ranks the layout that needs them all, on 4 the others."""
    from megatron_ultralong.runtime import launch

    # The other families differ inside of a layer only: two layers, no more rows than pipelines need, and one
    # memory setting a layout, each in turn.
    turn = itertools.cycle((0, 3, 4, 2, 5))
    models = (UNTIED, TIED, *(replace(model, layers=2) for model in FAMILY_MODELS.values()))
    references = [hf_model(model, LLAMA3) for model in models]
    all_rows = [_rows(model, 4) for model in models]

    @functools.cache
    def wanted(number: int, count: int) -> tuple[torch.Tensor, float, dict[str, torch.Tensor]]:
        return _reference(references[number], _first(all_rows[number], count))

    for tp, pp, cp, vpp in itertools.product((1, 2), repeat=4):
        if (tp * pp * cp == 8) != (world == 8) or vpp > pp:
            continue
        parallel = Parallel(tp=tp, pp=pp, cp=cp, vpp=vpp)
        ranks = launch.start(Runtime(device="cpu"), parallel)
        for number, model in enumerate(models):
            if (vpp == 2 and number > 1) or (model is TIED and (tp, cp) == (1, 1)):
                continue  # the tied weight's own paths are pipeline and vocabulary splits, which tp 2 covers
            count = 4 if number < 2 else max(2, ranks.dp)
            rows = _first(all_rows[number], count)
            if pp == 1 and (model is UNTIED or (model.qk_norm and model.qkv_bias)):
                _check_planned_checkpoints(model, ranks, parallel, rows)
            for memory in _memories(model, parallel) if number < 2 else [MEMORY[next(turn)]]:
                _check_layout(
                    model, references[number], ranks, parallel, memory, rows, *wanted(number, count)
                )
        leave_groups()


def _first(rows: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    return {name: x[:count] for name, x in rows.items()}


def _memories(model: Model, parallel: Parallel) -> list[Memory]:
    """Besides the default all recomputed or all kept, and the others where a layout is cheap or splits most.

    Interleaved stages and the tied weight do the same under each: they are checked under one or two.
    """
    tp, pp, cp = parallel.tp, parallel.pp, parallel.cp
    if parallel.vpp > 1:
        return [MEMORY[0]]
    if model is TIED:
        return [MEMORY[0], MEMORY[3]] if pp == 1 else [MEMORY[0]]
    more = {(1, 1): [5], (1, 2): [1], (2, 1): [1], (2, 2): [4]}[tp, cp] if pp == 1 or tp == cp == 2 else []
    return [MEMORY[i] for i in (0, 2 if tp == cp else 3, *more)]


# Layouts with each way of context parallelism, and how positions are counted; all rows are packed documents.
PACKED = (
    (Parallel(cp=2), "row"),
    (Parallel(cp=2), "document"),
    (Parallel(cp=4, ulysses=2), "document"),
    (Parallel(cp=2, ulysses=2), "row"),
    (Parallel(pp=2, cp=2, cp_comm_type="all_gather"), "document"),
    (Parallel(tp=2, cp=2, cp_comm_type="all_gather"), "row"),
    (Parallel(tp=2), "document"),
)
# Documents of one token, across every border between ranks, a whole row.
STARTS = (
    [0, 1, 2, 31, 33],
    [0],
    [0, 16, 48],
    [0, 5, 6, 7, 63],
    [0, 40],
    [0, 15, 17, 47, 49],
    list(range(64)),
    [0, 32],
)


@pytest.mark.slow
@pytest.mark.complete
def test_packed_documents_and_all_ways() -> None:
    run_ranks(_packed, 4)


def _packed(rank: int, world: int) -> None:
    from megatron_ultralong.runtime import launch

    reference = hf_model(UNTIED, LLAMA3)
    rows = _rows(UNTIED, 8)
    found = {positions: _reference(reference, rows, STARTS, positions) for positions in ("row", "document")}
    for i, (parallel, positions) in enumerate(PACKED):
        ranks = launch.start(Runtime(device="cpu"), parallel)
        ring = parallel.ulysses == 1 and parallel.cp_comm_type == "p2p"
        for memory in (MEMORY[4 + i % 2] if ring else MEMORY[1 + i % 3], MEMORY[0]):
            _check_layout(
                UNTIED,
                reference,
                ranks,
                parallel,
                memory,
                rows,
                *found[positions],
                starts=STARTS,
                positions=positions,
            )
        leave_groups()


# config.json's words for the other methods, and max_position_embeddings.
OTHER_METHODS: tuple[tuple[dict[str, Any], int], ...] = (
    ({"rope_type": "linear", "factor": 4.0}, 16),
    ({"rope_type": "dynamic", "factor": 2.0}, 16),
    (
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "long_factor": [1.0, 1.5, 2.5, 3.0, 4.0],
            "short_factor": [1.0, 1.0, 1.5, 1.5, 2.0],
        },
        64,
    ),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
)


Z_LOSS = 0.05


@pytest.mark.slow
def test_other_methods_equal_transformers() -> None:
    """Training computes what transformers does for a sequence of the same length; with a z-loss, which is in
    the gradient and not in the loss."""
    run_ranks(_other_methods, 4)


def _other_methods(rank: int, world: int) -> None:
    from megatron_ultralong.runtime import launch

    parallel = Parallel(tp=2, cp=2)
    ranks = launch.start(Runtime(device="cpu"), parallel)
    rows = _rows(UNTIED, 4)
    losses = set()
    for block, max_position in OTHER_METHODS:
        block = {**block, "rope_theta": 10000.0}
        rope = from_hf({"rope_parameters": block, "max_position_embeddings": max_position})
        reference = hf_model(UNTIED, block, max_position=max_position)
        logits, loss, grads = _reference(reference, rows, z_loss=Z_LOSS)
        losses.add(loss)
        _check_layout(
            UNTIED,
            reference,
            ranks,
            parallel,
            MEMORY[0],
            rows,
            logits,
            loss,
            grads,
            rope=rope,
            z_loss=Z_LOSS,
        )
    assert len(losses) == len(OTHER_METHODS)
    leave_groups()


def _rows(model: Model, count: int) -> dict[str, torch.Tensor]:
    """`count` packed rows of S + 1 tokens; masks that differ by row, whole rows and a whole rank's stretch
    masked."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, model.vocab_size, (count, S + 1), generator=generator)
    mask = (torch.rand(count, S, generator=generator) > torch.linspace(0.1, 0.8, count)[:, None]).float()
    mask[2] = 0
    mask[3, : S // 4] = 0
    mask[3, 3 * S // 4 :] = 0
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask}


def _reference(
    reference: Any,
    rows: dict[str, torch.Tensor],
    starts: Any = None,
    positions: str = "row",
    z_loss: float = 0.0,
) -> tuple[torch.Tensor, float, dict[str, torch.Tensor]]:
    """(logits, cross entropy, gradients of it and the z-loss). Each document on its own; its positions count
    from the start of the row or of the document."""
    reference.zero_grad()
    tokens = rows["tokens"]
    documents = [
        (row, a, b)
        for row, begins in enumerate(starts or [[0]] * len(tokens))
        for a, b in itertools.pairwise([*begins, S])
    ]
    logits = torch.zeros(*tokens.shape, reference.config.vocab_size)
    for length in {b - a for _, a, b in documents}:  # those of one length in one call
        same = [document for document in documents if document[2] - document[1] == length]
        places = [torch.arange(a, b) - (a if positions == "document" else 0) for _, a, b in same]
        out = reference(
            torch.stack([tokens[row, a:b] for row, a, b in same]), position_ids=torch.stack(places)
        ).logits
        for (row, a, b), one in zip(same, out, strict=True):
            logits[row, a:b] = one
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), rows["labels"].flatten(), reduction="none"
    )
    loss = (losses * rows["loss_mask"].flatten()).sum() / rows["loss_mask"].sum()
    (loss + _z_loss(logits, rows, z_loss)).backward()
    return logits.detach(), loss.item(), {name: p.grad.clone() for name, p in reference.named_parameters()}


def _z_loss(logits: torch.Tensor, rows: dict[str, torch.Tensor], z_loss: float) -> torch.Tensor:
    mask = rows["loss_mask"]
    return (z_loss * logits.logsumexp(-1).square() * mask).sum() / mask.sum()


def _check_layout(
    model: Model,
    reference: Any,
    ranks: Any,
    parallel: Parallel,
    memory: Memory,
    rows: dict[str, torch.Tensor],
    logits: torch.Tensor,
    loss: float,
    grads: dict[str, torch.Tensor],
    *,
    starts: Any = None,
    positions: str = "row",
    rope: Rope = ROPE,
    z_loss: float = 0.0,
) -> None:
    from megatron_ultralong.model import llama
    from megatron_ultralong.train import optimizer as optim
    from megatron_ultralong.train.loss_normalisation import global_mean
    from megatron_ultralong.train.step import Trainer, forward_backward

    where, count = f"{parallel} {memory}", len(rows["tokens"])
    chunks = llama.build(
        model, rope, ranks, parallel, memory, "fp32", positions_by_document=positions == "document"
    )
    assert sum(p.numel() for chunk in chunks for p in chunk.parameters()) == stage_parameters(
        model, parallel.tp, parallel.pp, ranks.pp_rank
    ), where
    whole = dict(reference.named_parameters())
    for chunk in chunks:
        for name, parameter in llama.named_parameters(chunk).items():
            parameter.data.copy_(
                weight_mapping.split(
                    name, {n: p.data for n, p in whole.items()}, model, ranks.tp_rank, ranks.tp
                )
            )

    ring = ranks.cp // parallel.ulysses
    nodes = 2 if ring > 2 else 1  # with relays

    def batches() -> Any:
        for row in range(ranks.dp_rank, count, ranks.dp):
            batch = {name: x[row : row + 1, tokens_of(row)] for name, x in rows.items()}
            yield batch | {"placement": placed(starts and starts[row], S, ring, nodes)}

    def tokens_of(row: int) -> torch.Tensor:
        return held(S, ranks.cp_rank, ranks.cp, starts and starts[row], parallel.ulysses, nodes)

    # Logits: the last stage's, gathered over TP, compared at this rank's own positions.
    mine = _logits(chunks, [batches() for _ in chunks], count // ranks.dp)
    assert len(mine) == (count // ranks.dp if ranks.pp_rank == ranks.pp - 1 else 0), where
    for part, row in zip(mine, range(ranks.dp_rank, count, ranks.dp)):
        parts = [torch.empty_like(part) for _ in range(ranks.tp)]
        torch.distributed.all_gather(parts, part, group=ranks.groups.tp)
        got = torch.cat(parts, dim=-1)[..., : model.vocab_size]
        want = logits[row : row + 1, tokens_of(row)]
        assert (got - want).abs().max() < 1e-4, where

    run = Run(
        name="test",
        train=Train(
            seq_length=S,
            micro_batch=1,
            global_batch=count,
            iterations=1,
            lr=1e-3,
            precision="fp32",
            z_loss=z_loss,
        ),
        parallel=parallel,
    )
    chunks = optim.data_parallel(chunks, ranks)
    optimizer = optim.build(chunks, run.optim, run.train, ranks)
    for chunk in chunks:
        chunk.zero_grad_buffer()
    with _counted_kernels() as calls:
        trainer = Trainer(run=run, ranks=ranks, chunks=chunks, optimizer=optimizer)
        sums = forward_backward(trainer, [batches() for _ in chunks], run.micro_batches(ranks.dp))
    # A kernel a layer, hop and micro-batch, forward and backward; full recompute computes attention a second
    # time.
    once = model.layers // ranks.pp * ranks.cp * run.micro_batches(ranks.dp)
    if starts is None and not memory.query_chunks:
        assert calls == {"forward": once * (2 if memory.recompute == "full" else 1), "backward": once}, where
    mean, z, targets = global_mean(sums, ranks)
    want_z = float(_z_loss(logits, rows, z_loss))
    assert abs(z - want_z) <= 1e-5 * want_z, (where, z, want_z)
    assert targets == int(rows["loss_mask"].sum()), where
    assert abs(mean - loss) <= 1e-5 * abs(loss), (where, mean, loss)
    complete_gradients(chunks, ranks)
    for chunk in chunks:
        for name, parameter in llama.named_parameters(chunk).items():
            want = weight_mapping.split(name, grads, model, ranks.tp_rank, ranks.tp)
            error = float((parameter.main_grad - want).norm() / want.norm())
            assert error < 1e-5, (where, name, error)
    # Split, copied and tied weights each count once in the norm that gradients are clipped by.
    want_norm = float(torch.stack([grad.norm() for grad in grads.values()]).norm())
    assert abs(optimizer.step()[1] - want_norm) < 1e-5 * want_norm, where


def complete_gradients(chunks: list[Any], ranks: Any) -> None:
    """Give every rank the sums of all gradients: with the distributed optimizer each holds those of its share
    only."""
    for bucket in (bucket for chunk in chunks for buffer in chunk.buffers for bucket in buffer.buckets):
        share = bucket.grad_data.chunk(ranks.dp * ranks.cp)[ranks.groups.dp_cp.rank()].clone()
        torch.distributed.all_gather_into_tensor(bucket.grad_data, share, group=ranks.groups.dp_cp)


@contextmanager
def _counted_kernels() -> Iterator[Counter[str]]:
    """Calls of the attention kernels inside the block."""
    from megatron_ultralong.context_parallel.kernels import select as kernels

    calls: Counter[str] = Counter()

    def counted(name: str, kernel: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return kernel(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("forward", "backward"):
            patch.setattr(kernels, name, counted(name, getattr(kernels, name)))
        yield calls


def _check_planned_checkpoints(
    model: Model, ranks: Any, parallel: Parallel, rows: dict[str, torch.Tensor]
) -> None:
    """What autograd keeps of two more layers is what `plan` says."""
    for mode in ("full", "all_but_attention", "none"):
        kept, planned = [], []
        for layers in (2, 4):
            run = Run(
                name="test",
                parallel=parallel,
                memory=Memory(recompute=mode, offload="off"),
                train=Train(
                    seq_length=S, global_batch=len(rows["tokens"]), iterations=1, lr=1e-3, precision="fp32"
                ),
            )
            kept.append(_kept_bytes(replace(model, layers=layers), ranks, run, rows))
            planned.append(gpu_memory(run, replace(model, layers=layers), ranks.world)["saved activations"])
        # Norms keep a scalar a token too.
        norms = 2 * 2 * (S // parallel.cp // parallel.tp) * 4 if mode == "none" else 0
        assert kept[1] - kept[0] == planned[1] - planned[0] + norms, (parallel, mode)


def _kept_bytes(model: Model, ranks: Any, run: Run, rows: dict[str, torch.Tensor]) -> int:
    """Bytes that a forward pass of one row leaves for its backward, each storage once, weights apart."""
    from megatron_ultralong.context_parallel import zigzag
    from megatron_ultralong.model import llama

    [chunk] = llama.build(model, ROPE, ranks, run.parallel, run.memory, "fp32")
    for parameter in chunk.parameters():
        parameter.data.fill_(0.01)
    weights = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # held on to, so that no address comes twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    row = {name: zigzag.shard(x[:1], ranks.cp_rank, ranks.cp, 1) for name, x in rows.items()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        chunk(**row)
    return sum(storage.nbytes() for storage in storages.values())


def _logits(chunks: list[Any], batches: list[Any], micro_batches: int) -> list[torch.Tensor]:
    """This rank's logits [1, s, v] of every micro-batch by Megatron's forward-only schedule; none but on the
    last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward_step(batches: Any, chunk: Any) -> Any:
        batch = next(batches)
        return chunk(
            batch["tokens"], placement=batch.get("placement")
        ), lambda logits, non_loss_data: logits.contiguous()

    many = len(chunks) > 1
    with torch.no_grad():
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches if many else batches[0],
            model=chunks if many else chunks[0],
            num_microbatches=micro_batches,
            seq_length=S,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
