"""What a report measures and at which sizes, in order of worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ultralong.measure import generation, step, timing
from megatron_ultralong.measure.attention_methods import AttentionSettings
from megatron_ultralong.measure.generation import GenerationSettings
from megatron_ultralong.measure.loss import LossSettings
from megatron_ultralong.measure.number_format import token_count
from megatron_ultralong.measure.step import StepSettings

K, GIB = 1024, 2**30
GROUPS = ("tests", "attention", "loss", "step", "longest", "generation", "extension")
TESTS = Path("tests/gpu")
"""In a clone; an installed package has no tests."""
MODES = (
    "all-but-attention",
    "offload-all",
    "query-chunks-offload",
    "offload-layer-inputs",
    "query-chunks",
    "full",
    "none",
)
"""Names in measure/step.py; first those that a long run would use."""
OTHER_METHODS = (
    "all-to-all",
    "hybrid",
    "all_gather",
    "te-style",
    "naive",
    "torch allgather",
    "torch alltoall",
    "ring-flash-attn",
    "yunchang",
)


@dataclass(frozen=True, kw_only=True)
class Work:
    """Rows that are measured in one process."""

    group: str
    name: str
    settings: Any
    """The group's: of measure/, or below."""
    rows: tuple[str, ...]

    def key(self, row: str) -> str:
        """Return the row's name in the whole report."""
        return f"{self.group}, {self.name}: {row}"


@dataclass(frozen=True, kw_only=True)
class ExtensionSettings:
    """A model extended to a longer context by the tools, in small."""

    model: Path
    """Hugging Face directory."""
    factor: int
    """Tokens of a row over the model's own context length."""
    iterations: int
    batch: int
    precision: str
    folder: Path
    """For the files of the run. What is complete there is not repeated."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a report, tokens unless said otherwise. Of two entries the second is measured after the first
    of every group."""

    full: bool
    """The shapes of Llama-3.1-8B (four layers) and Llama-3.2-1B; otherwise those of small models."""
    precision: str
    attention: tuple[Sequence[int], Sequence[int]]
    cp: Sequence[int]
    documents: int
    """In the packed rows."""
    error_length: int
    loss: tuple[Sequence[int], Sequence[int]]
    loss_chunks: Sequence[int]
    step: tuple[Sequence[int], Sequence[int]]
    layer_chunk: int
    loss_chunk: int
    save_on_cpu: Sequence[int]
    """Lengths at which torch's save_on_cpu is measured too; it fills host memory."""
    longest: tuple[Sequence[tuple[int, int]], Sequence[tuple[int, int]]]
    """Pairs: bytes of device memory that may be used, and the search's resolution in tokens."""
    generation: tuple[Sequence[int], Sequence[int]]
    repeats: int
    """Timed runs of each row, at the first entry of each group; of the others one."""
    iterations: int
    """Of the extension."""


FULL = Sizes(
    full=True,
    precision="bf16",
    attention=((64 * K,), (128 * K, 256 * K, 512 * K)),
    cp=(4, 8, 32),
    documents=16,
    error_length=4 * K,
    loss=((16 * K,), (64 * K,)),
    loss_chunks=(4 * K, 8 * K),
    step=((32 * K,), (128 * K, 512 * K)),
    layer_chunk=16 * K,
    loss_chunk=4 * K,
    save_on_cpu=(32 * K,),
    longest=(((16 * GIB, 16 * K),), ((64 * GIB, 64 * K),)),
    generation=((32 * K,), (128 * K, 512 * K)),
    repeats=5,
    iterations=12,
)
TINY = Sizes(
    full=False,
    precision="fp32",
    attention=((256,), ()),
    cp=(4, 8, 32),
    documents=4,
    error_length=64,
    loss=((256,), ()),
    loss_chunks=(64,),
    step=((256,), ()),
    layer_chunk=128,
    loss_chunk=64,
    save_on_cpu=(256,),
    longest=(((3 * 2**20, 64),), ()),
    generation=((128,), ()),
    repeats=1,
    iterations=2,
)


TINY_GPU = replace(
    TINY,
    precision="bf16",
    layer_chunk=8 * K,
    loss_chunk=4 * K,
    longest=(((256 * 2**20, 16 * K),), ()),
)
"""PyTorch's allocator takes at least 2 MiB at a time."""


def works(sizes: Sizes, groups: Sequence[str], extension: ExtensionSettings | None) -> Iterator[Work]:
    """Yield what is measured in these groups, in order of worth: every group at its first sizes, then at its
    larger ones."""
    for later in (0, 1):
        for group in (name for name in GROUPS if name in groups):
            if group == "tests" and not later:
                names = tuple(sorted(path.name for path in TESTS.glob("test_*.py"))) or ("all",)
                yield Work(group=group, name="tests/gpu", settings=None, rows=names)
            elif group == "extension" and not later and extension is not None:
                name = f"{extension.model.name} x {extension.factor}"
                yield Work(group=group, name=name, settings=extension, rows=("training",))
            elif group in _MADE:
                for size in getattr(sizes, group)[later]:
                    yield from _MADE[group](sizes, size, sizes.repeats if not later else 1)


