"""The checks that a rewritten answer must pass to replace the original."""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_ultralong.io.endpoint_client import Reply

MIN_LENGTH = 0.2
"""Least characters of a new answer, as a fraction of the original's."""

_REFUSALS = re.compile(
    r"(?:i(?:'m| am) (?:very |so |really )?sorry,? but|sorry,? but i|i(?:'m| am) (?:afraid (?:i|that)\b|unable to|not able to)|"
    r"unfortunately,? i (?:can't|cannot|am|'m)|"
    r"i (?:apologi[sz]e,? but|can(?:'t|not| not) (?:help(?! but)|assist|do|provide|answer|comply|fulfil|continue|"
    r"create|write|rewrite|process|complete)|"
    r"won't (?:help|be able)|must decline|have to decline|will not (?:help|assist))|"
    r"as an? (?:ai|artificial intelligence|(?:large )?language model)\b)"
)
_MENTIONS_DRAFT = re.compile(  # not "an improved version" or "the draft of your letter", which users ask for
    r"\b(?:rewritten|revised|refined|improved) (?:answer|response|reply)\b|"
    r"\b(?:in|of|from) the (?:original |given )?draft\b(?! of| for)|"
    r"\bthe (?:original |given )?draft(?:'s| (?:is|was|has|says|contains|makes|gives|answer|message|response))\b|"
    r"\bthe (?:original|given) (?:answer|response)\b"
)
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"


def rejection_reason(reply: Reply, original: str, *, domain: str, tags: frozenset[str]) -> str | None:
    """Return why a reply is rejected, as reports count it, or None. tags: of the request, like <draft>."""
    answer = reply.text
    if reply.refused or reply.finish == "content_filter":
        return "refusal"
    if reply.finish == "length":
        return "truncated"
    if not answer.strip():
        return "empty"
    if unclosed_fence(answer):
        return "truncated"
    if is_refusal(answer) and not is_refusal(original):  # a refusal may stay a refusal
        return "refusal"
    if any(tag in answer and tag not in original for tag in tags):
        return "echoes the request"
    if _MENTIONS_DRAFT.search(_opening(answer)) and not _MENTIONS_DRAFT.search(_opening(original)):
        return "speaks of the rewriting"
    if len(answer.strip()) < MIN_LENGTH * len(original.strip()):
        return "much shorter"
    if domain == "math" and (expected := final_answer(original)) is not None:
        result = final_answer(answer)
        if result is None or not same_answer(result, expected):
            return "other final answer"
    return None


def is_refusal(text: str) -> bool:
    """Whether an English text begins like a refusal."""
    return _REFUSALS.match(_opening(text)) is not None


def _opening(text: str) -> str:
    return text.replace("’", "'").lstrip(' \n\t"*#>-').lower()[:200]


def unclosed_fence(text: str) -> bool:
    """Whether the text ends inside a ``` or ~~~ block of Markdown."""
    opened = ""
    for line in text.splitlines():
        fence = re.match(r"\s*(`{3,}|~{3,})(.*)", line)
        if not fence:
            continue
        if not opened:
            if "`" not in fence[2]:  # ```code``` on one line is not a block
                opened = fence[1]
        elif fence[1].startswith(opened) and not fence[2].strip():
            opened = ""
    return bool(opened)


# ---- final answers of mathematics --------------------------------------------------------------


def final_answer(text: str) -> str | None:
    """Return the result that the text gives: the last \\boxed{...}, otherwise the last `#### ...`, otherwise
    `the (final) answer is ...` in its last line."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    if marked := re.findall(r"^[ \t]*####[ \t]*(\S.*?)[ \t]*$", text, re.MULTILINE):
        return marked[-1]
    last = text.strip().rsplit("\n", 1)[-1]
    stated = re.search(r"\banswer is:?\s*(.+?)\s*$", last, re.IGNORECASE)
    return stated[1] if stated else None


def _last_boxed(text: str) -> str | None:
    """Return the content of the last \\boxed{...}, None if its braces are not closed."""
    start = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    if start < 0:
        return None
    start = text.index("{", start) + 1
    depth = 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if not depth:
            return text[start:i]
    return None


def same_answer(a: str, b: str) -> bool:
    """Whether two results are equal: as numbers if both are, otherwise as text without notation."""
    a, b = _plain(a), _plain(b)
    x, y = _number(a), _number(b)
    return (
        x == y
        if x is not None and y is not None
        else a.replace(" ", "").lower() == b.replace(" ", "").lower()
    )


def _plain(answer: str) -> str:
    """Remove dollars, spacing, \\left, \\right, \\text{...} around words, thousands' commas, a full stop."""
    answer = re.sub(r"\\(?:left|right|displaystyle|[,;!: ])|\\?\$|\*\*|\\[()\[\]]", "", answer)
    answer = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}", r" \1", answer)
    answer = re.sub(r"\\[dt]frac", r"\\frac", answer).replace(r"\%", "%")
    answer = " ".join(answer.split()).rstrip(".").strip()
    return re.sub(r"^[-+]?\d{1,3}(?:,\d{3})+(?![\d,])", lambda number: number[0].replace(",", ""), answer)


def _number(answer: str) -> Fraction | None:
    """Parse a plain answer as a number: 3, -2.50, 3/4, \\frac{3}{4}; a unit or % after it is ignored."""
    answer = re.sub(r"^([-+]?)\\frac\s*\{?(\d+)\}?\s*\{?(\d+)\}?", r"\1\2/\3", answer)
    match = re.fullmatch(rf"({_NUMBER})(?:\s*/\s*({_NUMBER}))?(?:\s*%|\s+[A-Za-z][A-Za-z .]*)?", answer)
    if not match or (match[2] and not float(match[2])):
        return None
    return Fraction(match[1]) / Fraction(match[2] or 1)
