"""A block of RoPE settings in a Hugging Face config.json, with checked access to its values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ultralong.errors import UserError

ORIGINAL = "original_max_position_embeddings"
LLAMA_MAX_POSITION = 2048  # LlamaConfig's default


@dataclass(frozen=True)
class HFBlock:
    """`rope_scaling` or `rope_parameters` of a config.json, and the config around it."""

    config: Mapping[str, Any]
    values: Mapping[str, Any]
    where: str
    """Name of the block, for messages; empty where config.json has none."""

    @property
    def theta(self) -> float:
        """rope_theta, inside or outside of the block."""
        inner, outer = self.values.get("rope_theta"), self.config.get("rope_theta")
        if inner is not None and outer is not None and inner != outer:
            raise UserError(
                f"rope_theta={outer} and {self.where}.rope_theta={inner} contradict each other; "
                "remove the wrong one"
            )
        if inner is not None:
            return self.number("rope_theta")
        return checked_number(self.config, "rope_theta", "", 10000.0)

    def max_position(self) -> int:
        """max_position_embeddings, tokens."""
        return self._whole(
            checked_number(self.config, "max_position_embeddings", "", LLAMA_MAX_POSITION),
            "max_position_embeddings",
        )

    def original_length(self) -> int:
        """The original length, inside or outside of the block; max_position_embeddings where neither has
        it."""
        inner, outer = self.values.get(ORIGINAL), self.config.get(ORIGINAL)
        if inner is not None and outer is not None and inner != outer:
            raise UserError(
                f"{self.where}: {ORIGINAL}={inner} contradicts the top-level {ORIGINAL}={outer}; "
                "remove the wrong one"
            )
        if inner is None and outer is None:
            return self.max_position()
        return self._whole(
            checked_number(self.values if inner is not None else self.config, ORIGINAL, self.where),
            f"{self.where}: {ORIGINAL}",
        )

    def factor(self) -> float:
        """The scaling factor, at least 1."""
        return self._factor(self.number("factor"))

    def factor_or_ratio(self, original: int, optional: bool = False) -> float:
        """The scaling factor; where it is null (or, if `optional`, missing) max_position_embeddings /
        `original`, as in transformers."""
        if self.values.get("factor", None if optional else 0) is None:
            return self._factor(self.max_position() / original)
        return self.factor()

    def ramp(self, *ends: tuple[str, float | None]) -> tuple[float, float]:
        """(alpha, beta), from two (key, default) pairs."""
        alpha, beta = (self.number(key, default) for key, default in ends)
        if alpha >= beta:
            raise UserError(f"{self.where}: {ends[0][0]}={alpha:g} must be below {ends[1][0]}={beta:g}")
        return alpha, beta

    def has(self, key: str) -> bool:
        """Whether `key` is there; null counts as missing."""
        return self.values.get(key) is not None

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number of the block."""
        return checked_number(self.values, key, self.where, default)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of positive numbers of the block."""
        found = self.values.get(key)
        if not isinstance(found, (list, tuple)) or not found:
            raise UserError(f"{self.where}: {key} must be a list of numbers")
        return tuple(
            checked_number({f"{key}[{i}]": x}, f"{key}[{i}]", self.where) for i, x in enumerate(found)
        )

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {key}={value!r} must be true or false")
        return value

    def _factor(self, factor: float) -> float:
        if factor < 1:
            raise UserError(f"{self.where}: factor={factor:g} must be at least 1")
        return factor

    @staticmethod
    def _whole(value: float, name: str) -> int:
        if value != int(value):
            raise UserError(f"{name}={value} must be a whole number")
        return int(value)


def checked_number(values: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    """A positive number; null counts as missing. UserError where it is missing and has no default."""
    value = values.get(key)
    if value is None:
        value = default
    name = f"{where}: {key}" if where else key
    if value is None:
        raise UserError(f"{name} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"{name}={value!r} must be a positive number")
    return float(value)
