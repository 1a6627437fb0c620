"""CLEX (rope.type=clex; arXiv 2310.16450): frequencies that follow a learned differential equation in the
scaling factor."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from megatron_ultralong.errors import UserError
from megatron_ultralong.rope.base import ScaledRope
from megatron_ultralong.rope.longrope import LongRoPE
from megatron_ultralong.rope.ntk import ntk_exponent

if TYPE_CHECKING:
    from torch import Tensor

STEP = 0.01
"""Step of the integration (RK4) in the scale."""


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
        if self.width < 1:
            raise UserError(f"rope.width={self.width} must be at least 1")
        if self.ode_theta is not None and not 1 < self.ode_theta < math.inf:
            raise UserError(f"rope.ode_theta={self.ode_theta} must be above 1")
        if not 0 <= self.lr < math.inf:
            raise UserError(f"rope.lr={self.lr} must be 0 or more")

    # ---- maths ---------------------------------------------------------------------------------

    def network(self, head_dim: int) -> OdeNetwork:
        """The network before training."""
        return OdeNetwork(self, head_dim)

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

    def trained_length(self, seq_length: int) -> int:
        return max(seq_length, round(self.scale() * self.original()))

    def possible_factor(self, factor: float) -> float:
        return math.ceil(factor)

    def describe(self) -> str:
        theta, original = self.base()
        return f"clex, theta {theta:,.10g}, scales 1 to {self.scale():g} over {original:,} positions"

    # ---- config.json ---------------------------------------------------------------------------

    def to_hf(self, max_position: int, head_dim: int) -> dict[str, Any]:
        raise UserError(
            "config.json cannot express rope.type=clex; the nearest is its table at one scale: tools/convert_hf.py "
            "export --clex-scale T"
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


class OdeNetwork:
    """The right-hand side of the equation, with l D^2 parameters for the width l D, and its integration:
    float64 on the CPU, so that all ranks compute the same bits."""

    def __init__(self, rope: CLEX, head_dim: int) -> None:
        import torch

        ntk_exponent(head_dim)  # refuse a head dimension without NTK-aware scaling
        self.rope, self.head_dim = rope, head_dim
        hidden = rope.width * head_dim
        self.up = torch.zeros(head_dim // 2, hidden, device="cpu", requires_grad=True)
        """W_up, float32 [D/2, l D]."""
        self.down = torch.zeros(hidden, head_dim // 2, device="cpu", requires_grad=True)
        """W_down, float32 [l D, D/2]."""
        self._tables: dict[tuple[float, int, int], LongRoPE] = {}
        self.initialise(0)

    def initialise(self, seed: int) -> None:
        """Set the weights before training: W_up uniform up to 1 / sqrt(l D) (kaiming_uniform with
        a = sqrt(5), of a [D/2, l D] weight), W_down 0."""
        import torch

        generator = torch.Generator().manual_seed(seed % 2**32)
        bound = 1 / math.sqrt(self.up.shape[1])
        with torch.no_grad():
            self.up.uniform_(-bound, bound, generator=generator)
            self.down.zero_()

    def log_frequencies(self, scale: float) -> Tensor:
        """x(scale), float64 [D/2], differentiable with respect to the weights. UserError for a scale that is
        not trained."""
        import torch

        if not 1 <= scale <= self.rope.scale():
            raise UserError(
                f"scale {scale:g} is outside of 1 to rope.factor={self.rope.scale():g}, which this CLEX was trained for"
            )
        theta = self.rope.base()[0]
        x = self._pairs() * (-math.log(theta) / self.head_dim)
        steps = math.ceil(round((scale - 1) / STEP, 6))
        if not steps:
            return x
        act = torch.tanh if self.rope.activation == "tanh" else torch.nn.functional.silu
        up, down = self.up.double().T, self.down.double().T
        h = (scale - 1) / steps
        # At the beginnings and in the middles of the steps, and at the end.
        logs, slopes = self._ntk(1 + (h / 2) * torch.arange(2 * steps + 1, dtype=torch.float64, device="cpu"))
        # (x + ln f) W_up = x W_up + ln f W_up, whose second term needs no loop.
        inputs, slopes = (logs @ up.T).unbind(), slopes.unbind()

        def slope(x: Tensor, half_step: int) -> Tensor:
            return torch.addmv(slopes[half_step], down, act(torch.addmv(inputs[half_step], up, x)))

        for i in range(0, 2 * steps, 2):
            k1 = slope(x, i)
            k2 = slope(x.add(k1, alpha=h / 2), i + 1)
            k3 = slope(x.add(k2, alpha=h / 2), i + 1)
            k4 = slope(x.add(k3, alpha=h), i + 2)
            x = x.add(k1.add(k4), alpha=h / 6).add(k2.add(k3), alpha=h / 3)
        return x

    def table(self, scale: float, log_frequencies: Tensor | None = None) -> LongRoPE:
        """The frequencies at `scale` as LongRoPE factors, rounded to float32: 1 / (factor x theta^(2i/D)).

        Training, evaluation and exports all rotate by this table, so that they have the same bits.
        log_frequencies: those at `scale`, where they are known already.
        """
        import torch

        key = (scale, self.up._version, self.down._version)
        if key in self._tables:  # of one length after another, as evaluation asks
            return self._tables[key]
        with torch.no_grad():
            theta, original = self.rope.base()
            plain = self._pairs() * (-math.log(theta) / self.head_dim)
            x = self.log_frequencies(scale) if log_frequencies is None else log_frequencies
            factors = (plain - x).exp().float()
        if not bool((factors.isfinite() & (factors > 0)).all()):
            raise UserError(
                f"rope.type=clex: the network's frequencies at scale {scale:g} are beyond float32; train it again with a "
                "lower rope.lr"
            )
        table = LongRoPE(
            theta=theta,
            original_length=original,
            factor=float(scale),
            factors=tuple(factors.tolist()),
            attention_factor=1.0,
        )
        self._tables = {k: v for k, v in self._tables.items() if k[1:] == key[1:]} | {key: table}
        return table

    def _pairs(self) -> Tensor:
        """2i for each pair, float64 [D/2]."""
        import torch

        return torch.arange(0, self.head_dim, 2, dtype=torch.float64, device="cpu")

    def _ntk(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """(ln f(t) with the network's theta, f'(t) / f(t)) at `times`, each [*times.shape, D/2]."""
        theta = self.rope.ode_theta or self.rope.base()[0]
        growth = 2 * times - 1
        exponents = -self._pairs() / (self.head_dim - 2)
        logs = self._pairs() * (-math.log(theta) / self.head_dim) + growth.log()[..., None] * exponents
        return logs, 2 * exponents / growth[..., None]
