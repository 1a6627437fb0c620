"""LV-Eval's scorers, equal to infinigence/LVEval's metrics.py (tests/parity/test_official_scores_lv.py).

    hotpotwikiqa, loogle_*, multifieldqa_en   F1 of English words; 0 with less than a fifth of the keywords
    multifieldqa_zh, cmrc, lic                F1 of Chinese words (jieba); 0 with less than two fifths of them
    factrecall_en, factrecall_zh              F1, regardless of the keywords
    dureader                                  ROUGE-L of Chinese words

Only the first answer counts. Common words are not keywords, and are removed before ROUGE-L; F1 includes them.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Collection, Sequence
from typing import Any

from megatron_ultralong.evaluate.scorers.words import chinese, common, english, f1

COMMON_EN = frozenset(
    "about and are as at be because being but by does for from had has have he her his in is it of on or she that their they "
    "this to was were what when which who with".split()
)
COMMON_ZH = frozenset(
    "的 地 了 也 由 到 从 以 为 是 有 在 和 与 至 于 对 而 但 或 或者 以及 并 等 所 让 使 给 将 用 要 会 能 可以 不 "
    "无 中 上 后 时 首先 "
    "然后 已经 才 来 其他 一种 一定 主要 通过 根据 基于 进行 使用 用于 具有 包括 位于 变得 因素 方面 受 带 指 法 类 "
    "形 度 号 条 片 "
    "个 小 你 丁 年 月 日 亩 元 万元 亿元 c × ‰".split()
)
ENOUGH_EN, ENOUGH_ZH = 0.2, 0.4
"""Fraction of the keywords that an answer needs."""


def score(name: str, prediction: str, answers: Sequence[str], keywords: str | None = None) -> float:
    """The score of one answer, 0 to 1.

    name: the set, like cmrc_mixup. keywords: the field answer_keywords. Where an answer or its keywords
    contain no word at all, the official scorer divides by zero; here such an answer scores 0, and such
    keywords require nothing.
    """
    answer = answers[0] if answers else ""
    if name == "dureader_mixup":
        return _rouge_l(_rouge_words(prediction), _rouge_words(answer))
    if name.removesuffix("_mixup").endswith(("zh", "cmrc", "lic")):
        words, expected = _chinese_words(prediction), _chinese_words(answer)
        required, blacklist, enough = (
            _chinese_words(keywords) if keywords else expected,
            COMMON_ZH,
            ENOUGH_ZH,
        )
    else:
        words, expected = english(prediction), english(answer)
        required, blacklist, enough = english(keywords or ""), COMMON_EN, ENOUGH_EN
    if not name.startswith("factrecall") and _recall(words, required, blacklist) < enough:
        return 0.0
    return f1(words, expected)


def _recall(words: Sequence[str], required: Sequence[str], blacklist: Collection[str]) -> float:
    """Fraction of the required keywords among `words`; common ones count as missing."""
    matched = sum(count for word, count in common(words, required).items() if word not in blacklist)
    return matched / len(required) if required else 1.0


def _chinese_words(text: str) -> list[str]:
    return [word for word in map(chinese, _cut(text)) if word]


def _rouge_words(text: str) -> str:
    """Chinese words separated by spaces, segmented twice as by the official scorer: a word between spaces may
    be split further."""
    words = map(chinese, _cut(" ".join(_cut(text))))
    return " ".join(word for word in words if word not in COMMON_ZH)


def _rouge_l(prediction: str, answer: str) -> float:
    """F of ROUGE-L by the official scorer's package; 0 where it refuses an empty text, or exceeds the
    recursion limit on a long one."""
    from rouge import Rouge

    try:
        return Rouge(metrics=["rouge-l"]).get_scores(prediction, answer)[0]["rouge-l"]["f"]
    except (ValueError, RecursionError):
        return 0.0


def _cut(text: str) -> list[str]:
    return _jieba().lcut(text)


@functools.cache
def _jieba() -> Any:
    with warnings.catch_warnings():  # of pkg_resources and escape sequences
        warnings.simplefilter("ignore")
        import jieba
    jieba.setLogLevel(logging.WARNING)
    return jieba
