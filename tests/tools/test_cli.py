"""How a tool ends: one line and exit code 2 for a user's mistake, the traceback and 1 for a fault of ours,
and no process left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import processes

TOOL = """
import multiprocessing, time
from megatron_ultralong.errors import UserError
from megatron_ultralong.runtime import cli

def tool():
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(300,)).start()
    {end}

cli.main(tool)
"""


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("raise UserError('the file is missing')", 2, "error: the file is missing\n"),
        ("raise ZeroDivisionError", 1, "ZeroDivisionError\n"),
    ],
)
def test_no_child_holds_the_output_open(end: str, code: int, said: str) -> None:
    done = processes.run([sys.executable, "-c", TOOL.format(end=end)], capture_output=True, timeout=120)
    assert done.returncode == code and done.stderr.endswith(said)
    assert ("Traceback" in done.stderr) == (code == 1)


def test_a_mistake_ends_a_tool_with_one_line():
    tool = Path(__file__).parents[2] / "tools" / "plan.py"
    done = processes.run(
        [sys.executable, tool, "--recipe", "ultralong_1m", "--gpus", "7"], capture_output=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no layout of 7 GPUs") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_leaves_ends_a_tool_in_silence(lines: int) -> None:
    """Output smaller than the buffer is written at the end, larger output in the middle."""
    program = f"""
from megatron_ultralong.runtime import cli
cli.main(lambda: print("a line\\n" * {lines}))
"""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("act, code", [("print(1)", 0), ("print(1); raise UserError('x')", 2)])
def test_outputs_that_the_shell_closed(act: str, code: int) -> None:
    """As with >&-: Python has None in their place."""
    program = f"""
import sys
sys.stdout = None
from megatron_ultralong.errors import UserError
from megatron_ultralong.runtime import cli
def act():
    {act}
cli.main(act)
"""
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "error: x\n" * (code == 2))
