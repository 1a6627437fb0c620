"""What a run prints at its start about its kernels, and what it refuses; GPUs are made up."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ultralong.context_parallel.kernels import flash_versions, merge, select, startup
from megatron_ultralong.errors import UserError
from megatron_ultralong.model import spec
from megatron_ultralong.runtime import cli, memory

GPU = torch.device("cuda", 0)
BF16 = torch.bfloat16


@dataclass
class Machine:
    """A GPU and what is installed beside it."""

    capability: tuple[int, int] = (9, 0)
    cudnn: int = 92000
    built_with: int | None = 92000
    triton: str | None = None
    """Why Triton cannot be used."""
    deterministic: bool = False
    flash3: str | None = "not installed"
    """Why FlashAttention-3 cannot be used."""
    active: Any = "flash"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    it = Machine()

    def activate(version: Any, *kind: Any) -> str | None:
        if version == "flash3" and it.flash3:
            return it.flash3
        it.active = version
        return None

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: it.capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: it.cudnn)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: it.deterministic)
    monkeypatch.setattr(flash_versions, "active", lambda: it.active)
    monkeypatch.setattr(flash_versions, "activate", activate)
    monkeypatch.setattr(flash_versions, "installed", lambda version: it.flash3 != "not installed")
    monkeypatch.setattr(startup, "_activate", activate)
    monkeypatch.setattr(startup, "_built_cudnn", lambda: it.built_with)
    monkeypatch.setattr(merge, "why_not_triton", lambda device: it.triton)
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.7.1"))
    switch = torch.backends.cuda.cudnn_sdp_enabled()
    yield it
    torch.backends.cuda.enable_cudnn_sdp(switch)


def test_cpu() -> None:
    assert startup.apply("auto", torch.device("cpu"), torch.float32, 64, documents=True) == {
        "attention": "PyTorch's flash attention of the CPU (float32, head dimension 64, cpu)",
        "merge": "PyTorch operations",
    }
    assert spec.layers_of(torch.device("cpu")).startswith("Megatron-Core 0.")
    with pytest.raises(UserError, match="attention kernel flash3 needs a GPU, .*: use auto"):
        startup.apply("flash3", torch.device("cpu"), torch.float32, 64)


FA2 = f"FlashAttention-2 of PyTorch {torch.__version__}"


@pytest.mark.parametrize(
    ("changes", "setting", "head_dim", "attention", "backend"),
    [
        ({}, "auto", 128, "cuDNN 9.20.0 (bfloat16, head dimension 128, sm_90)", "cudnn"),
        (
            {"capability": (10, 0)},
            "auto",
            128,
            "cuDNN 9.20.0 (bfloat16, head dimension 128, sm_100)",
            "cudnn",
        ),
        (
            {"capability": (8, 0)},
            "auto",
            128,
            f"{FA2} (bfloat16, head dimension 128, sm_80): cuDNN is not used because the GPU is older than Hopper",
            "flash",
        ),
        (
            {"deterministic": True},
            "auto",
            128,
            f"{FA2} (bfloat16, head dimension 128, sm_90): cuDNN is not used because its backward is not deterministic",
            "flash",
        ),
        (
            {},
            "flash",
            128,
            f"{FA2} (bfloat16, head dimension 128, sm_90): cuDNN is not used because it is switched off",
            "flash",
        ),
        (
            {},
            "auto",
            256,
            f"{FA2} (bfloat16, head dimension 256, sm_90): cuDNN is not used because the head dimension is above 128",
            "flash",
        ),
        (
            {"flash3": None},
            "auto",
            128,
            "FlashAttention-3 (bfloat16, head dimension 128, sm_90): it is faster than cuDNN on Hopper",
            "flash3",
        ),
        ({"flash3": None}, "cudnn", 128, "cuDNN 9.20.0 (bfloat16, head dimension 128, sm_90)", "cudnn"),
        # FlashAttention-3 is for Hopper only, and FlashAttention-4 is used only if asked for.
        (
            {"flash3": None, "capability": (10, 0)},
            "auto",
            128,
            "cuDNN 9.20.0 (bfloat16, head dimension 128, sm_100)",
            "cudnn",
        ),
        (
            {"capability": (10, 0)},
            "flash4",
            128,
            "FlashAttention-4 (bfloat16, head dimension 128, sm_100): cuDNN is not used because it is switched off",
            "flash4",
        ),
    ],
)
def test_attention_on_a_gpu(
    machine: Machine, changes: dict[str, Any], setting: Any, head_dim: int, attention: str, backend: str
) -> None:
    vars(machine).update(changes)
    choices = startup.apply(setting, GPU, BF16, head_dim)
    assert choices == {"attention": attention, "merge": "one kernel of Triton 3.7.1"}
    assert select.choose(GPU, BF16, head_dim) == backend


def test_documents(machine: Machine) -> None:
    choices = startup.apply("auto", GPU, BF16, 128, documents=True)
    assert choices["attention inside documents"] == f"{FA2}, those of a rank in one call"
    machine.flash3 = None
    choices = startup.apply("auto", GPU, BF16, 128, documents=True)
    assert choices["attention inside documents"].startswith("FlashAttention-3")


def test_float32_on_a_gpu(machine: Machine) -> None:
    choices = startup.apply("auto", GPU, torch.float32, 128)
    assert choices["attention"] == "plain tensor operations (float32, head dimension 128, sm_90)"


def test_merge_without_triton(machine: Machine) -> None:
    machine.triton = "Triton is not installed"
    choices = startup.apply("auto", GPU, BF16, 128)
    assert choices["merge"] == "PyTorch operations, several passes over the output: Triton is not installed"


def test_another_cudnn_than_pytorch_was_built_with(machine: Machine) -> None:
    machine.cudnn = 91002
    choices = startup.apply("auto", GPU, BF16, 128)
    assert choices["attention"].startswith("cuDNN 9.10.2")
    assert choices["warning"].startswith("cuDNN 9.10.2 is loaded, but PyTorch was built with 9.20.0: ")
    machine.cudnn = 90100  # too old
    choices = startup.apply("auto", GPU, BF16, 128)
    assert "cuDNN is not used because version 90100 is older than 90501" in choices["attention"]
    machine.built_with = 90100
    assert "warning" not in startup.apply("auto", GPU, BF16, 128)


def test_a_cudnn_that_pytorch_refuses(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def version() -> int:
        raise RuntimeError("cuDNN version incompatibility: PyTorch was compiled against (9, 20, 0)\nmore")

    monkeypatch.setattr(torch.backends.cudnn, "version", version)
    choices = startup.apply("auto", GPU, BF16, 128)
    assert choices["attention"].endswith(
        "because cuDNN version incompatibility: PyTorch was compiled against (9, 20, 0)"
    )
    assert choices["warning"].startswith(
        "cuDNN that PyTorch cannot use is loaded, but PyTorch was built with 9.20.0"
    )
    with pytest.raises(UserError, match=r"kernel cudnn cannot be used here: cuDNN version .*; use auto"):
        startup.apply("cudnn", GPU, BF16, 128)


def test_flash3_that_does_not_work(machine: Machine) -> None:
    machine.flash3 = "it failed: no kernel image"
    choices = startup.apply("auto", GPU, BF16, 128)
    assert choices["attention"].startswith("cuDNN 9.20.0")
    assert choices["warning"] == "FlashAttention-3 is installed, but not used: it failed: no kernel image"
    with pytest.raises(
        UserError, match="kernel flash3 cannot be used here: it failed: no kernel image; use auto"
    ):
        startup.apply("flash3", GPU, BF16, 128)


# ---- what is set before CUDA starts --------------------------------------------------------------


def test_allocator_grows_segments_unless_the_user_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    monkeypatch.setattr(os, "environ", environment)
    memory.grow_segments()
    assert memory.cuda_environment() == (
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, CUDA_DEVICE_MAX_CONNECTIONS=1"
    )
    for name in memory.ALLOCATOR_SETTINGS:
        environment.clear()
        environment[name] = "max_split_size_mb:512"
        memory.grow_segments()
        assert (
            memory.cuda_environment() == f"{name}=max_split_size_mb:512, CUDA_DEVICE_MAX_CONNECTIONS=(unset)"
        )


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        ('raise RuntimeError("Found empty `transformer-engine` meta package installed.\\nMore")', "Found empty `tr"),
        ('__version__ = "2.9.0"', "No module named 'transformer_engine.pytorch'"),
    ],
)  # fmt: skip
def test_transformer_engine_without_its_pytorch_part(package: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine/__init__.py").write_text(package)
    code = (
        "from megatron_ultralong.runtime import cli; import importlib; "
        "cli.main(lambda: importlib.import_module('megatron.core') and 0)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    line = f"error: TransformerEngine is installed without a PyTorch part that works here ({reason}"
    assert done.returncode == 2 and done.stderr.startswith(line), done.stderr
    assert done.stderr.endswith("pip uninstall transformer-engine\n") and done.stderr.count("\n") == 1


def test_other_errors_that_mention_transformer_engine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that works is not blamed."""

    def fails() -> int:
        raise RuntimeError("transformer_engine: out of memory")

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", types.ModuleType("pytorch"))
    monkeypatch.setattr(cli, "leave", leave)
    with pytest.raises(SystemExit) as stop:
        cli.main(fails)
    assert stop.value.code == 1 and "Traceback" in capsys.readouterr().err
