"""Every form in which the merge kernel is called: the calls of ring, all-to-all, gather, query rows and
generation, recorded on tensors without data."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from megatron_ultralong.context_parallel import api, decode, query_rows
from megatron_ultralong.context_parallel.api import ContextGroups
from megatron_ultralong.context_parallel.attention_spec import AttentionSpec
from megatron_ultralong.context_parallel.kernels import select
from tests.packed import placed
from tests.unit.test_cuda_branches import Alone, cuda, heads

Call = tuple[Tensor, Tensor, Tensor, Tensor]
"""(out, lse, partial, partial_lse) on the meta device."""


def calls(d: int = 128) -> list[Call]:
    """Calls with different shapes, strides or alignments, of a rank with 4 query heads and 1 KV head, or 32
    and 8."""
    found: dict[Any, Call] = {}

    def record(*call: Tensor) -> None:
        found.setdefault(tuple((x.shape, x.stride(), x.storage_offset() % 16, x.dtype) for x in call), call)

    with pytest.MonkeyPatch.context() as patch, cuda("cudnn"):
        for module in (select, decode):
            patch.setattr(module, "merge_", record)
        for run in (_rings, _rows, _generation):
            run(d)
    return list(found.values())


def _rings(d: int) -> None:
    spec, starts = AttentionSpec(), (0, 1, 2, 67, 201, 60_001, 65_535)
    for (h, g), cp, ulysses, kind, s in (
        ((4, 1), 4, 1, "p2p", 65_536),
        ((4, 1), 4, 1, "all_gather", 65_536),
        ((32, 8), 4, 2, "p2p", 2**20),  # strides beyond 2^31
    ):
        groups = api.split_group(Alone(cp // 2, cp), ulysses, kind)  # type: ignore[arg-type]
        for which in (spec, AttentionSpec(placement=placed(starts, s * cp, cp // ulysses))):
            api.attention_forward(heads(h, s, d), heads(g, s, d), heads(g, s, d), groups, which)
    groups = ContextGroups(ring=Alone(1, 2))
    api.attention_forward(heads(4, 4096, d, 2), heads(1, 4096, d, 2), heads(1, 4096, d, 2), groups, spec)


def _rows(d: int) -> None:
    for groups in (ContextGroups(), ContextGroups(ring=Alone(1, 4))):
        for rows in ([slice(65_536, 81_920)], [slice(5, 40), slice(70_005, 70_040)]):
            n = sum(one.stop - one.start for one in rows)
            spec = AttentionSpec(query_rows=rows)
            s = 4 * query_rows.KEY_BLOCK
            api.attention_forward(heads(4, n, d), heads(1, s, d), heads(1, s, d), groups, spec)


def _generation(d: int) -> None:
    for comm in (None, Alone(1, 4)):
        for n, cached in ((4096, 8192), (77, 8192), (1, 3)):
            q, k, v = heads(32, n, d), heads(8, n, d), heads(8, n, d)
            decode.prefill_attention(q, k, v, [(heads(8, cached, d), heads(8, cached, d))], comm)  # type: ignore[arg-type]
