"""The RoPE that one source states: a config.json, a checkpoint, Megatron-LM's arguments or a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ultralong.rope.base import Rope


@dataclass(frozen=True, kw_only=True)
class RopeSource:
    """A source and the RoPE that its program computes from it."""

    name: str
    """The path as given; where one path has two possible RoPEs, with which of them."""
    kind: str
    """What it is: "Hugging Face", "checkpoint", "Megatron-LM arguments" or "GGUF"."""
    rope: Rope
    head_dim: int | None = None
    """Head dimension; None where the source does not state it."""
    max_position: int | None = None
    """max_position_embeddings or its equivalent, tokens; None where the source does not state it."""
    method: str = ""
    """The method in one line; empty = `rope.describe()`."""
    original_stated: bool = True
    """False where rope.original_length stands for one that the source does not state."""
    notes: tuple[str, ...] = ()
    """What a reader must know before trusting it, one line each."""

    def describe(self) -> str:
        """The method in one line."""
        return self.method or self.rope.describe()

    def original_length(self) -> int | None:
        """Context length before any scaling, tokens; None where the source does not state it."""
        return self.rope.original_length if self.original_stated else None

    def factor(self) -> float | None:
        """The scaling factor; None where the method has none or the source does not state it."""
        return getattr(self.rope, "factor", None)
