"""The templates of RULER's prompts: this project's own, or the official ones, read from the user's files.

Both have the same structure and fields. None of the official sentences is contained here: `official` reads
them from a checkout of NVIDIA/RULER (scripts/data/synthetic/), `installed` from lm-evaluation-harness, whose
RULER tasks use NVIDIA's words; neither runs any of that code.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from megatron_ultralong.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RulerWording:
    """Templates for str.format. A prompt is `niah` (`vt`, ...), and the prefix where the answer begins."""

    name: str
    needle: str
    """{type_needle_v} (in the plural), {key}, {value}"""
    noise: str
    """The haystack line of niah_single_1 and vt."""
    niah: str
    """{type_needle_v}, {context}, {query}"""
    niah_prefix: str
    niah_one: str
    """The same for a single value."""
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
OWN = RulerWording(
    name="own",
    needle="Among the secret {type_needle_v} of {key} there is {value}.",
    noise="Clouds drift over the lake. The kettle is warm. A bell rings twice. On we walk. Now and again it rains.",
    niah="The text below hides several secret {type_needle_v}. Keep them in mind: at its end you are asked for some of the "
    "{type_needle_v}.\n"
    "{context}\nWhich secret {type_needle_v} does the text above give for {query}?",
    niah_prefix=" The secret {type_needle_v} that the text above gives for {query} are",
    niah_one="The text below hides a secret {type_needle_v}. Keep it in mind: at its end you are asked for the {type_needle_v}.\n"
    "{context}\nWhich secret {type_needle_v} does the text above give for {query}?",
    niah_one_prefix=" The secret {type_needle_v} that the text above gives for {query} is",
    vt="In the text below, variables get their values in one or more chains. Follow every chain.\n\n{context}\n"
    "Question: Which variables have the value {query}, directly or through other variables?",
    vt_prefix=" Answer: By the chains in the text above, {num_v} variables have the value {query}. They are:",
    cwe="Here is a numbered list of words. Some of them occur more often than the rest. Remember those that occur most "
    "often.\n{context}\n"
    "Question: Which 10 words occur most often in the list above?",
    cwe_prefix=" Answer: The 10 words that occur most often in the list are:",
    fwe="The text below is in code. Count how often each coded word occurs and find the three that occur most often. {context}\n"
    "Question: Leave out the dots '...' and all explanation. Which three words occur most often in the coded text above?",
    fwe_prefix=" Answer: The three words that occur most often in the coded text above are:",
    qa=_BRIEFLY + "\n\nHere are the documents.\n\n{context}\n\n" + _BRIEFLY + "\n\nQuestion: {query}",
    qa_prefix=" Answer:",
    document="Document {i}:\n{document}",
)


def choose(checkout: Path | None, own: bool) -> RulerWording:
    """The checkout's wording where one is given, otherwise the installed package's where available and `own`
    is not set, otherwise our own."""
    return official(checkout) if checkout else OWN if own else installed() or OWN


def installed() -> RulerWording | None:
    """The official wording in lm-evaluation-harness; None where that is not installed, or contains it
    elsewhere."""
    spec = importlib.util.find_spec("lm_eval")
    places = [
        Path(root) / "tasks" / "ruler" for root in (spec.submodule_search_locations if spec else None) or ()
    ]
    try:
        place = next(place for place in places if place.is_dir())
        configs = {
            name: _assigned(place / f"{name}_utils.py", "CONFIG")[0] for name in ("vt", "cwe", "fwe", "qa")
        }
        configs["vt"] = configs["vt"]["variable_tracking"]
        # In its files the answer's first words lack the space before them.
        prefixes = {
            f"{name}_prefix": " " + config["answer_prefix"].lstrip() for name, config in configs.items()
        }
        niah, prefix = (
            _assigned(place / "niah_utils.py", "TEMPLATE")[0],
            " " + _plural_prefix(place / "prepare_niah.py"),
        )
        return RulerWording(
            name=f"official, as in lm-evaluation-harness {importlib.metadata.version('lm_eval')}",
            needle=_assigned(place / "prepare_niah.py", "NEEDLE")[0],
            noise=_assigned(place / "prepare_niah.py", "haystack")[0],
            document=_assigned(place / "qa_utils.py", "DOCUMENT_PROMPT")[0],
            niah=niah,
            niah_prefix=prefix,
            niah_one=_one(niah),
            niah_one_prefix=_one(prefix),
            **{name: config["template"] for name, config in configs.items()},
            **prefixes,
        )
    except (OSError, SyntaxError, ValueError, LookupError, TypeError, StopIteration):
        return None


def _plural_prefix(path: Path) -> str:
    """The first words of an answer with several values: the f-string in the else branch of `gen_prefix`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for key, value in zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ():
            if (
                ast.unparse(key or value) == "'gen_prefix'"
                and isinstance(value, ast.IfExp)
                and isinstance(value.orelse, ast.JoinedStr)
            ):
                return "".join(
                    str(part.value) if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"
                    for part in value.orelse.values
                    if isinstance(part, ast.Constant | ast.FormattedValue)
                )
    raise LookupError(f"{path.name} has no gen_prefix")


def official(directory: Path) -> RulerWording:
    """The wording of a checkout of NVIDIA/RULER (its top directory or scripts/data/synthetic). UserError
    where it is not one."""
    places = [
        place
        for place in (directory, directory / "scripts" / "data" / "synthetic")
        if (place / "constants.py").is_file()
    ]
    if not places:
        raise UserError(
            f"--official {directory}: contains no scripts/data/synthetic/constants.py; give a checkout of "
            "https://github.com/NVIDIA/RULER"
        )
    try:
        tasks = _assigned(places[0] / "constants.py", "TASKS")[0]
        niah = tasks["niah"]["template"], tasks["niah"]["answer_prefix"]
        texts = {
            short: (tasks[long]["template"], tasks[long]["answer_prefix"])
            for short, long in (
                ("vt", "variable_tracking"),
                ("cwe", "common_words_extraction"),
                ("fwe", "freq_words_extraction"),
                ("qa", "qa"),
            )
        }
        return RulerWording(
            name="official",
            needle=_assigned(places[0] / "niah.py", "needle")[0],
            noise=_assigned(places[0] / "niah.py", "haystack")[0],
            document=_assigned(places[0] / "qa.py", "DOCUMENT_PROMPT")[0],
            niah=niah[0],
            niah_prefix=niah[1],
            niah_one=_one(niah[0]),
            niah_one_prefix=_one(niah[1]),
            **{short: text for short, (text, _) in texts.items()},
            **{f"{short}_prefix": prefix for short, (_, prefix) in texts.items()},
        )
    except (OSError, SyntaxError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"--official {directory}: the templates are not where they are in RULER's scripts ({error})"
        ) from None


def _one(template: str) -> str:
    """RULER's own rule for the singular (niah.py): these words are replaced wherever they occur."""
    for plural, singular in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        template = template.replace(plural, singular)
    return template


def _assigned(path: Path, name: str) -> list:
    """The values of all literal assignments to `name` in a Python file, in order; LookupError where there are
    none."""
    values = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == name for target in node.targets
        ):
            try:
                values.append(ast.literal_eval(node.value))
            except ValueError:
                continue  # not a literal: haystack is also assigned from a file and from another variable
    if not values:
        raise LookupError(f"{path.name} assigns no {name}")
    return values
