"""RULER's prompts (size, needles, structure), files, restarts and scores, with small tokenizers and models
that are plain functions."""

from __future__ import annotations

import hashlib
import json
import random
import re
import runpy
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import PreTrainedTokenizerFast

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends.protocol import Completion, GenerationRequest
from megatron_ultralong.evaluate.pipeline.results import TaskScore
from megatron_ultralong.evaluate.prompts.encode import ChatMode, PromptEncoder
from megatron_ultralong.evaluate.tasks.ruler import filler_text, qa_files, wording
from megatron_ultralong.evaluate.tasks.ruler import run as ruler
from megatron_ultralong.evaluate.tasks.ruler.averages import averages
from megatron_ultralong.evaluate.tasks.ruler.fill_length import FillerText, PromptDraft, fit
from megatron_ultralong.evaluate.tasks.ruler.material import PromptMaterial
from megatron_ultralong.evaluate.tasks.ruler.sample import make_sample
from megatron_ultralong.evaluate.tasks.ruler.settings import RulerSettings
from megatron_ultralong.evaluate.tasks.ruler.tasks import TASKS
from megatron_ultralong.io import jsonl
from tests import text

CHAT = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
FAMILIES = ("llama3", "unigram")
WORDING = wording.OWN
OFFICIAL_SHA256 = "61c6652ae7d783040657cb7b17a21284736b369444f43853144c820a0db8452a"


def squad() -> dict:
    def paragraph(a: int, p: int) -> dict:
        return {
            "context": f"Town {a}.{p} was built in {1000 + 10 * a + p}"
            + " of stone and wood" * (p + 1)
            + ".",
            "qas": [
                {
                    "id": f"{a}{p}",
                    "question": f"When was town {a}.{p} built?",
                    "is_impossible": False,
                    "answers": [
                        {"text": str(1000 + 10 * a + p), "answer_start": 17},
                        {"text": f"in {1000 + 10 * a + p}", "answer_start": 14},
                    ],
                },
                {
                    "id": f"{a}{p}x",
                    "question": "Who sold it?",
                    "is_impossible": True,
                    "answers": [],
                    "plausible_answers": [],
                },
            ],
        }

    return {
        "version": "v2.0",
        "data": [
            {"title": f"Towns {a}", "paragraphs": [paragraph(a, p) for p in range(4)]} for a in range(9)
        ],
    }


