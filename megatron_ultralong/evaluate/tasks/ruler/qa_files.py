"""The questions and documents of RULER's qa_1 and qa_2, read from the official files of SQuAD 2.0 and
HotpotQA.

SQuAD     dev-v2.0.json
          {"data": [{"paragraphs": [{"context", "qas": [{"question", "answers", "is_impossible"}]}]}]}
HotpotQA  hotpot_dev_distractor_v1.json
          [{"question", "answer", "context": [[title, [sentence, ...]], ...]}]
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError


@dataclass(frozen=True, kw_only=True)
class QAQuestion:
    """A question; documents are given by their index."""

    text: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    """Always part of its prompt."""
    related: tuple[int, ...]
    """Used first as filler: the other paragraphs of the article."""


@dataclass(frozen=True, kw_only=True)
class QAData:
    """The questions of a file in its order, and its distinct documents sorted by text, as in RULER."""

    questions: list[QAQuestion]
    documents: list[str]


def read_squad(path: Path) -> QAData:
    """Read the answerable questions of SQuAD 2.0. UserError where the file is not SQuAD's."""

    def parse(values: Any) -> QAData:
        articles = [
            [paragraph["context"] for paragraph in article["paragraphs"]] for article in values["data"]
        ]
        documents = sorted({text for article in articles for text in article})
        number = {text: i for i, text in enumerate(documents)}
        questions = []
        for article in values["data"]:
            of_article = dict.fromkeys(number[paragraph["context"]] for paragraph in article["paragraphs"])
            for paragraph in article["paragraphs"]:
                own = number[paragraph["context"]]
                related = tuple(i for i in of_article if i != own)
                questions += [
                    QAQuestion(
                        text=one["question"],
                        answers=tuple(answer["text"] for answer in one["answers"]),
                        documents=(own,),
                        related=related,
                    )
                    for one in paragraph["qas"]
                    if not one.get("is_impossible", False)
                ]
        return QAData(questions=questions, documents=documents)

    return _read(path, "--squad", "SQuAD's dev-v2.0.json", parse)


def read_hotpotqa(path: Path) -> QAData:
    """Read HotpotQA with its distractors; a document is a title and, on the next line, its sentences.
    UserError where the file is not HotpotQA's."""

    def parse(values: Any) -> QAData:
        contexts = [
            [f"{title}\n{''.join(sentences)}" for title, sentences in one["context"]] for one in values
        ]
        documents = sorted({text for context in contexts for text in context})
        number = {text: i for i, text in enumerate(documents)}
        return QAData(
            documents=documents,
            questions=[
                QAQuestion(
                    text=one["question"],
                    answers=(one["answer"],),
                    documents=tuple(dict.fromkeys(number[text] for text in context)),
                    related=(),
                )
                for one, context in zip(values, contexts, strict=True)
            ],
        )

    return _read(path, "--hotpotqa", "HotpotQA's hotpot_dev_distractor_v1.json", parse)


def document_order(data: QAData, question: QAQuestion, rng: random.Random) -> list[int]:
    """All documents: the question's own, then related ones, then the others, at random. A prompt uses as many
    from the front as fit, and repeats them where all do not fill it."""
    taken = {*question.documents, *question.related}
    others = [i for i in range(len(data.documents)) if i not in taken]
    return [
        *question.documents,
        *rng.sample(question.related, len(question.related)),
        *rng.sample(others, len(others)),
    ]


def _read(path: Path, option: str, what: str, parse: Any) -> QAData:
    try:
        data = parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {path}: cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{option} {path}: is not {what} ({type(error).__name__}: {error})") from None
    if not data.questions or not all(question.answers for question in data.questions):
        raise UserError(f"{option} {path}: is not {what} (a question without answers, or none at all)")
    return data
