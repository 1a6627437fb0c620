"""RULER's retrieval tasks (niah_*) and variable tracking (vt): lines hidden in a haystack."""

from __future__ import annotations

import functools
import itertools
import random
import string
from collections.abc import Iterator

from megatron_ultralong.evaluate.tasks.ruler import filler_text
from megatron_ultralong.evaluate.tasks.ruler.fill_length import FillerText, PromptDraft, fit
from megatron_ultralong.evaluate.tasks.ruler.material import PromptMaterial, distinct
from megatron_ultralong.evaluate.tasks.ruler.tasks import RulerTask

DEPTHS = [round(100 * i / 39) / 100 for i in range(40)]
"""Positions of needles in an essay, as fractions of its sentences."""
CHAINS, HOPS = 1, 4
"""vt: chains of variables, and assignments per chain after the first."""
EXAMPLE_TOKENS = 500
"""vt: size of the worked example."""


def niah_draft(material: PromptMaterial, task: RulerTask, rng: random.Random) -> PromptDraft:
    """niah_*: find the values that belong to the queried keys."""
    wording, kind = material.wording, task.value
    keys = distinct(lambda: filler_text.draw(rng, task.key), task.keys)
    values = distinct(lambda: filler_text.draw(rng, task.value), task.keys * task.values)
    values_of = {key: values[i * task.values : (i + 1) * task.values] for i, key in enumerate(keys)}
    needles = [
        wording.needle.format(type_needle_v=kind, key=key, value=value)
        for key, own in values_of.items()
        for value in own
    ]
    rng.shuffle(needles)
    queried = rng.sample(keys, task.queries)
    outputs = [value for key in queried for value in values_of[key]]
    query = ", ".join(queried[:-1]) + ", and " + queried[-1] if len(queried) > 1 else queried[0]
    single = len(outputs) == 1
    fields = {"type_needle_v": kind.removesuffix("s") if single else kind, "query": query}
    template = wording.niah_one if single else wording.niah
    prefix = wording.niah_one_prefix if single else wording.niah_prefix

    if task.haystack == "needle":
        others = _other_needles(random.Random(rng.random()), task, wording.needle, keys, values)
        filler = FillerText(material.encoder.counts, others, before="\n")
    else:
        filler = material.essay if task.haystack == "essay" else material.noise
    essay = task.haystack == "essay"
    depths = rng.sample(DEPTHS, len(needles)) if essay else [rng.random() for _ in needles]
    separator = " " if essay else "\n"

    def render(n: int) -> str:
        return template.format(context=separator.join(_insert(filler.pieces(n), needles, depths)), **fields)

    def is_valid(text: str) -> bool:
        return all(text.count(value) == 1 for value in outputs) and all(
            text.count(key) == task.values + 1 for key in queried
        )

    return PromptDraft(
        render=render,
        estimate=filler.tokens,
        prefix=prefix.format(**fields),
        outputs=outputs,
        is_valid=is_valid,
    )


def _other_needles(
    rng: random.Random, task: RulerTask, needle: str, keys: list[str], values: list[str]
) -> Iterator[str]:
    while True:
        key, value = filler_text.draw(rng, task.key), filler_text.draw(rng, task.value)
        if not any(own in key for own in keys) and value not in values:
            yield needle.format(type_needle_v=task.value, key=key, value=value)


def _insert(pieces: list[str], needles: list[str], depths: list[float]) -> list[str]:
    """Insert the needles, in their order, at the depths (fractions of the pieces, sorted here)."""
    cuts = [0, *sorted(int(depth * len(pieces)) for depth in depths), len(pieces)]
    lines: list[str] = []
    for needle, start, end in zip([*needles, None], cuts[:-1], cuts[1:], strict=True):
        lines += pieces[start:end]
        lines += [needle] if needle is not None else []
    return lines


# ---- vt ----------------------------------------------------------------------------------------


def vt_draft(material: PromptMaterial, rng: random.Random) -> PromptDraft:
    """vt: find all variables with a value, directly or through other variables."""
    example_lines, example_answers = _chain(rng, letters=3)
    example_value, value = (str(number) for number in rng.sample(range(10_000, 99_999), 2))
    fields = {"num_v": HOPS + 1}
    prefix = material.wording.vt_prefix
    example = (
        _vt_text(material, rng, example_lines, example_value, _example_units(material))
        + prefix.format(query=example_value, **fields)
        + " "
        + " ".join(example_answers)
    )
    lines, outputs = _chain(rng, letters=5)
    seed = rng.random()  # the depths are drawn again, with the same result, for every number of units
    return PromptDraft(
        render=lambda n: example + "\n\n" + _vt_text(material, random.Random(seed), lines, value, n),
        estimate=material.noise.tokens,
        prefix=prefix.format(query=value, **fields),
        outputs=outputs,
        is_valid=lambda text: all(text.count(f"VAR {name} =") == 1 for name in (*example_answers, *outputs)),
    )


@functools.lru_cache(maxsize=1)
def _example_units(material: PromptMaterial) -> int:
    """Noise lines of the worked example: as many as make it `EXAMPLE_TOKENS`."""
    lines, _ = _chain(random.Random(f"{material.seed}/vt"), letters=3)
    draft = PromptDraft(
        render=lambda n: _vt_text(material, random.Random(0), lines, "12345", n) + material.wording.vt_prefix,
        estimate=material.noise.tokens,
        prefix="",
        outputs=[],
    )
    return fit(draft, EXAMPLE_TOKENS, lambda text: material.encoder.counts([text])[0])[2]


def _chain(rng: random.Random, *, letters: int) -> tuple[list[str], list[str]]:
    """(the lines of one chain, the first with a field for its value; its variables)."""
    names = distinct(lambda: filler_text.letters(rng, letters, string.ascii_uppercase), CHAINS * (HOPS + 1))
    return [
        f"VAR {names[0]} = {{}}",
        *(f"VAR {new} = VAR {old}" for old, new in itertools.pairwise(names)),
    ], names


def _vt_text(material: PromptMaterial, rng: random.Random, lines: list[str], value: str, n: int) -> str:
    filled = [lines[0].format(value), *lines[1:]]
    context = "\n".join(_insert(material.noise.pieces(n), filled, [rng.random() for _ in lines]))
    return material.wording.vt.format(context=context, query=value)
