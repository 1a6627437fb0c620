"""The index (`.metadata`) of a checkpoint in torch.distributed.checkpoint's format, which is a pickle: read
without running code of the file, and compared with the files that it refers to."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError

FILE = ".metadata"
_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
    "torch.distributed.checkpoint.filesystem",
)
_NAMES = {
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("builtins", "dict"),
    ("builtins", "list"),
    ("builtins", "set"),
    ("builtins", "slice"),
    ("builtins", "tuple"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
}
"""What else an index consists of, beside torch's data types."""
_OLDER = {
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
    ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),
}
"""Classes of Megatron-Core up to 0.15 and of torch up to 2.3."""


class _Replaced:
    """Takes the place of a class that an older release of Megatron-Core or torch stored, whose values are
    kept as attributes."""

    def __init__(self, *values: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Builds nothing but what an index consists of."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if (module, name) in _OLDER:
            return _Replaced
        allowed = (module, name) in _NAMES
        if module == "torch":
            allowed = allowed or isinstance(getattr(torch, name, None), torch.dtype)
        elif module in _MODULES:
            found = getattr(__import__(module, fromlist=["_"]), name, None)
            # Classes that are defined there; not what the module imported.
            allowed = isinstance(found, type) and found.__module__ == module
        if not allowed:
            raise UserError(f"{FILE} contains an unexpected class, {module}.{name}; it is not loaded")
        return super().find_class(module, name)


def read(checkpoint: Path) -> Any:
    """The index (torch's Metadata, or its values). UserError where it is missing, damaged, or contains
    anything else than an index; no code of the file is run."""
    try:
        with (checkpoint / FILE).open("rb") as file:
            index = _Unpickler(file).load()
    except FileNotFoundError:
        raise UserError(f"{checkpoint}/{FILE} is missing") from None
    except UserError as error:
        raise UserError(f"{checkpoint}/{error}") from None
    except Exception as error:  # whatever a damaged pickle makes Python raise
        raise UserError(
            f"{checkpoint}/{FILE} cannot be read: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        ) from None
    if not (hasattr(index, "state_dict_metadata") and hasattr(index, "storage_data")):
        raise UserError(f"{checkpoint}/{FILE} cannot be read: it is no index of a checkpoint")
    return index


def fault(checkpoint: Path) -> str | None:
    """The first file that the index refers to and that is missing or too short; None = there is none.
    UserError where the index cannot be read."""
    ends: dict[str, int] = {}
    for place in (read(checkpoint).storage_data or {}).values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size < end:
            return f"{name} has {file.stat().st_size:,} bytes, but its index refers to {end:,}"
    return None