def hotpotqa() -> list:
    return [
        {
            "_id": str(i),
            "question": f"Who painted picture {i}?",
            "answer": f"Painter {i}",
            "type": "bridge",
            "level": "hard",
            "supporting_facts": [[f"Picture {i}", 0]],
            "context": [
                [f"Picture {i}", [f"Picture {i} is by painter {i}.", " It hangs in a hall."]],
                *([f"Hall {j}", [f"Hall {j} is old."]] for j in range(i, i + 9)),
            ],
        }
        for i in range(12)
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("qa")
    (folder / "dev-v2.0.json").write_text(json.dumps(squad()))
    (folder / "hotpot.json").write_text(json.dumps(hotpotqa()))
    return {"squad": folder / "dev-v2.0.json", "hotpotqa": folder / "hotpot.json"}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {
        family: PreTrainedTokenizerFast(
            tokenizer_object=text.tokenizer(family), bos_token="<|begin|>", eos_token="<|end|>"
        )
        for family in FAMILIES
    }


def material_of(tokenizer, files, mode: ChatMode = "no", wording=WORDING, **change) -> PromptMaterial:
    tokenizer.chat_template = CHAT if mode == "yes" else None
    data = {
        "squad": qa_files.read_squad(files["squad"]),
        "hotpotqa": qa_files.read_hotpotqa(files["hotpotqa"]),
    }
    return PromptMaterial(PromptEncoder(tokenizer, mode), wording, qa_data=data, **change)


# ---- prompts -----------------------------------------------------------------------------------

# With these small tokenizers, of about two letters a token, cwe takes this much with no filler at all.
LEAST = dict.fromkeys(TASKS, 3000) | {"cwe": 10000}


def unit(material: PromptMaterial, name: str, row: dict) -> int:
    """Tokens that one more unit of filler could take, by the text itself and with some slack for how pieces
    join."""
    counts, body = material.encoder.counts, row["input"]
    if name == "cwe":
        words = (
            [f"{first}-{first}" for first in filler_text.SINGLE]
            if "-" in row["outputs"][0]
            else filler_text.SINGLE
        )
        return 3 * (max(counts([" " + word for word in words])) + counts([" 12345."])[0])
    if name == "fwe":
        return 3 * max(counts([" " + word for word in set(re.findall(r"\b[a-z]{6}\b", body))]))
    if name.startswith("qa"):
        documents = material.qa_data[TASKS[name].data].documents
        return max(
            counts([material.wording.document.format(i=1000, document=one) + "\n\n" for one in documents])
        )
    if TASKS[name].haystack == "essay":
        return max(counts([" " + piece for piece in material.essay.pieces(row["meta"]["units"] + 1)]))
    return max(counts(["\n" + line for line in body.split("\n")[1:-1]])) + 8


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", TASKS)
def test_prompts_are_of_the_wanted_size_and_hold_their_needles_once(name, family, tokenizers, files):
    rng = random.Random(f"{name}/{family}")
    for mode in ("no", "yes"):
        material = material_of(tokenizers[family], files, mode, seed=rng.randrange(100))
        length, index = rng.randint(LEAST[name], 2 * LEAST[name]), rng.randrange(12)
        row = make_sample(material, name, length, index)
        prompt = material.encoder.encode(row["input"], row["answer_prefix"])
        assert row["length"] == len(prompt) + TASKS[name].answer_tokens <= length
        assert length - row["length"] <= unit(material, name, row), "one more unit would have fitted"
        begins = tokenizers[family].convert_ids_to_tokens(prompt[:2])
        assert (begins[0] == "<|begin|>") is (mode == "yes"), "these tokenizers put none there themselves"
        check(name, row)
        again = make_sample(
            material_of(tokenizers[family], files, mode, seed=material.seed), name, length, index
        )
        assert again == row, "same seed, same data, whatever was made before"
        assert make_sample(material, name, length, (index + 1) % 12)["input"] != row["input"]


def check(name: str, row: dict) -> None:
    """The structure of a prompt of our own wording, read back from its text."""
    task, body, outputs, prefix = TASKS[name], row["input"], row["outputs"], row["answer_prefix"]
    assert row["index"] >= 0 and prefix.startswith(" ") and len(outputs) == len(set(outputs))
    if task.kind == "niah":
        values = task.queries * task.values
        assert len(outputs) == values and all(body.count(value) == 1 for value in outputs)
        needles = re.findall(r"Among the secret (\w+) of (\S+) there is (\S+)\.", body)
        belong: dict[str, list[str]] = {}
        for kind, key, value in needles:
            assert kind == task.value
            belong.setdefault(key, []).append(value)
        asked = re.split(r", and |, ", re.search(r"give for (.*)\?$", body)[1])  # type: ignore[index]
        assert len(asked) == task.queries and sorted(
            value for key in asked for value in belong[key]
        ) == sorted(outputs)
        assert all(len(belong[key]) == task.values for key in asked)
        assert len(belong) == task.keys if task.haystack != "needle" else len(needles) > 10
        pattern = (
            r"\d{7}"
            if task.value == "numbers"
            else r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
        )
        assert all(re.fullmatch(pattern, value) for value in outputs) and prefix.endswith(
            " is" if values == 1 else " are"
        )
        assert (WORDING.noise in body) is (task.haystack == "noise")
    elif name == "vt":
        assigned = re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", body, re.MULTILINE)
        example, chain = assigned[:5], assigned[5:]
        value = re.search(r"value (\d{5}),", body.rsplit("Question:", 1)[1])[1]  # type: ignore[index]
        assert [name for name, _ in chain] == outputs and [source for _, source in chain] == [
            value,
            *outputs[:-1],
        ]
        assert all(len(name) == 5 for name, _ in chain) and all(len(name) == 3 for name, _ in example)
        assert (
            " ".join(name for name, _ in example) + "\n\n" in body
            and value != example[0][1]
            and f"5 variables have the value {value}" in prefix
        )
    elif name == "cwe":
        example, listed = body.split("Question:")[:2]
        for part, often, seldom, words in (
            (example, 10, 3, 40),
            (listed.split("\n")[2], 30, 3, row["meta"]["units"] + 10),
        ):
            numbers = [int(number) for number in re.findall(r"(\d+)\. ", part)]
            counts = Counter(re.findall(r"\d+\. (\S+)", part))
            assert numbers == list(range(1, len(numbers) + 1)) and len(counts) == words
            assert Counter(counts.values()) == Counter({often: 10, seldom: words - 10})
        assert {word for word, count in counts.items() if count == 30} == set(outputs) and len(outputs) == 10
        assert not any(word in other for word in outputs for other in counts if word != other)
    elif name == "fwe":
        counts = Counter(re.search(r"most often\. (.*)\nQuestion", body)[1].split())  # type: ignore[index]
        n = row["meta"]["units"]
        assert [word for word, _ in counts.most_common(4)] == ["...", *outputs]
        assert [count for _, count in counts.most_common(4)] == [
            int(n * k**-2.0 / 1.6449340668482264) for k in (1, 2, 3, 4)
        ]
    else:
        documents = re.findall(r"^Document (\d+):\n(.*?)\n\n", body, re.MULTILINE | re.DOTALL)
        assert [int(number) for number, _ in documents] == list(range(1, row["meta"]["units"] + 1))
        key = re.search(r"(?:town|picture) ([\d.]+)", body.rsplit("Question:", 1)[1])[1]  # type: ignore[index]
        own = [
            document
            for _, document in documents
            if re.search(rf"(?:Town|Picture) {re.escape(key)} ", document)
        ]
        assert (
            len(own) in (row["meta"]["rounds"] - 1, row["meta"]["rounds"])
            and own
            and outputs[0].lower() in own[0].lower()
        )


def test_long_and_short_lists_of_cwe(tokenizers, files):
    """Below 4,096 tokens words come 6 times and once; where single words do not suffice, pairs fill the
    length all the same."""
    material = material_of(tokenizers["llama3"], files)
    body = make_sample(material, "cwe", 4095, 0)["input"].split("Question:")[1]
    assert set(Counter(re.findall(r"\d+\. (\S+)", body)).values()) == {6, 1}
    row = make_sample(material, "cwe", 40_000, 0)
    assert all("-" in word for word in row["outputs"]) and 40_000 - row["length"] < unit(material, "cwe", row)
    check("cwe", row)


def test_official_parameters():
    """scripts/synthetic.yaml and constants.py of NVIDIA/RULER, written down once more."""
    rows = {
        name: (t.haystack, t.key, t.value, t.keys, t.values, t.queries)
        for name, t in TASKS.items()
        if t.kind == "niah"
    }
    assert rows == {
        "niah_single_1": ("noise", "words", "numbers", 1, 1, 1),
        "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
        "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
        "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
        "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
        "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
        "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
        "niah_multiquery": ("essay", "words", "numbers", 4, 1, 4),
    }
    assert {name: task.answer_tokens for name, task in TASKS.items() if task.kind != "niah"} == {
        "vt": 30,
        "cwe": 120,
        "fwe": 50,
        "qa_1": 32,
        "qa_2": 32,
    }
    assert {task.answer_tokens for task in TASKS.values() if task.kind == "niah"} == {128} and len(
        TASKS
    ) == 13
    assert [name for name, task in TASKS.items() if task.match_part] == ["qa_1", "qa_2"]


def test_too_short_a_length_says_by_how_much(tokenizers, files):
    material = material_of(tokenizers["llama3"], files)
    with pytest.raises(UserError, match=r"--lengths 200: niah_single_1: (\d+) tokens too short") as error:
        make_sample(material, "niah_single_1", 200, 0)
    missing = int(re.search(r"(\d+) tokens too", str(error.value))[1])  # type: ignore[index]
    assert make_sample(material, "niah_single_1", 220 + missing, 0)["meta"]["units"] == 0, (
        "keys differ by some tokens"
    )


def test_words_are_many_and_distinct():
    assert not set(filler_text.ADJECTIVES) & set(filler_text.NOUNS)
    assert len(set(filler_text.SINGLE)) == len(filler_text.SINGLE) > 800
    step = 97
    assert len({filler_text.word(i) for i in range(0, filler_text.WORDS, step)}) == len(
        range(0, filler_text.WORDS, step)
    )
    assert (
        filler_text.word(0) == "able-acorn"
        and filler_text.word(filler_text.PAIRS) == "acorn-album"
        and filler_text.WORDS > 400_000
    )
    rng = random.Random(0)
    assert len({filler_text.sentence(rng) for _ in range(5000)}) > 4990


def test_haystack_files_are_read_in_order_and_again(tokenizers, files, tmp_path):
    (tmp_path / "a.txt").write_text("One comes\nfirst.  Two follows it!")
    (tmp_path / "b.txt").write_text("Three ends?")
    pieces = filler_text.read_haystack((tmp_path / "a.txt", tmp_path / "b.txt"))
    assert pieces == ["One comes first.", "Two follows it!", "Three ends?"]
    body = make_sample(material_of(tokenizers["llama3"], files, haystack=pieces), "niah_single_2", 2000, 0)[
        "input"
    ]
    without = re.sub(r" ?Among the secret .*? there is \d+\.", "", body)
    assert "One comes first. Two follows it! Three ends? One comes first. Two" in without
    (tmp_path / "essays.json").write_text(json.dumps({"text": 'One comes\nfirst. "Two" follows!'}))
    assert filler_text.read_haystack((tmp_path / "essays.json",)) == ["One comes first.", '"Two" follows!']
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "list.json").write_text("[1]")
    for path, words in (
        (tmp_path / "none.txt", "cannot be read"),
        (tmp_path / "empty.txt", "no text"),
        (tmp_path / "list.json", "read as text"),
    ):
        with pytest.raises(UserError, match=words):
            filler_text.read_haystack((path,))


