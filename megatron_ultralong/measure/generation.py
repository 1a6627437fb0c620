"""Reading a prompt and writing tokens after it, on one device, with the weights of a Llama-3.2-1B's shape set
at random.

What is timed is what every answer of `evaluate.py --engine megatron` is made of: the prompt's chunks through
all layers into the KV cache, then one token after another of n sequences that share the prompt, the output
layer and the choice of the likeliest included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ultralong.config import Model, Parallel, Rope, Runtime
from megatron_ultralong.context_parallel.kernels import select as kernels
from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends import memory_check
from megatron_ultralong.measure import report as reports
from megatron_ultralong.measure import timing
from megatron_ultralong.measure.report import Column, Report

WARM_UP = 256
"""Tokens that are read first, to load kernels."""

COLUMNS = (
    Column(key="tokens", title="prompt", show=reports.tokens, meaning="tokens of it"),
    Column(
        key="prefill_seconds",
        title="prefill",
        show=reports.milliseconds,
        meaning="time to read the whole prompt",
    ),
    Column(key="prefill_tokens_per_second", title="prefill tokens/s", show=reports.number),
    Column(
        key="decode_seconds",
        title="a step",
        show=reports.milliseconds,
        meaning="one more token of every sequence",
    ),
    Column(
        key="decode_tokens_per_second",
        title="decode tokens/s",
        show=reports.number,
        meaning="of all sequences together",
    ),
    Column(key="kv_bytes", title="KV", show=reports.bytes_, meaning="keys and values of the prompt"),
    Column(
        key="peak_bytes",
        title="peak",
        show=reports.bytes_,
        meaning="weights, keys and values and all else on the device",
    ),
    Column(
        key="planned_bytes",
        title="planned",
        show=reports.bytes_,
        meaning="what evaluate.py asks for before it starts",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    model: Model
    lengths: Sequence[int]
    """Tokens of the prompt, a row each."""
    sequences: int
    """That go on after the prompt, n."""
    written: int
    """Tokens of each."""
    chunk: int
    """Tokens of the prompt read at a time."""
    precision: str
    repeats: int = 3

    def __post_init__(self) -> None:
        for name, value in [("lengths", n) for n in self.lengths] + [
            (n, getattr(self, n)) for n in ("sequences", "written", "chunk", "repeats")
        ]:
            if value < 1:
                raise UserError(f"--{name} {value} must be at least 1")


def shape(gpu: bool) -> Model:
    """Llama-3.2-1B's; a small model's on a CPU."""
    if gpu:
        return Model(
            hidden_size=2048,
            ffn_size=8192,
            layers=16,
            heads=32,
            kv_heads=8,
            head_dim=64,
            vocab_size=128256,
            tied_embeddings=True,
        )
    return Model(
        hidden_size=64,
        ffn_size=128,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        vocab_size=256,
        tied_embeddings=True,
    )


def run(
    settings: Settings,
    device: torch.device,
    command: str,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Measure all rows; `progress` is told each before it starts. It starts, and ends, torch.distributed with
    one rank."""
    from megatron_ultralong.runtime import launch

    if launch.world_size() > 1:
        raise UserError("tools/benchmark.py runs in one process: start it without torchrun")
    m = settings.model
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[settings.precision]
    report = Report(
        kind="generate",
        columns=COLUMNS,
        bars=("prefill_tokens_per_second", "decode_tokens_per_second"),
        about=reports.about(
            device,
            command,
            kernel=kernels.choose(device, dtype, m.head_dim),
            dtype=settings.precision,
            shape=f"{m.layers} layers, hidden {m.hidden_size}, MLP {m.ffn_size}, {m.heads} query and {m.kv_heads} KV heads of {m.head_dim}, "
            f"vocabulary {m.vocab_size}, {settings.precision}",
            sequences=settings.sequences,
            written=settings.written,
            read_chunk=settings.chunk,
            repeats=settings.repeats,
            memory=timing.CPU_MEMORY if device.type == "cpu" else "torch's allocator",
        ),
    )
    ranks = launch.start(Runtime(device="cuda" if device.type == "cuda" else "cpu"), Parallel())
    try:
        reader = _reader(settings, ranks)
        for length in settings.lengths:
            progress(reports.tokens(length))
            row: dict[str, Any] = {
                "name": f"{reports.tokens(length)} + {settings.sequences} x {settings.written}",
                "ours": True,
                "tokens": length,
            }
            try:
                row |= _measured(reader, length, settings)
            except RuntimeError as error:
                if not timing.is_out_of_memory(error):
                    raise
                row["note"] = "out of memory"
            timing.release()
            report.rows.append(row)
    finally:
        launch.stop()
    return report


def _reader(settings: Settings, ranks: Any) -> Any:
    from megatron_ultralong.model.inference.prefill_decode import InferenceModel

    reader = InferenceModel(settings.model, Rope(), ranks, Parallel(), settings.precision, settings.chunk)
    with torch.no_grad():
        for parameter in reader.chunk.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, settings.model.init_std)
    return reader


def _measured(reader: Any, length: int, settings: Settings) -> dict[str, Any]:
    model, device, n = settings.model, reader.ranks.device, settings.sequences
    prompt = torch.randint(model.vocab_size, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    weights = timing.size(*reader.chunk.parameters())
    found: dict[str, Any] = {}

    def read(tokens: list[int], cache: Any) -> None:
        cache.truncate(0)
        for _ in reader.read(tokens, cache):
            pass

    def write(caches: list[Any]) -> None:
        for cache in caches:
            cache.truncate(length)
        chosen = [0] * n
        for turn in range(settings.written):
            chosen = reader.logits(reader.step(chosen, caches, turn)).argmax(dim=-1).tolist()

    with timing.peak(device) as peak:
        context = reader.cache(length)
        read(prompt[:WARM_UP], context)
        found["prefill_seconds"] = timing.seconds(
            lambda: read(prompt, context), device, settings.repeats, warm_up=0
        )
        caches = [reader.cache(settings.written, context) for _ in range(n)]
        found["decode_seconds"] = (
            timing.seconds(lambda: write(caches), device, settings.repeats, warm_up=1) / settings.written
        )
    tokens = length + n * settings.written
    return found | {
        "prefill_tokens_per_second": length / found["prefill_seconds"],
        "decode_tokens_per_second": n / found["decode_seconds"],
        "kv_bytes": memory_check.kept_bytes(model, Parallel(), length, reader.dtype.itemsize),
        "peak_bytes": weights + peak.bytes,
        "planned_bytes": memory_check.needed(
            model, Parallel(), reader.chunk_tokens, reader.dtype.itemsize, tokens
        ),
    }