def _attention(sizes: Sizes, length: int, repeats: int) -> Iterator[Work]:
    first = length == sizes.attention[0][0]
    heads, kv_heads, head_dim = (32, 8, 128) if sizes.full else (8, 2, 16)

    def settings(**changes: Any) -> AttentionSettings:
        values: dict[str, Any] = {
            "length": length,
            "cp": sizes.cp,
            "ulysses": (),
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "dtype": timing.DTYPES[sizes.precision],
            "documents": None,
            "error_length": sizes.error_length,
            "methods": ("ring",),
            "repeats": repeats,
            "warm_up": 1 if first else 0,
        }
        return AttentionSettings(**values | changes)

    name, rings = token_count(length), tuple(f"ring, CP {cp}" for cp in sizes.cp)
    yield Work(group="attention", name=name, settings=settings(), rows=("one kernel", *rings))
    if first:
        packed = settings(documents=sizes.documents, unpacked=False)
        title = f"{name} of {sizes.documents} documents"
        yield Work(group="attention", name=title, settings=packed, rows=("one kernel", *rings))
        cp = sizes.cp[1]
        others = settings(
            cp=(cp,), ulysses=(2,), methods=tuple(dict.fromkeys(name.split()[0] for name in OTHER_METHODS))
        )
        rows = [f"{method}, CP {cp}" for method in OTHER_METHODS]
        yield Work(group="attention", name=f"{name}, other methods", settings=others, rows=tuple(rows))


def _loss(sizes: Sizes, tokens: int, repeats: int) -> Iterator[Work]:
    settings = LossSettings(
        tokens=tokens,
        hidden=4096 if sizes.full else 64,
        vocab=128256 if sizes.full else 1000,
        chunks=sizes.loss_chunks,
        dtype=timing.DTYPES[sizes.precision],
        error_tokens=512 if sizes.full else 64,
        repeats=repeats,
    )
    rows = [f"ours, chunks of {token_count(chunk)}" for chunk in sizes.loss_chunks]
    rows += [
        "whole logits",
        *(f"torch.utils.checkpoint, chunks of {token_count(c)}" for c in sizes.loss_chunks),
    ]
    rows += ["Liger fused linear cross entropy"]
    yield Work(group="loss", name=token_count(tokens), settings=settings, rows=tuple(rows))


def _step_settings(sizes: Sizes, length: int, repeats: int) -> StepSettings:
    return StepSettings(
        model=step.slice_of(4, sizes.full),
        lengths=(length,),
        settings=MODES,
        precision=sizes.precision,
        layer_chunk=sizes.layer_chunk,
        loss_chunk=sizes.loss_chunk,
        repeats=repeats,
    )


def _step(sizes: Sizes, length: int, repeats: int) -> Iterator[Work]:
    modes = (*MODES, "save-on-cpu") if length in sizes.save_on_cpu else MODES
    settings = _step_settings(sizes, length, repeats)
    yield Work(group="step", name=token_count(length), settings=settings, rows=modes)


def _longest(sizes: Sizes, size: tuple[int, int], repeats: int) -> Iterator[Work]:
    limit, granularity = size
    settings = replace(
        _step_settings(sizes, granularity, 1), longest=True, limit=limit, granularity=granularity
    )
    name = f"in {limit / GIB:.0f} GiB" if sizes.full else f"in {limit / 2**20:.0f} MiB"
    rows: tuple[str, ...] = ("all-but-attention", "offload-all", "query-chunks-offload")
    if size not in sizes.longest[0]:
        rows = rows[:2]  # query chunks would take hours to fill so much memory
    yield Work(group="longest", name=name, settings=settings, rows=rows)


def _generation(sizes: Sizes, length: int, repeats: int) -> Iterator[Work]:
    settings = GenerationSettings(
        model=generation.model_shape(sizes.full),
        lengths=(length,),
        sequences=1,
        written=32 if sizes.full else 4,
        chunk=sizes.layer_chunk,
        precision=sizes.precision,
        repeats=min(3, repeats),
    )
    name = token_count(length)
    yield Work(group="generation", name=f"{name} tokens", settings=settings, rows=("prefill and decode",))


_MADE: dict[str, Callable[[Sizes, Any, int], Iterator[Work]]] = {
    "attention": _attention,
    "loss": _loss,
    "step": _step,
    "longest": _longest,
    "generation": _generation,
}
