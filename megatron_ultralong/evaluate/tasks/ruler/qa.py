"""The questions and documents of RULER's qa_1 and qa_2, from the official files of SQuAD 2.0 and HotpotQA.

SQuAD     dev-v2.0.json                    {"data": [{"paragraphs": [{"context", "qas": [{"question", "answers", "is_impossible"}]}]}]}
HotpotQA  hotpot_dev_distractor_v1.json    [{"question", "answer", "context": [[title, [sentence, ...]], ...]}]
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question; documents by their number."""

    text: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    """Always in its prompt."""
    related: tuple[int, ...]
    """Taken first as filler: the other paragraphs of the article."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """All of a file: questions in its order, different documents sorted by text, as RULER has them."""

    questions: list[Question]
    documents: list[str]


def read_squad(path: Path) -> Data:
    """Answerable questions of SQuAD 2.0. UserError where the file is none."""

    def parse(values: Any) -> Data:
        articles = [
            [paragraph["context"] for paragraph in article["paragraphs"]] for article in values["data"]
        ]
        documents = sorted({text for article in articles for text in article})
        number = {text: i for i, text in enumerate(documents)}
        questions = []
        for article in values["data"]:
            every = dict.fromkeys(number[paragraph["context"]] for paragraph in article["paragraphs"])
            for paragraph in article["paragraphs"]:
                own = number[paragraph["context"]]
                related = tuple(i for i in every if i != own)
                questions += [
                    Question(
                        text=one["question"],
                        answers=tuple(answer["text"] for answer in one["answers"]),
                        documents=(own,),
                        related=related,
                    )
                    for one in paragraph["qas"]
                    if not one.get("is_impossible", False)
                ]
        return Data(questions=questions, documents=documents)

    return _read(path, "--squad", "SQuAD's dev-v2.0.json", parse)


def read_hotpotqa(path: Path) -> Data:
    """HotpotQA with its distractors; a document is a title and, on the next line, its sentences. UserError
    where the file is none."""

    def parse(values: Any) -> Data:
        contexts = [
            [f"{title}\n{''.join(sentences)}" for title, sentences in one["context"]] for one in values
        ]
        documents = sorted({text for context in contexts for text in context})
        number = {text: i for i, text in enumerate(documents)}
        return Data(
            documents=documents,
            questions=[
                Question(
                    text=one["question"],
                    answers=(one["answer"],),
                    documents=tuple(dict.fromkeys(number[text] for text in context)),
                    related=(),
                )
                for one, context in zip(values, contexts, strict=True)
            ],
        )

    return _read(path, "--hotpotqa", "HotpotQA's hotpot_dev_distractor_v1.json", parse)


def order(data: Data, question: Question, rng: random.Random) -> list[int]:
    """All documents: the question's own, then related ones, then the others, at random. A prompt takes so
    many from the front as fit, and from the front again where all of them do not fill it."""
    taken = {*question.documents, *question.related}
    others = [i for i in range(len(data.documents)) if i not in taken]
    return [
        *question.documents,
        *rng.sample(question.related, len(question.related)),
        *rng.sample(others, len(others)),
    ]


def _read(path: Path, option: str, what: str, parse: Any) -> Data:
    try:
        data = parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {path}: cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{option} {path}: is not {what} ({type(error).__name__}: {error})") from None
    if not data.questions or not all(question.answers for question in data.questions):
        raise UserError(f"{option} {path}: is not {what} (a question without answers, or none at all)")
    return data
