"""The CUDA path on a machine without a GPU: every file check_*.py by pytest on the null GPU (machine.py), and
tests/gpu with numbers unchecked."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.null_gpu import machine

pytestmark = pytest.mark.skipif(machine.why_not() is not None, reason=machine.why_not() or "")

CHECKS = sorted(path.name for path in Path(__file__).parent.glob("check_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_on_null_gpu(name: str) -> None:
    done = machine.run(["-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", f"tests/null_gpu/{name}"])
    print(done.stdout)
    assert done.returncode == 0
