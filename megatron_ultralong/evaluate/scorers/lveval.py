"""LV-Eval's scorers, equal to infinigence/LVEval's flops.py (tests/parity/test_official_scores_lv.py).

    hotpotwikiqa, loogle_*, multifieldqa_en   F1 of English words; 0 unless a fifth of the keywords is there
    multifieldqa_zh, cmrc, lic                F1 of Chinese words (jieba); 0 unless two fifths of the keywords are there
    factrecall_en, factrecall_zh              F1, whatever the keywords
    dureader                                  ROUGE-L of Chinese words

Only the first answer counts. Common words count as no keyword, and are left out before ROUGE-L; F1 counts
them.
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
    "的 地 了 也 由 到 从 以 为 是 有 在 和 与 至 于 对 而 但 或 或者 以及 并 等 所 让 使 给 将 用 要 会 能 可以 不 无 中 上 后 时 首先 "
    "然后 已经 才 来 其他 一种 一定 主要 通过 根据 基于 进行 使用 用于 具有 包括 位于 变得 因素 方面 受 带 指 法 类 形 度 号 条 片 "
    "个 小 你 丁 年 月 日 亩 元 万元 亿元 c × ‰".split()
)
ENOUGH_EN, ENOUGH_ZH = 0.2, 0.4
"""Share of the keywords that an answer needs."""


def score(name: str, prediction: str, answers: Sequence[str], keywords: str | None = None) -> float:
    """The score of one answer, 0 to 1.

    name: the set, like cmrc_mixup. keywords: its field answer_keywords. Where an answer or its keywords hold
    no word at all the official scorer divides by zero; here such an answer scores 0, and such keywords ask
    for nothing.
    """
    answer = answers[0] if answers else ""
    if name == "dureader_mixup":
        return _rouge_l(_rouge_words(prediction), _rouge_words(answer))
    if name.removesuffix("_mixup").endswith(("zh", "cmrc", "lic")):
        written, wanted = _chinese_words(prediction), _chinese_words(answer)
        asked, blacklist, enough = _chinese_words(keywords) if keywords else wanted, COMMON_ZH, ENOUGH_ZH
    else:
        written, wanted = english(prediction), english(answer)
        asked, blacklist, enough = english(keywords or ""), COMMON_EN, ENOUGH_EN
    if not name.startswith("factrecall") and _recall(written, asked, blacklist) < enough:
        return 0.0
    return f1(written, wanted)


def _recall(written: Sequence[str], asked: Sequence[str], blacklist: Collection[str]) -> float:
    """Share of the keywords that were written; common ones count as missing."""
    found = sum(count for word, count in common(written, asked).items() if word not in blacklist)
    return found / len(asked) if asked else 1.0


def _chinese_words(text: str) -> list[str]:
    return [word for word in map(chinese, _cut(text)) if word]


def _rouge_words(text: str) -> str:
    """Chinese words with spaces between, cut twice as the official scorer does: a word may come apart when it
    stands between spaces."""
    words = map(chinese, _cut(" ".join(_cut(text))))
    return " ".join(word for word in words if word not in COMMON_ZH)


def _rouge_l(written: str, wanted: str) -> float:
    """F of ROUGE-L by the official scorer's package, which refuses empty texts and counts back through long
    ones by recursion: both are 0."""
    from rouge import Rouge

    try:
        return Rouge(metrics=["rouge-l"]).get_scores(written, wanted)[0]["rouge-l"]["f"]
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
