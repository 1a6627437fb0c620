"""InfiniteBench: rules of the scorers, prompts of every task, the answer's first words in a chat, stages,
averages, and the command."""

from __future__ import annotations

import contextlib
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.pipeline import stages
from megatron_ultralong.evaluate.scorers.infinitebench import score
from megatron_ultralong.evaluate.tasks import infinitebench
from megatron_ultralong.official_files.infinitebench import TASKS
from tests import benchmark_files as made
from tests.answering import Answering

TOOL = Path(__file__).parents[2] / "tools" / "evaluate.py"
OPTIONS = ["load", "save_all", "merge", "split"]
EXAMPLES = {
    "passkey": {
        "context": "Grass. The key is 71432.",
        "input": "What is the pass key?",
        "answer": ["71432"],
        "options": [],
    },
    "number_string": {
        "context": "Grass. The digits are 3000077442.",
        "input": "Which digits?",
        "answer": ["3000077442"],
        "options": [],
    },
    "kv_retrieval": {
        "context": '{"5e6b": "71aa-4953"}',
        "input": 'Key: "5e6b"\nIts value is: ',
        "answer": "71aa-4953",
        "options": "",
    },
    "code_run": {
        "context": "def func_7(x): ...",
        "input": "What is func_7(-2)?",
        "answer": [-3],
        "options": [],
    },
    "code_debug": {"context": "def load(): ...", "input": "", "answer": ["merge", "C"], "options": OPTIONS},
    "math_find": {
        "context": "[4, 94, 7]",
        "input": "Find it. The largest number of the list is:",
        "answer": [94],
        "options": "",
    },
    "math_calc": {"context": "1 + 2 + 3", "input": "", "answer": [[1, 3, 6]], "options": ""},
    "longdialogue_qa_eng": {
        "context": "ACE\nHello, $$MASK$$.",
        "input": "Who?",
        "answer": ["GAGGI", "Remo Gaggi"],
        "options": [],
    },
    "longbook_qa_eng": {
        "context": "A book.",
        "input": "Who is it?",
        "answer": ["Mrs. Bronwyn", "Bronwyn"],
        "options": [],
    },
    "longbook_sum_eng": {
        "context": "A book.",
        "input": "",
        "answer": ["Ida leaves.\nAl stays at home."],
        "options": [],
    },
    "longbook_choice_eng": {
        "context": "A book.",
        "input": "Who is it?",
        "answer": "Ida",
        "options": ["Al", "Bo", "Ida", "Di"],
    },
    "longbook_qa_chn": {"context": "一本书。", "input": "是谁？", "answer": ["小张", "张"], "options": []},
}
RIGHT = {
    "passkey": " 71432.",
    "number_string": " 3000077442",
    "kv_retrieval": '"71aa-4953"',
    "code_run": " -3.",
    "code_debug": " C. merge",
    "math_find": " 94",
    "math_calc": " [1, 3, 6]",
    "longdialogue_qa_eng": " Gaggi.",
    "longbook_qa_eng": " Bronwyn",
    "longbook_sum_eng": "Ida leaves.\nAl stays at home.",
    "longbook_choice_eng": " C",
    "longbook_qa_chn": "小张。",
}


def data(folder: Path, tasks: tuple[str, ...] = TASKS) -> Path:
    for task in tasks:
        made.jsonl(folder / f"{task}.jsonl", [{"id": i, **EXAMPLES[task]} for i in range(2)])
    return folder


def read(path: Path) -> dict[str, dict]:
    return {line["id"]: line for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()[1:])}


def task_of(prompt: str, prompts: dict[str, dict]) -> str:
    plain = re.sub(r"\s|<\|\w+\|>", "", prompt)
    return next(id.split("/")[0] for id, line in prompts.items() if re.sub(r"\s", "", line["text"]) == plain)


def answering(out: Path, answers: dict[str, str], **how) -> Answering:
    return Answering(
        lambda prompt: answers[task_of(prompt, read(out / "infinitebench.prompts.jsonl"))], **how
    )


@pytest.fixture
def prepared(tmp_path) -> Path:
    assert (
        infinitebench.prepare(tmp_path, data(tmp_path / "data"), infinitebench.InfiniteBenchSettings()) == 24
    )
    return tmp_path


