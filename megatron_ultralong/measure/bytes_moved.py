"""Bytes that operations other than matrix products and attention read and write, torch's and Triton's.

These operations compute little, so their time is that of memory. Counted is what each reads and writes if
nothing stays in a cache: the same number on every run and machine, for any length.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "c10d.")
_NOTHING = ("empty", "attention", "lift_fresh", "_local_scalar_dense", "detach", "alias")
_ONLY_WRITTEN = ("aten.copy_", "aten.fill_", "aten.zero_")


class BytesMoved(TorchDispatchMode):
    """Counts inside its block. Each tensor argument is read once, and each result written once; an expanded
    tensor counts as what it was expanded from."""

    def __init__(self) -> None:
        super().__init__()
        self.by_operation: Counter[str] = Counter()
        self._restored = contextlib.ExitStack()

    @property
    def total(self) -> int:
        return sum(self.by_operation.values())

    def __enter__(self) -> BytesMoved:
        if torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
            from triton.runtime.jit import JITFunction

            self._restored.callback(setattr, JITFunction, "run", JITFunction.run)
            JITFunction.run = self._counting(JITFunction.run)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._restored.close()

    def _counting(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Each tensor of a kernel of Triton is read or written once. The merge is a part of attention."""

        def counted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            if "merge" not in kernel.fn.__name__:
                self.by_operation[kernel.fn.__name__] += sum(_bytes(x) for x in _tensors((args, kwargs)))
            return run(kernel, *args, **kwargs)

        return counted

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = str(function)
        if function.is_view or name.startswith(_PRODUCTS) or any(word in name for word in _NOTHING):
            return result
        given, returned = _tensors((args, kwargs)), _tensors(result)
        storages = {x.untyped_storage()._cdata for x in given}
        if not function._schema.is_mutable and all(x.untyped_storage()._cdata in storages for x in returned):
            return result  # a view by another name
        size = sum(_bytes(x) for x in (*given, *returned))
        # Not read: what out= or an overwriting operation is given.
        out = [kwargs.get(argument.name) for argument in function._schema.arguments if argument.is_out]
        size -= sum(_bytes(x) for x in _tensors(out))
        if name.startswith(_ONLY_WRITTEN):
            size -= _bytes(args[0])
        if not returned:  # results are written to arguments, as in fused optimizers
            written = [
                value
                for argument, value in zip(function._schema.arguments, args, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            size += sum(_bytes(x) for x in _tensors(written))
        self.by_operation[name.removeprefix("aten.")] += size
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_iter(values) if isinstance(x, Tensor)]


def _bytes(x: Tensor) -> int:
    """Bytes of the distinct elements of x."""
    count = x.element_size()
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride or not size else 1
    return count
