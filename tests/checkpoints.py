"""Checkpoints without tensors: enough for what reads only run.json."""

from __future__ import annotations

import pickle
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata

from megatron_ultralong.checkpoint import torch_index, training_state
from megatron_ultralong.checkpoint.training_state import TrainingState


def write_without_tensors(place: Path, state: TrainingState | None = None) -> Path:
    """Write a checkpoint's metadata.json, an index without tensors, and run.json for `state`."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "metadata.json").write_text("{}")
    (place / torch_index.FILE).write_bytes(pickle.dumps(Metadata(state_dict_metadata={}, storage_data={})))
    if state is not None:
        training_state.write(place, state)
    return place
