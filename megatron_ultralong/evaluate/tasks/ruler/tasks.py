"""RULER's 13 tasks (arXiv 2404.06654): what each consists of, and the drawing of its prompts.

Parameters and structure are those of NVIDIA/RULER at c3f5e3b4 (scripts/synthetic.yaml,
scripts/data/synthetic/*.py); the code and the random numbers are our own. It differs where RULER's own data
can be ambiguous or needlessly short: keys, values and coded words are distinct and occur nowhere else, filler
is added until not one more unit fits, the example in vt and cwe stands inside the user's message.
"""

from __future__ import annotations

import itertools
import math
import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.prompts.chat_template import Frame
from megatron_ultralong.evaluate.tasks.ruler import filler_text
from megatron_ultralong.evaluate.tasks.ruler import qa as ruler_qa
from megatron_ultralong.evaluate.tasks.ruler.fill_length import Draft, Filler, fit
from megatron_ultralong.evaluate.tasks.ruler.wording import Wording


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task."""

    kind: Literal["niah", "vt", "cwe", "fwe", "qa"]
    tokens: int
    """To generate."""
    part: bool = False
    """Scored by string_match_part; else by string_match_all."""
    haystack: Literal["noise", "essay", "needle", ""] = ""
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    """Values a key."""
    queries: int = 1
    data: Literal["squad", "hotpotqa", ""] = ""


def _niah(haystack: Literal["noise", "essay", "needle"], **change) -> Task:
    return Task(kind="niah", tokens=128, haystack=haystack, **change)


TASKS = {
    "niah_single_1": _niah("noise"),
    "niah_single_2": _niah("essay"),
    "niah_single_3": _niah("essay", value="uuids"),
    "niah_multikey_1": _niah("essay", keys=4),
    "niah_multikey_2": _niah("needle"),
    "niah_multikey_3": _niah("needle", key="uuids", value="uuids"),
    "niah_multivalue": _niah("essay", values=4),
    "niah_multiquery": _niah("essay", keys=4, queries=4),
    "vt": Task(kind="vt", tokens=30),
    "cwe": Task(kind="cwe", tokens=120),
    "fwe": Task(kind="fwe", tokens=50),
    "qa_1": Task(kind="qa", tokens=32, part=True, data="squad"),
    "qa_2": Task(kind="qa", tokens=32, part=True, data="hotpotqa"),
}
DEPTHS = [round(100 * i / 39) / 100 for i in range(40)]
"""Where needles may stand in an essay, as shares of its sentences."""
CHAINS, HOPS = 1, 4
COMMON_WORDS, CODED_LETTERS, ALPHA, ZETA = 10, 6, 2.0, math.pi**2 / 6
"""cwe: words asked for. fwe: letters of a word; word k (from 1) has the share k^-ALPHA / ZETA, ZETA =
zeta(ALPHA)."""
SHORT = 4096
"""Below this length cwe repeats its words less often, as RULER does."""
ATTEMPTS = 20


class Kit:
    """What all prompts of a run are made from."""

    def __init__(
        self,
        frame: Frame,
        wording: Wording,
        *,
        seed: int = 0,
        haystack: list[str] | None = None,
        data: dict[str, ruler_qa.Data] | None = None,
    ) -> None:
        """haystack: sentences of the essay, repeated when they do not suffice; None = own sentences. data: of
        `squad` and `hotpotqa`."""
        self.frame, self.wording, self.seed, self.data = frame, wording, seed, data or {}
        rng = random.Random(f"{seed}/essay")
        own = (filler_text.sentence(rng) for _ in itertools.count())
        self.essay = Filler(frame.counts, itertools.cycle(haystack) if haystack else own)
        self.noise = Filler(frame.counts, itertools.repeat(wording.noise), before="\n")
        self.document_costs: dict[str, dict[int, int]] = {}

    def numbers(self, n: int) -> float:
        """About how many tokens ` 1.`, ` 2.` ... ` n.` take together."""
        return sum(
            max(0, min(n, 10**d - 1) - 10 ** (d - 1) + 1) * cost
            for d, cost in enumerate(self._number_costs, 1)
        )

    @cached_property
    def _number_costs(self) -> list[float]:
        """Tokens of ` 1.`, ` 10.` ... by digits, from 1 digit on: the mean of some of them."""
        some = [[f" {10**d + i * 9 * 10**d // 16}." for i in range(16 if d else 9)] for d in range(8)]
        return [sum(self.frame.counts(group)) / len(group) for group in some]

    @cached_property
    def example_noise(self) -> int:
        """Noise lines of vt's example: as many as make it 500 tokens."""
        lines, _ = _chains(random.Random(f"{self.seed}/vt"), letters=3)
        return fit(
            Draft(
                render=lambda n: _vt_text(self, random.Random(0), lines, "12345", n) + self.wording.vt_prefix,
                cost=self.noise.cost,
                prefix="",
                outputs=[],
            ),
            500,
            lambda text: self.frame.counts([text])[0],
        )[2]