# ---- scores and words --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task, prediction, answer, wanted",
    [
        ("passkey", "12345 or 71432", ["71432"], 0),
        ("passkey", "x71432y", "71432", 1),
        ("kv_retrieval", "value:71aa-4953", ["71aa-4953"], 1),
        ("kv_retrieval", "(71aa-4953)", "71aa-4953", 0),
        ("code_run", "It is `-3`.", -3, 1),
        ("code_run", "-3 it is", -3, 0),
        ("code_run", "-3.0", [-3], 0),
        ("code_run", "", 1, 0),
        ("math_find", "94.", [94], 1),
        ("math_find", "94.5", [94], 0),
        ("math_find", "94", [94.0], 1),
        ("math_find", "none", [94], 0),
        ("math_find", "1" * 5000, [94], 0),
        ("math_calc", "[1, 3, 7]", [1, 3, 6], 2 / 3),
        ("math_calc", "0 1 3 6", [[1, 3, 6]], 0),
        ("math_calc", "", [1], 0),
        ("longdialogue_qa_eng", "Ace!", ["ACE", "Remo"], 1),
        ("longdialogue_qa_eng", "Remo", ["ACE", "Remo"], 0),
        ("longdialogue_qa_eng", "Ace Rothstein", ["ACE ROTHSTEIN"], 0),
        ("code_debug", "The answer is: C", ["merge", "C"], 1),
        ("code_debug", "C merge", ["merge", "C"], 0),
        ("code_debug", "answer is:", ["merge", "C"], 0),
        ("longbook_choice_eng", "Cats", ["Ida", "C"], 1),
        ("longbook_choice_eng", "I pick Ida. C", ["Ida", "C"], 1),
        ("longbook_choice_eng", "the answer is C", ["Ida", "C"], 1),
        ("longbook_choice_eng", " ", ["Ida", "C"], 0),
        ("longbook_qa_eng", "the Bronwyn", ["Mrs. Bronwyn", "Bronwyn"], 1),
        ("longbook_qa_chn", "小李", ["小张"], 0.5),
        ("longbook_sum_eng", "Al stays at home.\nIda leaves.", ["Ida leaves.\nAl stays at home."], 1),
        ("longbook_sum_eng", "", "x", 0),
    ],
)
def test_rules(task, prediction, answer, wanted):
    assert score(task, prediction, answer) == pytest.approx(wanted)


def test_own_words_cover_every_task():
    assert set(infinitebench.OWN) == set(infinitebench.ANSWER_TOKENS) == set(TASKS)


def test_prompts_hold_what_the_task_needs(prepared):
    prompts, answers = (
        read(prepared / "infinitebench.prompts.jsonl"),
        read(prepared / "infinitebench.answers.jsonl"),
    )
    for task, example in EXAMPLES.items():
        text = prompts[f"{task}/0"]["text"]
        assert example["context"] in text and "{" not in text.replace(EXAMPLES["kv_retrieval"]["context"], "")
        assert prompts[f"{task}/0"]["tokens"] == infinitebench.ANSWER_TOKENS[task]
    assert "func_7 among" in prompts["code_run/0"]["text"] and prompts["code_run/0"]["text"].endswith(
        "The value that func_7(-2) returns is"
    )
    assert prompts["math_find/0"]["text"].startswith("Look for the largest number in this list.")
    assert (
        "C. merge\n" in prompts["code_debug/0"]["text"]
        and "C. Ida\n" in prompts["longbook_choice_eng/0"]["text"]
    )
    numbers = [answers[f"{task}/0"]["answer"] for task in ("math_calc", "code_run", "math_find")]
    assert numbers == [[1, 3, 6], [-3], [94]] and answers["kv_retrieval/1"]["answer"] == ["71aa-4953"]
    assert answers["longbook_choice_eng/0"]["answer"] == ["Ida", "C"] and answers["code_debug/0"][
        "answer"
    ] == ["merge", "C"]


@pytest.mark.parametrize(
    "task, change, message",
    [
        ("code_debug", {"answer": "nothing"}, "field 'answer' contains none of the options"),
        ("code_run", {"input": "f(2)"}, "field 'input' contains nothing like"),
        ("math_find", {"input": "Find it."}, "field 'input' contains nothing like"),
        ("math_find", {"answer": ["94"]}, "field 'answer' contains no numbers; is this the official file"),
        ("passkey", {"answer": []}, "field 'answer' is empty"),
    ],
)
def test_what_is_not_official_is_one_line(tmp_path, task, change, message):
    made.jsonl(tmp_path / f"{task}.jsonl", [{"id": 0, **EXAMPLES[task], **change}])
    with pytest.raises(UserError, match=rf"{task}.jsonl, line 1: {message}"):
        infinitebench.prepare(tmp_path, tmp_path, infinitebench.InfiniteBenchSettings())


