"""rope.safetensors of a checkpoint: the network of a RoPE method whose frequencies are trained (CLEX), and
its optimizer's state. It is the same on every rank, so that it is read under any layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files
from megatron_ultralong.rope.base import Rope
from megatron_ultralong.rope.clex import CLEX, TrainedCLEX, with_network
from megatron_ultralong.rope.longrope import LongRoPE

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_ultralong.rope.ode import OdeNetwork

FILE = "rope.safetensors"
WEIGHTS = ("up", "down")


def write(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write the file into `folder`. UserError where it cannot be written."""
    from safetensors.torch import save

    with atomic_files.whole_file(folder / FILE) as file:
        file.write(save(tensors))


def read(checkpoint: Path) -> dict[str, Tensor]:
    """Name -> tensor. UserError where the file is missing or damaged."""
    from safetensors.torch import load

    try:
        return load((checkpoint / FILE).read_bytes())
    except Exception as error:  # whatever a damaged file makes safetensors raise
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise UserError(f"{checkpoint / FILE} {reason}; it holds the network of rope.type=clex") from None


def check_present(checkpoint: Path, rope: Rope) -> None:
    """UserError where a checkpoint lacks the file that its method needs."""
    if isinstance(rope, CLEX) and not (checkpoint / FILE).is_file():
        raise UserError(f"{checkpoint} lacks {FILE}, the network of rope.type=clex")


def copy_weights(checkpoint: Path, network: OdeNetwork) -> None:
    """Fill `network` with the weights of a checkpoint. UserError where they do not fit."""
    import torch

    tensors = read(checkpoint)
    with torch.no_grad():
        for name in WEIGHTS:
            target: Tensor = getattr(network, name)
            stored = tensors.get(name)
            if stored is None or stored.shape != target.shape or not bool(stored.isfinite().all()):
                found = "is missing" if stored is None else f"has shape {list(stored.shape)}"
                if stored is not None and stored.shape == target.shape:
                    found = "has values that are not finite"
                raise UserError(
                    f"{checkpoint / FILE}: {name} {found}; it must be finite numbers of shape {list(target.shape)} "
                    "(rope.width and model.head_dim)"
                )
            target.copy_(stored)


def copy_weights_if_stored(checkpoint: Path, network: OdeNetwork) -> None:
    """`copy_weights`, unless the checkpoint has no network."""
    if (checkpoint / FILE).is_file():
        copy_weights(checkpoint, network)


def exported(checkpoint: Path, rope: Rope, head_dim: int, clex_scale: float | None) -> Rope:
    """Return the RoPE that an export of a checkpoint states: CLEX's frequencies at one scale (None = the
    largest), any other method as it is. UserError where `clex_scale` does not fit."""
    trained = with_weights(checkpoint, rope, head_dim)
    if isinstance(trained, CLEX):
        return trained.frozen(trained.scale() if clex_scale is None else clex_scale, head_dim)
    if clex_scale is not None:
        raise UserError(f"--clex-scale is for rope.type=clex; {checkpoint} has rope.type={rope.type}")
    return rope


def compared_scale(hf: Rope, stored: Rope) -> float | None:
    """Scale at which the RoPE of a checkpoint is compared with that of an HF directory; None for a method
    without, and for the largest where the directory is no export of CLEX."""
    if isinstance(stored, CLEX) and isinstance(hf, LongRoPE):
        return min(hf.scale(), stored.scale())
    return None


def with_weights(checkpoint: Path, rope: Rope, head_dim: int) -> Rope:
    """Return the RoPE of a checkpoint with its network; `rope` itself where the method has none."""
    if not isinstance(rope, CLEX) or isinstance(rope, TrainedCLEX):
        return rope
    network = rope.network(head_dim)
    copy_weights(checkpoint, network)
    return with_network(rope, network)
