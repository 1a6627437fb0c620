"""What a process asks of its device, in order: the stub's log, with PyTorch's operations in it.

The stub sees streams, events and NCCL's buffers; which memory an operation reads and writes is added here,
and when the allocator gives a block out and takes it back.
"""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.cuda import _gpu_trace
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Range = tuple[int, int]
"""Addresses from the first up to, and without, the second."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One line of the log."""

    kind: str
    """begin, op, nccl (a call alone), group (of NCCL's calls), record, wait, sync device, sync stream, sync
    event, alloc or free."""
    name: str = ""
    """Of the operation or collective; of the part of the run that begins."""
    stream: str = ""
    event: str = ""
    reads: tuple[Range, ...] = ()
    writes: tuple[Range, ...] = ()
    where: str = ""
    """The line of the library that asked for it."""
    communicator: str = ""
    rank: int = 0
    """In the communicator; so is `peer`."""
    size: int = 0
    count: int = 0
    dtype: int = 0
    peer: int = -1
    """Who receives or sends, or the root; -1 for other collectives."""
    group: tuple[Call, ...] = ()
    """What NCCL does at the same time, in one kernel."""


class Operations(TorchDispatchMode):
    """Notes every operation on CUDA tensors in the stub's log, with what it reads and writes."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, runs_no_kernel, writes = _effects(function)
        if name.startswith("c10d::"):  # its calls of NCCL are logged by the stub
            _note(f"at {_caller()}")
        result = function(*args, **kwargs)
        if not runs_no_kernel:
            arguments = [*enumerate(args), *kwargs.items()]
            read = [value for key, value in arguments if key not in writes]
            written = [value for key, value in arguments if key in writes]
            _note_operation(name, read, [written, result])
        return result


@functools.cache
def _effects(function: Any) -> tuple[str, bool, frozenset[int | str]]:
    """(name, whether it runs no kernel, arguments it writes, by position and by name)."""
    schema = function._schema
    writes: set[int | str] = set()
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            writes |= {position, argument.name}
    is_view = any(x.alias_info is not None and not x.alias_info.is_write for x in schema.returns)
    no_kernel = re.match(r"c10d::|aten::(new_)?empty|aten::record_stream", schema.name) is not None
    return schema.name, is_view or no_kernel, frozenset(writes)


def _note_operation(name: str, reads: Any, writes: Any) -> None:
    def ranges(tensors: Any) -> str:
        found = []
        for x in tree_iter(tensors):
            if isinstance(x, torch.Tensor) and x.is_cuda and x.numel():
                last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride()))
                found.append(f"{x.data_ptr():#x}+{(last + 1) * x.element_size()}")
        return ",".join(found)

    read, written = ranges(reads), ranges(writes)
    if read or written:
        _note(f"op stream={_stream()} read={read} write={written} {name} at {_caller()}")


def _note_triton(run: Callable[..., Any]) -> Callable[..., Any]:
    """Triton's kernels are no operations of PyTorch; any of them may read and write all its tensors."""

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = run(self, *args, **kwargs)
        _note_operation(f"triton {self.fn.__name__}", [], (args, kwargs))
        return result

    return noted


@contextmanager
def operations() -> Iterator[None]:
    """Record what the block does; once in a process, whose NULL_GPU_LOG must be set."""
    from triton.runtime.jit import JITFunction

    JITFunction.run = _note_triton(JITFunction.run)
    torch._C._activate_gpu_trace()
    _gpu_trace.register_callback_for_memory_allocation(
        lambda pointer: _note(f"alloc {pointer:#x} stream={_stream()}")
    )
    _gpu_trace.register_callback_for_memory_deallocation(lambda pointer: _note(f"free {pointer:#x}"))
    with Operations():
        yield
    flush()


def begin(name: str) -> None:
    """Note that a part of the run begins here."""
    torch.cuda.synchronize()
    _note(f"begin {name}")


_library = ctypes.CDLL(None)


def flush() -> None:
    """Write all that is in the stub's buffer to the log."""
    _library.fflush(None)


