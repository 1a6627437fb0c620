"""InfiniteBench's scorers, equal to OpenBMB/InfiniteBench's src/compute_scores.py
(tests/parity/test_official_scores_lv.py).

passkey, number_string      the first number is the answer
kv_retrieval                the answer is one of the words
longdialogue_qa_eng         the same, in capitals
code_run                    the last word is the number
math_find                   the first number, with decimals, is the answer
math_calc                   fraction of the results that are right before the first wrong one
code_debug, longbook_choice the letter, or the choice's text, comes first or after words like "answer is:"
longbook_qa_eng, _chn       best F1 over the answers, of words or of Chinese characters
longbook_sum_eng            ROUGE-Lsum
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from megatron_ultralong.evaluate.scorers.words import chinese, english, f1

_DEBUG_CUES = ("answer is:", "is:", "answer:", "correct option is:")
_CHOICE_CUES = ("answer is:", "answer:", "answer is", "option is")


def score(task: str, prediction: str, answer: Any) -> float:
    """The score of one answer, 0 to 1.

    answer: as in the official files (a string, a number or a list), but [text, letter] for code_debug and
    longbook_choice_eng. Where the official scorer raises an error, the score is 0: a decimal number instead
    of an integer in math_find, a number of more than 4,300 digits.
    """
    expected = answer if isinstance(answer, list) else [answer]
    if task in ("passkey", "number_string"):
        number = re.search("[0-9]+", prediction)
        return float(number is not None and number[0] == expected[0])
    if task == "kv_retrieval":
        return float(expected[0] in _words(prediction, "\n:\"'.,?!{}"))
    if task == "longdialogue_qa_eng":  # only the first name counts, and one of several words never matches
        return float(expected[0] in [word.upper() for word in _words(prediction, "\n:\"'.,?!{}")])
    if task == "code_run":
        return float(_number(int, (_words(prediction, "\n.`'\":") or [""])[-1]) == expected[0])
    if task == "math_find":
        number = re.search(r"\d+\.\d+|\d+", prediction)
        return float(number is not None and _number(type(expected[0]), number[0]) == expected[0])
    if task == "math_calc":
        return _right_from_start(prediction, expected[0] if isinstance(expected[0], list) else expected)
    if task == "code_debug":
        return float(_debug(prediction.strip(), *expected[:2]))
    if task == "longbook_choice_eng":
        return float(_choice(prediction.strip(), expected))
    if task == "longbook_qa_eng":
        return max((f1(english(prediction), english(one)) for one in expected), default=0.0)
    if task == "longbook_qa_chn":
        return max((f1(chinese(prediction), chinese(one)) for one in expected), default=0.0)
    assert task == "longbook_sum_eng", task
    return _rouge_scorer().score_multi(expected, prediction)["rougeLsum"].fmeasure


def _words(text: str, signs: str) -> list[str]:
    """Words of a text in which `signs` separate words."""
    return text.translate(dict.fromkeys(map(ord, signs), " ")).split()


def _number(kind: type, text: str) -> Any:
    """`text` as a number of type `kind`; None where it is not one."""
    try:
        return kind(text)
    except ValueError:
        return None


def _right_from_start(prediction: str, expected: Sequence[int]) -> float:
    right = 0
    for text, number in zip(re.findall("[0-9]+", prediction), expected):
        if _number(int, text) != number:
            break
        right += 1
    return right / len(expected) if expected else 0.0


def _debug(text: str, function: str, letter: str) -> bool:
    if text.startswith((f"{letter}.", f"{letter}:")):
        return True
    for sign in ("\n", "`", "'", '"', "-", "*", "Option", "option"):
        text = text.replace(sign, " ")
    return _after_cue(text, _DEBUG_CUES, (letter, function)) or False


def _choice(text: str, expected: Sequence[str]) -> bool:
    if text[:1] and text[0] in "ABCD":
        return text[0] in expected
    if text in expected:
        return bool(text)
    text = text.translate(dict.fromkeys(map(ord, "\n\"'.,?!{}"), " "))
    match = _after_cue(text, _CHOICE_CUES, expected)
    if match is not None:
        return match
    # Otherwise the first word that is a substring of ABCD.
    return next((word in expected for word in text.split() if word in "ABCD"), False)


def _after_cue(text: str, cues: Sequence[str], expected: Sequence[str]) -> bool | None:
    """Whether one of `expected` follows, after one character, the first of `cues` that occurs; None where
    none does."""
    text = re.sub(" {2,}", " ", text)
    for cue in cues:
        _, present, after = text.partition(cue)
        if present:
            return len(after) > 0 and after[1:].startswith(tuple(expected))
    return None


@functools.cache
def _rouge_scorer() -> Any:
    """The scorer of Hugging Face's evaluate: no stemming, lines are sentences."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeLsum"], use_stemmer=False)
