"""What a run does once at its start: apply the setting of the attention kernel, try out kernels that are
compiled on the spot, and say which ones are used and why."""

from __future__ import annotations

import torch

from megatron_ultralong.config import AttentionBackend
from megatron_ultralong.context_parallel.attention_spec import Backend
from megatron_ultralong.context_parallel.kernels import aten, flash_versions, merge, select
from megatron_ultralong.errors import UserError, first_line


def apply(
    setting: AttentionBackend,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    documents: bool = False,
) -> dict[str, str]:
    """Apply `setting` to this process. Return what is used for attention, for attention inside documents (if
    `documents`) and for the merge, each with the reason, and a warning if there is one.

    auto takes FlashAttention-3 on Hopper where it is installed and works; torch.backends.cuda's own switches
    keep their effect. Deterministic algorithms, if wanted, are already on. UserError where the kernel that is
    asked for cannot be used. `select.choose` returns the choice from then on.
    """
    backend = select.choose(device, dtype, head_dim)
    if device.type != "cuda" or backend == "eager":
        if setting != "auto":
            raise UserError(
                f"attention kernel {setting} needs a GPU, bf16 or fp16, and a head dimension of a multiple of 8 up to "
                f"256; this is {device.type}, {_dtype_name(dtype)}, {head_dim}: use auto"
            )
        name = {"cpu": "PyTorch's flash attention of the CPU"}.get(backend, "plain tensor operations")
        return {"attention": f"{name} ({_kind(device, dtype, head_dim)})", "merge": _merge(device)}
    problem, warnings = None, shadowed_cudnn()
    if setting in ("flash", "flash3", "flash4"):
        torch.backends.cuda.enable_cudnn_sdp(False)
        problem = _activate(setting, device, dtype, head_dim)
    elif setting == "cudnn":
        torch.backends.cuda.enable_cudnn_sdp(True)
        problem = select.why_not_cudnn(device, head_dim)
        if flash_versions.active() == "flash3":  # it would come before cuDNN
            flash_versions.activate("flash")
    elif torch.cuda.get_device_capability(device)[0] == 9 and flash_versions.installed("flash3"):
        failure = _activate("flash3", device, dtype, head_dim)
        if failure is not None:
            warnings.append(f"FlashAttention-3 is installed, but not used: {failure}")
    if problem is not None:
        raise UserError(f"attention kernel {setting} cannot be used here: {problem}; use auto")
    choices = {"attention": _attention(device, dtype, head_dim)}
    if documents:
        choices["attention inside documents"] = f"{_flash_name()}, those of a rank in one call"
    choices["merge"] = _merge(device)
    return choices | ({"warning": "; ".join(warnings)} if warnings else {})


def _attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The kernel of attention on a GPU, and why."""
    where = _kind(device, dtype, head_dim)
    if select.choose(device, dtype, head_dim) == "cudnn":
        return f"cuDNN {_version(select.cudnn_version()[0])} ({where})"
    problem = select.why_not_cudnn(device, head_dim)
    reason = (
        "it is faster than cuDNN on Hopper" if problem is None else f"cuDNN is not used because {problem}"
    )
    return f"{_flash_name()} ({where}): {reason}"


def shadowed_cudnn() -> list[str]:
    """Return a warning if the cuDNN that is loaded is another one than PyTorch was built with."""
    loaded, _ = select.cudnn_version()
    built = _built_cudnn()
    if built is None or loaded == built:
        return []
    return [
        f"cuDNN {_version(loaded) if loaded else 'that PyTorch cannot use'} is loaded, but PyTorch was built "
        f"with {_version(built)}: another installation comes first, see LD_LIBRARY_PATH and LD_PRELOAD"
    ]


def _activate(version: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Activate a FlashAttention and try it out, forward and backward; or return why that failed.

    Which build fits which PyTorch is known to neither: flash-attn-4 4.0.0b20 returns more than PyTorch 2.13
    expects, and builds of flash_attn_3 may lack the backward.
    """
    try:
        flash_versions.activate(version)
        if version != "flash":
            q = torch.zeros(1, 256, 2, head_dim, dtype=dtype, device=device).transpose(1, 2)
            k = q[:, :1]
            out, lse = aten.flash_forward(q, k, k, True, 1.0)
            aten.flash_backward(out, q, k, k, out, lse, True, 1.0)
            torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # foreign code may raise anything
        flash_versions.activate("flash")
        return f"it failed: {first_line(error)}"
    return None


def _merge(device: torch.device) -> str:
    if device.type != "cuda":
        return "PyTorch operations"
    problem = merge.why_not_triton(device)
    if problem is not None:
        return f"PyTorch operations, several passes over the output: {problem}"
    import triton

    return f"one kernel of Triton {triton.__version__}"


def _flash_name() -> str:
    version = flash_versions.active()
    if version == "flash":
        return f"FlashAttention-2 of PyTorch {torch.__version__}"
    return flash_versions.package_version(version)


def _kind(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    where = (
        "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else device.type
    )
    return f"{_dtype_name(dtype)}, head dimension {head_dim}, {where}"


def _built_cudnn() -> int | None:
    """The version of cuDNN that PyTorch was built with; None without cuDNN."""
    compiled = getattr(getattr(torch._C, "_cudnn", None), "getCompileVersion", None)
    if compiled is None:
        return None
    major, minor, patch = compiled()
    return major * 10_000 + minor * 100 + patch


def _version(number: int) -> str:
    return f"{number // 10_000}.{number // 100 % 100}.{number % 100}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
