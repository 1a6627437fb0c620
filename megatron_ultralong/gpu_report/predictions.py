"""What planning/ estimates for the rows of a report: the figures of `ultralong plan`, for one GPU.

Times are None where the device has no data sheet in planning/hardware.py. All ranks of a context parallel
group compute on one device here, and copies in its memory take the place of the network.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from megatron_ultralong.config import Data, Memory, Model, Parallel, Run, Train
from megatron_ultralong.context_parallel.attention_spec import Backend
from megatron_ultralong.evaluate.backends import memory_check
from megatron_ultralong.measure import attention_inputs
from megatron_ultralong.measure.attention_methods import AttentionSettings
from megatron_ultralong.measure.generation import GenerationSettings
from megatron_ultralong.measure.loss import LossSettings
from megatron_ultralong.measure.number_format import token_count
from megatron_ultralong.measure.step import SETTINGS, StepSettings, planned_bytes
from megatron_ultralong.planning import layer_memory, memory, time
from megatron_ultralong.planning.documents import DocumentLengths
from megatron_ultralong.planning.hardware import Gpu, Machine

Prediction = dict[str, float]
"""Figures by the keys of a row of measure/."""


def attention(
    settings: AttentionSettings, row: dict[str, Any], backend: Backend, gpu: Gpu | None
) -> Prediction:
    """Return times and workspace of a row of `measure.attention`: of one kernel, and of our own methods."""
    method, cp, documents = row["method"], row["cp"], row["documents"]
    own = {
        "one kernel": 1,
        "ring": 1,
        "all_gather": 1,
        "all-to-all": cp,
        "hybrid": min([*settings.ulysses, cp]),
    }
    if method not in own:
        return {}
    model = Model(
        hidden_size=settings.heads * settings.head_dim,
        ffn_size=1,
        layers=1,
        heads=settings.heads,
        kv_heads=settings.kv_heads,
        head_dim=settings.head_dim,
        vocab_size=1,
    )
    parallel = Parallel(
        cp=cp, ulysses=own[method], cp_comm_type="all_gather" if method == "all_gather" else "p2p"
    )
    run = _run(model, settings.length, _precision(settings), Memory(), parallel, masked=documents is not None)
    predicted: Prediction = {
        "workspace_bytes": cp * layer_memory.attention_workspace_bytes(run, model, backend)
    }
    if gpu is None:
        return predicted
    assumed = Machine(gpu=gpu, gpus=1).assumed
    lengths = None
    if documents is not None:
        starts = attention_inputs.random_starts(settings.length, documents, settings.seed)
        lengths = DocumentLengths(tuple(b - a for a, b in itertools.pairwise([*starts, settings.length])))
    todo = time.workload(run, model, documents=lengths)
    peak, memory_rate = _peak(gpu, run), gpu.hbm * assumed.links

    def milliseconds(flops: float, moved: float, hops: int) -> float:
        seconds = flops / peak + moved / memory_rate + hops * assumed.hop_microseconds * 1e-6
        return 1e3 * cp * seconds

    # What is sent is read and written once.
    forward = milliseconds(
        todo.attention / assumed.attention_forward,
        todo.merge_forward + 2 * (todo.ring_forward + todo.exchange_forward),
        todo.hops_forward,
    )
    backward = milliseconds(
        time.BACKWARD * todo.attention / assumed.attention_backward,
        todo.merge_backward + 2 * (todo.ring_backward + todo.exchange_backward),
        todo.hops_backward,
    )
    return predicted | {"forward_ms": forward, "backward_ms": backward, "both_ms": forward + backward}


def loss(settings: LossSettings, row: dict[str, Any], gpu: Gpu | None) -> Prediction:
    """Return time and peak memory of a row of `measure.loss`; of the latter, for our own rows only."""
    predicted: Prediction = {}
    if gpu is not None:
        flops = 6.0 * settings.tokens * settings.hidden * settings.vocab
        run = _run(_output_layer(settings), settings.tokens, _precision(settings), Memory(), Parallel())
        predicted["ms"] = 1e3 * flops / (_peak(gpu, run) * Machine(gpu=gpu, gpus=1).assumed.products)
    chunks = [chunk for chunk in settings.chunks if row["name"] == f"ours, chunks of {token_count(chunk)}"]
    if chunks:
        model = _output_layer(settings)
        run = _run(model, settings.tokens, _precision(settings), Memory(loss_chunk=chunks[0]), Parallel())
        e = settings.dtype.itemsize
        # Hidden states, their gradient and the weight's are not counted by the measurement.
        given = (2 * settings.tokens + settings.vocab) * settings.hidden * e
        predicted["peak_bytes"] = memory.gpu_memory(run, model, 1)["loss"] - given
    return predicted


def step(
    settings: StepSettings,
    row: dict[str, Any],
    backend: Backend,
    gpu: Gpu | None,
    device_bytes: int | None = None,
) -> Prediction:
    """Return time and memory of a row of `measure.step`.

    device_bytes: with `longest`, memory of the device; its longest sequence is then predicted as well.
    """
    model, name = settings.model, row["setting"]
    if name == "save-on-cpu":
        return {}
    saved = replace(SETTINGS[name], layer_chunk=settings.layer_chunk, loss_chunk=settings.loss_chunk)
    e = 2 if settings.precision == "bf16" else 4
    weights = 2 * e * memory.stage_parameters(model, 1, 1, 0)  # and their gradients

    def peak(length: int) -> int:
        return weights + planned_bytes(model, saved, length, settings.precision, backend)

    predicted: Prediction = {}
    limit = settings.limit or device_bytes
    if settings.longest and limit:
        good, bad = 0, settings.granularity
        while peak(bad) <= limit:
            good, bad = bad, 2 * bad
        while bad - good > settings.granularity:
            middle = (good + bad) // 2 // settings.granularity * settings.granularity
            good, bad = (middle, bad) if peak(middle) <= limit else (good, middle)
        predicted["tokens"] = good
    length = row.get("tokens")
    if not length:
        return predicted
    run = _run(model, length, settings.precision, saved, Parallel())
    predicted |= {"peak_bytes": peak(length), "bytes_per_token": (peak(length) - weights) / length}
    if saved.offload != "off":
        predicted["host_bytes"] = memory.total(memory.host_memory(run, model, 1))
    if gpu is not None:
        seconds = sum(time.iteration_time(run, model, Machine(gpu=gpu, gpus=1)).values())
        predicted |= {"seconds": seconds, "tokens_per_second": length / seconds}
    return predicted


def generation(settings: GenerationSettings, row: dict[str, Any], gpu: Gpu | None) -> Prediction:
    """Return memory and times of a row of `measure.generation`.

    Prefill is computed as the forward of training; decoding reads weights, keys and values once for every
    token.
    """
    model, length = settings.model, row["tokens"]
    e = 2 if settings.precision == "bf16" else 4
    tokens = length + settings.sequences * settings.written
    planned = row.get("planned_bytes") or memory_check.needed(model, Parallel(), settings.chunk, e, tokens)
    predicted: Prediction = {"peak_bytes": planned}
    if gpu is None:
        return predicted
    run = _run(model, length, settings.precision, Memory(), Parallel())
    todo, assumed = time.workload(run, model), Machine(gpu=gpu, gpus=1).assumed
    prefill = (todo.attention / assumed.attention_forward + todo.products / assumed.products) / _peak(
        gpu, run
    )
    read = memory_check.weight_bytes(model, Parallel(), e)
    read += settings.sequences * memory_check.kept_bytes(model, Parallel(), length, e)
    decode = read / (gpu.hbm * assumed.links)
    return predicted | {
        "prefill_seconds": prefill,
        "prefill_tokens_per_second": length / prefill,
        "decode_seconds": decode,
        "decode_tokens_per_second": settings.sequences / decode,
    }


def training(run: Run, model: Model, backend: Backend, gpu: Gpu | None) -> Prediction:
    """Return memory and seconds of an iteration of a whole run on one GPU; memory.offload is settled."""
    predicted: Prediction = {"peak_bytes": memory.total(memory.gpu_memory(run, model, 1, backend))}
    if gpu is not None:
        seconds = sum(time.iteration_time(run, model, Machine(gpu=gpu, gpus=1)).values())
        tokens = run.train.global_batch * run.train.seq_length
        predicted |= {"iteration_seconds": seconds, "tokens_per_second": tokens / seconds}
    return predicted


def _run(
    model: Model, length: int, precision: str, saved: Memory, parallel: Parallel, masked: bool = False
) -> Run:
    """A run of one sequence per iteration."""
    if saved.offload == "auto":
        saved = replace(saved, offload="off")
    train = Train(
        seq_length=length,
        global_batch=1,
        iterations=1,
        lr=1e-5,
        precision="bf16" if precision == "bf16" else "fp32",
    )
    data = Data(documents="masked" if masked else "joined")
    return Run(name="report", model=model, memory=saved, parallel=parallel, train=train, data=data)


def _output_layer(settings: LossSettings) -> Model:
    return Model(
        hidden_size=settings.hidden,
        ffn_size=1,
        layers=1,
        heads=1,
        kv_heads=1,
        head_dim=settings.hidden,
        vocab_size=settings.vocab,
    )


def _peak(gpu: Gpu, run: Run) -> float:
    return gpu.bf16 if run.train.precision == "bf16" else gpu.fp32


def _precision(settings: AttentionSettings | LossSettings) -> str:
    return "bf16" if settings.dtype.itemsize == 2 else "fp32"
