"""run.json of a checkpoint: everything that a checkpoint records besides its tensors."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_ultralong import config
from megatron_ultralong.checkpoint import rope_network
from megatron_ultralong.config import Model
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files
from megatron_ultralong.rope.base import Rope
from megatron_ultralong.rope.methods import from_values

FORMAT = 2
"""Format version of run.json. Version 1 has other names for some settings of the run (`config.RENAMED`); both
are read."""
READABLE = (1, FORMAT)


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Model, RoPE, run and position in the data. The field names are the keys of run.json."""

    model: Model
    rope: Rope
    iteration: int = 0
    consumed: int = 0
    """Sequences trained on so far."""
    tokens: int = 0
    """Tokens trained on so far."""
    run: dict[str, Any] | None = None
    """The resolved run (`config.to_dict`)."""
    max_length: int = 0
    """Longest sequence length of its training with this RoPE so far, tokens, including that of the checkpoint
    it started from, and what the loaded model states where its RoPE is unchanged."""
    data: dict[str, Any] | None = None
    """What it was trained on: seed, shuffling, and the weight and manifest hash of each data set."""
    bad_steps: int = 0
    """Iterations so far whose update was not made (`train.on_bad_step`)."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses with which the next ones are compared (`train.loss_spike`), oldest first."""
    base: str = ""
    """Name of the base model."""
    frozen_weights: str = ""
    """With LoRA, a sum of the weights that are not trained, which the checkpoint does not contain."""

    def has_adapters_only(self) -> bool:
        """Whether the checkpoint contains LoRA's adapters and not the model."""
        return bool(self.frozen_weights)

    def stored_run(self) -> config.Run | None:
        """The run as dataclasses; None for a model that was only converted."""
        return config.from_dict(self.run) if self.run else None


def write(checkpoint: Path, state: TrainingState, checksums: str | None = None) -> None:
    """Write run.json into the folder `checkpoint`. checksums: the algorithm of the checksums.json that is
    written next to it. UserError where it cannot be written."""
    values = {"format": FORMAT, "checksums": checksums, **asdict(state)}
    atomic_files.write_text(checkpoint / "run.json", json.dumps(values, indent=2) + "\n")


def read(checkpoint: Path) -> TrainingState:
    """Read run.json of a checkpoint. UserError where it is missing or has a newer format."""
    file = checkpoint / "run.json"
    if not file.is_file():
        raise UserError(
            f"{file} is missing: not a checkpoint of this program (one of Megatron-LM requires a recipe with the "
            "model's shape)"
        )
    values = atomic_files.read_json(file)
    version = values.pop("format", None)
    if version not in READABLE:
        raise UserError(
            f"{file}: unsupported format version {version} (expected {' or '.join(map(str, READABLE))}); "
            "use the release that wrote it"
        )
    values.pop("checksums", None)  # checkpoint/integrity.py
    try:
        rope = from_values(values.pop("rope"), ignore_others=True)
        rope_network.check_present(checkpoint, rope)
        state = TrainingState(model=Model(**values.pop("model")), rope=rope, **values)
        for one in fields(TrainingState):
            if type(getattr(state, one.name)) is not int and one.type == "int":
                raise TypeError(f"{one.name} is not a whole number")
        if not all(type(loss) in (int, float) for loss in state.recent_losses):
            raise TypeError("recent_losses are not numbers")
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{file} cannot be read: it has been changed ({_one_line(error)})") from None
    return state


def _one_line(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0]
    return f"{text} is missing" if isinstance(error, KeyError) else text
