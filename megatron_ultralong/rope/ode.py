"""The differential equation of CLEX: its network, and the integration forward and backward.

float64 on the CPU, so that all ranks compute the same bits; the vectors are short, and numpy's calls cost
less than torch's. D head dimension, H = l D hidden units for a network of width l.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_ultralong.errors import UserError
from megatron_ultralong.rope.base import ScaledRope
from megatron_ultralong.rope.longrope import LongRoPE
from megatron_ultralong.rope.ntk import ntk_exponent

Array = NDArray[numpy.float64]

STEP = 0.01
"""Step of the integration (RK4) in the scale."""
_BLOCK = 512
"""Steps whose intermediate values the backward holds at a time."""


class OdeNetwork:
    """The right-hand side of the equation (clex.py has it), and its solution at any scale."""

    def __init__(
        self, rope: ScaledRope, head_dim: int, *, width: int, activation: str, theta: float | None
    ) -> None:
        """rope: theta, original length and largest scale. width, activation: of the network. theta: that of
        its input; None = that of `rope`. UserError for a head dimension without NTK-aware scaling."""
        ntk_exponent(head_dim)
        self.rope, self.head_dim = rope, head_dim
        self._activation, self._theta = activation, theta
        hidden = width * head_dim
        self.up = torch.zeros(head_dim // 2, hidden, device="cpu", requires_grad=True)
        """W_up, float32 [D/2, H]."""
        self.down = torch.zeros(hidden, head_dim // 2, device="cpu", requires_grad=True)
        """W_down, float32 [H, D/2]."""
        self._tables: dict[tuple[float, int, int], LongRoPE] = {}
        self.initialise(0)

    def initialise(self, seed: int) -> None:
        """Set the weights before training: W_up uniform up to 1 / sqrt(H) (kaiming_uniform with a = sqrt(5)),
        W_down 0."""
        generator = torch.Generator().manual_seed(seed % 2**32)
        bound = 1 / math.sqrt(self.up.shape[1])
        with torch.no_grad():
            self.up.uniform_(-bound, bound, generator=generator)
            self.down.zero_()

    def log_frequencies(self, scale: float) -> Tensor:
        """x(scale), float64 [D/2], differentiable with respect to the weights. UserError for a scale that is
        not trained."""
        if not 1 <= scale <= self.rope.scale():
            raise UserError(
                f"scale {scale:g} is outside of 1 to rope.factor={self.rope.scale():g}, which this CLEX was trained for"
            )
        steps = math.ceil(round((scale - 1) / STEP, 6))
        if not steps:
            return torch.from_numpy(self._plain())
        h = (scale - 1) / steps
        # At the beginnings and in the middles of the steps, and at the end.
        logs, slopes = self._ntk(1 + (h / 2) * numpy.arange(2 * steps + 1, dtype=numpy.float64))
        return _Solution.apply(
            self.up, self.down, _Equation(self._plain(), logs, slopes, h, self._activation)
        )

    def table(self, scale: float, log_frequencies: Tensor | None = None) -> LongRoPE:
        """The frequencies at `scale` as LongRoPE factors, rounded to float32: 1 / (factor x theta^(2i/D)).

        Training, evaluation and exports all rotate by this table, so that they have the same bits.
        log_frequencies: those at `scale`, where they are known already.
        """
        key = (scale, self.up._version, self.down._version)
        if key in self._tables:  # of one length after another, as evaluation asks
            return self._tables[key]
        with torch.no_grad():
            x = self.log_frequencies(scale) if log_frequencies is None else log_frequencies
            factors = (torch.from_numpy(self._plain()) - x).exp().float()
        if not bool((factors.isfinite() & (factors > 0)).all()):
            raise UserError(
                f"rope.type=clex: the network's frequencies at scale {scale:g} are beyond float32; train it again with a "
                "lower rope.lr"
            )
        theta, original = self.rope.base()
        table = LongRoPE(
            theta=theta,
            original_length=original,
            factor=float(scale),
            factors=tuple(factors.tolist()),
            attention_factor=1.0,
        )
        self._tables = {k: v for k, v in self._tables.items() if k[1:] == key[1:]} | {key: table}
        return table

    def _plain(self) -> Array:
        """x(1): the logarithms of the unscaled frequencies, [D/2]."""
        return self._pairs() * (-math.log(self.rope.base()[0]) / self.head_dim)

    def _pairs(self) -> Array:
        """2i for each pair, [D/2]."""
        return numpy.arange(0, self.head_dim, 2, dtype=numpy.float64)

    def _ntk(self, times: Array) -> tuple[Array, Array]:
        """(ln f(t) with the network's theta, f'(t) / f(t)) at `times` [n], each [n, D/2]."""
        theta = self._theta or self.rope.base()[0]
        growth = (2 * times - 1)[:, None]
        exponents = -self._pairs() / (self.head_dim - 2)
        logs = self._pairs() * (-math.log(theta) / self.head_dim) + numpy.log(growth) * exponents
        return logs, 2 * exponents / growth


class _Equation(NamedTuple):
    """The equation without its network, at n half steps."""

    start: Array
    """x at the beginning, [D/2]."""
    logs: Array
    """ln f(t), [n, D/2]."""
    slopes: Array
    """f'(t) / f(t), [n, D/2]."""
    step: float
    """Of the scale, from one step to the next."""
    activation: str


