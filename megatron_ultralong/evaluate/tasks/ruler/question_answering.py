"""RULER's question answering (qa_1, qa_2): a question, its documents, and other documents as filler."""

from __future__ import annotations

import itertools
import random

from megatron_ultralong.evaluate.tasks.ruler import qa_files
from megatron_ultralong.evaluate.tasks.ruler.fill_length import FillerText, PromptDraft
from megatron_ultralong.evaluate.tasks.ruler.material import PromptMaterial
from megatron_ultralong.evaluate.tasks.ruler.tasks import RulerTask


def qa_draft(material: PromptMaterial, task: RulerTask, rng: random.Random, index: int) -> PromptDraft:
    """qa_*: answer question `index` from numbered documents."""
    data, sizes = material.qa_data[task.data], material.document_tokens.setdefault(task.data, {})
    question, template = data.questions[index], material.wording.document
    order = qa_files.document_order(data, question, rng)
    seed = rng.random()

    def counts(numbers: list[str]) -> list[int]:
        new = [int(number) for number in numbers if int(number) not in sizes]
        texts = [template.format(i=1, document=data.documents[i]) + "\n\n" for i in new]
        sizes.update(zip(new, material.encoder.counts(texts), strict=True))
        return [sizes[int(number)] for number in numbers]

    # The pieces of the filler are document numbers: each document is tokenised once in a run.
    filler = FillerText(counts, (str(i) for i in itertools.cycle(order)), before="")

    def render(n: int) -> str:
        documents = [data.documents[int(number)] for number in filler.pieces(n)]
        random.Random(seed).shuffle(documents)
        context = "\n\n".join(template.format(i=i, document=text) for i, text in enumerate(documents, 1))
        return material.wording.qa.format(context=context, query=question.text)

    def estimate(n: int) -> float:
        return filler.tokens(n) + material.number_tokens(n) - n * material.number_tokens(1)

    return PromptDraft(
        render=render,
        estimate=estimate,
        prefix=material.wording.qa_prefix,
        outputs=list(question.answers),
        min_units=len(question.documents),
    )
