"""CLEX (rope.type=clex; arXiv 2310.16450): frequencies that follow a learned differential equation in the
scaling factor."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from megatron_ultralong.errors import UserError
from megatron_ultralong.rope.base import ScaledRope
from megatron_ultralong.rope.longrope import LongRoPE

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_ultralong.rope.ode import OdeNetwork


@dataclass(frozen=True, kw_only=True)
class CLEX(ScaledRope):
    """x(t), the logarithms of the frequencies at scale t, starts at x(1) = ln theta^(-2i/D) and follows

        dx/dt = act((x + ln f(t)) W_up) W_down + f'(t) / f(t),  f_i(t) = (theta (2t - 1)^(D/(D-2)))^(-2i/D).

    W_down is zero before training, so that the frequencies are those of NTK-aware scaling by 2t - 1. The
    network (W_up, W_down) is trained with the model: in each iteration t is a random whole number up to
    `factor`, and the tokens' positions are spread over t x original_length (train/ode_training.py). In
    validation, evaluation and generation, n tokens have t = n / original_length, rounded up, and positions
    0, 1, 2, ...; for a request n counts prompt and new tokens, so that all cached keys have the same
    frequencies.

    Settings alone, as stored in run.json; `TrainedCLEX` has the network as well.
    """

    type: Literal["clex"] = "clex"
    factor: float | None = None
    """Largest scale trained, a whole number from 2 on. None = train.seq_length / original_length, rounded
    up."""
    width: int = 1
    """Width of the network, in head dimensions."""
    activation: Literal["tanh", "silu"] = "tanh"
    """act of the equation."""
    ode_theta: float | None = None
    """theta in the network's input f(t); None = theta. CLEX's published code has 10000 there for every
    model."""
    lr: float = field(default=2e-5, compare=False)
    """Highest learning rate of the network; it follows the run's schedule. Without weight decay."""

    draws_positions = True
    reaches_further = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allow_short:
            raise UserError(
                "rope.allow_short=true: rope.type=clex has no frequencies beyond rope.factor; set rope.factor"
            )
        if self.factor is not None and (self.factor < 2 or self.factor != int(self.factor)):
            raise UserError(
                f"rope.factor={self.factor:g} must be a whole number from 2 on for rope.type=clex; set rope.factor"
            )
        if self.original_length == 1:
            raise UserError("rope.original_length=1 must be at least 2 for rope.type=clex")
        if self.width < 1:
            raise UserError(f"rope.width={self.width} must be at least 1")
        if self.ode_theta is not None and not 1 < self.ode_theta < math.inf:
            raise UserError(f"rope.ode_theta={self.ode_theta} must be above 1")
        if not 0 <= self.lr < math.inf:
            raise UserError(f"rope.lr={self.lr} must be 0 or more")

    # ---- maths ---------------------------------------------------------------------------------

    def network(self, head_dim: int) -> OdeNetwork:
        """The network before training."""
        from megatron_ultralong.rope.ode import OdeNetwork  # imports torch

        return OdeNetwork(self, head_dim, width=self.width, activation=self.activation, theta=self.ode_theta)

    def frozen(self, scale: float, head_dim: int) -> LongRoPE:
        """Return the frequencies at `scale` as a table, without a temperature. UserError for a scale that is
        not trained."""
        return self.network(head_dim).table(scale)

    def scale_of(self, length: int) -> int:
        """t of a sequence of `length` tokens. UserError beyond the largest scale."""
        scale = max(1, math.ceil(length / self.original()))
        if scale > self.scale():
            raise UserError(
                f"a sequence of {length} tokens needs scale {scale}, but rope.factor={self.scale():g} is the largest that "
                f"this CLEX was trained for ({self.covered_length()} tokens)"
            )
        return scale

    def frequencies(self, head_dim: int, length: int) -> Tensor:
        return self.frozen(self.scale_of(length), head_dim).frequencies(head_dim, length)

    def depends_on_length(self) -> bool:
        return True

    def readable_length(self, trained_length: int) -> int:
        return max(trained_length, round(self.scale() * self.original()))

    def possible_factor(self, factor: float) -> float:
        return math.ceil(factor)

    def describe(self) -> str:
        theta, original = self.base()
        return f"clex, theta {theta:,.10g}, scales 1 to {self.scale():g} over {original:,} positions"

    # ---- config.json ---------------------------------------------------------------------------

    def to_hf(self, max_position: int, head_dim: int) -> dict[str, Any]:
        raise UserError(
            "config.json cannot express rope.type=clex; the nearest is its table at one scale: `ultralong convert "
            "export --clex-scale T`"
        )


@dataclass(frozen=True, kw_only=True)
class TrainedCLEX(CLEX):
    """CLEX with its network, which may be in training: frequencies are those of its present weights."""

    weights: OdeNetwork = field(compare=False, repr=False)

    def network(self, head_dim: int) -> OdeNetwork:
        if head_dim != self.weights.head_dim:
            raise UserError(f"CLEX was trained for head_dim={self.weights.head_dim}, not {head_dim}")
        return self.weights


def with_network(rope: CLEX, network: OdeNetwork) -> TrainedCLEX:
    """Return `rope` with `network`."""
    return TrainedCLEX(**{f.name: getattr(rope, f.name) for f in fields(CLEX)}, weights=network)
