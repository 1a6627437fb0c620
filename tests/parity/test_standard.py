"""SmolLM2-135M-Instruct, real weights with a chat template, under lm-evaluation-harness: our adapter against
the harness's own model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.test_standard import assert_parity, own_cache, write_tasks  # noqa: F401

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")


def test_real_weights_in_a_chat(base: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path / "tasks")
    ours = assert_parity(base, ["digit", "write"], tmp_path / "tasks", tmp_path / "out", chat=True)
    assert ours.settings["chat"] and ours.model["parameters"] > 1e8
