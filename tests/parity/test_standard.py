"""SmolLM2-135M-Instruct, real weights with a chat template, under lm-evaluation-harness: our adapter against
the harness's own model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity.test_smollm2 import base  # noqa: F401  the fixture that makes the model, or skips
from tests.unit.test_standard import assert_parity, own_cache, write_tasks  # noqa: F401

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")


def test_real_weights_in_a_chat(base: Path, tmp_path: Path) -> None:  # noqa: F811
    write_tasks(tmp_path / "tasks")
    ours = assert_parity(base, ["digit", "write"], tmp_path / "tasks", tmp_path / "out", chat=True)
    assert ours.settings["chat"] and ours.model["parameters"] > 1e8
