"""Speed and memory of prefill and decode on one device, in the shape of Llama-3.2-1B with random weights.

These are the steps of every answer of `evaluate.py --engine megatron`: the prompt is read in chunks through
all layers into the KV cache; then n sequences that share the prompt are decoded token by token, including
output layer and argmax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ultralong.config import Model, Parallel, Runtime
from megatron_ultralong.context_parallel.kernels import select as kernels
from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends import memory_check
from megatron_ultralong.measure import timing
from megatron_ultralong.measure.number_format import byte_count, integer, three_digits, token_count
from megatron_ultralong.measure.report import RecordRow, ReportColumn, SpeedReport, about
from megatron_ultralong.measure.step import model_text
from megatron_ultralong.rope.methods import Unscaled

WARM_UP = 256
"""Tokens of a first prefill that loads kernels and is not measured."""

COLUMNS = (
    ReportColumn("tokens", "prompt", token_count, "tokens of the prompt"),
    ReportColumn("prefill_seconds", "prefill", three_digits, "seconds to read the whole prompt"),
    ReportColumn("prefill_tokens_per_second", "prefill tokens/s", integer, higher_is_better=True),
    ReportColumn("decode_seconds", "step", three_digits, "seconds for one more token of every sequence"),
    ReportColumn("decode_tokens_per_second", "decode tokens/s", integer, "of all sequences together", True),
    ReportColumn("kv_bytes", "KV", byte_count, "keys and values of the prompt"),
    ReportColumn("peak_bytes", "peak", byte_count, "all memory on the device, weights and KV cache included"),
    ReportColumn("planned_bytes", "planned", byte_count, "memory that evaluate.py requires before it starts"),
)


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """What is measured."""

    model: Model
    lengths: Sequence[int]
    """Tokens of the prompt, one row each."""
    sequences: int
    """Sequences that continue the prompt, n."""
    written: int
    """Tokens decoded in each sequence."""
    chunk: int
    """Tokens of the prompt per prefill chunk."""
    precision: str
    repeats: int = 3

    def __post_init__(self) -> None:
        for name, value in [("lengths", n) for n in self.lengths] + [
            (n, getattr(self, n)) for n in ("sequences", "written", "chunk", "repeats")
        ]:
            if value < 1:
                raise UserError(f"--{name} {value} must be at least 1")


def model_shape(gpu: bool) -> Model:
    """Return the shape of Llama-3.2-1B, or of a small model on a CPU."""
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
    settings: GenerationSettings,
    device: torch.device,
    command: str,
    progress: Callable[[str], None] = lambda line: None,
    record: RecordRow = lambda row: None,
) -> SpeedReport:
    """Measure all rows; `progress` is called with the name of each before it starts, `record` with each row
    as soon as it is measured.

    Starts and ends torch.distributed with one rank.
    """
    from megatron_ultralong.model import kernel_choices
    from megatron_ultralong.runtime import launch

    if launch.world_size() > 1:
        raise UserError("`ultralong benchmark` runs in one process: start it without torchrun")
    ranks = launch.start(Runtime(device="cuda" if device.type == "cuda" else "cpu"), Parallel())
    choices = kernel_choices.apply(device, settings.model, settings.precision)
    dtype = timing.DTYPES[settings.precision]
    report = SpeedReport(
        kind="generate",
        columns=COLUMNS,
        record=record,
        bars=("prefill_tokens_per_second", "decode_tokens_per_second"),
        about=about(
            device,
            command,
            kernel=kernels.choose(device, dtype, settings.model.head_dim),
            **choices,
            dtype=settings.precision,
            shape=f"{model_text(settings.model)}, {settings.precision}",
            sequences=settings.sequences,
            written=settings.written,
            read_chunk=settings.chunk,
            repeats=settings.repeats,
            memory=timing.CPU_MEMORY if device.type == "cpu" else "torch's allocator",
        ),
    )
    try:
        reader = _reader(settings, ranks)
        for length in settings.lengths:
            progress(token_count(length))
            row: dict[str, Any] = {
                "name": f"{token_count(length)} + {settings.sequences} x {settings.written}",
                "ours": True,
                "tokens": length,
            }
            try:
                row |= _measured(reader, length, settings)
            except RuntimeError as error:
                if not timing.is_out_of_memory(error):
                    raise
                row["note"] = "out of memory"
            timing.free_memory()
            report.add(row)
    finally:
        launch.stop()
    return report


def _reader(settings: GenerationSettings, ranks: Any) -> Any:
    from megatron_ultralong.model.inference.prefill_decode import InferenceModel

    reader = InferenceModel(settings.model, Unscaled(), ranks, Parallel(), settings.precision, settings.chunk)
    with torch.no_grad():
        for parameter in reader.chunk.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, settings.model.init_std)
    return reader


def _measured(reader: Any, length: int, settings: GenerationSettings) -> dict[str, Any]:
    model, device, n = settings.model, reader.ranks.device, settings.sequences
    prompt = torch.randint(model.vocab_size, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    weights = timing.tensor_bytes(*reader.chunk.parameters())
    figures: dict[str, Any] = {}

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

    with timing.peak_memory(device) as peak:
        context = reader.cache(length)
        read(prompt[:WARM_UP], context)
        figures["prefill_seconds"] = timing.median_seconds(
            lambda: read(prompt, context), device, settings.repeats, warm_up=0
        )
        caches = [reader.cache(settings.written, context) for _ in range(n)]
        figures["decode_seconds"] = (
            timing.median_seconds(lambda: write(caches), device, settings.repeats, warm_up=1)
            / settings.written
        )
    tokens = length + n * settings.written
    return figures | {
        "prefill_tokens_per_second": length / figures["prefill_seconds"],
        "decode_tokens_per_second": n / figures["decode_seconds"],
        "kv_bytes": memory_check.kept_bytes(model, Parallel(), length, reader.dtype.itemsize),
        "peak_bytes": weights + peak.bytes,
        "planned_bytes": memory_check.needed(
            model, Parallel(), reader.chunk_tokens, reader.dtype.itemsize, tokens
        ),
    }