def sample(kit: Kit, name: str, length: int, index: int) -> dict:
    """Prompt `index` of a task, in RULER's field names: input (the user's text), answer_prefix, outputs,
    length (all tokens, those to generate included). At most `length`, at most one unit of filler less.
    UserError where `length` is too short for it."""
    task = TASKS[name]
    for attempt in range(ATTEMPTS):
        rng = random.Random(f"{kit.seed}/{name}/{length}/{index}/{attempt}")
        draft = DRAFTS[task.kind](kit, task, length, rng, index)
        try:
            text, size, units = fit(draft, length - task.tokens, partial(kit.frame.size, prefix=draft.prefix))
        except UserError as error:
            raise UserError(f"--lengths {length}: {name}: {error}") from None
        if draft.sound(text):
            meta = {"task": name, "target": length, "units": units}
            if task.data:
                # Above 1 where all documents do not fill the length: they come again, the answer's too, as in
                # RULER.
                meta["rounds"] = math.ceil(units / len(kit.data[task.data].documents))
            return {
                "index": index,
                "input": text,
                "outputs": draft.outputs,
                "length": size + task.tokens,
                "answer_prefix": draft.prefix,
                "meta": meta,
            }
    raise UserError(
        f"{name}: in {ATTEMPTS} attempts every prompt held one of its needles twice; give another --haystack"
    )


# ---- niah --------------------------------------------------------------------------------------


def _niah_draft(kit: Kit, task: Task, length: int, rng: random.Random, index: int) -> Draft:
    words, kind = kit.wording, task.value
    keys = _different(lambda: filler_text.draw(rng, task.key), task.keys)
    values = _different(lambda: filler_text.draw(rng, task.value), task.keys * task.values)
    belong = {key: values[i * task.values : (i + 1) * task.values] for i, key in enumerate(keys)}
    needles = [
        words.needle.format(type_needle_v=kind, key=key, value=value)
        for key, own in belong.items()
        for value in own
    ]
    rng.shuffle(needles)
    asked = rng.sample(keys, task.queries)
    outputs = [value for key in asked for value in belong[key]]
    query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
    one = len(outputs) == 1
    fields = {"type_needle_v": kind.removesuffix("s") if one else kind, "query": query}
    template, prefix = (words.niah_one, words.niah_one_prefix) if one else (words.niah, words.niah_prefix)

    if task.haystack == "needle":
        filler = Filler(
            kit.frame.counts,
            _other_needles(random.Random(rng.random()), task, words.needle, keys, values),
            before="\n",
        )
    else:
        filler = kit.essay if task.haystack == "essay" else kit.noise
    places = rng.sample(DEPTHS, len(needles)) if task.haystack == "essay" else [rng.random() for _ in needles]
    joint = " " if task.haystack == "essay" else "\n"

    def render(n: int) -> str:
        return template.format(context=joint.join(_insert(filler.pieces(n), needles, places)), **fields)

    def sound(text: str) -> bool:
        return all(text.count(value) == 1 for value in outputs) and all(
            text.count(key) == task.values + 1 for key in asked
        )

    return Draft(
        render=render, cost=filler.cost, prefix=prefix.format(**fields), outputs=outputs, sound=sound
    )


