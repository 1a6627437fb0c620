"""Passkey retrieval (needle in a haystack): does the model find one fact, at every length and depth?

A prompt is an introduction, a haystack with one needle ("The pass key of Mira is 48213.") and the question
about it; or several needles, and all of them asked for. The wording and the grid are this project's own.
Every prompt has an exact size: prompt tokens + tokens left for the answer = length.

Nothing here needs a model: `run` is handed a backend (protocol.py).
"""

from __future__ import annotations

import itertools
import random
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends.protocol import Backend, Request
from megatron_ultralong.evaluate.pipeline import predictions
from megatron_ultralong.evaluate.prompts import chat_template

FORMAT = 1
"""Version of the results JSON."""

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
class Grid:
    """What is asked."""

    lengths: tuple[int, ...]
    """Prompt plus answer, tokens."""
    depths: tuple[float, ...]
    """Where the needle stands in the haystack: 0 = first, 100 = last, percent."""
    trials: int = 10
    """Prompts a cell of the grid."""
    digits: int = 5
    """Digits of a pass key."""
    needles: int = 1
    """Pass keys in a prompt, all asked for: the first at the depth, the others evenly from there to the end."""
    answer_tokens: int | None = None
    """Tokens generated; None = what the answer takes, 24 a needle in a chat."""
    chat: chat_template.Mode = "auto"
    """Put the prompt into the tokenizer's chat template; auto = where it has one."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("lengths", "depths"):
            values = getattr(self, name)
            if not values or len({f"{value:g}" if name == "depths" else value for value in values}) != len(
                values
            ):
                raise UserError(f"--{name}: give at least one value, and each only once")
        if min(self.lengths) < 1:
            raise UserError(f"--lengths {min(self.lengths)}: must be at least 1")
        if not all(0 <= depth <= 100 for depth in self.depths):
            raise UserError("--depths are percent of the haystack, 0 to 100")
        if self.trials < 1 or not 1 <= self.digits <= 50:
            raise UserError("--trials must be at least 1, and --digits 1 to 50")
        if not 1 <= self.needles <= min(len(NAMES), 10**self.digits // 2):
            raise UserError(
                f"--needles {self.needles}: 1 to {min(len(NAMES), 10**self.digits // 2)}, as there are names, and numbers of that many digits"
            )
        if self.answer_tokens is not None and self.answer_tokens < 1:
            raise UserError("--answer-tokens must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One trial."""

    length: int
    depth: float
    trial: int
    names: tuple[str, ...]
    answers: tuple[str, ...]
    """In the order of the question, which is not that of the text."""
    text: str
    """The user's message."""
    prefix: str
    """The answer's first words, given to the model."""
    tokens: list[int]
    """The whole prompt: message, template and the answer's first words."""
    needle_at: int
    """First token of the first needle."""
    answer_tokens: int
    """Tokens to generate; len(tokens) + answer_tokens = length."""

    @property
    def name(self) -> str:
        return _listed(self.names)

    @property
    def answer(self) -> str:
        return _listed(self.answers)

    def request(self) -> Request:
        return Request(
            id=f"{self.length}/{self.depth:g}/{self.trial}",
            text=self.text,
            prefix=self.prefix,
            ids=self.tokens,
            tokens=self.answer_tokens,
        )


# ---- wording -----------------------------------------------------------------------------------


def needle(name: str, value: str) -> str:
    return f" The pass key of {name} is {value}."


def question(*names: str) -> str:
    return (
        f" What is the pass key of {names[0]}?"
        if len(names) == 1
        else f" What are the pass keys of {_listed(names)}, in this order?"
    )


def answer_start(*names: str) -> str:
    """The answer's first words, given to the model, so that the very next thing it writes is the value."""
    return f" The pass key of {names[0]} is" if len(names) == 1 else f" The pass keys of {_listed(names)} are"


def answer(value: str) -> str:
    return f" {value}."


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def pass_key(rng: random.Random, digits: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(digits))


def sentences(text: str) -> list[str]:
    """`text` cut after full stops, each piece with its leading space, white space joined."""
    pieces = [" ".join(piece.split()) for piece in re.split(r"(?<=[.!?])\s+", text)]
    return [" " + piece for piece in pieces if piece]


# ---- prompts -----------------------------------------------------------------------------------


