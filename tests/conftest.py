"""What all tests share: one thread per process, so that ranks do not compete for few cores; modules of the
repository are found from any folder; no process outlives its test; how pytest-xdist distributes tests."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
)

import pytest
import torch

from tests import processes

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_process_stays() -> Iterator[None]:
    yield
    processes.kill_all()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distribute files in order, tests with ranks and on the null GPU one by one, and tests on a GPU
    all to one worker."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            folder = os.path.dirname(file := nodeid.split("::")[0])
            one_by_one = {"tests/distributed": nodeid, "tests/null_gpu": nodeid}
            return {**one_by_one, "tests/gpu": folder}.get(folder, file)

    config.option.loadscopereorder = False
    return Scheduling(config, log)