def test_size_is_found_though_pieces_join_to_other_counts():
    """Whole texts that take other counts of tokens than their pieces say: less, more, and unevenly."""
    for factor in (0.4, 1.0, 1.7):
        filler = FillerText(
            lambda texts: [len(one) for one in texts], iter(f"{'x' * (i % 7)}" for i in range(10**6))
        )
        calls = []

        def count(body: str, factor: float = factor, calls: list = calls) -> int:
            calls.append(body)
            return 50 + int(factor * len(body) + len(body) % 3)

        found, size, n = fit(
            PromptDraft(
                render=lambda n, f=filler: "".join(" " + p for p in f.pieces(n)),
                estimate=filler.tokens,
                prefix="",
                outputs=[],
            ),
            20_000,
            count,
        )
        assert (
            size == count(found) <= 20_000 and 20_000 - size <= 8 * factor + 4 and len(filler.pieces(n)) == n
        )
        assert len(calls) <= 6, "whole texts are tokenised a few times only"


# ---- official wording, questions and answers ---------------------------------------------------


def checkout(folder: Path) -> Path:
    """What a checkout of NVIDIA/RULER has, with sentences of our own."""
    place = folder / "scripts" / "data" / "synthetic"
    place.mkdir(parents=True)
    names = {
        "niah": "Some {type_needle_v} are here. {context} What are all {type_needle_v} for {query}?",
        "variable_tracking": "V {context} {query}",
        "common_words_extraction": "C {context}",
        "freq_words_extraction": "F {context}",
        "qa": "Q {context} {query}",
    }
    tasks = {
        name: {"tokens_to_generate": 1, "template": template, "answer_prefix": " They are"}
        for name, template in names.items()
    }
    (place / "constants.py").write_text(f"raise SystemExit('is read, not run')\nTASKS = {tasks!r}\n")
    (place / "niah.py").write_text(
        'import nothing\nneedle = "One {type_needle_v} for {key}: {value}."\nif 1:\n    haystack = open("x")\n'
        'else:\n    haystack = "Noise here."\n'
    )
    (place / "qa.py").write_text('DOCUMENT_PROMPT = "Doc {i}\\n{document}"\n')
    return folder


