"""Split answers into words, and compute the F1 of two lists of words: shared by the scorers of LV-Eval and
InfiniteBench.

Both follow SQuAD for English; for Chinese they remove the same punctuation.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

# zhon.hanzi's punctuation with a full stop, without the left single book mark, which the official scorers
# keep.
_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣"
    "､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NO_PUNCTUATION_ZH = str.maketrans("", "", string.punctuation + _CHINESE_PUNCTUATION)


def english(text: str) -> list[str]:
    """Words in lower case, without articles and ASCII punctuation (the parts around a sign inside a word are
    joined)."""
    return re.sub(r"\b(?:a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION)).split()


def chinese(text: str) -> str:
    """Lower case, without punctuation and white space."""
    return "".join(text.lower().translate(_NO_PUNCTUATION_ZH).split())


def common(prediction: Sequence[str], reference: Sequence[str]) -> Counter[str]:
    """Words that both contain, as often as both contain them."""
    return Counter(prediction) & Counter(reference)


def f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the words, ignoring their order; 0 to 1."""
    same = common(prediction, reference).total()
    return 2 * same / (len(prediction) + len(reference)) if same else 0.0
