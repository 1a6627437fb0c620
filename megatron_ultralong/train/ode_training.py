"""Training of CLEX's network: the scale and the positions that an iteration draws, and the update.

Megatron's optimizer does not know the network: its weights are the same on every rank, and its gradient,
through cos and sin of every layer and head, is a sum over all ranks (tensor and pipeline parallel ranks have
different heads and layers, context and data parallel ranks different tokens).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_ultralong.checkpoint import rope_network
from megatron_ultralong.config import Optim, Train
from megatron_ultralong.errors import UserError
from megatron_ultralong.model.attention import Draw, RotaryTable
from megatron_ultralong.rope.clex import TrainedCLEX
from megatron_ultralong.runtime.launch import Ranks

_MOMENTS = ("exp_avg", "exp_avg_sq")


class OdeTraining:
    """The network of a CLEX model in training, with its AdamW."""

    def __init__(self, rotary: RotaryTable, train: Train, optim: Optim, ranks: Ranks) -> None:
        assert isinstance(rotary.rope, TrainedCLEX)
        self._rotary, self._rope, self._network = rotary, rotary.rope, rotary.rope.weights
        self._train, self._optim, self._ranks = train, optim, ranks
        self._weights = [getattr(self._network, name) for name in rope_network.WEIGHTS]
        self._adam = torch.optim.AdamW(self._weights, weight_decay=0.0)
        self._log_frequencies: Tensor | None = None
        self.scalars: dict[str, float] = {}
        """Of the last iteration, for the log: its scale, and the norm of the network's gradient."""

    @contextmanager
    def drawn(self, iteration: int) -> Iterator[None]:
        """Train with the scale and the positions of `iteration` within the block; every sequence of the
        iteration has the same."""
        scale, positions = draw(
            int(self._rope.scale()),
            self._rope.original(),
            self._train.seq_length,
            (self._train.seed, iteration),
        )
        head_dim, device = self._rotary.head_dim, self._ranks.device
        self._log_frequencies = x = self._network.log_frequencies(scale)
        self.scalars = {"train/rope_scale": float(scale), "train/rope_grad_norm": 0.0}
        self._gradient = torch.zeros(head_dim // 2, dtype=torch.float64, device=device)
        self._rotary.draw = Draw(
            frequencies=self._network.table(scale, x).frequencies(head_dim, self._train.seq_length),
            positions=torch.from_numpy(positions),
            gradient=self._gradient,
        )
        try:
            yield
        finally:
            self._rotary.draw = None

    def step(self, target_tokens: int, lr_share: float) -> bool:
        """Update the network after the gradients of a global batch of `target_tokens` tokens; every rank
        calls it.

        lr_share: this iteration's part of the run's highest learning rate. False, with the network unchanged,
        where the gradient is not finite.
        """
        assert self._log_frequencies is not None, "no iteration has been drawn"
        torch.distributed.all_reduce(self._gradient)
        gradient, log_frequencies = self._gradient.cpu() / max(1, target_tokens), self._log_frequencies
        self._log_frequencies = None
        if not bool(gradient.isfinite().all()):
            return False
        if not log_frequencies.requires_grad:  # scale 1, where the frequencies are unscaled
            return True
        self._adam.zero_grad()
        # d/dx of a function of exp(x)
        log_frequencies.backward(gradient * log_frequencies.detach().exp())
        if not all(bool(weight.grad.isfinite().all()) for weight in self._weights):
            return False
        norm = torch.linalg.vector_norm(torch.cat([weight.grad.flatten() for weight in self._weights]))
        self.scalars["train/rope_grad_norm"] = float(norm)
        if self._optim.clip:
            torch.nn.utils.clip_grad_norm_(self._weights, self._optim.clip)
        for group in self._adam.param_groups:
            group["lr"] = self._rope.lr * lr_share
            group["betas"], group["eps"] = (self._optim.beta1, self._optim.beta2), self._optim.eps
        self._adam.step()
        self._equal_on_all_ranks()
        return True

    def _equal_on_all_ranks(self) -> None:
        """Take rank 0's weights and moments: processors of different kinds may differ in the last bit."""
        moments = [self._adam.state[weight][key] for weight in self._weights for key in _MOMENTS]
        own = [weight.detach() for weight in self._weights] + moments
        flat = torch.cat([tensor.flatten() for tensor in own]).to(self._ranks.device)
        torch.distributed.broadcast(flat, src=0)
        for tensor, new in zip(own, flat.cpu().split([tensor.numel() for tensor in own]), strict=True):
            tensor.copy_(new.view_as(tensor))

    # ---- checkpoints ---------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Weights and the optimizer's state, by the names of rope.safetensors."""
        tensors: dict[str, Tensor] = {}
        for name, weight in zip(rope_network.WEIGHTS, self._weights, strict=True):
            tensors[name] = weight.detach().clone()
            for key, value in self._adam.state.get(weight, {}).items():
                tensors[f"{name}.{key}"] = value.detach().clone()
        return tensors

    def load_optimizer(self, checkpoint: Path) -> None:
        """Continue with the optimizer's state of a checkpoint, if it was trained with a network.

        The weights are loaded with the model's. UserError for a damaged file.
        """
        if not (checkpoint / rope_network.FILE).is_file():
            return
        stored = rope_network.read(checkpoint)
        self._adam.state.clear()
        for name, weight in zip(rope_network.WEIGHTS, self._weights, strict=True):
            if f"{name}.step" in stored:
                shapes = {"step": (), **dict.fromkeys(_MOMENTS, weight.shape)}
                for key, shape in shapes.items():
                    tensor = stored.get(f"{name}.{key}")
                    if tensor is None or tensor.shape != shape or not bool(tensor.isfinite().all()):
                        raise UserError(
                            f"{checkpoint / rope_network.FILE}: {name}.{key} must be finite numbers of shape {list(shape)}"
                        )
                    self._adam.state[weight][key] = tensor.clone()


def draw(
    largest: int, original_length: int, seq_length: int, seed: Sequence[int]
) -> tuple[int, NDArray[numpy.float64]]:
    """Draw (scale t, positions float64 [S]) of an iteration; they depend on the arguments alone.

    t is uniform from 1 to `largest`. With k = S // L, at least 1, the positions are 0, then a random sample
    of S - 2 of the multiples 1/k, 2/k, ... below S t / k, in order, then S t // k - 1, as in CLEX's published
    code; k > 1 is its training on sequences longer than the original length L.
    """
    generator = numpy.random.PCG64(numpy.random.SeedSequence(seed))
    scale = 1 + int(generator.random_raw() % largest)
    k = max(1, seq_length // original_length)
    positions = numpy.zeros(seq_length)
    if seq_length > 1:
        positions[1:-1] = (1 + _sorted_sample(seq_length * scale - 2, seq_length - 2, generator)) / k
        positions[-1] = seq_length * scale // k - 1
    return scale, positions


def _sorted_sample(n: int, count: int, generator: numpy.random.PCG64) -> NDArray[numpy.int64]:
    """`count` different numbers of 0 ... n - 1 in order, every subset with the same probability.

    These are the first different ones of independent draws, from raw bits: numpy guarantees no other results
    for every version.
    """
    if count == n:
        return numpy.arange(n)
    chosen = numpy.zeros(n, dtype=bool)
    missing = count
    while missing:
        chosen[generator.random_raw(missing) % numpy.uint64(n)] = True
        missing = count - int(numpy.count_nonzero(chosen))
    return numpy.flatnonzero(chosen)
