"""The methods of context parallel attention that measure/attention.py compares, and its settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from megatron_ultralong.config import AttentionBackend, check_heads
from megatron_ultralong.context_parallel import api
from megatron_ultralong.context_parallel.attention_spec import AttentionSpec
from megatron_ultralong.context_parallel.placement import Placement
from megatron_ultralong.errors import UserError
from megatron_ultralong.measure import peers, ring_baselines
from megatron_ultralong.measure.virtual_run import AttentionMethod, MakeAttention

METHODS = (
    "ring",
    "all-to-all",
    "hybrid",
    "all_gather",
    "te-style",
    "naive",
    "torch",
    "ring-flash-attn",
    "yunchang",
)


@dataclass(frozen=True, kw_only=True)
class AttentionSettings:
    """What is measured."""

    length: int
    """S."""
    cp: Sequence[int]
    ulysses: Sequence[int]
    """Ranks that exchange heads, for the hybrid rows."""
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    documents: int | None
    """Documents of random lengths in the packed rows; None = no such rows."""
    unpacked: bool = True
    """Rows without documents too."""
    error_length: int
    """S of the comparison with float64."""
    kernel: AttentionBackend = "auto"
    """auto, cudnn or flash."""
    methods: Sequence[str] = METHODS
    repeats: int = 10
    warm_up: int = 2
    """Runs before those that are timed, beyond one or two of each kind that measure bytes."""
    seed: int = 0

    def __post_init__(self) -> None:
        options = {"length": "seq-length", "error_length": "error-tokens"}
        for name in ("length", "heads", "kv_heads", "head_dim", "error_length", "repeats"):
            if getattr(self, name) < 1:
                option = options.get(name, name.replace("_", "-"))
                raise UserError(f"--{option} {getattr(self, name)} must be at least 1")
        if self.heads % self.kv_heads:
            raise UserError(f"--heads {self.heads} is not a multiple of --kv-heads {self.kv_heads}")
        for cp in self.cp:
            if cp < 2:
                raise UserError(f"--cp {cp} must be at least 2: the first row is one rank alone")
            for name, length in (("seq-length", self.length), ("error-tokens", self.error_length)):
                if length % (2 * cp):
                    raise UserError(f"--{name} {length} is not divisible by 2 x --cp = {2 * cp}")
        if self.documents is not None and not 1 <= self.documents <= min(self.length, self.error_length):
            raise UserError(
                f"--document-count {self.documents} must be at least 1 and at most --seq-length and --error-tokens"
            )
        if "gather" in self.methods:
            raise UserError("--methods gather: this method is now called all_gather")
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise UserError(f"--methods {unknown[0]}: choose from {', '.join(METHODS)}")

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def methods(settings: AttentionSettings, packed: bool, kernel: str) -> Iterator[AttentionMethod]:
    """Yield the rows in order; the first is the ideal.

    packed: rows with documents, which only some methods support. kernel: its name, for titles.
    """
    within = "inside documents" if packed else "on the whole sequence"
    yield AttentionMethod(
        key="one kernel", name=f"one kernel ({kernel}) {within}", cp=1, make=_ours(1, "p2p"), ours=False
    )
    selected = set(settings.methods)
    for cp in settings.cp:
        if "ring" in selected:
            title = f"ours: {'placed documents' if packed else 'ring'}, CP {cp}"
            yield AttentionMethod(key="ring", name=title, cp=cp, make=_ours(1, "p2p"))
        for ulysses in [
            *([cp] if "all-to-all" in selected else []),
            *(u for u in settings.ulysses if "hybrid" in selected and 1 < u < cp and cp % u == 0),
        ]:
            name = (
                f"ours: all-to-all, CP {cp}"
                if ulysses == cp
                else f"ours: all-to-all {ulysses} x ring {cp // ulysses}, CP {cp}"
            )
            key = "all-to-all" if ulysses == cp else "hybrid"
            try:
                check_heads(settings.heads, settings.kv_heads, ulysses)
                yield AttentionMethod(key=key, name=name, cp=cp, ulysses=ulysses, make=_ours(ulysses, "p2p"))
            except UserError as error:
                yield AttentionMethod(key=key, name=name, cp=cp, make=None, note=str(error))
        if "all_gather" in selected and not packed:  # keys of packed rows are sent one way only
            name = f"ours: all_gather, CP {cp}"
            yield AttentionMethod(key="all_gather", name=name, cp=cp, make=_ours(1, "all_gather"))
    if packed:
        return  # the other methods do not support documents
    for cp in settings.cp:
        if "te-style" in selected:
            name = f"TE-style schedule (written here), CP {cp}"
            yield AttentionMethod(key="te-style", name=name, cp=cp, make=ring_baselines.te_style, ours=False)
        if "naive" in selected:
            name = f"naive ring, sums in {settings.dtype_name}, CP {cp}"
            yield AttentionMethod(key="naive", name=name, cp=cp, make=ring_baselines.naive, ours=False)
        yield from (
            method for method in peers.methods(cp, settings.dtype) if method.key.split()[0] in selected
        )


def _ours(ulysses: int, cp_comm_type: api.CommType) -> MakeAttention:
    def make(group: Any, placement: Placement | None) -> tuple[Any, Any]:
        groups = api.ContextGroups() if group is None else api.split_group(group, ulysses, cp_comm_type)
        spec = AttentionSpec(placement=placement)
        return (
            partial(api.attention_forward, groups=groups, spec=spec),
            partial(api.attention_backward, groups=groups, spec=spec),
        )

    return make
