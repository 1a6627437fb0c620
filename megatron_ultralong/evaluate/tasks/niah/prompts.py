"""Passkey prompts of exact length: an introduction, a haystack with one needle or several, and the question.

The wording ("The pass key of Mira is 48213.") is this project's own. Every prompt has an exact size: prompt
tokens + tokens left for the answer = length.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends.protocol import GenerationRequest
from megatron_ultralong.evaluate.prompts.encode import ChatMode, PromptEncoder

INTRODUCTION = "Some pass keys are hidden in this text. Remember them."
FILLER = (
    "The sky is blue today.",
    "The grass is green in spring.",
    "A small boat rests by the river.",
    "The sun goes down behind the hills.",
    "Some birds sing before the morning.",
    "The old road leads to the sea.",
    "Rain falls softly on the roof.",
    "The baker opens her shop early.",
    "A cat sleeps under the table.",
    "The train leaves the town at noon.",
    "Snow covers the garden in winter.",
    "The children play near the bridge.",
    "Stars shine above the quiet farm.",
    "A light wind moves the trees.",
    "The teacher reads a long letter.",
    "Warm bread lies on the shelf.",
)
NAMES = tuple(
    "Abel Ada Alma Bea Ben Bob Carl Cleo Cora Dan Dora Doug Elsa Emil Eva Fay Finn Fred Greta Gus Hans Hugo Ida Igor Ines Jana "
    "Jon Kai Kurt Lars Lena Leo Mary Max Mira Ned Nils Nora Oda Olga Otto Paul Pete Pia Quinn Ralf Rosa Ruth Sam Sven Tara Tina "
    "Tom Ulf Ute Vera Vito Will Wim Xenia Yara Yves Zita Zoe".split()
)


@dataclass(frozen=True, kw_only=True)
class NiahSettings:
    """The grid of a passkey test."""

    lengths: tuple[int, ...]
    """Prompt plus answer, tokens."""
    depths: tuple[float, ...]
    """Position of the needle in the haystack, percent: 0 = first, 100 = last."""
    trials: int = 10
    """Prompts per length and depth."""
    digits: int = 5
    """Digits of a pass key."""
    needles: int = 1
    """Pass keys in a prompt; the question asks for all of them. The first is at the depth, the others are
    spread evenly from there to the end."""
    answer_tokens: int | None = None
    """Tokens to generate; None = the size of the answer, or 24 per needle in a chat."""
    chat: ChatMode = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("lengths", "depths"):
            values = getattr(self, name)
            distinct = {f"{value:g}" if name == "depths" else value for value in values}
            if not values or len(distinct) != len(values):
                raise UserError(f"--{name}: give at least one value, and each only once")
        if min(self.lengths) < 1:
            raise UserError(f"--lengths {min(self.lengths)}: must be at least 1")
        if not all(0 <= depth <= 100 for depth in self.depths):
            raise UserError("--depths are percent of the haystack, 0 to 100")
        if self.trials < 1 or not 1 <= self.digits <= 50:
            raise UserError("--samples must be at least 1, and --digits 1 to 50")
        most = min(len(NAMES), 10**self.digits // 2)
        if not 1 <= self.needles <= most:
            raise UserError(
                f"--needles {self.needles}: must be 1 to {most}, limited by the names and the numbers of that many digits"
            )
        if self.answer_tokens is not None and self.answer_tokens < 1:
            raise UserError("--answer-tokens must be at least 1")


@dataclass(frozen=True, kw_only=True)
class NiahPrompt:
    """The prompt of one trial."""

    length: int
    depth: float
    trial: int
    names: tuple[str, ...]
    answers: tuple[str, ...]
    """In the order of the question, which differs from that of the text."""
    text: str = field(repr=False)
    """The user message."""
    prefix: str
    """The first words of the answer, which the model continues."""
    tokens: list[int] = field(repr=False)
    """The complete prompt: message, template and the answer's first words."""
    needle_at: int
    """Index of the first token of the first needle."""
    answer_tokens: int
    """Tokens to generate; len(tokens) + answer_tokens = length."""

    @property
    def name(self) -> str:
        return _joined(self.names)

    @property
    def answer(self) -> str:
        return _joined(self.answers)

    def request(self) -> GenerationRequest:
        return GenerationRequest(
            id=f"{self.length}/{self.depth:g}/{self.trial}",
            text=self.text,
            prefix=self.prefix,
            ids=self.tokens,
            max_tokens=self.answer_tokens,
        )


# ---- wording -----------------------------------------------------------------------------------


