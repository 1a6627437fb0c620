"""LV-Eval: prompts, cutting, stages that go on after a kill, averages, and the command."""

from __future__ import annotations

import contextlib
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.pipeline import command, stages
from megatron_ultralong.evaluate.pipeline.results import BenchmarkResult
from megatron_ultralong.evaluate.prompts import official, truncate
from megatron_ultralong.evaluate.scorers.lveval import score
from megatron_ultralong.evaluate.tasks import infinitebench, lveval
from megatron_ultralong.official_files.lveval import LEVELS, SETS
from tests import benchmark_files as made
from tests.answering import Answering, byte_tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "evaluate.py"


def right(prompt: str) -> str:
    return "Mira" if "Mira keeps" in prompt else "unknown"


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]]


def run(
    out: Path, data: Path, backend: Answering, choice: lveval.LVEvalSettings | None = None, **how
) -> BenchmarkResult:
    lveval.prepare(out, data, choice or lveval.LVEvalSettings())
    stages.predict(backend, out, "lveval", **how)
    return lveval.results(out)


# ---- scores and words --------------------------------------------------------------------------


def test_only_the_first_answer_counts_and_keywords_are_needed():
    assert score("loogle_SD_mixup", "the red barge", ["The red barge.", "x"], "red barge") == 1
    assert score("loogle_SD_mixup", "x", ["The red barge.", "x"], "red barge") == 0
    assert score("loogle_SD_mixup", "the red barge", ["red barge"], "blue boat green mast dark sail") == 0
    assert score(
        "loogle_SD_mixup", "red barge mast", ["red barge"], "blue boat green mast sail"
    ) == pytest.approx(0.8)  # 1 of 5 is enough
    assert (
        score("loogle_SD_mixup", "red barge mast", ["red barge"], "blue boat green mast dark sail") == 0
    )  # 1 of 6 is not
    assert (
        score("loogle_SD_mixup", "what is this about", ["what is this about"], "what is this about") == 0
    )  # words that say nothing
    assert score("factrecall_en", "red barge", ["red barge"], "blue boat") == 1
    assert (
        score("cmrc_mixup", "绿灯", ["港口大门上挂着一盏绿灯"], None)
        == 0
        < score("factrecall_zh", "绿灯", ["港口大门上挂着一盏绿灯"], None)
    )
    assert (
        score("hotpotwikiqa_mixup", "x", [])
        == score("dureader_mixup", "", ["绿灯"])
        == score("cmrc_mixup", "。", ["。"])
        == 0
    )
    assert (
        score("hotpotwikiqa_mixup", "red barge", ["red barge"], "the , !") == 1
    )  # keywords without a word ask for nothing


def test_own_words_cover_every_set_and_tokens_are_the_official_ones():
    assert set(lveval.OWN) == set(SETS)
    for template in lveval.OWN.values():
        assert sorted(re.findall(r"\{(\w*)\}", template)) == ["context", "input"] and template.endswith(
            ("Answer:", "回答：")
        )
    assert {name: lveval.answer_tokens(name) for name in SETS if lveval.answer_tokens(name) != 64} == {
        "factrecall_en": 16,
        "factrecall_zh": 16,
    }


def checkout(folder: Path, text: str | None = None) -> Path:
    folder.mkdir()
    text = text or "X {context}" + " Y {input}"
    values = ", ".join(f'{name!r}: "{text}"  \n' for name in SETS)
    (folder / "config.py").write_text(
        f"from metrics import nothing\nraise SystemExit('this must never run')\nDATASET_PROMPT = {{{values}}}\n"
    )
    return folder


