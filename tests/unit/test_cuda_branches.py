"""The branches that only run on CUDA, forward and backward, on tensors without data: shapes, strides and
dtypes of every call, on a machine without a GPU and with a torch without CUDA.

Tensors are on the meta device, where torch's operators check their arguments and say what they return.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torchgen
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ultralong.context_parallel import api, query_rows, zigzag
from megatron_ultralong.context_parallel.api import ContextGroups
from megatron_ultralong.context_parallel.attention_spec import AttentionSpec
from megatron_ultralong.context_parallel.kernels import aten, select
from megatron_ultralong.model.loss import LossSpec, sharded_token_loss, sharded_token_nll
from tests.packed import placed

META = torch.device("meta")
BF16 = torch.bfloat16
STARTS = (0, 1, 2, 67, 200, 201, 333, 511, 512, 700, 767)


class Calls(TorchDispatchMode):
    """Counts the attention operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in str(function):
            self.names[str(function).removeprefix("aten.").removesuffix(".default")] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def cuda(backend: str) -> Iterator[Calls]:
    """Inside, kernels are chosen as on a GPU where `backend` is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "choose", lambda *args: backend)
        with Calls() as calls:
            yield calls


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def heads(h: int, s: int, d: int = 64, b: int = 1) -> Tensor:
    """[b, h, s, d] as a projection lays it out: tokens first in memory."""
    return empty(s, b, h, d).permute(1, 2, 0, 3)


# ---- kernels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["flash", "cudnn"])
@pytest.mark.parametrize(("h", "g"), [(8, 8), (9, 3), (5, 1)])
def test_kernels(backend: Any, h: int, g: int) -> None:
    for s, t, causal, d in ((256, 256, True, 128), (77, 77, True, 64), (96, 250, False, 64)):
        q, k, v = heads(h, s, d, 2), heads(g, t, d, 2), heads(g, t, d, 2)
        out, lse = select.forward(q, k, v, causal, 0.1, backend=backend)
        assert out.shape == q.shape and out.dtype == BF16 and out.device == META
        assert lse.shape == q.shape[:3] and lse.dtype == torch.float32
        for dout in (heads(h, s, d, 2), empty(2, h, s, d), empty(2, h, d, s).mT):
            grads = select.backward(dout, q, k, v, out, lse, causal, 0.1, backend=backend)
            assert [(x.shape, x.dtype) for x in grads] == [(x.shape, x.dtype) for x in (q, k, v)]


@pytest.mark.parametrize("g", [1, 2, 8])
def test_many_documents(g: int) -> None:
    """One call of the kernel forward, and as many backward as its workspace allows."""
    s = 4096
    for starts, calls in ((list(range(0, s, 1500)), 1), (list(range(0, s, 100)), 11)):
        spec = AttentionSpec(placement=placed(starts, s, 1))
        with cuda("flash") as counted:
            leaves = [heads(8, s).requires_grad_(), *(heads(g, s).requires_grad_() for _ in "kv")]
            out = api.attention(*leaves, ContextGroups(), spec)
            grads = torch.autograd.grad(out, leaves, empty(*out.shape))
        assert [x.shape for x in grads] == [x.shape for x in leaves]
        assert counted.names["_flash_attention_forward"] == 1
        assert counted.names["_flash_attention_backward"] == calls


@pytest.mark.parametrize(
    ("forward", "backward", "ours"),
    [
        ("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward", aten.flash_backward),
        ("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward", aten.cudnn_backward),
        (
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention_for_cpu_backward",
            aten.cpu_backward,
        ),
    ],
)  # fmt: skip
def test_backward_is_called_as_torch_calls_it(
    forward: str, backward: str, ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each argument is what torch's own derivative formula passes in its place."""
    file = Path(torchgen.__file__).parent / "packaged" / "autograd" / "derivatives.yaml"
    entry = re.search(rf"- name: {forward}\(.*?(?=\n- name)", file.read_text(), re.DOTALL)
    assert entry
    formula = re.search(rf"{backward}(?:_symint)?\((.*)\)", entry[0])
    assert formula
    q, k, v, dout, out = heads(4, 32), heads(2, 32), heads(2, 32), heads(4, 32), heads(4, 32)
    lse = empty(1, 4, 32, dtype=torch.float32)
    passed: list[Any] = []
    monkeypatch.setattr(aten, "cudnn_lse_dims", lambda device: 3)

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is getattr(torch.ops.aten, backward).default:
                names = [argument.name for argument in function._schema.arguments]
                values = dict(zip(names, args, strict=False)) | (kwargs or {})
                passed.extend(values.get(name) for name in names)
            return function(*args, **(kwargs or {}))

    with Recorded():
        ours(dout, q, k, v, out, lse, True, 0.1)
    known = {"grad": dout, "query": q, "key": k, "value": v, "output": out, "logsumexp": lse}
    known |= {"dropout_p": 0.0, "is_causal": True, "scale": 0.1, "max_q": 32, "max_k": 32}
    known |= {"attn_mask": None, "attn_bias": None, "cum_seq_q": None, "cum_seq_k": None}
    words = formula[1].split(", ")
    assert len(words) == len(passed)
    checked = 0
    for word, value in zip(words, passed, strict=True):
        if word in known:
            wanted, checked = known[word], checked + 1
            assert value is wanted if isinstance(wanted, Tensor) or wanted is None else value == wanted, word
    assert checked >= 9, "nearly every argument is known"