def needle(name: str, value: str) -> str:
    return f" The pass key of {name} is {value}."


def question(*names: str) -> str:
    if len(names) == 1:
        return f" What is the pass key of {names[0]}?"
    return f" What are the pass keys of {_joined(names)}, in this order?"


def answer_start(*names: str) -> str:
    """The first words of the answer, so that the model generates the value next."""
    return f" The pass key of {names[0]} is" if len(names) == 1 else f" The pass keys of {_joined(names)} are"


def answer(value: str) -> str:
    return f" {value}."


def pass_key(rng: random.Random, digits: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(digits))


def sentences(text: str) -> list[str]:
    """Split `text` after sentences, each with a leading space and its white space joined."""
    pieces = [" ".join(piece.split()) for piece in re.split(r"(?<=[.!?])\s+", text)]
    return [" " + piece for piece in pieces if piece]


def _joined(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


# ---- prompts -----------------------------------------------------------------------------------


class NiahPromptBuilder:
    """Builds prompts of exact length with one tokenizer.

    The parts are encoded separately and joined as tokens: sizes are exact, and the needle has the same tokens
    at every position.
    """

    def __init__(self, tokenizer: Any, settings: NiahSettings, haystack: str | None = None) -> None:
        """haystack: text to hide needles in, repeated where it is short; None = this project's filler
        sentences. UserError as in `PromptEncoder`."""
        self.settings = settings
        self.encoder = PromptEncoder(tokenizer, settings.chat)
        texts = sentences(haystack) if haystack is not None else [" " + text for text in FILLER]
        self.pieces = [ids for ids in map(self.encoder.ids, texts) if ids]
        if not self.pieces:
            raise UserError("--haystack: the file contains no text")
        self.head = [*self.encoder.bos, *self.encoder.ids(self.encoder.head + INTRODUCTION, "control")]

    def prompt(self, length: int, depth: float, trial: int) -> NiahPrompt:
        """The prompt of one trial, the same for every model with this tokenizer. UserError where `length` is
        too short."""
        encoder, count = self.encoder, self.settings.needles
        rng = random.Random(f"{self.settings.seed}/{length}/{depth:g}/{trial}")
        names = tuple(rng.sample(NAMES, count)) if count > 1 else (rng.choice(NAMES),)
        values: list[str] = []
        while len(values) < count:
            value = pass_key(rng, self.settings.digits)
            values += [value] if value not in values else []
        needles = [encoder.ids(needle(name, value)) for name, value in zip(names, values, strict=True)]
        start = answer_start(*names)
        prefix = start.strip() if encoder.chat else start
        asked, prefix_ids = encoder.ids(question(*names)), encoder.ids(prefix)
        size = self.settings.answer_tokens or (
            24 * count if encoder.chat else len(encoder.ids(answer(_joined(values))))
        )
        fixed = len(encoder.assemble(asked, prefix_ids, head=self.head)) + sum(map(len, needles)) + size
        room = length - fixed
        if room < 0:
            raise UserError(
                f"--lengths {length}: too short, the prompt without any haystack and its answer are {fixed} tokens"
            )
        depths = [(depth + (100 - depth) * i / max(1, count - 1)) / 100 for i in range(count)]
        parts = self._haystack(rng, room, depths)
        if count > 1:
            rng.shuffle(needles)
        middle = list(parts[0])
        for ids, after in zip(needles, parts[1:], strict=True):
            middle += [*ids, *after]
        return NiahPrompt(
            length=length,
            depth=depth,
            trial=trial,
            names=names,
            answers=tuple(values),
            text=INTRODUCTION + encoder.tokenizer.decode(middle) + question(*names),
            prefix=prefix,
            tokens=encoder.assemble([*middle, *asked], prefix_ids, head=self.head),
            needle_at=len(self.head) + len(parts[0]),
            answer_tokens=size,
        )

    def _haystack(self, rng: random.Random, room: int, depths: list[float]) -> list[list[int]]:
        """`room` tokens, split between sentences as close to `depths` (0-1, ascending) as possible; the last
        sentence may be cut."""
        tokens: list[int] = []
        borders = [0]
        i = rng.randrange(len(self.pieces))
        while len(tokens) < room:
            tokens += self.pieces[i]
            borders.append(len(tokens))
            i = (i + 1) % len(self.pieces)
        inside = [border for border in borders if border <= room]
        cuts = [0, *(min(inside, key=lambda border: abs(border - depth * room)) for depth in depths), room]
        return [tokens[start:end] for start, end in itertools.pairwise(cuts)]