def test_official_words_are_read_and_never_run(tmp_path):
    choice = lveval.LVEvalSettings(official=checkout(tmp_path / "a"))
    lveval.prepare(tmp_path, made.lveval(tmp_path / "data"), choice)
    first = read(tmp_path / "lveval.prompts.jsonl")[1]
    assert first["text"] == "X Mira keeps the light. Y Who keeps the light?"
    for text, message in (
        ("only {context}", "is not a template with {context}, {input}"),
        ("{context} {input} {other}", "is not a template with"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            lveval.prepare(
                tmp_path,
                tmp_path / "data",
                lveval.LVEvalSettings(official=checkout(tmp_path / text.strip("{} "), text)),
            )
    with pytest.raises(UserError, match="config.py cannot be parsed as Python"):
        lveval.prepare(tmp_path, tmp_path / "data", lveval.LVEvalSettings(official=tmp_path))
    with pytest.raises(UserError, match="assigns no DATASET_PROMPTS"):
        official.read(tmp_path / "a" / "config.py", "DATASET_PROMPTS", {})


def test_fields_are_filled_once():
    assert official.fill("{a}{b}", {"a": "{b}{c}", "b": "{}"}) == "{b}{c}{}"


# ---- fitting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("limit", [60, 61, 200, 1000, None])
@pytest.mark.parametrize(
    "text", ["begin " + "é" * 300 + " end. Open the", "字" * 120 + "。问题\n答案：", "short one."]
)
def test_prompt_and_answer_are_never_over_the_limit(chat, limit, text):
    tokenizer, start = byte_tokenizer(chat), infinitebench.answer_start(text)
    prompt = truncate.PromptTruncator(tokenizer, chat="auto", max_length=limit).prompt("x", text, 16, start)
    whole = truncate.PromptTruncator(tokenizer, chat="auto", max_length=None).prompt("x", text, 16, start)
    assert whole.cut == 0 and len(prompt.request.ids) + prompt.cut == len(whole.request.ids)
    if limit is not None:
        assert len(prompt.request.ids) + 16 <= limit
        assert not prompt.cut or len(prompt.request.ids) + 16 >= limit - 1, "no more is cut than has to be"
    if not prompt.cut:
        assert (
            prompt.request.text
            + (" " if "Open" in text and chat else "\n" if "答案" in text and chat else "")
            + prompt.request.prefix
            == text
        )
        assert tokenizer.decode(prompt.request.ids) == (
            "<|begin|><|user|>" + prompt.request.text + "<|end|><|assistant|>" + prompt.request.prefix
            if chat
            else text
        )
    else:  # both ends stay, and as much of each
        at = len(tokenizer.encode("<|begin|><|user|>")) if chat else 0
        assert (
            prompt.request.ids[: at + 6] == whole.request.ids[: at + 6]
            and prompt.request.ids[-12:] == whole.request.ids[-12:]
        )


def test_limits_that_leave_nothing(tmp_path):
    fitter = truncate.PromptTruncator(byte_tokenizer(), chat="no", max_length=65)
    with pytest.raises(
        UserError,
        match="--max-length 65: answers of lic_mixup may have 64 tokens, which leaves none for the prompt",
    ):
        fitter.check("lic_mixup", 64)
    with pytest.raises(UserError, match="--max-length 65: x needs 64 tokens without its text"):
        fitter.prompt("x", "abc", 64)
    with pytest.raises(UserError, match="--chat yes: this model's tokenizer has no chat template"):
        truncate.PromptTruncator(byte_tokenizer(), chat="yes", max_length=None)
    assert truncate.PromptTruncator(byte_tokenizer(), chat="no", max_length=67).prompt(
        "x", "abcde", 64
    ).request.ids == byte_tokenizer().encode("ae")


# ---- stages ------------------------------------------------------------------------------------


def test_right_wrong_and_rambling(tmp_path):
    data = made.lveval(tmp_path / "data")
    result = run(tmp_path, data, Answering(right))
    assert (
        result.settings["wording"] == "own"
        and result.model["path"] == "one"
        and result.settings["max_length"] is None
        and result.settings["chat"] is False
    )
    assert [(one.task, one.length, one.count, one.score, one.notes["cut"]) for one in result.scores] == [
        ("hotpotwikiqa_mixup", 16 * 1024, 2, 100, 0),
        ("hotpotwikiqa_mixup", 128 * 1024, 2, 100, 0),
        ("dureader_mixup", 256 * 1024, 1, pytest.approx(100), 0),
    ]
    assert (
        result.extra["averages"]["<128K"] == {"score": 100, "cells": 2, "of": 44}
        and result.extra["averages"]["<256K"]["cells"] == 3
    )
    table = lveval.table(result)
    assert (
        "average <128K: 100.00 over 2 of 44\n" in table
        and "average <256K: 100.00 over 3 of 55" in table
        and table.endswith("wording: own")
    )
    assert re.search(r"hotpotwikiqa_mixup +100.00 +100.00 +-", table)
    (tmp_path / "b").mkdir()
    (tmp_path / "c").mkdir()
    rambling = run(tmp_path / "b", data, Answering(lambda prompt: "Mira keeps it, " + "as they say, " * 9))
    assert 0 < rambling.extra["averages"]["<128K"]["score"] < 30
    assert len(read(tmp_path / "b" / "lveval.scores.jsonl")[0]["prediction"]) == 64, (
        "no more than the official tokens"
    )
    assert (
        run(tmp_path / "c", data, Answering(lambda prompt: "Mora does.")).extra["averages"]["<256K"]["score"]
        == 0
    )


def test_prompts_that_are_cut_are_counted_and_marked(tmp_path):
    backend = Answering(right, max_position=240)
    result = run(tmp_path, made.lveval(tmp_path / "data"), backend)
    assert [one.notes["cut"] for one in result.scores] == [2, 2, 1] and result.settings["max_length"] == 240
    assert all(239 <= size <= 240 for size in backend.sizes) and all(
        prompt.endswith(("Answer:", "回答：")) for prompt in backend.prompts
    )
    assert all(prompt.startswith(lveval.OWN["hotpotwikiqa_mixup"][:40]) for prompt in backend.prompts[1:])
    assert "* the middle of some prompts was cut, to 240 tokens including the answer" in lveval.table(result)


def test_refused_prompts_count_as_nothing_are_marked_and_asked_again(tmp_path, capsys):
    data = made.lveval(tmp_path / "data")
    result = run(tmp_path, data, Answering(right, refuses="And who else?"))
    assert "lveval: prompts are not cut, since the model's positions are not known" in capsys.readouterr().out
    assert [(one.count, one.score, one.notes["refused"]) for one in result.scores] == [
        (2, 50, 1),
        (2, 50, 1),
        (1, pytest.approx(100), 0),
    ]
    assert result.extra["refused"] == {"HTTP 400: 339 tokens are too many": 2}
    table = lveval.table(result)
    assert re.search(r"hotpotwikiqa_mixup +50.00! +50.00! ", table)
    assert (
        "! 2 prompts were refused by the endpoint and count as 0: HTTP 400: 339 tokens are too many (2); the same command requests them again"
        in table
    )
    for name in ("predictions", "scores"):
        rows = [row.get("refused", "") for row in read(tmp_path / f"lveval.{name}.jsonl")]
        assert [bool(re.fullmatch(r"HTTP 400: \d+ tokens are too many", row)) for row in rows] == [
            False,
            False,
            True,
            False,
            True,
        ]
    again = Answering(right)
    stages.predict(again, tmp_path, "lveval", max_length=None)
    assert len(again.prompts) == 2 and all("And who else?" in prompt for prompt in again.prompts)
    result = lveval.results(tmp_path)
    assert [one.notes["refused"] for one in result.scores] == [0, 0, 0]
    assert result.extra["averages"]["<128K"]["score"] == 100
    assert "refused" not in lveval.table(result)
    stages.predict(Answering(right, dies_after=0), tmp_path, "lveval")  # now it is finished


def test_broken_files_are_one_line(tmp_path):
    run(tmp_path, made.lveval(tmp_path / "data"), Answering(right))
    path = tmp_path / "lveval.predictions.jsonl"
    whole = path.read_text()
    first, second, *rest = whole.splitlines(keepends=True)
    row = json.loads(second)
    del row["cut"]
    for text, message in (
        (
            whole[:-9],
            r"lveval.predictions.jsonl cannot be read \(.*\); remove it and run --stage predict again",
        ),
        (
            "".join([first, json.dumps(row) + "\n", *rest]),
            "line 2 lacks id, prediction, prompt_tokens, cut",
        ),
        ("".join([first, "3\n", *rest]), "line 2 lacks"),
        ("".join(['{"of": null}\n', second, *rest]), "is of another version; run --stage predict first"),
        (
            json.dumps({"of": json.loads(first)["of"]}) + "\n" + second,
            "is of another version; run --stage predict first",
        ),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message) as error:
            lveval.results(tmp_path)
        assert "\n" not in str(error.value)
    stages.predict(Answering(right, dies_after=0), tmp_path, "lveval")  # made again, of the journal
    assert path.read_text() == whole


def test_half_a_surrogate_pair_in_the_data(tmp_path):
    data = made.lveval(tmp_path / "data")
    for path in data.glob("*_16k.jsonl"):
        path.write_text(
            path.read_text()
            .replace("keeps the light.", "keeps the light \\ud83d.")
            .replace('"She"', '"\\ud83d"')
        )
    backend = Answering(right)
    assert run(tmp_path, data, backend).extra["averages"]["<128K"]["score"] == 100
    assert sum("the light \ufffd." in prompt for prompt in backend.prompts) == 2
    assert read(tmp_path / "lveval.answers.jsonl")[3]["answers"] == ["Mira", "\ud83d"]


def test_a_stopped_run_asks_nothing_twice(tmp_path):
    data = made.lveval(tmp_path / "data")
    lveval.prepare(tmp_path, data, lveval.LVEvalSettings())
    dying = Answering(right, dies_after=2)
    with pytest.raises(KeyboardInterrupt):
        stages.predict(dying, tmp_path, "lveval", batch=1)
    assert len(dying.prompts) == 2 and not (tmp_path / "lveval.predictions.jsonl").exists()
    with pytest.raises(
        UserError,
        match=r"lveval.predictions.jsonl is missing, or is of another version; run --stage predict first",
    ):
        lveval.results(tmp_path)
    journal = tmp_path / "lveval.journal.jsonl"
    journal.write_text(journal.read_text() + '{"key": "half a li')
    counted: list[int] = []
    again = Answering(right)
    stages.predict(again, tmp_path, "lveval", progress=counted.append)
    keys = [json.loads(line)["key"] for line in journal.read_text().splitlines()[1:]]
    assert len(again.prompts) == 3 and sum(counted) == 5 and len(set(keys)) == len(keys) == 5
    assert lveval.results(tmp_path).extra["averages"]["<256K"]["score"] == pytest.approx(100)
    stages.predict(Answering(right, dies_after=0), tmp_path, "lveval")  # all there: nothing is asked
    with pytest.raises(UserError, match='was written with model.path "one", not "two"'):
        stages.predict(Answering(right, name="two"), tmp_path, "lveval")
    with pytest.raises(UserError, match=r"contains an answer to another prompt"):
        stages.predict(Answering(right), tmp_path, "lveval", max_length=200)


def test_preparing_again(tmp_path):
    data = made.lveval(tmp_path / "data")
    assert lveval.prepare(tmp_path, data, lveval.LVEvalSettings()) == 5 == stages.count(tmp_path, "lveval")
    prompts = tmp_path / "lveval.prompts.jsonl"
    before = prompts.stat().st_mtime_ns
    assert (
        lveval.prepare(tmp_path, data, lveval.LVEvalSettings()) == 5 and prompts.stat().st_mtime_ns == before
    ), "made from the same: kept"
    stages.predict(Answering(right), tmp_path, "lveval")
    choice = lveval.LVEvalSettings(sets=("hotpotwikiqa_mixup",), levels=("16k",), limit=1)
    assert lveval.prepare(tmp_path, data, choice) == 1 and prompts.stat().st_mtime_ns != before
    with pytest.raises(
        UserError, match="the predictions do not belong to the questions that were prepared last"
    ):
        lveval.results(tmp_path)
    stages.predict(Answering(right, dies_after=0), tmp_path, "lveval")  # its answer is in the journal
    result = lveval.results(tmp_path)
    assert [one.count for one in result.scores] == [1] and "only the first 1 questions each" in lveval.table(
        result
    )
    assert not list(tmp_path.glob(".lveval*")), "nothing half-written stays"


def test_zipped_files_give_the_same_prompts(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        lveval.prepare(
            tmp_path / name,
            made.lveval(tmp_path / f"data_{name}", zipped=name == "b"),
            lveval.LVEvalSettings(),
        )
    assert read(tmp_path / "a" / "lveval.prompts.jsonl") == read(tmp_path / "b" / "lveval.prompts.jsonl")


def test_what_is_asked_for_has_to_be_there(tmp_path):
    data = made.lveval(tmp_path / "data")
    with pytest.raises(UserError, match="--sets cmrc: unknown; choose from hotpotwikiqa_mixup"):
        lveval.LVEvalSettings(sets=("cmrc",))
    with pytest.raises(UserError, match="--lengths 8k: unknown; choose from 16k, 32k"):
        lveval.LVEvalSettings(levels=("8k",))
    assert (
        command.parse_names("16k, ,32k,", LEVELS) == ("16k", "32k")
        and command.parse_names(None, LEVELS) == LEVELS
    )
    with pytest.raises(UserError, match="--sets: give at least one of hotpotwikiqa_mixup"):
        lveval.LVEvalSettings(sets=command.parse_names(",", SETS))
    with pytest.raises(UserError, match="--samples must be at least 1"):
        lveval.LVEvalSettings(limit=0)
    with pytest.raises(
        UserError, match="--data contains no hotpotwikiqa_mixup_32k; download it, or leave it out"
    ):
        lveval.prepare(
            tmp_path, data, lveval.LVEvalSettings(sets=("hotpotwikiqa_mixup",), levels=("16k", "32k"))
        )
    assert not list(tmp_path.glob("*lveval.*")), "nothing half-written stays"
    made.lveval(data / "again")
    with pytest.raises(UserError, match="--data: two files contain dureader_mixup/256k/0"):
        lveval.prepare(tmp_path, data, lveval.LVEvalSettings())
    with pytest.raises(UserError, match="run --stage prepare first"):
        stages.predict(Answering(right), tmp_path, "lveval")


def test_the_command(tmp_path, monkeypatch, capsys):
    backend = Answering(right)
    main = runpy.run_path(str(TOOL))
    monkeypatch.setattr(
        "megatron_ultralong.evaluate.backends.options.open_backend",
        lambda args: contextlib.nullcontext(backend),
    )

    def call(*args: str) -> None:
        monkeypatch.setattr(
            sys, "argv", ["evaluate.py", "lveval", "--model", "m", "--output", str(tmp_path / "out"), *args]
        )
        main["main"]()

    data = str(made.lveval(tmp_path / "data"))
    with pytest.raises(UserError, match="--data DIR is needed"):
        call()
    call("--stage", "prepare", "--data", data, "--sets", "hotpotwikiqa_mixup", "--lengths", "16K, 128k")
    assert not backend.prompts
    call("--stage", "predict", "--max-length", "1K")
    call("--stage", "score")
    written = json.loads((tmp_path / "out" / "lveval.json").read_text(encoding="utf-8"))
    assert (
        written["format"] == 2
        and written["extra"]["averages"]["<128K"]["score"] == 100
        and written["settings"]["max_length"] == 1024
    )
    assert "average <128K: 100.00 over 2 of 44" in capsys.readouterr().out and len(LEVELS) == 5
    call("--data", data, "--sets", "hotpotwikiqa_mixup", "--lengths", "16k,128k", "--max-length", "1K")
    assert len(backend.prompts) == 4, "all was there"
