"""The sentences of RULER's prompts: this project's own, or the official ones, read from files that the user has.

Both have the same structure and fields. None of the official sentences stands here: `official` reads them from a checkout of NVIDIA/RULER
(scripts/data/synthetic/) without running any of its code.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from megatron_ultralong.config import UserError


@dataclass(frozen=True, kw_only=True)
class Wording:
    """Templates for str.format. A prompt is `niah` (`vt`, ...) and, where the answer begins, the prefix."""

    name: str
    needle: str
    """{type_needle_v} (in the plural), {key}, {value}"""
    noise: str
    """The haystack line of niah_single_1 and vt."""
    niah: str
    """{type_needle_v}, {context}, {query}"""
    niah_prefix: str
    niah_one: str
    """The same where there is one value to find."""
    niah_one_prefix: str
    vt: str
    """{context}, {query}; the prefix also {num_v}"""
    vt_prefix: str
    cwe: str
    """{context}"""
    cwe_prefix: str
    fwe: str
    """{context}"""
    fwe_prefix: str
    qa: str
    """{context}, {query}"""
    qa_prefix: str
    document: str
    """{i}, {document}"""


_BRIEFLY = "Answer the question from the documents below. Write the answer alone and nothing else."
OWN = Wording(
    name="own",
    needle="Among the secret {type_needle_v} of {key} there is {value}.",
    noise="Clouds drift over the lake. The kettle is warm. A bell rings twice. On we walk. Now and again it rains.",
    niah="The text below hides several secret {type_needle_v}. Keep them in mind: at its end you are asked for some of the {type_needle_v}.\n"
         "{context}\nWhich secret {type_needle_v} does the text above give for {query}?",
    niah_prefix=" The secret {type_needle_v} that the text above gives for {query} are",
    niah_one="The text below hides a secret {type_needle_v}. Keep it in mind: at its end you are asked for the {type_needle_v}.\n"
             "{context}\nWhich secret {type_needle_v} does the text above give for {query}?",
    niah_one_prefix=" The secret {type_needle_v} that the text above gives for {query} is",
    vt="In the text below, variables get their values in one or more chains. Follow every chain.\n\n{context}\n"
       "Question: Which variables have the value {query}, directly or through other variables?",
    vt_prefix=" Answer: By the chains in the text above, {num_v} variables have the value {query}. They are:",
    cwe="Here is a numbered list of words. Some of them occur more often than the rest. Remember those that occur most often.\n{context}\n"
        "Question: Which 10 words occur most often in the list above?",
    cwe_prefix=" Answer: The 10 words that occur most often in the list are:",
    fwe="The text below is in code. Count how often each coded word occurs and find the three that occur most often. {context}\n"
        "Question: Leave out the dots '...' and all explanation. Which three words occur most often in the coded text above?",
    fwe_prefix=" Answer: The three words that occur most often in the coded text above are:",
    qa=_BRIEFLY + "\n\nHere are the documents.\n\n{context}\n\n" + _BRIEFLY + "\n\nQuestion: {query}",
    qa_prefix=" Answer:",
    document="Document {i}:\n{document}",
)


def official(directory: Path) -> Wording:
    """The wording of a checkout of NVIDIA/RULER (its top directory or scripts/data/synthetic). UserError where it is none."""
    places = [place for place in (directory, directory / "scripts" / "data" / "synthetic") if (place / "constants.py").is_file()]
    if not places:
        raise UserError(f"--official {directory}: no scripts/data/synthetic/constants.py in it; give a checkout of https://github.com/NVIDIA/RULER")
    try:
        tasks = _assigned(places[0] / "constants.py", "TASKS")[0]
        niah = tasks["niah"]["template"], tasks["niah"]["answer_prefix"]
        texts = {short: (tasks[long]["template"], tasks[long]["answer_prefix"]) for short, long in (
            ("vt", "variable_tracking"), ("cwe", "common_words_extraction"), ("fwe", "freq_words_extraction"), ("qa", "qa"))}
        return Wording(
            name="official", needle=_assigned(places[0] / "niah.py", "needle")[0], noise=_assigned(places[0] / "niah.py", "haystack")[0],
            document=_assigned(places[0] / "qa.py", "DOCUMENT_PROMPT")[0],
            niah=niah[0], niah_prefix=niah[1], niah_one=_one(niah[0]), niah_one_prefix=_one(niah[1]),
            **{short: text for short, (text, _) in texts.items()}, **{f"{short}_prefix": prefix for short, (_, prefix) in texts.items()})
    except (OSError, SyntaxError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"--official {directory}: the templates are not where RULER's scripts have them ({error})") from None


def _one(template: str) -> str:
    """RULER's own way to its singular form (niah.py): these words are replaced wherever they stand."""
    for plural, singular in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        template = template.replace(plural, singular)
    return template


def _assigned(path: Path, name: str) -> list:
    """Values of all literal assignments to `name` in a Python file, in order; LookupError where there is none."""
    values = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and any(isinstance(target, ast.Name) and target.id == name for target in node.targets):
            try:
                values.append(ast.literal_eval(node.value))
            except ValueError:
                continue  # Not a literal: haystack is also assigned from a file and from another variable.
    if not values:
        raise LookupError(f"{path.name} assigns no {name}")
    return values
