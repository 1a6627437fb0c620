"""The zigzag rings of ring-flash-attn (MIT) and yunchang (Apache-2.0) on our virtual ranks, where they are
installed.

Their functions are called as they are. What they ask others for is ours: the network (`_Comm`), and the
kernels of flash_attn's interface: for ring-flash-attn, where flash_attn is not installed, by a module of that
name that lives in this process only; for yunchang in the place of what it would choose. Checked with
ring-flash-attn 0.1.8 and yunchang 0.6.4.

Shapes: their tensors are [b, s, h, d]; ours are [b, h, s, d], and views of them are handed over.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_ultralong.context_parallel.comm import Communicator, Transfer
from megatron_ultralong.context_parallel.kernels import select as kernels

PACKAGES = {"ring-flash-attn": "ring_flash_attn", "yunchang": "yunchang"}
"""Names on PyPI, and of what they install."""
_STAND_INS: set[str] = set()


def missing(package: str) -> str:
    """Why it cannot be run here; empty where it can."""
    if importlib.util.find_spec(PACKAGES[package]) is None:
        return f"not installed: pip install {package}"
    try:
        _module(package)
    except Exception as error:  # whatever another package's import may raise
        return f"cannot be imported: {type(error).__name__}: {error}"[:150]
    return ""


def note(package: str) -> str:
    """What is not the same for it as for the other rows."""
    return (
        "with flash_attn's own kernels"
        if package == "ring-flash-attn" and hasattr(sys.modules.get("flash_attn"), "__version__")
        else ""
    )


def zigzag(package: str, ring: Communicator, starts: Sequence[int] | None) -> tuple[Any, Any]:
    """(forward, backward) of this rank; `starts` is not for it."""
    assert starts is None
    module = _module(package)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = module.zigzag_ring_flash_attn_forward(
            ring, *map(_turn, (q, k, v)), softmax_scale=q.shape[3] ** -0.5
        )
        return _turn(out), lse

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> kernels.QKVGradients:
        dq, dk, dv = module.zigzag_ring_flash_attn_backward(
            ring, *map(_turn, (dout, q, k, v, out)), lse, softmax_scale=q.shape[3] ** -0.5
        )
        return _turn(dq), _turn(dk), _turn(dv)

    return forward, backward


def _turn(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _module(package: str) -> Any:
    """Its file of the zigzag ring, with our network in it."""
    if package == "yunchang":
        # It would take the stand-in below for the real thing.
        hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name in _STAND_INS}
        try:
            import yunchang.ring.zigzag_ring_flash_attn as theirs
        finally:
            sys.modules.update(hidden)
        theirs.RingComm, theirs.select_flash_attn_impl = _Comm, _kernels_of
        return theirs
    if importlib.util.find_spec("flash_attn") is None:
        interface = _stand_in(
            "flash_attn.flash_attn_interface",
            _flash_attn_forward,
            _flash_attn_backward,
            _flash_attn_varlen_forward,
            _flash_attn_varlen_backward,
        )
        _stand_in("flash_attn").flash_attn_interface = interface
    # Its package also imports patches of transformers, which newer versions of that break; the ring has no
    # need of them.
    _stand_in("ring_flash_attn.adapters", substitute_hf_flash_attn, update_ring_flash_attn_params)
    import ring_flash_attn.zigzag_ring_flash_attn as found

    found.RingComm = _Comm
    return found


def _stand_in(name: str, *functions: Any) -> Any:
    """A module of this name with these functions, for this process."""
    module: Any = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for function in functions:
        setattr(module, function.__name__, function)
    _STAND_INS.add(name)
    sys.modules.setdefault(name, module)
    return module


class _Comm:
    """What its functions ask of the network: tensors to the next rank, others from the one before."""

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
        """Nothing: what was handed over is under way already."""

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
    out, lse = kernels.forward(_turn(q), _turn(k), _turn(v), causal, softmax_scale)
    return _turn(out), lse, None, None


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
    found = kernels.backward(
        _turn(dout), _turn(q), _turn(k), _turn(v), _turn(out), softmax_lse, causal, softmax_scale
    )
    for to, gradient in zip((dq, dk, dv), found, strict=True):
        to.copy_(_turn(gradient))


def _kernels_of(attn_type: Any, stage: str) -> Any:
    """What yunchang chooses its kernels by, forward and backward."""

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
