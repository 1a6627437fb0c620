"""Dtypes of weights: their names on the command line and in files, and conversion that loses no value to
infinity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import reduce

import torch
from torch import Tensor

from megatron_ultralong.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""By name on the command line."""
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""As in config.json."""
SAFETENSORS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""By name in safetensors files."""


def common(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The narrowest dtype that represents the values of all of `dtypes` exactly."""
    return reduce(torch.promote_types, dtypes)


def narrower(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The dtype in which values of `a` and of `b` are equal where one was converted to the other."""
    return next(dtype for dtype in (torch.bfloat16, torch.float16, torch.float32) if dtype in (a, b))


def main(elements: Mapping[str, int], dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """The dtype of most elements. Both by tensor: its number of elements, and its dtype."""
    counts: Counter[torch.dtype] = Counter()
    for name, dtype in dtypes.items():
        counts[dtype] += elements[name]
    return counts.most_common(1)[0][0]


def converted(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Convert `tensor`, whose name is `name` in messages. UserError where a finite value would become
    infinite."""
    result = tensor.to(dtype)
    if dtype == torch.float16 != tensor.dtype and not result.isfinite().all():
        largest = float(tensor[tensor.isfinite()].abs().max())
        if largest > torch.finfo(dtype).max:
            raise UserError(
                f"{name} has values up to {largest:.3g}, and float16 represents none above 65504; use --dtype bf16 or fp32"
            )
    return result