def _other_needles(
    rng: random.Random, task: Task, needle: str, keys: list[str], values: list[str]
) -> Iterator[str]:
    while True:
        key, value = filler_text.draw(rng, task.key), filler_text.draw(rng, task.value)
        if not any(own in key for own in keys) and value not in values:
            yield needle.format(type_needle_v=task.value, key=key, value=value)


def _insert(pieces: list[str], needles: list[str], places: list[float]) -> list[str]:
    """`pieces` with the needles, in their order, at the places (shares of the pieces, sorted here)."""
    cuts = [0, *sorted(int(place * len(pieces)) for place in places), len(pieces)]
    out: list[str] = []
    for needle, start, end in zip([*needles, None], cuts[:-1], cuts[1:], strict=True):
        out += pieces[start:end]
        out += [needle] if needle is not None else []
    return out


# ---- vt ----------------------------------------------------------------------------------------


def _vt_draft(kit: Kit, task: Task, length: int, rng: random.Random, index: int) -> Draft:
    shown, answers = _chains(rng, letters=3)
    old, value = (str(number) for number in rng.sample(range(10_000, 99_999), 2))
    fields = {"num_v": HOPS + 1}
    example = (
        _vt_text(kit, rng, shown, old, kit.example_noise)
        + kit.wording.vt_prefix.format(query=old, **fields)
        + " "
        + " ".join(answers)
    )
    lines, outputs = _chains(rng, letters=5)
    seed = rng.random()  # The places are drawn anew, and alike, for every size.
    return Draft(
        render=lambda n: example + "\n\n" + _vt_text(kit, random.Random(seed), lines, value, n),
        cost=kit.noise.cost,
        prefix=kit.wording.vt_prefix.format(query=value, **fields),
        outputs=outputs,
        sound=lambda text: all(text.count(f"VAR {name} =") == 1 for name in (*answers, *outputs)),
    )


def _chains(rng: random.Random, *, letters: int) -> tuple[list[str], list[str]]:
    """Lines of one chain, the first with a gap for its value; its variables."""
    names = _different(lambda: filler_text.letters(rng, letters, string.ascii_uppercase), CHAINS * (HOPS + 1))
    return [
        f"VAR {names[0]} = {{}}",
        *(f"VAR {new} = VAR {old}" for old, new in itertools.pairwise(names)),
    ], names


def _vt_text(kit: Kit, rng: random.Random, lines: list[str], value: str, n: int) -> str:
    context = "\n".join(
        _insert(kit.noise.pieces(n), [lines[0].format(value), *lines[1:]], [rng.random() for _ in lines])
    )
    return kit.wording.vt.format(context=context, query=value)


# ---- cwe ---------------------------------------------------------------------------------------


def _cwe_draft(kit: Kit, task: Task, length: int, rng: random.Random, index: int) -> Draft:
    example_words, example_often, example_seldom, often, seldom = (
        (20, 3, 1, 6, 1) if length < SHORT else (40, 10, 3, 30, 3)
    )
    template, prefix = kit.wording.cwe, kit.wording.cwe_prefix
    first = COMMON_WORDS + example_words  # where the words of the list go on after the common ones
    words = Filler(kit.frame.counts, _different_words(random.Random(rng.random()), single=True))
    most: int | None = (
        len(filler_text.SINGLE) - 2 * first
    )  # some single words are parts of others and left out

    def cost(n: int) -> float:
        numbers = kit.numbers(COMMON_WORDS * often + n * seldom)
        return (
            words.cost(COMMON_WORDS) * often + (words.cost(first + n) - words.cost(first)) * seldom + numbers
        )

    if (
        most and cost(most) < length
    ):  # There are too few single words for this length: a list of pairs of words, then.
        words, most = (
            Filler(kit.frame.counts, _different_words(random.Random(rng.random()), single=False)),
            None,
        )
    common = words.pieces(COMMON_WORDS)
    shown = words.pieces(first)[COMMON_WORDS:]
    example = (
        template.format(context=_numbered(rng, shown, example_often, example_seldom))
        + prefix
        + " "
        + " ".join(f"{i}. {word}" for i, word in enumerate(shown[:COMMON_WORDS], 1))
    )
    seed = rng.random()

    def render(n: int) -> str:
        listed = [*common, *words.pieces(first + n)[first:]]
        return example + "\n" + template.format(context=_numbered(random.Random(seed), listed, often, seldom))

    return Draft(
        render=render,
        cost=cost,
        prefix=prefix,
        outputs=common,
        most=most,
        sound=lambda text: all(text.count(word) == often for word in common),
    )


