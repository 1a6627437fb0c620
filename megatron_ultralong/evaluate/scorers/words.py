"""Answers to words, and the F1 of two lists of words: what the scorers of LV-Eval and InfiniteBench have in
common.

Both follow SQuAD for English; for Chinese they take out the same signs.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

# Those of zhon.hanzi with a full stop, but for the left one-book marks, which the official scorers leave in.
_CHINESE_SIGNS = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
_NO_SIGNS = str.maketrans("", "", string.punctuation)
_NO_SIGNS_ZH = str.maketrans("", "", string.punctuation + _CHINESE_SIGNS)


def english(text: str) -> list[str]:
    """Words in lower case, without ASCII punctuation (signs inside a word vanish, its parts join) and
    articles."""
    return re.sub(r"\b(?:a|an|the)\b", " ", text.lower().translate(_NO_SIGNS)).split()


def chinese(text: str) -> str:
    """Lower case, without punctuation and white space."""
    return "".join(text.lower().translate(_NO_SIGNS_ZH).split())


def common(prediction: Sequence[str], reference: Sequence[str]) -> Counter[str]:
    """Words of both, as often as both have them."""
    return Counter(prediction) & Counter(reference)


def f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """Harmonic mean of the shares of `prediction` and of `reference` that the other has too, order aside; 0
    to 1."""
    same = common(prediction, reference).total()
    return 2 * same / (len(prediction) + len(reference)) if same else 0.0
