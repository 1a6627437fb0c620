"""The arguments that Megatron-LM stores in a torch_dist checkpoint: `args` of common.pt."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError

_NOT_READ = ("megatron.", "signal.")
"""Modules whose objects Megatron-LM stores among its arguments (enums). They are not imported: `_NotRead`
takes their place."""


class _NotRead:
    """Takes the place of a stored object that has no part in RoPE."""

    def __init__(self, *values: Any) -> None:
        pass


def stored_arguments(file: Path) -> dict[str, Any]:
    """Read the arguments in common.pt, without running any code of the file. UserError where it contains
    objects that are neither plain values nor Megatron-LM's own, or no arguments."""
    import torch

    if not file.is_file():
        raise UserError(
            f"{file} is missing: newer releases of Megatron-LM store their arguments among the tensors; write them "
            "to a text file and pass that"
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            others = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            unknown = sorted(name for name in others if not name.startswith(_NOT_READ))
            if unknown:
                raise UserError(
                    f"{file}: contains more than plain values ({', '.join(unknown)}) and is not loaded; write its "
                    "arguments to a text file and pass that"
                )
            with torch.serialization.safe_globals([(_NotRead, name) for name in others]):
                common = torch.load(str(file), map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged or foreign file makes torch raise
        raise UserError(
            f"{file} cannot be read: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        ) from None
    arguments = common.get("args") if isinstance(common, dict) else None
    if not isinstance(arguments, argparse.Namespace):
        raise UserError(f"{file}: contains no args of Megatron-LM; write them to a text file and pass that")
    return vars(arguments)
