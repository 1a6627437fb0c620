"""The CUDA path on a machine without a GPU: every file check_*.py by pytest on the null GPU (machine.py), and
tests/gpu with numbers unchecked."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.null_gpu import machine

pytestmark = pytest.mark.skipif(machine.why_not() is not None, reason=machine.why_not() or "")

HERE = Path(__file__).parent
CHECKS = [
    *sorted(HERE.glob("check_*.py")),
    *sorted((HERE.parent / "gpu").glob("test_*.py")),
]


@pytest.mark.slow
@pytest.mark.parametrize("path", CHECKS, ids=lambda path: path.stem)
def test_on_null_gpu(path: Path) -> None:
    unchecked = ["-p", "tests.null_gpu.unchecked_numbers"] if path.parent != HERE else []
    options = ["-q", "-n0", "-p", "no:cacheprovider", *unchecked]
    done = machine.run(["-m", "pytest", *options, str(path)])
    print(done.stdout)
    if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:  # the file says why it cannot run
        pytest.skip(next(line for line in done.stdout.splitlines() if line.startswith("SKIPPED")))
    assert done.returncode == 0
