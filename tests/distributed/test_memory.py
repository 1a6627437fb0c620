"""Counts that stand for memory: the largest tensor a step makes, and what a layer keeps for its backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ultralong.config import Memory, Model, Parallel, Runtime
from megatron_ultralong.model import init  # no megatron
from megatron_ultralong.rope.methods import Unscaled
from tests.spawn import run_ranks

S = 512
# The MLP's and the vocabulary's widths stand out from all else: 8 and 20 times the hidden size.
MODEL = Model(hidden_size=32, ffn_size=256, layers=3, heads=4, kv_heads=2, head_dim=8, vocab_size=640)
CHUNK = 64


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return result


def test_memory_of_a_step() -> None:
    run_ranks(_one_rank, 1)


def _one_rank(rank: int, world: int) -> None:
    from megatron_ultralong.model import llama
    from megatron_ultralong.runtime import launch

    ranks = launch.start(Runtime(device="cpu"), Parallel())
    with pytest.raises(AssertionError, match="must be resolved first"):
        llama.build(MODEL, Unscaled(theta=10000.0), ranks, Parallel(), Memory(), "fp32")
    tokens = torch.randint(0, MODEL.vocab_size, (1, S + 1), generator=torch.Generator().manual_seed(0))
    largest, kept, grads = {}, {}, {}
    for name, memory in {
        "none": Memory(recompute="none", offload="off", loss_chunk=0),
        "attention": Memory(
            recompute="all_but_attention", offload="off", layer_chunk=CHUNK, loss_chunk=CHUNK
        ),
        "offloaded": Memory(
            recompute="all_but_attention", offload="all", layer_chunk=CHUNK, loss_chunk=CHUNK
        ),
    }.items():
        (chunk,) = llama.build(MODEL, Unscaled(theta=10000.0), ranks, Parallel(), memory, "fp32")
        init.initialise(llama.named_parameters(chunk), MODEL, 1, 0, 1)
        saved = 0

        def save(x: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += x.numel()
            return x

        with Largest() as seen:
            with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
                loss = chunk(tokens[:, :-1], tokens[:, 1:], torch.ones(1, S))
            loss.backward()
        largest[name], kept[name] = seen.bytes, saved
        grads[name] = {n: p.grad.clone() for n, p in llama.named_parameters(chunk).items()}
    hidden = MODEL.hidden_size
    assert largest["none"] == 4 * S * MODEL.vocab_size, "whole logits are what this test is to see"
    # With chunks nothing is wider than q, k and v of the whole sequence, or than a weight.
    assert (
        largest["attention"]
        == largest["offloaded"]
        == 4 * max(CHUNK * MODEL.vocab_size, MODEL.vocab_size * hidden, 2 * S * hidden)
    ), largest
    # A layer keeps input, attention output and logsumexp; offloaded, none of it stays on the device.
    layer = S * (2 * hidden + MODEL.heads)
    assert kept["attention"] - kept["offloaded"] == MODEL.layers * layer
    for other in ("attention", "offloaded"):
        for name, grad in grads["none"].items():
            assert (grads[other][name] - grad).norm() <= 1e-5 * grad.norm(), (other, name)


# Layers `call(i, x)` whose outputs and inputs others use as well; w is the caller's own, and stays.


def _chain(call: Any, x: torch.Tensor, bias: torch.Tensor, w: torch.Tensor) -> None:
    (call(2, call(1, call(0, x * 1))) * w).sum().backward()


def _one_gradient_for_two(call: Any, x: torch.Tensor, bias: torch.Tensor, w: torch.Tensor) -> None:
    (call(2, call(1, call(0, x) + bias)) * w).sum().backward()


def _outputs_used_twice(call: Any, x: torch.Tensor, bias: torch.Tensor, w: torch.Tensor) -> None:
    y = call(0, x)
    z = call(1, y)
    ((call(2, z) * w).sum() + (y * bias).sum() + (z + y).sum() + (z * w).sum()).backward()


def _two_layers_on_one(call: Any, x: torch.Tensor, bias: torch.Tensor, w: torch.Tensor) -> None:
    y = call(0, x)
    ((call(1, y) + call(2, y) + y + bias) * w).sum().backward()


def _gradients_given(call: Any, x: torch.Tensor, bias: torch.Tensor, w: torch.Tensor) -> None:
    torch.autograd.backward([call(1, call(0, x)), call(2, x) + bias], [w, w])


def test_gradients_are_overwritten_only_where_nobody_else_holds_them() -> None:
    run_ranks(_shared_gradients, 1)


def _shared_gradients(rank: int, world: int) -> None:
    """Against layers that autograd goes through."""
    from megatron_ultralong.model import llama
    from megatron_ultralong.model.layer import gradients
    from megatron_ultralong.runtime import launch

    ranks = launch.start(Runtime(device="cpu"), Parallel())
    generator = torch.Generator().manual_seed(1)
    x0, bias0, w = (torch.randn(S, 1, MODEL.hidden_size, generator=generator) for _ in range(3))
    given = w.clone()
    reuse_or_allocate = gradients.reuse_or_allocate
    in_place: list[bool] = []

    def counting(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        dx = reuse_or_allocate(ctx, dy)
        in_place.append(dx is dy)
        return dx

    want: dict[str, list[torch.Tensor]] = {}
    for memory in (
        Memory(recompute="none", offload="off"),
        Memory(offload="off", layer_chunk=100),
        Memory(offload="all", layer_chunk=100),
        *(
            Memory(offload=where, layer_chunk=100, query_chunks=True)
            for where in ("off", "layer_inputs", "all")
        ),
    ):
        (chunk,) = llama.build(MODEL, Unscaled(theta=10000.0), ranks, Parallel(), memory, "fp32")
        init.initialise(llama.named_parameters(chunk), MODEL, 1, 0, 1)
        layers = list(llama.unwrap(chunk).decoder.layers)

        def call(i: int, x: torch.Tensor, layers: Any = layers) -> torch.Tensor:
            return layers[i](hidden_states=x, attention_mask=None)[0]

        for case in (
            _chain,
            _one_gradient_for_two,
            _outputs_used_twice,
            _two_layers_on_one,
            _gradients_given,
        ):
            x, bias = x0.clone().requires_grad_(), bias0.clone().requires_grad_()
            chunk.zero_grad()
            in_place.clear()
            with pytest.MonkeyPatch.context() as patch:
                for module in ("recompute", "query_chunks"):
                    patch.setattr(f"megatron_ultralong.model.layer.{module}.reuse_or_allocate", counting)
                case(call, x, bias, w)
            assert torch.equal(w, given), (memory, case.__name__)
            found = [
                x.grad,
                *([] if bias.grad is None else [bias.grad]),
                *(p.grad for layer in layers for p in layer.parameters()),
            ]
            for got, expected in zip(found, want.setdefault(case.__name__, found), strict=True):
                assert (got - expected).norm() <= 1e-5 * expected.norm(), (memory, case.__name__)
            if case is _chain and memory.recompute == "all_but_attention":
                assert in_place == [False, True, True], "the last layer's gradient came from elsewhere"
