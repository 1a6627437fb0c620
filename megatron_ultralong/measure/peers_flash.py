"""The zigzag rings of ring-flash-attn (MIT) and yunchang (Apache-2.0), where installed, on our virtual ranks.

Their functions are called unchanged, but use our network (`_Comm`) and our kernels through flash_attn's
interface. For ring-flash-attn, if flash_attn is not installed, a module of that name is created in this
process; for yunchang the function that selects a kernel is replaced. Checked with ring-flash-attn 0.1.8 and
yunchang 0.6.4.

Shapes: their tensors are [b, s, h, d]; ours are [b, h, s, d], and views of them are passed.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import torch
from torch import Tensor

from megatron_ultralong.context_parallel.comm import Communicator, Transfer
from megatron_ultralong.context_parallel.kernels import select as kernels
from megatron_ultralong.context_parallel.placement import Placement

PACKAGES = {"ring-flash-attn": "ring_flash_attn", "yunchang": "yunchang"}
"""Name on PyPI: name of the module."""
_STUBS: set[str] = set()


def missing(package: str) -> str:
    """Return why the package cannot be run here; empty if it can."""
    if importlib.util.find_spec(PACKAGES[package]) is None:
        return f"not installed: pip install {package}"
    try:
        _module(package)
    except Exception as error:  # an import may raise anything
        return f"cannot be imported: {type(error).__name__}: {error}"[:150]
    return ""


def note(package: str) -> str:
    """Return what differs from the other rows, or an empty text."""
    return (
        "with flash_attn's own kernels"
        if package == "ring-flash-attn" and hasattr(sys.modules.get("flash_attn"), "__version__")
        else ""
    )


def zigzag(package: str, ring: Communicator, placement: Placement | None) -> tuple[Any, Any]:
    """Return (forward, backward) of this rank; packed documents are not supported."""
    assert placement is None
    module = _module(package)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = module.zigzag_ring_flash_attn_forward(
            ring, *map(_swap_axes, (q, k, v)), softmax_scale=q.shape[3] ** -0.5
        )
        return _swap_axes(out), lse

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> kernels.QKVGradients:
        dq, dk, dv = module.zigzag_ring_flash_attn_backward(
            ring, *map(_swap_axes, (dout, q, k, v, out)), lse, softmax_scale=q.shape[3] ** -0.5
        )
        return _swap_axes(dq), _swap_axes(dk), _swap_axes(dv)

    return forward, backward


def _swap_axes(x: Tensor) -> Tensor:
    """[b, s, h, d] <-> [b, h, s, d]."""
    return x.transpose(1, 2)


def _module(package: str) -> Any:
    """The package's module of the zigzag ring, using our network."""
    if package == "yunchang":
        # It would mistake the stub below for the real flash_attn.
        hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name in _STUBS}
        try:
            import yunchang.ring.zigzag_ring_flash_attn as theirs
        finally:
            sys.modules.update(hidden)
        theirs.RingComm, theirs.select_flash_attn_impl = _Comm, _select_kernels
        return theirs
    if importlib.util.find_spec("flash_attn") is None:
        interface = _stub(
            "flash_attn.flash_attn_interface",
            _flash_attn_forward,
            _flash_attn_backward,
            _flash_attn_varlen_forward,
            _flash_attn_varlen_backward,
        )
        _stub("flash_attn").flash_attn_interface = interface
    # The package also imports patches for transformers, which fail with newer versions; the ring does not
    # need them.
    _stub("ring_flash_attn.adapters", substitute_hf_flash_attn, update_ring_flash_attn_params)
    import ring_flash_attn.zigzag_ring_flash_attn as theirs

    theirs.RingComm = _Comm
    return theirs


def _stub(name: str, *functions: Any) -> Any:
    """Create a module of this name with these functions in this process."""
    module: Any = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for function in functions:
        setattr(module, function.__name__, function)
    _STUBS.add(name)
    sys.modules.setdefault(name, module)
    return module


class _Comm:
    """Their interface to the network: send tensors to the next rank, receive others from the previous one."""

    def __init__(self, ring: Communicator) -> None:
        self.rank, self.world_size = ring.rank, ring.size
        self._ring = ring
        self._transfers: list[Transfer] = []

    def send_recv_kv(
        self, k: Tensor, v: Tensor, k_buffer: Tensor | None = None, v_buffer: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.send_recv(k, k_buffer), self.send_recv(v, v_buffer)

    def send_recv(self, send: Tensor, receive: Tensor | None = None) -> Tensor:
        receive = torch.empty_like(send) if receive is None else receive
        self._transfers.append(self._ring.send_recv(send, receive))
        return receive

    def commit(self) -> None:
        """Do nothing: transfers start when they are requested."""

    def wait(self) -> None:
        for transfer in self._transfers:
            transfer.wait()
        self._transfers = []


# ---- flash_attn's interface over our kernels ---------------------------------------------------


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    return_softmax: bool = False,
) -> tuple[Tensor, Tensor, None, None]:
    out, lse = kernels.forward(_swap_axes(q), _swap_axes(k), _swap_axes(v), causal, softmax_scale)
    return _swap_axes(out), lse, None, None


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    rng_state: Any = None,
) -> None:
    gradients = kernels.backward(
        _swap_axes(dout),
        _swap_axes(q),
        _swap_axes(k),
        _swap_axes(v),
        _swap_axes(out),
        softmax_lse,
        causal,
        softmax_scale,
    )
    for buffer, gradient in zip((dq, dk, dv), gradients, strict=True):
        buffer.copy_(_swap_axes(gradient))


def _select_kernels(attn_type: Any, stage: str) -> Any:
    """Replaces yunchang's selection of kernels, for forward and backward."""

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        q, k, v, _, scale = args
        return _flash_attn_forward(q, k, v, 0.0, scale, kwargs["causal"])[:2]

    def backward(*args: Any, **kwargs: Any) -> None:
        dout, q, k, v, out, lse, dq, dk, dv, _, scale, causal = args[:12]
        _flash_attn_backward(dout, q, k, v, out, lse, dq, dk, dv, 0.0, scale, causal)

    return {"fwd-only": forward, "bwd-only": backward}[stage]


def _flash_attn_varlen_forward(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError


def _flash_attn_varlen_backward(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError


def substitute_hf_flash_attn(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError


def update_ring_flash_attn_params(*args: Any, **kwargs: Any) -> None:
    raise NotImplementedError
