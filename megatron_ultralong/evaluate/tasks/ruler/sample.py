"""One RULER prompt of a given task and length.

The structure is that of NVIDIA/RULER at c3f5e3b4 (scripts/data/synthetic/*.py); code and random numbers are
this project's own. It differs where RULER's own data can be ambiguous or needlessly short: keys, values and
coded words are distinct and occur nowhere else, filler is added until not one more unit fits, and the worked
examples of vt and cwe are in the user message.
"""

from __future__ import annotations

import math
import random
from functools import partial
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.tasks.ruler.aggregation import cwe_draft, fwe_draft
from megatron_ultralong.evaluate.tasks.ruler.fill_length import PromptDraft, fit
from megatron_ultralong.evaluate.tasks.ruler.material import PromptMaterial
from megatron_ultralong.evaluate.tasks.ruler.question_answering import qa_draft
from megatron_ultralong.evaluate.tasks.ruler.retrieval import niah_draft, vt_draft
from megatron_ultralong.evaluate.tasks.ruler.tasks import TASKS, RulerTask

ATTEMPTS = 20


def make_sample(material: PromptMaterial, name: str, length: int, index: int) -> dict[str, Any]:
    """Make prompt `index` of a task, with RULER's field names: input (the user message), answer_prefix,
    outputs, length (all tokens, including those to generate).

    Its length is at most `length`, and at most one unit of filler less. UserError where `length` is too
    short.
    """
    task = TASKS[name]
    for attempt in range(ATTEMPTS):
        rng = random.Random(f"{material.seed}/{name}/{length}/{index}/{attempt}")
        draft = _draft(material, task, length, rng, index)
        count = partial(material.encoder.size, prefix=draft.prefix)
        try:
            text, size, units = fit(draft, length - task.answer_tokens, count)
        except UserError as error:
            raise UserError(f"--lengths {length}: {name}: {error}") from None
        if draft.is_valid(text):
            meta = {"task": name, "target": length, "units": units}
            if task.data:
                # Above 1 where all documents do not fill the length: they are repeated, as in RULER.
                meta["rounds"] = math.ceil(units / len(material.qa_data[task.data].documents))
            return {
                "index": index,
                "input": text,
                "outputs": draft.outputs,
                "length": size + task.answer_tokens,
                "answer_prefix": draft.prefix,
                "meta": meta,
            }
    raise UserError(
        f"{name}: in {ATTEMPTS} attempts every prompt contained one of its needles twice; give another --haystack"
    )


def _draft(
    material: PromptMaterial, task: RulerTask, length: int, rng: random.Random, index: int
) -> PromptDraft:
    if task.kind == "niah":
        return niah_draft(material, task, rng)
    if task.kind == "vt":
        return vt_draft(material, rng)
    if task.kind == "cwe":
        return cwe_draft(material, length, rng)
    if task.kind == "fwe":
        return fwe_draft(material, task, length, rng)
    return qa_draft(material, task, rng, index)