def test_official_words_are_read(tmp_path):
    source = tmp_path / "checkout" / "src"
    source.mkdir(parents=True)
    texts = {
        task: "Q " + " ".join(sorted(set(re.findall(r"\{\w+\}", text))))
        for task, text in infinitebench.OWN.items()
    }
    items = ", ".join(f"{task!r}: {text[:5]!r} + {text[5:]!r}" for task, text in texts.items())
    (source / "prompt.py").write_text(f"gpt4_templates = {{}}\nyarn_mistral_templates = {{{items}}}\n")
    (source / "eval_utils.py").write_text(
        "import nothing\ndef f(target_number):\n    prefix = f'Seek {target_number} here'\n"
    )
    choice = infinitebench.InfiniteBenchSettings(official=tmp_path / "checkout")
    infinitebench.prepare(tmp_path, data(tmp_path / "data"), choice)
    text = read(tmp_path / "infinitebench.prompts.jsonl")["math_find/0"]["text"]
    assert text == f"Q [4, 94, 7] {EXAMPLES['math_find']['input']} Seek the largest number here"
    assert (
        json.loads((tmp_path / "infinitebench.answers.jsonl").open().readline())["of"]["wording"]
        == "official"
    )
    (source / "eval_utils.py").write_text("prefix = 'no such thing'\n")
    with pytest.raises(
        UserError, match=r"eval_utils.py does not assign prefix one f-string with \{target_number\}"
    ):
        infinitebench.prepare(tmp_path, tmp_path / "data", choice)
    (source / "prompt.py").write_text("yarn_mistral_templates = dict()\n")
    with pytest.raises(UserError, match="yarn_mistral_templates is not a dictionary"):
        infinitebench.prepare(tmp_path, tmp_path / "data", choice)


@pytest.mark.parametrize(
    "text, start",
    [
        ("A key.\n\nThe pass key is", "The pass key is"),
        ("Work out f(2). The value of f(2) is", "The value of f(2) is"),
        ('Who? "Me"', ""),
        ("Be concise.", ""),
        ("问题：谁？\n答案：", "答案："),
        ("The value is: ", "The value is: "),
        ("What now?\n", ""),
        ("", ""),
    ],
)
def test_the_start_of_an_answer(text, start):
    assert infinitebench.answer_start(text) == start


@pytest.mark.parametrize("answer", [[True], ["94"], []])
def test_what_is_no_number_is_refused(tmp_path, answer):
    made.jsonl(tmp_path / "data" / "math_find.jsonl", [{"id": 0, **EXAMPLES["math_find"], "answer": answer}])
    with pytest.raises(UserError, match="field 'answer' (contains no numbers|is empty)"):
        infinitebench.prepare(tmp_path, tmp_path / "data", infinitebench.InfiniteBenchSettings())


def test_a_task_twice_is_refused(tmp_path):
    data(tmp_path / "data", ("passkey",))
    data(tmp_path / "data" / "copy", ("passkey", "code_run"))
    with pytest.raises(UserError, match="are the same task; keep one of them"):
        infinitebench.prepare(tmp_path, tmp_path / "data", infinitebench.InfiniteBenchSettings())


# ---- stages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
def test_right_answers_score_one_hundred(prepared, chat):
    backend = answering(prepared, RIGHT, chat=chat)
    stages.predict(backend, prepared, "infinitebench")
    result = infinitebench.results(prepared)
    assert {one.task: one.score for one in result.scores} == dict.fromkeys(TASKS, pytest.approx(100))
    assert (
        result.extra["averages"]["all tasks"] == {"score": pytest.approx(100), "cells": 12, "of": 12}
        and result.settings["chat"] is chat
    )
    starts = {prompt.rpartition("<|assistant|>")[2] for prompt in backend.prompts}
    if chat:  # the answer's first words stand where the answer stands
        assert {
            "The pass key is",
            "Summary:",
            "答案：",
            "The letter of the right answer is",
            "Its value is:",
        } <= starts
        assert all(prompt.startswith("<|begin|><|user|>") for prompt in backend.prompts)
    else:
        assert all("<|user|>" not in prompt for prompt in backend.prompts)


