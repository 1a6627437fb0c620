"""Published forms to one; what cannot be used is told with file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_ultralong.data import conversations
from megatron_ultralong.data.conversations import Conversation, Unusable
from megatron_ultralong.errors import UserError
from tests.chat import write_jsonl

QA = [("user", "q"), ("assistant", "a")]


def one(tmp_path: Path, record: object, **settings) -> Conversation | Unusable:
    (found,) = conversations.read(write_jsonl(tmp_path / "a.jsonl", [record]), source="s", **settings)
    return found


def turns(found: Conversation | Unusable) -> list[tuple[str, str]]:
    assert isinstance(found, Conversation), found
    return [(message.role, message.content) for message in found.messages]


@pytest.mark.parametrize(
    "record, want",
    [
        # Columns as the sets publish them.
        (
            {"id": "x_0", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            QA,
        ),  # ShareGPT
        (
            {
                "conversations": [
                    {"from": "system", "value": "s", "weight": None},
                    {"from": "human", "value": "q", "weight": 0},
                    {"from": "gpt", "value": "a", "weight": 1},
                ]
            },
            [("system", "s"), *QA],
        ),  # SlimOrca
        (
            {
                "idx": "1",
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                    {"from": "human", "value": "r"},
                    {"from": "gpt", "value": "b"},
                ],
            },
            [*QA, ("user", "r"), ("assistant", "b")],
        ),  # Evol-Instruct V2
        ({"conversations": [{"from": "user", "value": "q"}, {"from": "chatgpt", "value": "a"}]}, QA),
        ({"instruction": "q", "input": "", "output": "a"}, QA),  # Alpaca-GPT4
        ({"instruction": "q", "input": "more", "output": "a"}, [("user", "q\n\nmore"), ("assistant", "a")]),
        (
            {"instruction": "q", "input": "more", "response": "a"},
            [("user", "q\n\nmore"), ("assistant", "a")],
        ),  # GPTeacher
        ({"system": "s", "instruction": "q", "output": "a"}, [("system", "s"), *QA]),
        (
            {"task": "t", "dataset": "d", "instruction": "q", "response": "a", "id": "1", "parent_id": "0"},
            QA,
        ),  # UltraInteract
        ({"question": "q", "answer": "a"}, QA),  # OrcaMathWordProblems, GlaiveCodeAssistant
        ({"source": "data/CoT/x.json", "instruction": "q", "output": "a"}, QA),  # MathInstruct
        ({"type": "GSM_Rephrased", "query": "q", "original_question": "o", "response": "a"}, QA),  # MetaMath
        (
            {"lang": "python", "index": 1, "seed": "x", "problem": "q", "solution": "a"},
            QA,
        ),  # Magicoder OSS-Instruct
        ({"system_prompt": "s", "question": "q", "response": "a"}, [("system", "s"), *QA]),
        ({"prompt": "q", "response": "a"}, QA),
        ({"prompt": "q", "completion": "a"}, QA),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, QA),
        (
            {
                "system": "s",
                "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            },
            [("system", "s"), *QA],
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": " "},
                    {"role": "user", "content": [{"type": "text", "text": "q"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "a"}, "b"]},
                ]
            },
            [("user", "q"), ("assistant", "ab")],
        ),
    ],
)
def test_forms(tmp_path, record, want):
    assert turns(one(tmp_path, record)) == want


def test_a_named_form_looks_nowhere_else(tmp_path):
    record = {
        "messages": [{"role": "user", "content": "m"}, {"role": "assistant", "content": "n"}],
        "instruction": "i",
        "output": "o",
        "ask": "q",
        "reply": "a",
    }
    assert (
        turns(one(tmp_path, record))[0][1] == "m"
        and turns(one(tmp_path, record, form="messages"))[0][1] == "m"
    )
    assert turns(one(tmp_path, record, form="alpaca"))[0][1] == "i"
    assert turns(one(tmp_path, record, form="ask/reply")) == QA
    assert one(tmp_path, {"question": "q", "answer": "a"}, form="sharegpt").reason.startswith(
        "no list of turns under conversations"
    )
    assert (
        "no known columns for form ask/reply among question, answer"
        in one(tmp_path, {"question": "q", "answer": "a"}, form="ask/reply").reason
    )
    with pytest.raises(UserError, match="form alpaka: must be auto, sharegpt"):
        one(tmp_path, record, form="alpaka")


def said(*roles: str) -> dict:
    return {"messages": [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]}


@pytest.mark.parametrize(
    "record, kept, cut",
    [
        (said("user", "assistant", "user"), [0, 1], 1),
        (said("assistant", "user", "assistant"), [1, 2], 1),
        (said("system", "assistant", "assistant", "user", "assistant", "user", "user"), [0, 3, 4], 4),
        (said("system", "user", "assistant"), [0, 1, 2], 0),
    ],
)
def test_what_stands_outside_questions_and_answers_is_cut_and_counted(tmp_path, record, kept, cut):
    found = one(tmp_path, record)
    assert (
        turns(found) == [(record["messages"][i]["role"], record["messages"][i]["content"]) for i in kept]
        and found.turns_cut == cut
    )


@pytest.mark.parametrize(
    "record, kind, reason",
    [
        ("{not json", "broken", "not JSON"),
        ("[1, 2]", "broken", "contains a list, not an object with columns"),
        ({"text": "t"}, "broken", "no known columns among text"),
        (said("user"), "broken", "no question with an answer after it"),
        (said("assistant", "user"), "broken", "no question with an answer after it"),
        ({"messages": []}, "broken", "no question with an answer"),
        (said("user", "user", "assistant"), "broken", "two turns of the user in a row"),
        (said("user", "assistant", "assistant"), "broken", "two turns of the assistant in a row"),
        (
            said("user", "assistant", "system", "user", "assistant"),
            "broken",
            "a system message in the middle",
        ),
        (said("user", "narrator"), "broken", "unknown role 'narrator'"),
        ({"messages": [{"content": "q"}]}, "broken", "unknown role None"),
        ({"messages": ["q", "a"]}, "broken", "a turn is a str"),
        ({"question": "q", "answer": " \n"}, "broken", "turn 2 (assistant) is empty"),
        ({"question": None, "answer": "a"}, "broken", "turn 1 (user) is empty"),
        ({"question": "q", "answer": 4}, "broken", "answer contains a int, not text"),
        ('{"question": "q", "answer": "\\ud800"}', "broken", "a lone surrogate"),
        (said("user", "tool", "assistant"), "unsupported", "uses tools (tool)"),
        (
            {
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": None, "tool_calls": [{"function": {}}]},
                ]
            },
            "unsupported",
            "uses tools (assistant)",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image"}]},
                    {"role": "assistant", "content": "a"},
                ]
            },
            "unsupported",
            "user contains parts that are not text",
        ),
    ],
)
def test_what_cannot_be_used_is_told_with_its_line(tmp_path, record, kind, reason):
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}, "", record, {"question": "r", "answer": "b"}]
    )
    first, bad, last = conversations.read(path, source="s")
    assert (
        isinstance(bad, Unusable)
        and bad.place == f"{path}, line 3"
        and bad.kind == kind
        and reason in bad.reason
    )
    assert turns(first) == QA and last.messages[0].content == "r" and last.place == f"{path}, line 4"


def test_kinds_of_files(tmp_path):
    records = [
        {
            "id": i,
            "domain": d,
            "messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "ä"}],
        }
        for i, d in enumerate(["math", "poems", "code"])
    ]
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()
    (tmp_path / "in").mkdir()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "d.json").write_text(json.dumps(records))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "in" / "e.parquet")
    (tmp_path / "in" / "notes.md").write_text("not data")
    paths = conversations.files([str(tmp_path / "*.js*"), str(tmp_path / "in"), str(tmp_path / "d.json")])
    assert [path.name for path in paths] == ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.json", "e.parquet"]
    for path, word in zip(paths, ("line", "line", "line", "item", "row")):
        read: list[int] = []
        found = list(conversations.read(path, source="s", progress=read.append))
        assert [turns(c) for c in found] == [[("user", f"q{i}"), ("assistant", "ä")] for i in range(3)]
        assert [(c.id, c.domain, c.source) for c in found] == [
            ("0", "math", "s"),
            ("1", "general", "s"),
            ("2", "code", "s"),
        ]
        assert found[2].place == f"{path}, {word} 3" and sum(read) == path.stat().st_size
    assert {c.domain for c in conversations.read(paths[0], source="s", domain="general")} == {"general"}


def test_files_that_cannot_be_read_are_one_line(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").write_text("[")
    (tmp_path / "c.parquet").write_text("no")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"question": "q", "answer": "a"}\n' * 999)[:40])
    (tmp_path / "e.jsonl.zst").write_bytes(
        zstandard.compress(b'{"question": "q", "answer": "a"}\n' * 999)[:30]
    )
    for name, message in (
        ("a.json", "expected a list of records"),
        ("b.json", "not JSON"),
        ("c.parquet", "cannot be read as parquet"),
        ("d.jsonl.gz", "cannot be read"),
        ("e.jsonl.zst", "cannot be read"),
    ):
        with pytest.raises(UserError, match=f"{name}: {message}") as error:
            list(conversations.read(tmp_path / name, source="s"))
        assert "\n" not in str(error.value)
    for text, message in (
        (f"{tmp_path}/x*.jsonl", "no file of a known kind"),
        (f"{tmp_path}/none.jsonl", "No such file"),
        (__file__, "unknown kind of file"),
    ):
        with pytest.raises(UserError, match=message):
            conversations.files([text])


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"train_on_turn": False}])
def test_answers_that_are_context_only(tmp_path, mark):
    def record(first, second):
        contents = (("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
        marks = ({"weight": 1, "train": True}, first, mark, second)  # a question's own means nothing
        return {
            "messages": [
                {"role": role, "content": text, **m} for (role, text), m in zip(contents, marks, strict=True)
            ]
        }

    file = write_jsonl(tmp_path / "a.jsonl", [record(mark, {}), record({}, mark), record({"weight": None}, {}), record(mark, mark)])  # fmt: skip
    *read, none = conversations.read(file, source="s")
    trained = [[m.trained for m in one.messages if m.role == "assistant"] for one in read]
    assert trained == [[False, True], [True, False], [True, True]]
    assert none.kind == "unsupported" and none.reason == "none of its answers is to be trained on"
    # What refine writes is read back alike.
    again = conversations.as_messages(record(mark, {}), "auto", "name")
    assert conversations.turns(again, "auto") == conversations.turns(record(mark, {}), "auto")


@pytest.mark.parametrize(
    ("mark", "reason"),
    [
        ({"weight": 0.5}, "weight=0.5 of a turn must be 0 or 1"),
        ({"train": "no"}, "train='no' of a turn must be 0 or 1"),
        ({"weight": 1, "train": False}, "the marks of a turn contradict each other (weight, train)"),
    ],
)
def test_marks_that_say_neither(mark, reason):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **mark}]
    with pytest.raises(conversations.Refused) as caught:
        conversations.turns({"messages": turns}, "auto")
    assert str(caught.value) == reason
