"""The chunked loss against torch's cross entropy, on one rank; over tensor parallel ranks
tests/distributed/test_model.py has it."""

from __future__ import annotations

import pytest
import torch

from megatron_ultralong.model import loss
from megatron_ultralong.model.loss import LossSpec, sharded_token_loss, sharded_token_nll

S, B, H, V, PADDED = 13, 2, 8, 29, 32


class One:
    """A tensor parallel group of one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def spec(chunk: int, z_loss: float = 0.0) -> LossSpec:
    return LossSpec(group=One(), vocab_size=V, chunk=chunk, z_loss=z_loss)


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(S, B, H, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(PADDED, H, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (B, S), generator=generator)
    weights = torch.rand(B, S, generator=generator) * (
        torch.rand(B, S, generator=generator) > 0.3
    )  # token weights, some zero
    return hidden, weight, labels, weights


def reference(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, z_loss: float
) -> torch.Tensor:
    logits = (hidden.float() @ weight[:V].float().t()).transpose(0, 1)  # [b, s, V]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(
        B, S
    )
    return ((nll + z_loss * logits.logsumexp(-1) ** 2) * weights).sum()


@pytest.mark.parametrize("chunk", [0, 1, 5, 8, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("block", [1, 3 * PADDED, loss.LOSS_BLOCK])
def test_value_and_gradients(chunk: int, z_loss: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "LOSS_BLOCK", block)
    hidden, weight, labels, weights = inputs(torch.float32)
    want = reference(hidden, weight, labels, weights, z_loss)
    want_grads = torch.autograd.grad(want, (hidden, weight))
    z_sum = torch.ones(())  # is added to
    got = sharded_token_loss(hidden, weight, labels, weights, spec(chunk, z_loss), z_sum=z_sum)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    logits = (hidden.double() @ weight[:V].double().t()).transpose(0, 1)
    want_z = (z_loss * logits.logsumexp(-1).square() * weights).sum()
    torch.testing.assert_close(z_sum.double() - 1, want_z.detach(), rtol=1e-6, atol=1e-6)
    assert not z_sum.requires_grad
    for grad, want_grad in zip(torch.autograd.grad(3 * got, (hidden, weight)), want_grads, strict=True):
        torch.testing.assert_close(grad, 3 * want_grad, rtol=1e-5, atol=1e-5)


def test_bf16_sums_chunks_in_float32() -> None:
    hidden, weight, labels, weights = inputs(torch.bfloat16)
    want = torch.autograd.grad(reference(hidden, weight, labels, weights, 0.0), (hidden, weight))
    got = torch.autograd.grad(
        sharded_token_loss(hidden, weight, labels, weights, spec(chunk=1)),
        (hidden, weight),
    )
    for grad, want_grad in zip(got, want, strict=True):
        assert grad.dtype == torch.bfloat16
        assert (grad.float() - want_grad.float()).norm() < 0.01 * want_grad.float().norm()


def test_all_tokens_masked_and_no_graph() -> None:
    hidden, weight, labels, weights = inputs(torch.float32)
    got = sharded_token_loss(
        hidden,
        weight,
        labels,
        torch.zeros_like(weights),
        spec(chunk=4, z_loss=0.1),
    )
    assert got == 0 and all((grad == 0).all() for grad in torch.autograd.grad(got, (hidden, weight)))
    with torch.no_grad():
        assert not sharded_token_loss(hidden, weight, labels, weights, spec(chunk=4)).requires_grad


@pytest.mark.parametrize("chunk", [0, 5, 1000])
def test_the_loss_of_each_token(chunk: int) -> None:
    hidden, weight, labels, _ = inputs(torch.float32)
    norm = torch.nn.RMSNorm(H)
    torch.nn.init.normal_(norm.weight)
    logits = (norm(hidden) @ weight[:V].t()).transpose(0, 1)
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(
        B, S
    )
    got = sharded_token_nll(hidden, weight, labels, spec(chunk), norm)
    assert got.shape == (B, S) and not got.requires_grad
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