class Builder:
    """Prompts of exact size for one tokenizer.

    The parts are encoded alone and joined as tokens: sizes are exact, and the needle is the same tokens
    wherever it stands.
    """

    def __init__(self, tokenizer: Any, grid: Grid, haystack: str | None = None) -> None:
        """tokenizer: a transformers tokenizer. haystack: text to hide needles in (repeated when short); None
        = own filler sentences over and over. UserError where a chat template is asked for and there is none.
        """
        self.tokenizer, self.grid = tokenizer, grid
        framed = chat_template.frame(tokenizer, grid.chat)
        self.chat = framed.chat
        self.pieces = [
            self.encode(piece)
            for piece in (sentences(haystack) if haystack is not None else [" " + text for text in FILLER])
        ]
        self.pieces = [piece for piece in self.pieces if piece]
        if not self.pieces:
            raise UserError("--haystack: the file holds no text")
        self.head, self.tail = (
            [*framed.bos, *self.encode(framed.head + INTRODUCTION)],
            self.encode(framed.tail),
        )

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def prompt(self, length: int, depth: float, trial: int) -> Prompt:
        """The prompt of one trial, the same for every model with this tokenizer. UserError where `length` is
        too short."""
        rng = random.Random(f"{self.grid.seed}/{length}/{depth:g}/{trial}")
        count = self.grid.needles
        names = tuple(rng.sample(NAMES, count)) if count > 1 else (rng.choice(NAMES),)
        values: list[str] = []
        while len(values) < count:
            value = pass_key(rng, self.grid.digits)
            values += [value] if value not in values else []
        hidden = [self.encode(needle(name, value)) for name, value in zip(names, values, strict=True)]
        start = answer_start(*names)
        prefix = start.strip() if self.chat else start
        end = [*self.encode(question(*names)), *self.tail, *self.encode(prefix)]
        size = self.grid.answer_tokens or (
            24 * count if self.chat else len(self.encode(answer(_listed(values))))
        )
        room = length - len(self.head) - sum(map(len, hidden)) - len(end) - size
        if room < 0:
            raise UserError(
                f"--lengths {length}: too short, the prompt without any haystack and its answer are {length - room} tokens"
            )
        depths = [(depth + (100 - depth) * i / max(1, count - 1)) / 100 for i in range(count)]
        parts = self._haystack(rng, room, depths)
        if count > 1:
            rng.shuffle(hidden)
        middle = list(parts[0])
        for one, after in zip(hidden, parts[1:], strict=True):
            middle += [*one, *after]
        text = INTRODUCTION + self.tokenizer.decode(middle) + question(*names)
        return Prompt(
            length=length,
            depth=depth,
            trial=trial,
            names=names,
            answers=tuple(values),
            text=text,
            prefix=prefix,
            tokens=[*self.head, *middle, *end],
            needle_at=len(self.head) + len(parts[0]),
            answer_tokens=size,
        )

    def _haystack(self, rng: random.Random, room: int, depths: list[float]) -> list[list[int]]:
        """`room` tokens, parted between sentences as near to `depths` (0-1, rising) as they allow; the last
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


# ---- scoring -----------------------------------------------------------------------------------


def is_correct(prediction: str, value: str) -> bool:
    """Whether a number of the prediction is exactly `value`: no digit more, no digit less."""
    return value in re.findall(r"\d+", prediction)


def run(
    backend: Backend,
    grid: Grid,
    *,
    haystack: Path | None = None,
    batch: int | None = None,
    answers: Path | None = None,
    progress: Callable[[int], Any] = lambda n: None,
) -> dict[str, Any]:
    """All trials of `grid`, as the results JSON's values.

    batch: prompts at a time; None = as many as make 16K tokens. answers: the file that keeps them, so that
    none is asked for twice (predictions.py). progress: called with the number of trials done since the last
    call.
    """
    started = time.time()
    builder = Builder(backend.tokenizer, grid, _read(haystack) if haystack else None)
    for length in grid.lengths:  # Too short a length is told before the first minute is spent.
        builder.prompt(length, grid.depths[0], 0)
    backend.check(max(grid.lengths), batch or 1)
    asked: deque[Prompt] = (
        deque()
    )  # a prompt of 4M tokens is a list of tens of megabytes: only those of one batch are there
    trials: list[dict[str, Any]] = []

    def requests() -> Iterator[Request]:
        for length in grid.lengths:
            for depth in grid.depths:
                for trial in range(grid.trials):
                    asked.append(builder.prompt(length, depth, trial))
                    yield asked[-1].request()

    for one in predictions.run(backend, requests(), answers, batch=batch, progress=progress):
        prompt = asked.popleft()
        found = sum(is_correct(one.text, value) for value in prompt.answers)
        trials.append(
            {
                "length": prompt.length,
                "depth": prompt.depth,
                "trial": prompt.trial,
                "name": prompt.name,
                "answer": prompt.answer,
                "prediction": one.text,
                "correct": found == grid.needles,
                "found": found,
                "needles": grid.needles,
                "prompt_tokens": len(prompt.tokens),
                "needle_at": prompt.needle_at,
                **({} if one.answered else {"refused": one.finish}),
            }
        )
    return {
        "format": FORMAT,
        "task": "niah",
        "mode": "passkey" if grid.needles == 1 else "passkeys",
        "prompt": "own wording",
        "grid": "own grid",
        "model": backend.describe(),
        "settings": {
            **asdict(grid),
            "chat": builder.chat,
            "haystack": haystack.name if haystack else "own filler sentences",
        },
        **summarize(trials),
        "trials": trials,
        "seconds": round(time.time() - started, 1),
    }


def summarize(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Share of needles found in all trials, of each length and of each cell, in the order of the trials.

    A cell's `correct` counts prompts with every needle found; with one needle its share of the trials is the
    accuracy. `refused` counts those that an endpoint gave no answer to; their needles count as not found."""
    cells: dict[tuple[int, float], list[dict[str, Any]]] = {}
    lengths: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        cells.setdefault((trial["length"], trial["depth"]), []).append(trial)
        lengths.setdefault(str(trial["length"]), []).append(trial)
    return {
        "accuracy": _share(trials),
        "refused": _refused(trials),
        "by_length": {length: _share(some) for length, some in lengths.items()},
        "cells": [
            {
                "length": length,
                "depth": depth,
                "trials": len(some),
                "correct": sum(trial["correct"] for trial in some),
                "needles": sum(trial["needles"] for trial in some),
                "found": sum(trial["found"] for trial in some),
                "accuracy": _share(some),
                "refused": _refused(some),
            }
            for (length, depth), some in cells.items()
        ],
    }


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--haystack {path}: cannot be read as text ({error})") from None


def _share(trials: list[dict[str, Any]]) -> float:
    return round(sum(trial["found"] for trial in trials) / sum(trial["needles"] for trial in trials), 4)


def _refused(trials: list[dict[str, Any]]) -> int:
    return sum("refused" in trial for trial in trials)