# ---- context parallelism -------------------------------------------------------------------------


class Alone:
    """One of several ranks. What it sends must fit what it receives; nothing moves."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def subgroup(self, ranks: list[int]) -> Alone:
        return Alone(ranks.index(self.rank), len(ranks))

    def send_recv(self, send: Tensor, receive: Tensor) -> Alone:
        assert send.shape == receive.shape and send.dtype == receive.dtype
        return self._contiguous(send, receive)

    def exchange(self, sends: Any, receives: Any) -> Alone:
        return self._contiguous(*(buffer for _, buffer in (*sends, *receives)))

    def all_to_all(self, send: Tensor, receive: Tensor) -> Alone:
        assert len(send) == len(receive) == self.size
        return self.send_recv(send, receive)

    def all_gather(self, send: Tensor, receive: Tensor) -> Alone:
        assert receive.shape == (self.size, *send.shape) and send.dtype == receive.dtype
        return self._contiguous(send, receive)

    def reduce_scatter(self, send: Tensor, receive: Tensor) -> Alone:
        assert send.shape == (self.size, *receive.shape) and send.dtype == receive.dtype
        return self._contiguous(send, receive)

    def _contiguous(self, *buffers: Tensor) -> Alone:
        assert all(x.is_contiguous() and x.device == META for x in buffers)
        return self

    def wait(self) -> None:
        pass


@pytest.mark.parametrize("backend", ["flash", "cudnn"])
@pytest.mark.parametrize(
    ("cp", "ulysses", "comm_type"),
    [(1, 1, "p2p"), (2, 1, "p2p"), (4, 1, "p2p"), (4, 2, "p2p"), (4, 1, "all_gather"), (4, 2, "all_gather"), (8, 8, "p2p")],
)  # fmt: skip
@pytest.mark.parametrize("starts", [(0,), STARTS])
def test_every_way_of_context_parallelism(
    backend: Any, cp: int, ulysses: int, comm_type: Any, starts: tuple[int, ...]
) -> None:
    s = 768 // cp
    for rank in {0, cp - 1, cp // 2}:
        with cuda(backend) as calls:
            groups = api.split_group(Alone(rank, cp), ulysses, comm_type) if cp > 1 else ContextGroups()
            leaves = [heads(h, s).requires_grad_() for h in (8, 2, 2)]
            spec = AttentionSpec(placement=placed(starts, 768, cp // ulysses))
            out = api.attention(*leaves, groups, spec)
            grads = torch.autograd.grad(out, leaves, empty(*out.shape))
        assert out.shape == leaves[0].shape and out.dtype == BF16
        assert [(x.shape, x.dtype) for x in grads] == [(x.shape, x.dtype) for x in leaves]
        names = " ".join(calls.names)
        assert "cpu" not in names and backend in (names if len(starts) == 1 else f"{names} {backend}")


@pytest.mark.parametrize("backend", ["flash", "cudnn"])
@pytest.mark.parametrize("cp", [1, 4])
@pytest.mark.parametrize("starts", [(0,), STARTS])
def test_query_rows(backend: Any, cp: int, starts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_rows, "KEY_BLOCK", 100)
    s = 768 // cp
    groups = ContextGroups(ring=Alone(1, cp)) if cp > 1 else ContextGroups()
    for rows in ([slice(0, s // 3)], [slice(5, 40), slice(s // 2 + 5, s // 2 + 40)]):
        with cuda(backend):
            n = sum(one.stop - one.start for one in rows)
            q, k, v = heads(8, n), heads(2, s), heads(2, s)
            spec = AttentionSpec(placement=placed(starts, 768, cp), query_rows=rows)
            out, lse = api.attention_forward(q, k, v, groups, spec)
            assert out.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32
            dkv = empty(2, *k.shape, dtype=torch.float32)
            dq = api.attention_backward_rows(heads(8, n), q, k, v, out, lse, groups, spec, dkv)
        assert dq.shape == q.shape and dq.dtype == BF16
    assert zigzag.positions(768, 0, cp).numel() == s


# ---- loss ----------------------------------------------------------------------------------------


class OneRank:
    @staticmethod
    def size() -> int:
        return 1

    @staticmethod
    def rank() -> int:
        return 0


@pytest.mark.parametrize("chunk", [0, 300])
def test_loss(chunk: int) -> None:
    spec = LossSpec(group=OneRank, vocab_size=90, chunk=chunk, z_loss=1e-4)
    hidden, weight = empty(1024, 1, 64).requires_grad_(), empty(100, 64).requires_grad_()
    labels, mask = empty(1, 1024, dtype=torch.int64), empty(1, 1024, dtype=torch.float32)
    total = sharded_token_loss(hidden, weight, labels, mask, spec)
    grads = torch.autograd.grad(total, [hidden, weight])
    assert total.shape == () and total.dtype == torch.float32
    assert [(x.shape, x.dtype) for x in grads] == [(x.shape, BF16) for x in (hidden, weight)]
    nll = sharded_token_nll(hidden, weight, labels, spec, torch.nn.Identity())
    assert nll.shape == (1, 1024) and nll.dtype == torch.float32