def _note(line: str) -> None:
    _library.null_gpu_note(line.encode())


def _stream() -> str:
    """The current stream as the stub's log has it (C's %p)."""
    stream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
    return f"{stream:#x}" if stream else "(nil)"


def _caller() -> str:
    """The innermost line of the library, if it is near."""
    frame = sys._getframe(2)
    for _ in range(20):
        if "/megatron_ultralong/" in frame.f_code.co_filename:
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return "elsewhere"


# ---- reading -----------------------------------------------------------------------------------

_PATTERNS = {
    "op": r"op stream=(?P<stream>\S+) read=(?P<reads>\S*) write=(?P<writes>\S*) (?P<name>.*) at (?P<where>\S+)",
    "nccl": r"nccl (?P<name>\w+) count=(?P<count>\d+) type=(?P<dtype>\d+) peer=(?P<peer>-?\d+) "
    r"stream=(?P<stream>\S+) read=(?P<reads>\S+) write=(?P<writes>\S+) "
    r"communicator (?P<communicator>\w+) size (?P<size>\d+) rank (?P<rank>\d+)",
    "group start": r"nccl group start",
    "group end": r"nccl group end",
    "record": r"record event=(?P<event>\S+) stream=(?P<stream>\S+)",
    "wait": r"wait stream=(?P<stream>\S+) event=(?P<event>\S+)",
    "sync device": r"sync device",
    "sync stream": r"sync stream (?P<stream>\S+)",
    "sync event": r"sync event (?P<event>\S+)",
    "alloc": r"alloc (?P<reads>\S+) stream=(?P<stream>\S+)",
    "free": r"free (?P<reads>\S+)",
    "begin": r"begin (?P<name>.*)",
}
_BY_FIRST_WORD = {
    word: [(kind, re.compile(pattern)) for kind, pattern in _PATTERNS.items() if kind.split()[0] == word]
    for word in ("op", "record", "wait", "sync", "alloc", "free", "begin")
}
_BY_FIRST_WORD["nccl"] = [
    (kind, re.compile(_PATTERNS[kind])) for kind in ("group start", "group end", "nccl")
]


@dataclass
class Part:
    """What follows one call of `begin`."""

    name: str
    calls: list[Call] = field(default_factory=list)


def read(log: Path) -> list[Part]:
    """Return the parts of a run. What came before the first is left out."""
    parts: list[Part] = [Part("")]
    where = ""
    group: list[Call] = []
    depth = 0  # of groups inside groups, which are one
    with log.open() as lines:
        for line in lines:
            first = line.split(" ", 1)[0]
            if first == "at":
                where = line[3:].strip()
            call = _parse(line, first, where)
            if call is None:
                continue
            if call.kind == "begin":
                parts.append(Part(call.name))
            elif call.kind == "group start":
                depth += 1
            elif call.kind == "group end":
                depth -= 1
                if depth == 0 and group:
                    parts[-1].calls.append(Call(kind="group", stream=group[0].stream, group=tuple(group)))
                    group = []
            elif depth and call.kind == "nccl":
                group.append(call)
            else:
                parts[-1].calls.append(call)
    return parts[1:]


def _parse(line: str, first: str, where: str) -> Call | None:
    for kind, pattern in _BY_FIRST_WORD.get(first, ()):
        if match := pattern.match(line):
            return _call(kind, match.groupdict(), where)
    return None


def _call(kind: str, fields: dict[str, str], where: str) -> Call:
    values: dict[str, Any] = {"where": where} if kind == "nccl" else {}
    for name, text in fields.items():
        if name in ("reads", "writes"):
            values[name] = tuple(filter(None, map(_range, text.split(","))))
        else:
            values[name] = int(text) if name in ("rank", "size", "count", "dtype", "peer") else text
    return Call(kind=kind, **values)


def _range(text: str) -> Range | None:
    start, _, size = text.partition("+")
    if not start or start == "(nil)":
        return None
    first = int(start, 16)
    return first, first + int(size or 0)