class _Solution(torch.autograd.Function):
    """x at the end. The backward follows the steps of the integration back, so that its gradient is that of
    the computed solution; it holds the states at the beginnings of the steps, and solves a block of steps
    again."""

    @staticmethod
    def forward(ctx: Any, up: Tensor, down: Tensor, equation: _Equation) -> Tensor:
        rk4 = _RungeKutta(up, down, equation)
        x, ctx.states = equation.start, [equation.start]
        for i in range(rk4.steps):
            x = rk4.step(x, i)
            ctx.states.append(x)
        ctx.rk4 = rk4
        return torch.from_numpy(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rk4, states = ctx.rk4, ctx.states
        up, down = numpy.zeros_like(rk4.up), numpy.zeros_like(rk4.down)
        dx = grad.numpy()
        for stop in range(rk4.steps, 0, -_BLOCK):
            start = max(0, stop - _BLOCK)
            kept = [rk4.evaluations(states[i], i) for i in range(start, stop)]
            inputs, d_inside, outputs, d_slopes = [], [], [], []
            for one in reversed(kept):
                dx, parts = rk4.step_backward(dx, one)
                for evaluation, (d_slope, d_in) in zip(one, parts, strict=True):
                    inputs.append(evaluation.x)
                    d_inside.append(d_in)
                    outputs.append(evaluation.out)
                    d_slopes.append(d_slope)
            up += numpy.array(inputs).T @ numpy.array(d_inside)
            down += numpy.array(outputs).T @ numpy.array(d_slopes)
        return torch.from_numpy(up).float(), torch.from_numpy(down).float(), None


class _Evaluation(NamedTuple):
    """The network at one place of a step."""

    x: Array
    """Its input x + ln f, [D/2]."""
    out: Array
    """act(input W_up), [H]."""
    derivative: Array
    """act'(input W_up), [H]."""


class _RungeKutta:
    """Classical Runge-Kutta of fourth order, with the derivative of a step."""

    def __init__(self, up: Tensor, down: Tensor, equation: _Equation) -> None:
        self.up, self.down = (w.detach().double().numpy() for w in (up, down))
        self._equation, self._h = equation, equation.step
        self._act = _ACTIVATIONS[equation.activation]
        # (x + ln f) W_up = x W_up + ln f W_up, whose second term needs no loop.
        self._inputs = equation.logs @ self.up
        self.steps = len(equation.logs) // 2

    def step(self, x: Array, i: int) -> Array:
        """x after step i."""
        h = self._h
        k1 = self._slope(x, 2 * i)
        k2 = self._slope(x + h / 2 * k1, 2 * i + 1)
        k3 = self._slope(x + h / 2 * k2, 2 * i + 1)
        k4 = self._slope(x + h * k3, 2 * i + 2)
        return x + h / 6 * (k1 + k4) + h / 3 * (k2 + k3)

    def evaluations(self, x: Array, i: int) -> tuple[_Evaluation, ...]:
        """What step i computes from x, for its derivative."""
        h, found, y = self._h, [], x
        for half_step, length in ((2 * i, h / 2), (2 * i + 1, h / 2), (2 * i + 1, h), (2 * i + 2, 0.0)):
            out, derivative = self._act(y @ self.up + self._inputs[half_step], True)
            found.append(_Evaluation(y + self._equation.logs[half_step], out, derivative))
            y = x + length * (out @ self.down + self._equation.slopes[half_step])
        return tuple(found)

    def step_backward(
        self, dx: Array, places: tuple[_Evaluation, ...]
    ) -> tuple[Array, list[tuple[Array, Array]]]:
        """Gradients, given that of x after the step: that of x before it, and for each place (that of the
        slope [D/2], that of the activation's argument [H])."""
        h, total, found = self._h, dx, []
        later = numpy.zeros_like(dx)  # gradient of the next place's x
        for place, weight, length in zip(
            reversed(places), (h / 6, h / 3, h / 3, h / 6), (0.0, h, h / 2, h / 2), strict=True
        ):
            d_slope = weight * dx + length * later
            d_inside = (self.down @ d_slope) * place.derivative
            later = self.up @ d_inside
            total = total + later
            found.append((d_slope, d_inside))
        return total, found[::-1]

    def _slope(self, x: Array, half_step: int) -> Array:
        out, _ = self._act(x @ self.up + self._inputs[half_step], False)
        return out @ self.down + self._equation.slopes[half_step]


_NONE: Array = numpy.zeros(0)


def _tanh(x: Array, with_derivative: bool) -> tuple[Array, Array]:
    out = numpy.tanh(x)
    return out, 1 - out * out if with_derivative else _NONE


def _silu(x: Array, with_derivative: bool) -> tuple[Array, Array]:
    gate = 0.5 * (1 + numpy.tanh(0.5 * x))  # the sigmoid, without overflow
    return x * gate, gate * (1 + x * (1 - gate)) if with_derivative else _NONE


_ACTIVATIONS: dict[str, Callable[[Array, bool], tuple[Array, Array]]] = {"tanh": _tanh, "silu": _silu}