def test_wrong_answers_score_nothing_and_rambling_little(prepared):
    stages.predict(answering(prepared, dict.fromkeys(TASKS, "?")), prepared, "infinitebench")
    assert infinitebench.results(prepared).extra["averages"]["all tasks"]["score"] == 0
    (prepared / "infinitebench.journal.jsonl").unlink()
    rambling = {task: f"Well, I would say {text}" for task, text in RIGHT.items()}
    stages.predict(answering(prepared, rambling, name="two"), prepared, "infinitebench")
    result = infinitebench.results(prepared)
    cells = {one.task: one.score for one in result.scores}
    assert cells["passkey"] == cells["code_debug"] == cells["math_find"] == 0, (
        "no room for it, or not as the rule wants it"
    )
    assert cells["kv_retrieval"] == 100 and 0 < cells["longbook_qa_eng"] < 40


def test_cut_in_the_middle_and_never_over_the_limit(tmp_path):
    EASY = ("passkey", "longbook_choice_eng")
    infinitebench.prepare(
        tmp_path, data(tmp_path / "data", EASY), infinitebench.InfiniteBenchSettings(tasks=EASY, limit=1)
    )
    backend = Answering(lambda prompt: "C", max_position=4096)
    stages.predict(backend, tmp_path, "infinitebench", max_length=141)
    result = infinitebench.results(tmp_path)
    assert all(140 <= size <= 141 for size in backend.sizes) and [
        one.notes["cut"] for one in result.scores
    ] == [1, 1]
    assert all(
        prompt.endswith(("The pass key is", "The letter of the right answer is"))
        for prompt in backend.prompts
    )
    table = infinitebench.table(result)
    assert (
        re.search(r"longbook_choice_eng +100.00\* +1 +1", table)
        and "average all tasks: 50.00 over 2 of 12" in table
    )
    (tmp_path / "infinitebench.journal.jsonl").unlink()
    stages.predict(
        Answering(lambda prompt: "C", refuses="The letter of"), tmp_path, "infinitebench", max_length=142
    )
    table = infinitebench.table(infinitebench.results(tmp_path))
    assert (
        re.search(r"longbook_choice_eng +0.00! +1", table)
        and "! 1 prompts were refused by the endpoint and count as 0: HTTP 400: " in table
    )


def test_a_task_that_writes_more_than_fits_is_told_before_anything_is_asked(prepared):
    backend = Answering(lambda prompt: "", max_position=8192)
    with pytest.raises(
        UserError,
        match="--max-length 8192: answers of math_calc may have 30,000 tokens, which leaves none for the prompt",
    ):
        stages.predict(backend, prepared, "infinitebench")
    assert not backend.prompts


def test_a_stopped_run_goes_on(prepared):
    dying = answering(prepared, RIGHT, dies_after=7)
    with pytest.raises(KeyboardInterrupt):
        stages.predict(dying, prepared, "infinitebench", batch=1)
    again = answering(prepared, RIGHT)
    stages.predict(again, prepared, "infinitebench", batch=1)
    assert len(dying.prompts) == 7 and len(again.prompts) == 17
    assert infinitebench.results(prepared).extra["averages"]["all tasks"]["score"] == pytest.approx(100)


def test_the_command(tmp_path, monkeypatch, capsys):
    folder = data(tmp_path / "data", ("passkey", "code_run"))
    main = runpy.run_path(str(TOOL))
    backend = answering(tmp_path / "out", RIGHT)
    monkeypatch.setattr(
        "megatron_ultralong.evaluate.backends.options.open_backend",
        lambda args: contextlib.nullcontext(backend),
    )
    arguments = [
        "evaluate.py",
        "infinitebench",
        "--model",
        "m",
        "--output",
        str(tmp_path / "out"),
        "--data",
        str(folder),
        "--tasks",
    ]
    for wrong, message in (
        ("passkey,code_walk", "--tasks code_walk: unknown; choose from passkey"),
        ("passkey,math_calc", "--data contains no math_calc"),
    ):
        monkeypatch.setattr(sys, "argv", [*arguments, wrong])
        with pytest.raises(UserError, match=message):
            main["main"]()
    monkeypatch.setattr(sys, "argv", [*arguments, "passkey,code_run", "--samples", "1"])
    main["main"]()
    written = json.loads((tmp_path / "out" / "infinitebench.json").read_text(encoding="utf-8"))
    assert (
        written["extra"]["averages"]["all tasks"] == {"score": 100.0, "cells": 2, "of": 12}
        and written["task"] == "infinitebench"
    )
    assert "only the first 1 questions each" in capsys.readouterr().out