def test_official_wording_is_read_from_a_checkout(tmp_path, tokenizers, files):
    words = wording.official(checkout(tmp_path / "RULER"))
    assert (
        words.name == "official" and words.noise == "Noise here." and words.document == "Doc {i}\n{document}"
    )
    assert (
        words.niah_one == "A {type_needle_v} is here. {context} What is {type_needle_v} for {query}?"
        and words.niah_one_prefix == " They is"
    )
    body = make_sample(material_of(tokenizers["llama3"], files, wording=words), "niah_single_1", 1000, 0)[
        "input"
    ]
    assert body.startswith("A number is here. Noise here.\n") and body.count("One numbers for ") == 1
    assert wording.official(tmp_path / "RULER" / "scripts" / "data" / "synthetic") == words
    with pytest.raises(UserError, match="give a checkout"):
        wording.official(tmp_path)
    (tmp_path / "RULER" / "scripts" / "data" / "synthetic" / "qa.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="assigns no DOCUMENT_PROMPT"):
        wording.official(tmp_path / "RULER")


def test_official_wording_of_the_installed_harness(tokenizers, files, monkeypatch, tmp_path):
    """NVIDIA's words, known here by their hash alone: none of them stands in this project."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    words = wording.choose(None, own=False)
    assert words == wording.installed() and re.fullmatch(
        r"official, as in lm-evaluation-harness [\d.]+", words.name
    )
    texts = {name: text for name, text in vars(words).items() if name != "name"}
    assert hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest() == OFFICIAL_SHA256
    assert all(
        re.findall(r"\{\w+\}", text) == re.findall(r"\{\w+\}", getattr(WORDING, name))
        for name, text in texts.items()
        if name != "qa_prefix"
    )
    for task in TASKS:
        row = make_sample(material_of(tokenizers["llama3"], files, wording=words), task, 3000, 0)
        assert "{" not in row["answer_prefix"] and row["answer_prefix"].startswith(" ")
        assert all(output.lower() in row["input"].lower() for output in row["outputs"][:1])
    assert wording.choose(None, own=True) == wording.OWN
    monkeypatch.setattr(wording.importlib.util, "find_spec", lambda name: None)
    assert wording.choose(None, own=False) == wording.OWN
    # Another version of it, which has them elsewhere.
    monkeypatch.setattr(
        wording.importlib.util,
        "find_spec",
        lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]),
    )
    (tmp_path / "tasks" / "ruler").mkdir(parents=True)
    assert wording.choose(None, own=False) == wording.OWN


def test_questions_and_documents_of_the_official_files(files, tmp_path):
    data = qa_files.read_squad(files["squad"])
    assert (
        len(data.questions) == 36 and len(data.documents) == 36 and data.documents == sorted(data.documents)
    )
    first = data.questions[0]
    assert (
        first.text == "When was town 0.0 built?"
        and first.answers == ("1000", "in 1000")
        and len(first.related) == 3
    )
    assert data.documents[first.documents[0]].startswith("Town 0.0 ") and all(
        data.documents[i].startswith("Town 0.") for i in first.related
    )
    order = qa_files.document_order(data, first, random.Random(0))
    assert (
        order[0] == first.documents[0]
        and set(order[1:4]) == set(first.related)
        and sorted(order) == list(range(36))
    )
    data = qa_files.read_hotpotqa(files["hotpotqa"])
    assert (
        len(data.questions) == 12
        and len(data.documents) == 12 + 20
        and len(data.questions[3].documents) == 10
    )
    assert (
        data.documents[data.questions[3].documents[0]]
        == "Picture 3\nPicture 3 is by painter 3. It hangs in a hall."
    )
    (tmp_path / "x.json").write_text('{"data": 3}')
    for read, path, words in (
        (qa_files.read_squad, files["hotpotqa"], "is not SQuAD"),
        (qa_files.read_hotpotqa, files["squad"], "is not Hotpot"),
        (qa_files.read_squad, tmp_path / "x.json", "is not SQuAD"),
        (qa_files.read_squad, tmp_path / "no", "cannot be read"),
    ):
        with pytest.raises(UserError, match=words):
            read(path)


# ---- stages ------------------------------------------------------------------------------------


class Oracle:
    """A backend that answers from what it is told, and remembers what it was asked."""

    def __init__(self, tokenizer, answers: list[str], stop_after: int = 10**9) -> None:
        self.tokenizer, self.answers, self.left, self.asked = tokenizer, answers, stop_after, []

    def generate(self, requests: list[GenerationRequest]) -> Iterator[tuple[int, Completion]]:
        for place, request in enumerate(requests):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            self.asked.append((list(request.ids or ()), request.max_tokens))
            yield (
                place,
                Completion(
                    text=self.answers[len(self.asked) - 1],
                    tokens_in=len(request.ids or ()),
                    tokens_out=1,
                    finish="stop",
                ),
            )

    max_position = 8192

    def check(self, length: int, batch: int) -> None:
        self.checked = (length, batch)

    def describe(self) -> dict:
        return {"path": "oracle", "lengths": (1, 2)}


def settings(tmp_path: Path, files: dict, **change) -> RulerSettings:
    return RulerSettings(
        **{
            "out": tmp_path / "out",
            "tasks": ("niah_single_1", "qa_1"),
            "lengths": (2000, 3000),
            "samples": 3,
            "own_words": True,
            **files,
            **change,
        }
    )


def test_stages_go_on_where_they_were_stopped_and_refuse_other_settings(
    tokenizers, files, tmp_path, monkeypatch
):
    tokenizer = tokenizers["llama3"]
    tokenizer.chat_template = None
    mine, done = settings(tmp_path, files), []
    ruler.prepare(mine, tokenizer, done.append)
    place = tmp_path / "out" / "data" / "niah_single_1" / "2000.jsonl"
    whole = place.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert sum(done) == 12 and [row["index"] for row in rows] == [0, 1, 2]
    assert {"index", "input", "outputs", "length", "answer_prefix", "meta"} == set(rows[0]) and rows[0][
        "meta"
    ]["wording"] == "own"
    # Killed in the middle of the third line, before the file got its name.
    place.unlink()
    place.with_name("2000.jsonl.part").write_text(whole[: whole.rindex('{"index": 2') + 40])
    ruler.prepare(mine, tokenizer)
    assert place.read_text() == whole and sorted(path.name for path in place.parent.iterdir()) == [
        "2000.jsonl",
        "3000.jsonl",
    ]
    ruler.prepare(settings(tmp_path, files, samples=4), tokenizer)
    assert place.read_text().startswith(whole) and len(place.read_text().splitlines()) == 4
    for change in ({"seed": 1}, {"official": checkout(tmp_path / "R")}):
        with pytest.raises(UserError, match="was made with"):
            ruler.prepare(settings(tmp_path, files, **change), tokenizer)

    answers = [
        ", ".join(row["outputs"])
        for length in (2000, 3000)
        for task in ("niah_single_1", "qa_1")
        for row in list(jsonl.read(tmp_path / "out" / "data" / task / f"{length}.jsonl"))[:3]
    ]
    stopped = Oracle(tokenizer, answers, stop_after=5)
    with pytest.raises(KeyboardInterrupt):
        ruler.predict(mine, stopped)
    with pytest.raises(UserError, match="stopped before its end"):
        ruler.score(mine)
    rest = Oracle(tokenizer, [*answers[5:11], "nothing"])
    ruler.predict(mine, rest, progress=done.append)
    assert rest.checked == (3000, 5), "memory for the longest is asked for before the first prompt"
    assert len(rest.asked) == 7 and [tokens for _, tokens in stopped.asked] == [128] * 3 + [32] * 2
    encoder = PromptEncoder(tokenizer, "no")
    assert stopped.asked[1][0] == encoder.encode(rows[1]["input"], rows[1]["answer_prefix"])
    # All are there: no prompt is made into tokens again, and none asked.
    monkeypatch.setattr(PromptEncoder, "encode", None)
    again: list[int] = []
    ruler.predict(mine, Oracle(tokenizer, []), progress=again.append)
    assert sum(again) == 12
    monkeypatch.undo()
    result = ruler.score(mine)
    assert {(one.task, one.length): one.score for one in result.scores} == {
        ("niah_single_1", 2000): 100.0,
        ("qa_1", 2000): 100.0,
        ("niah_single_1", 3000): 100.0,
        ("qa_1", 3000): 66.67,
    }
    assert result.settings["prompts"]["niah_single_1"]["words"] == "own"
    assert result.settings["prompts"]["qa_1"] == {
        "seed": 0,
        "wording": "own",
        "tokenizer": f"{len(tokenizer)} tokens",
        "chat": False,
        "source": "dev-v2.0.json",
    }
    assert (
        result.settings["wording"] == "own"
        and result.model["path"] == "oracle"
        and result.extra["by_length"]["3000"]["average"] == 83.34
    )
    other = Oracle(tokenizer, answers)
    other.describe = lambda: {"path": "other"}  # type: ignore[method-assign]
    with pytest.raises(UserError, match='was written with model.path "oracle", not "other"'):
        ruler.predict(mine, other)
    assert ruler.score(mine) == result, "what was finished stays"
    assert ruler.score(settings(tmp_path, {})) == result, (
        "predictions of qa_1 are scored without its questions"
    )

    assert settings(tmp_path, {}, lengths=(2000, 3000, 4000)).runnable() == ("niah_single_1",), (
        "of qa_1 not every length is there"
    )
    # A table is of one model, and a task of one making.
    part, whole = (
        settings(tmp_path, files, tasks=("niah_single_1",), lengths=(3000,)),
        settings(tmp_path, files, tasks=("niah_single_1",)),
    )
    path = part.prediction_file("niah_single_1", 3000)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for change, message in (
        ({"model": {"path": "b"}}, r"answers of two models \(path .oracle. and .b.\)"),
        (
            {"made": {**rows[0]["made"], "seed": 9}},
            r"niah_single_1 prompts made in two ways \(seed 0 and 9\)",
        ),
        ({"pred": None}, "line 1: needs `pred`"),
        ({"outputs": "52"}, "line 1: needs"),
        ({"made": "x"}, "line 1: needs"),
    ):
        path.write_text("".join(json.dumps(row | change) + "\n" for row in rows))
        with pytest.raises(UserError, match=message):
            ruler.score(whole)
    path.write_text(
        "".join(json.dumps(row | {"refused": "HTTP 400: too long", "over": True}) + "\n" for row in rows)
    )
    result = ruler.score(whole)
    assert (
        result.scores[-1].notes["refused"] == 3
        and "of 6, 3 prompts were refused by the endpoint and count as 0: HTTP 400: too long (3); "
        in ruler.table(result)
    )
    assert (
        "3 of 6 prompts are longer" in ruler.table(result)
        and result.model["max_position"] == 8192
        and "*" not in ruler.table(result)
    )
    result.model["max_position"] = 2500
    assert "  3,000*" in ruler.table(result) and "* beyond the 2,500 positions" in ruler.table(result)


def test_a_file_of_prompts_has_one_writer_and_each_prompt_once(tokenizers, files, tmp_path):
    mine, place = (
        settings(tmp_path, files, tasks=("niah_single_1",), lengths=(2000,)),
        tmp_path / "out" / "data" / "niah_single_1" / "2000.jsonl",
    )
    with (
        pytest.raises(UserError, match="is being written by another run"),
        jsonl.ResumableFile(place, keep=()),
    ):
        ruler.prepare(mine, tokenizers["llama3"])
    ruler.prepare(mine, tokenizers["llama3"])
    good = place.read_text().splitlines(keepends=True)
    place.write_text("".join([good[0], good[0], good[1]]))
    with pytest.raises(UserError, match="line 2: is prompt 0, not 1; remove the file"):
        ruler.prepare(mine, tokenizers["llama3"])


def test_rulers_own_data_and_predictions_are_scored_as_they_are(tokenizers, tmp_path):
    tokenizer = tokenizers["llama3"]
    tokenizer.chat_template = CHAT
    place = tmp_path / "ruler" / "4096" / "data" / "vt" / "validation.jsonl"
    place.parent.mkdir(parents=True)
    # `index` is no number of the line; the second brings its own template.
    rows = [
        {
            "index": 731,
            "input": "the sky",
            "outputs": ["ABCDE", "FGHIJ"],
            "length": 9,
            "answer_prefix": " Answer: ",
        },
        {
            "index": 2,
            "input": "<|begin|>the cat",
            "outputs": ["KLMNO"],
            "length": 9,
            "answer_prefix": " Answer: ",
        },
    ]
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = RulerSettings(out=tmp_path / "out", tasks=("vt",), lengths=(4096,), data=tmp_path / "ruler")
    backend = Oracle(tokenizer, ["abcde", "none"])
    ruler.predict(mine, backend)
    texts = [tokenizer.decode(prompt) for prompt, _ in backend.asked]
    assert texts == ["<|begin|><|user|>the sky<|end|><|assistant|> Answer: ", "<|begin|>the cat Answer: "]
    result = ruler.score(mine)
    assert (
        result.scores
        == (
            TaskScore(
                task="vt", length=4096, score=25.0, count=2, notes={"empty": 0, "over": 0, "refused": 0}
            ),
        )
        and result.settings["wording"] == "as in the data"
    )
    official = mine.out / "predictions" / "vt" / "4096.jsonl"
    official.write_text(
        json.dumps(
            {
                "index": 731,
                "pred": "\x02ABCDE fghij ",
                "input": "x",
                "outputs": ["ABCDE", "FGHIJ"],
                "others": {},
            }
        )
        + "\n"
    )
    assert ruler.score(mine).scores[0].score == 100.0
    official.with_suffix(".journal.jsonl").unlink()
    kept = official.read_text()
    with pytest.raises(
        UserError,
        match="contains predictions of another model, or to other prompts; score them with --stage score",
    ):
        ruler.predict(mine, backend)
    assert official.read_text() == kept
    place.write_text('{"index": 0, "input": "x"}\n')
    with pytest.raises(UserError, match="without `input`"):
        ruler.predict(
            RulerSettings(out=tmp_path / "b", tasks=("vt",), lengths=(4096,), data=tmp_path / "ruler"),
            backend,
        )
    with pytest.raises(UserError, match="run --stage prepare first"):
        ruler.predict(RulerSettings(out=tmp_path / "b", tasks=("cwe",), lengths=(4096,)), backend)


def test_averages_up_to_a_bound_name_their_lengths_and_what_is_missing():
    lengths = [4096 * 2**i for i in range(9)]
    full = {task: {length: 100.0 - i for i, length in enumerate(lengths)} for task in TASKS}
    found = averages(full)
    assert {bound: value["average"] for bound, value in found["up_to"].items()} == {
        "128K": 97.5,
        "512K": 96.5,
        "1M": 96.0,
    }
    assert found["up_to"]["128K"]["lengths"] == lengths[:6] and all(
        value["complete"] for value in found["up_to"].values()
    )
    del full["qa_2"][4096]
    found = averages(full)
    assert (
        found["by_length"]["4096"] == {"average": 100.0, "tasks": 12, "complete": False}
        and not found["up_to"]["128K"]["complete"]
    )
    some = averages({"vt": {4096: 50.0, 131072: 10.0, 2097152: 0.0}})
    assert some["up_to"] == {"128K": {"average": 30.0, "lengths": [4096, 131072], "complete": False}}


# ---- the command -------------------------------------------------------------------------------


def test_under_torchrun_only_the_first_rank_does_what_asks_no_model(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        command(
            monkeypatch,
            "ruler",
            "--model",
            tmp_path,
            "--lengths",
            "1K",
            "--stage",
            "prepare",
            "--output",
            tmp_path / "out",
        )
    assert stop.value.code == 0 and not list((tmp_path / "out").iterdir())


def command(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    runpy.run_path(str(Path(__file__).parents[2] / "tools" / "evaluate.py"))["main"]()


def test_the_command(tmp_path, monkeypatch, capsys):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = text.save_tokenizer(tmp_path / "model")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=400,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=4096,
            eos_token_id=1,
            bos_token_id=0,
        )
    ).save_pretrained(model)
    good = [
        "ruler",
        "--model",
        model,
        "--tasks",
        "niah_single_1,fwe,qa_1",
        "--lengths",
        "1K",
        "--samples",
        "1",
        "--device",
        "cpu",
        "--output",
        tmp_path / "out",
    ]
    command(monkeypatch, *good)
    result, printed = json.loads((tmp_path / "out" / "ruler.json").read_text()), capsys.readouterr().out
    assert (
        {one["task"] for one in result["scores"]} == {"niah_single_1", "fwe"}
        and "qa_1 is left out: give --squad FILE" in printed
        and "mean of 2/13" in printed
    )
    for change, words in (
        (["--tasks", "vt,nothing"], "no such task"),
        (["--tasks", "qa_2"], "no task can be run"),
        (["--lengths", "1K,1K"], "only once"),
        (["--samples", "0"], "at least 1"),
        (["--official", tmp_path], "give a checkout"),
        (["--lengths", "100"], "too short"),
        (["--haystack", tmp_path / "no.txt"], "cannot be read"),
        (["--squad", tmp_path / "no.json"], "cannot be read"),
        (["--seed", "1"], "was made with seed"),
        (["--model", tmp_path / "nowhere"], "no such directory"),
        (["--stage", "score", "--tasks", "cwe"], "run --stage predict first"),
    ):
        with pytest.raises(UserError, match=words) as error:
            command(monkeypatch, *good, *change)
        assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").rglob("*.part"))