def _different_words(rng: random.Random, *, single: bool) -> Iterator[str]:
    """Words, no two alike; the first ones, which are asked for, are no part of another."""
    order = iter(
        rng.sample(filler_text.SINGLE, len(filler_text.SINGLE))
        if single
        else (filler_text.word(rng.randrange(filler_text.WORDS)) for _ in itertools.count())
    )
    taken: set[str] = set()
    common: list[str] = []
    for word in order:
        if word in taken or any(word in other or other in word for other in common):
            continue
        taken.add(word)
        common += [word] if len(common) < COMMON_WORDS else []
        yield word


def _numbered(rng: random.Random, words: list[str], often: int, seldom: int) -> str:
    entries = words[:COMMON_WORDS] * often + words[COMMON_WORDS:] * seldom
    rng.shuffle(entries)
    return " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1))


# ---- fwe ---------------------------------------------------------------------------------------


def _fwe_draft(kit: Kit, task: Task, length: int, rng: random.Random, index: int) -> Draft:
    # RULER's vocabulary is a 50th of the tokens; of words beyond the square root of the length none is ever
    # drawn.
    size = max(5, min((length - task.tokens) // 50, math.isqrt(length)))
    words = ["...", *_different(lambda: filler_text.letters(rng, CODED_LETTERS), size - 1)]
    costs = kit.frame.counts([" " + word for word in words])
    seed = rng.random()

    def often(n: int) -> list[int]:
        return [int(n * k**-ALPHA / ZETA) for k in range(1, size + 1)]

    def render(n: int) -> str:
        text = [word for word, times in zip(words, often(n), strict=True) for _ in range(times)]
        random.Random(seed).shuffle(text)
        return kit.wording.fwe.format(context=" ".join(text))

    def sound(text: str) -> bool:
        return text.count(words[3]) > text.count(words[4])

    return Draft(
        render=render,
        cost=lambda n: sum(cost * times for cost, times in zip(costs, often(n), strict=True)),
        prefix=kit.wording.fwe_prefix,
        outputs=words[1:4],
        least=80,
        sound=sound,
    )


# ---- qa ----------------------------------------------------------------------------------------


def _qa_draft(kit: Kit, task: Task, length: int, rng: random.Random, index: int) -> Draft:
    data, known = kit.data[task.data], kit.document_costs.setdefault(task.data, {})
    question = data.questions[index]
    order = ruler_qa.order(data, question, rng)
    seed = rng.random()

    def counts(numbers: list[str]) -> list[int]:
        new = [int(number) for number in numbers if int(number) not in known]
        known.update(
            zip(
                new,
                kit.frame.counts(
                    [kit.wording.document.format(i=1, document=data.documents[i]) + "\n\n" for i in new]
                ),
                strict=True,
            )
        )
        return [known[int(number)] for number in numbers]

    # The filler's pieces are numbers of documents: each is tokenised once in a run, however many prompts it
    # is in.
    filler = Filler(counts, (str(i) for i in itertools.cycle(order)), before="")

    def render(n: int) -> str:
        chosen = [data.documents[int(number)] for number in filler.pieces(n)]
        random.Random(seed).shuffle(chosen)
        context = "\n\n".join(
            kit.wording.document.format(i=i, document=text) for i, text in enumerate(chosen, 1)
        )
        return kit.wording.qa.format(context=context, query=question.text)

    def cost(n: int) -> float:
        return filler.cost(n) + kit.numbers(n) - n * kit.numbers(1)

    return Draft(
        render=render,
        cost=cost,
        prefix=kit.wording.qa_prefix,
        outputs=list(question.answers),
        least=len(question.documents),
    )


def _different(make: Callable[[], str], count: int) -> list[str]:
    """`count` texts, no two alike, in the order they were made."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[make()] = None
    return list(found)


DRAFTS = {"niah": _niah_draft, "vt": _vt_draft, "cwe": _cwe_draft, "fwe": _fwe_draft, "qa": _qa_draft}
