"""Decontamination: every planted n-gram found and nothing else, against a search with plain sets; files
rewritten exactly; resume."""

from __future__ import annotations

import gzip
import json
import random
import signal
import sys
import time
import unicodedata
from itertools import pairwise
from pathlib import Path

import psutil
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_ultralong.data import conversations
from megatron_ultralong.data.decontaminate import benchmark_index
from megatron_ultralong.data.decontaminate.benchmark_index import NgramRules, build_index
from megatron_ultralong.data.decontaminate.filter_files import DocumentBatch
from megatron_ultralong.data.decontaminate.normalise import Normalisation, Vocabulary
from megatron_ultralong.data.decontaminate.report import SAMPLES, format_table
from megatron_ultralong.data.decontaminate.run import DecontaminationSettings, decontaminate
from megatron_ultralong.data.decontaminate.scan import BatchScanner, ContaminationPolicy
from megatron_ultralong.data.pretrain import sources
from megatron_ultralong.errors import UserError
from megatron_ultralong.official_files.records import BenchmarkExample
from tests import benchmark_files as made
from tests import processes

ROOT = Path(__file__).parents[2]
QUESTION = made.QUESTION  # 18 words
SOLUTION = "the guild of the harbour built the light at Skarn in the year of the great frost and long before the others"


def run(
    inputs,
    benchmarks,
    output,
    *,
    action="drop",
    margin=0,
    pieces="join",
    min_piece=0,
    normalise="words",
    text_key="text",
    form=None,
    workers=1,
    **rules,
):
    settings = DecontaminationSettings(
        rules=NgramRules(**rules),
        normalisation=Normalisation.parse(normalise),
        policy=ContaminationPolicy(action=action, margin=margin, pieces=pieces, min_piece=min_piece),
        text_key=text_key,
        form=form,
    )
    return decontaminate(
        [Path(path) for path in inputs],
        benchmarks,
        Path(output),
        settings,
        workers=workers,
        show_progress=False,
    )


def words_of(text: str) -> list[str]:
    """The rule for words, reimplemented character by character: letters, digits and their marks; Han
    characters one by one."""
    found, word = [], ""
    for character in unicodedata.normalize("NFKC", text).casefold() + " ":
        han = "CJK UNIFIED" in unicodedata.name(character, "")
        mark = unicodedata.category(character)[0] == "M"
        if (unicodedata.category(character)[0] in "LN" and not han) or (mark and word):
            word += character
        else:
            found += [word] if word else []
            word = ""
            found += [character] if han else []
    return found


def by_sets(texts: list[str], documents: list[str], ngram: int, least: int) -> list[bool]:
    """Whether each document has an n-gram of the texts, or a complete shorter text; with sets of tuples."""
    wanted: set[tuple[str, ...]] = set()
    for text in texts:
        words = words_of(text)
        size = min(ngram, len(words))
        if size >= least:
            wanted |= {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}
    found = []
    for document in documents:
        words = words_of(document)
        found.append(
            any(
                tuple(words[i : i + size]) in wanted
                for size in range(least, ngram + 1)
                for i in range(len(words) - size + 1)
            )
        )
    return found


REPORT = ContaminationPolicy(action="report")


def scan(examples, documents, policy=REPORT, **rules):
    """The result of a scanner for .jsonl lines with those texts, and its index."""
    index = build_index(examples, NgramRules(**rules), Normalisation())
    lines = [json.dumps({"text": document}).encode() + b"\n" for document in documents]
    return BatchScanner(index, policy, "text")(DocumentBatch("x.jsonl", ".jsonl", 1, lines)), index


def example(question, number=0, benchmark="text", answers=(), choices=(), context=""):
    return BenchmarkExample(
        benchmark=benchmark,
        task="t",
        split="test",
        id=str(number),
        question=question,
        answers=answers,
        choices=choices,
        context=context,
    )


# ---- words -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how, words",
    [
        ("words", ["don", "t", "find", "naïve", "灯", "塔", "x2", "café", "has", "close"]),
        ("exact", ["Don’t", "ﬁnd", "NAÏVE", "灯塔x²", "cafe\u0301,", "has_close"]),
        (
            "lower",
            ["don’t", "find", "naïve", "灯塔x²", "cafe\u0301,", "has_close"],
        ),  # casefold() opens the ligature
        ("cjk,nfkc", ["Don’t", "find", "NAÏVE", "灯", "塔", "x2", "café,", "has_close"]),
    ],
)
def test_words_by_every_rule(how, words):
    normalisation, text = Normalisation.parse(how), "Don’t ﬁnd  NAÏVE\n灯塔x² cafe\u0301, has_close"
    vocabulary = Vocabulary(normalisation, {}, learn=True)
    ids = vocabulary.encode(text)
    names = list(vocabulary.word_to_id)
    assert [names[i - 1] for i in ids] == words
    spans = normalisation.word_spans(text)
    assert len(spans) == len(words) and [normalisation.words(text[a:b]) for a, b in spans] == [
        [word] for word in words
    ]


def test_normalise_is_checked():
    with pytest.raises(
        UserError,
        match="unknown step 'upper'; use words or exact, or some of "
        "entities,invisible,hyphenation,nfkc,lower,punctuation,cjk",
    ):
        Normalisation.parse("lower,upper")


def test_words_and_their_places_agree_on_random_text():
    rng, normalisation = random.Random(1), Normalisation()
    for _ in range(3000):
        text = "".join(
            rng.choice(
                [
                    *"aBß ,-é\u0301\u0308漢ｶﾞ\u1112\u1161ﬁİไ\u0e31\u3000\x1c½¨²_\u200b\u00ad\u3164&;",
                    *("-\n", "\u2010\r\n", "&amp;", "&nbsp;", "&shy;", "&#39;", "&amp;lt;", "&#x301;", "aB"),
                ]
            )
            for _ in range(rng.randint(0, 20))
        )
        vocabulary = Vocabulary(normalisation, {"aba": 1, "aß": 2})
        joined_spans = vocabulary.word_spans(text)
        assert len(joined_spans) == len(vocabulary.encode(text))
        assert all(a <= c and b <= d for (a, b), (c, d) in pairwise(joined_spans)), "in order"
        text, _ = Vocabulary(normalisation, {}).join_hyphenated(text)
        words, spans = (
            [word for part in text.split() for word in normalisation.words(part)],
            normalisation.word_spans(text),
        )
        assert (
            len(words)
            == len(spans)
            == len(normalisation.words(text))
            == len(Vocabulary(normalisation, {}).encode(text))
        )
        assert all(a <= c and b <= d for (a, b), (c, d) in pairwise(spans)), "in order"


PLAIN = "Why doesn't the well-known example of R&D at the harbour of Skarn count as café co-operation?"


@pytest.mark.parametrize(
    "hidden",
    [
        PLAIN.replace("example", "exam\u00adple"),
        PLAIN.replace("example", "ex\u200ba\u200cm\u200dp\u2060l\ufeffe").replace("Why", "\ufeffWhy"),
        PLAIN.replace("example", "exa\ufe0fm\u202ap\u3164le"),
        PLAIN.replace("example", "exam-\nple"),
        PLAIN.replace("example", "exam\u2010 \r\n  ple").replace("harbour", "har\u00ad\nbour"),
        PLAIN.replace("well-known", "well-\nknown").replace("example", "exam-\nple"),
        PLAIN.replace("'", "&#39;").replace("&D", "&amp;D"),
        PLAIN.replace("'", "&amp;#x27;").replace(" ", "&nbsp;").replace("é", "&eacute;"),
        PLAIN.replace("example", "exam&shy;ple").replace("harbour", "har&#8203;bour"),
        PLAIN.replace("at", "ａｔ").replace("é", "e\u0301"),
    ],
)
def test_text_in_disguise_is_found_and_cut(hidden):
    """In both directions: hidden in a document, and in a benchmark."""
    found, _ = scan([example(PLAIN)], [f"Before it. {hidden} After it.", "Some ordinary text."], ngram=17)
    assert [match["words"] for match in found.matches] == [20] and found.matches[0]["line"] == 1
    cut = ContaminationPolicy(action="cut")
    edited, _ = scan([example(PLAIN)], [f"Before it. {hidden} After it."], cut, ngram=17)
    (item,) = edited.edits[0]
    assert json.loads(item)["text"].replace("\ufeff", "") == "Before it. ? After it."
    if "well-\nknown" not in hidden:  # see below
        assert len(scan([example(hidden)], [PLAIN], ngram=17)[0].matches) == 1


@pytest.mark.parametrize(
    "text",
    [
        "why doesn't the wellknown example of R&D at the harbour of Skarn count as café co-operation",
        PLAIN.replace("example", "exam ple"),
        PLAIN.replace("example", "exam- ple"),
        PLAIN.replace("example", "exam\n-\nple"),
        PLAIN.replace("example", "exam-\n\nple"),
        PLAIN.replace("R&D", "R&nbsp D"),
        PLAIN.replace("Skarn", "Skarn &frac12;"),
    ],
)
def test_ordinary_text_is_not_made_equal(text):
    assert not scan([example(PLAIN)], [text], ngram=17)[0].matches


def test_what_a_hyphen_at_the_end_of_a_line_joins():
    learned: dict[str, int] = {}
    Vocabulary(Normalisation(), learned, learn=True).encode("the exam-\nple of Jean-\nPaul, 3-\n5, x -\ny")
    assert list(learned) == ["the", "example", "of", "jean", "paul", "3", "5", "x", "y"]
    names = ["", *learned]
    of_document = Vocabulary(Normalisation(), learned)
    text = "the exam-\nple, x-\ny (of-\nthe) Jean-\n\nPaul ex-\nam"
    words = [names[i] for i in of_document.encode(text)]
    assert words == ["the", "example", "x", "y", "of", "the", "jean", "paul", "", ""]
    assert [text[a:b] for a, b in of_document.word_spans(text)][:3] == ["the", "exam-\nple", "x"]
    without = Vocabulary(Normalisation.parse("lower,punctuation"), learned)
    assert [names[i] for i in without.encode("exam-\nple")] == ["", ""]


# ---- the search --------------------------------------------------------------------------------


def test_every_plant_is_found_and_clean_text_is_not():
    rng = random.Random(2)
    words = [f"w{i}" for i in range(300)]
    texts = [" ".join(rng.choices(words, k=rng.randint(5, 40))) for _ in range(60)]
    disguise = [
        str,
        str.upper,
        lambda t: t.replace(" ", ", "),
        lambda t: t.replace(" ", "\n—"),
        lambda t: t.replace("w", "ｗ"),
        lambda t: f"“{t}”!",
    ]
    documents, planted = [], []
    for k in range(400):
        document = [rng.choice(words) for _ in range(rng.randint(0, 60))]
        source = texts[rng.randrange(60)].split()
        size = rng.choice((0, 7, 8, 12, 13, 20))
        plant = (
            source
            if size == 8 and len(source) < 13
            else source[rng.randrange(max(len(source) - size, 0) + 1) :][:size]
        )
        at = rng.randint(0, len(document))
        documents.append(" ".join([*document[:at], disguise[k % 6](" ".join(plant)), *document[at:]]))
        planted.append(len(plant) >= 13)
    outcome, _ = scan([example(text, i) for i, text in enumerate(texts)], documents, common=1000)
    found = [i + 1 in {match["line"] for match in outcome.matches} for i in range(400)]
    assert found == by_sets(texts, documents, 13, 8)
    assert 60 < sum(planted) <= sum(found) < 330 and all(f for f, p in zip(found, planted) if p)


def test_random_texts_of_few_words_against_sets():
    """So few words that n-grams collide, repeat and overlap all the time."""
    rng = random.Random(3)
    alphabet = ["a", "B", "c1", "é", "e\u0301", "灯", "灯塔", "ﬁ", "x-y", "—"]
    for n, least in ((2, 1), (3, 2), (4, 4), (5, 2)):
        for _ in range(30):
            texts = [" ".join(rng.choices(alphabet, k=rng.randint(0, 9))) for _ in range(4)]
            documents = [
                rng.choice([" ", ",", "\n "]).join(rng.choices(alphabet, k=rng.randint(0, 14)))
                for _ in range(12)
            ]
            outcome, index = scan(
                [example(text, i) for i, text in enumerate(texts)],
                documents,
                ngram=n,
                min_words=least,
                common=99,
            )
            assert [i + 1 in {m["line"] for m in outcome.matches} for i in range(12)] == by_sets(
                texts, documents, n, least
            )
            for match in outcome.matches:
                assert match["text"].split() and match["words"] >= min(
                    n, len(words_of(texts[int(match["example"])]))
                )


def test_long_texts_are_searched_across_strides_and_blocks():
    filler = " ".join(f"z{i % 4999}" for i in range(400_000))
    for at in (0, 32_760, 32_768, 200_001, 399_999):
        words = filler.split(" ")
        words[at:at] = QUESTION.split()
        outcome, _ = scan([example(QUESTION)], [" ".join(words)])
        assert [(match["words"], match["text"]) for match in outcome.matches] == [(18, QUESTION.lower())]


def test_same_hash_is_not_the_same_words(monkeypatch):
    """With all hashes equal, only the comparison word by word decides."""
    import numpy

    from megatron_ultralong.data.decontaminate import ngrams

    def same(hashes, sizes):
        return (
            (size, numpy.full(max(len(hashes) - size + 1, 0), 7, dtype=numpy.uint64))
            for size in sizes
            if size <= len(hashes)
        )

    monkeypatch.setattr(ngrams, "rolling_hashes", same)
    monkeypatch.setattr(benchmark_index, "rolling_hashes", same)
    index = build_index([example("a b c d")], NgramRules(ngram=4, min_words=4), Normalisation())
    encode = index.vocabulary().encode
    assert [match.start for match in index.search(encode("x a b c d a b c"))] == [1]
    assert not list(index.search(encode("d c b a a b c x d")))


def test_short_texts_match_completely_or_not_at_all():
    nine, seven = "one two three four five six seven eight nine", "one two three four five six seven"
    outcome, index = scan(
        [example(nine, 0), example(seven, 1), example("", 2)], [f"x {nine} y", f"x {nine[:-5]} y", seven]
    )
    assert [(match["line"], match["example"], match["words"]) for match in outcome.matches] == [(1, "0", 9)]
    counts = index.statistics["text"]
    assert (counts["examples"], counts["texts"], counts["unsearchable"], counts["ngrams"]) == (3, 1, 2, 1)
    assert counts["too_short"] == 4  # question, and question with answer, of two


def test_template_text_is_ignored_and_counted():
    template = "answer the following question in one short sentence and give nothing else at all please "
    examples = [example(f"{template} q{i} r{i} s{i}", i) for i in range(11)]
    documents = [template, f"{template} q3 r3 s3"]
    outcome, index = scan(examples, documents, common=10)
    assert [(match["line"], match["example"]) for match in outcome.matches] == [(2, "3")]
    assert index.statistics["text"]["common"] == 3  # its 15 words have 3 n-grams
    assert {match["line"] for match in scan(examples, documents, common=11)[0].matches} == {1, 2}
    same = [
        example(QUESTION, i) for i in range(50)
    ]  # the same text fifty times is not a template: it counts once
    assert [match["example"] for match in scan(same, [QUESTION], common=1)[0].matches] == ["0"]
    two = [example(QUESTION, 0, "gsm8k"), example(QUESTION, 1, "math")]  # and counts for each benchmark
    assert [match["benchmark"] for match in scan(two, [QUESTION], common=1)[0].matches] == ["gsm8k", "math"]


def test_choices_answers_and_contexts():
    asked = example(
        " ".join(QUESTION.split()[:9]), answers=("C",), choices=tuple(made.CHOICES), context=SOLUTION
    )
    start = asked.question
    lettered = f"{start} A. {made.CHOICES[0]} B. {made.CHOICES[1]} C. {made.CHOICES[2]}"
    documents = [
        " ".join([start, *made.CHOICES]),
        lettered,
        SOLUTION,
        start + " first",
        " ".join(start.split()[:8]),
    ]
    found = {match["line"] for match in scan([asked], documents)[0].matches}
    assert found == {1, 2, 4}
    assert {match["line"] for match in scan([asked], documents, contexts=True)[0].matches} == {1, 2, 3, 4}
    solved = example("short", answers=(SOLUTION,))
    assert scan([solved], [SOLUTION.upper()])[0].matches[0]["part"] == "answer"


# ---- treatment ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, left",
    [
        ({}, ["Before it. ... After, it."]),
        ({"margin": 1}, ["Before , it."]),
        ({"margin": 99}, []),
        ({"pieces": "split"}, ["Before it. ", "... After, it."]),
        ({"pieces": "split", "min_piece": 12}, ["... After, it."]),
        ({"min_piece": 12}, ["... After, it."]),
    ],
)
def test_cut_removes_exactly(settings, left):
    outcome, _ = scan(
        [example(QUESTION)],
        [f"Before it. {QUESTION.upper()}... After, it."],
        ContaminationPolicy(action="cut", **settings),
    )
    (edit,) = outcome.edits.values()
    assert [json.loads(line)["text"] for new in edit for line in new.splitlines()] == left
    assert outcome.counts["cut"] == bool(left) and outcome.counts["dropped"] == (not left)


def test_cut_leaves_nothing_to_find():
    """Also where the words around a match form another one once it is removed, and in text without spaces."""
    rng = random.Random(4)
    alphabet = ["a", "B", "灯塔", "灯", "ﬁ", "½", "x-y"]
    removed = 0
    for _ in range(150):
        texts = [example(" ".join(rng.choices(alphabet, k=rng.randint(3, 8))), i) for i in range(3)]
        documents = [rng.choice((" ", "", ", ")).join(rng.choices(alphabet, k=25)) for _ in range(5)]
        for settings in ({}, {"pieces": "split"}, {"margin": 1, "min_piece": 4}):
            policy = ContaminationPolicy(action="cut", **settings)
            outcome, index = scan(texts, documents, policy, ngram=4, min_words=3)
            left = [
                line
                for edit in outcome.edits.values()
                for new in edit
                for line in new.splitlines(keepends=True)
            ]
            assert not BatchScanner(index, policy, "text")(
                DocumentBatch("x.jsonl", ".jsonl", 1, left)
            ).matches
            removed += outcome.counts["words_removed"]
    assert removed > 1000


# ---- files -------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path):
    return "text=" + str(
        made.jsonl(tmp_path / "bench.jsonl", [{"text": QUESTION, "id": "lights"}, {"text": SOLUTION}])
    )


def test_lines_rows_and_texts_keep_what_is_clean(tmp_path, bench):
    lines = [
        b'{"text": "clean \\u00e9",  "id": 1}\n',
        b"\n",
        json.dumps({"id": 2, "text": f"see: {QUESTION}!", "more": [1]}).encode() + b"\n",
        b"nonsense\n",
        b'{"other": 1}\n',
        b'{"text": null}\n',
        b'{"text": "\\ud800"}\n',
        b"[]\n",
        b'{"text": "\xff"}\n',
        b'{"messages": [{"role": "user", "content": "hi"}, '
        b'{"role": "assistant", "content": [{"type": "text", "text": "ho"}]}]}\n',
        json.dumps(
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": SOLUTION}]}
        ).encode()
        + b"\n",
        b'{"messages": [{"role": "user"}]}\n',
        b'{"text": "last, without a line end"}',
    ]
    clean, cut = [lines[i] for i in (0, 1, 9, 12)], b'{"id": 2, "text": "see: !", "more": [1]}\n'
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines)))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(b"".join(lines)))
    (tmp_path / "bad.txt").write_text(f"It was so: {QUESTION}. Yes.\r\n")
    (tmp_path / "good.txt.gz").write_bytes(gzip.compress("\ufeffclean\r\n".encode()))
    schema = pyarrow.schema(
        [("n", pyarrow.int32()), ("text", pyarrow.large_string()), ("deep", pyarrow.list_(pyarrow.int8()))],
        metadata={"k": "v"},
    )
    rows = [
        {"n": 1, "text": "clean", "deep": [1]},
        {"n": 2, "text": f"see {SOLUTION} end", "deep": None},
        {"n": 3, "text": None, "deep": []},
    ]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows, schema), tmp_path / "d.parquet", compression="zstd"
    )
    inputs = [
        tmp_path / name
        for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "bad.txt", "good.txt.gz", "d.parquet")
    ]

    reports = {
        action: run(inputs, [bench], tmp_path / action, action=action) for action in ("report", "drop", "cut")
    }
    names = {"report.json", "matches.jsonl", "broken.jsonl", ".decontaminate"}
    assert {path.name for path in (tmp_path / "report").iterdir()} == names
    assert {path.name for path in (tmp_path / "drop").iterdir()} == names | {path.name for path in inputs} - {
        "bad.txt"
    }
    assert {path.name for path in (tmp_path / "cut").iterdir()} == names | {path.name for path in inputs}
    for action, left in (("drop", clean), ("cut", [*clean[:2], cut, *clean[2:]])):
        folder = tmp_path / action
        assert (folder / "a.jsonl").read_bytes() == b"".join(left)
        assert gzip.decompress((folder / "b.jsonl.gz").read_bytes()) == b"".join(left)
        with zstandard.open(folder / "c.jsonl.zst", "rb") as file:
            assert file.read() == b"".join(left)
        assert gzip.decompress((folder / "good.txt.gz").read_bytes()) == "\ufeffclean\r\n".encode()
        table = pyarrow.parquet.read_table(folder / "d.parquet")
        assert table.schema.equals(
            pyarrow.parquet.read_schema(tmp_path / "d.parquet"), check_metadata=True
        ) and table.schema.metadata == {b"k": b"v"}
        assert table.to_pylist() == [rows[0], *([{**rows[1], "text": "see  end"}] if action == "cut" else [])]
        assert (
            pyarrow.parquet.read_metadata(folder / "d.parquet").row_group(0).column(0).compression == "ZSTD"
        )
    assert (tmp_path / "cut" / "bad.txt").read_bytes() == b"It was so: . Yes.\r\n"
    split = run(
        [tmp_path / "a.jsonl", tmp_path / "d.parquet"],
        [bench],
        tmp_path / "split",
        action="cut",
        pieces="split",
    )
    assert split["totals"]["cut"] == 2
    assert pyarrow.parquet.read_table(tmp_path / "split" / "d.parquet").column("text").to_pylist() == [
        "clean",
        "see ",
        " end",
    ]
    piece = b'{"id": 2, "text": "see: ", "more": [1]}\n'  # the other is "!": no word, no document
    assert (tmp_path / "split" / "a.jsonl").read_bytes() == b"".join([*clean[:2], piece, *clean[2:]])

    matches = [json.loads(line) for line in (tmp_path / "drop" / "matches.jsonl").read_text().splitlines()]
    assert matches[0] == {
        "file": str(inputs[0]),
        "line": 3,
        "id": 2,
        "benchmark": "text",
        "task": "bench.jsonl",
        "example": "lights",
        "part": "question",
        "words": 18,
        "text": QUESTION.lower(),
    }
    assert (matches[1]["line"], matches[1]["message"], matches[1]["example"]) == (11, 1, "1")
    assert [match["file"] for match in matches] == [
        str(path) for path in (*inputs[:1] * 2, *inputs[1:2] * 2, *inputs[2:3] * 2, inputs[3], inputs[5])
    ]
    broken = [json.loads(line) for line in (tmp_path / "drop" / "broken.jsonl").read_text().splitlines()]
    assert [item["line"] for item in broken if item["file"] == str(inputs[0])] == [4, 5, 6, 7, 8, 9, 12]
    assert [(item["line"], item["reason"]) for item in broken if item["file"] == str(inputs[5])] == [
        (3, "'text' contains nothing, not text")
    ]
    totals = reports["drop"]["totals"]
    assert (
        totals["documents"],
        totals["contaminated"],
        totals["dropped"],
        totals["cut"],
        totals["broken"],
    ) == (19, 8, 8, 0, 22)
    totals = reports["cut"]["totals"]
    assert (totals["dropped"], totals["cut"]) == (3, 5), "conversations are not cut"
    of = reports["report"]["benchmarks"]["text"]
    assert (of["examples"], of["found"], of["matches"], of["documents"], len(of["samples"])) == (
        2,
        2,
        8,
        8,
        SAMPLES,
    )
    text = format_table(reports["drop"])
    assert "19 documents, 8 contaminated: 8 dropped, 0 cut" in text
    assert f"22 lines could not be read and are not in the output: {inputs[0]}, line 4" in text


def test_empty_files_and_halves_of_surrogate_pairs(tmp_path):
    """JSON can contain what UTF-8 cannot: in an id, in a benchmark. Files without any document are
    written."""
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"text": QUESTION + " \ud800", "id": "\udfff"}) + "\n")
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"id": "\ud801", "text": f"see {QUESTION}"}) + "\n")
    for name in ("empty.jsonl", "empty.txt", "empty.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    inputs = [path, *sorted(tmp_path.glob("empty*"))]
    for action in ("cut", "drop"):
        report = run(inputs, [f"text={own}"], tmp_path / action, action=action, workers=0)
        assert report["totals"]["contaminated"] == 1 and report["totals"]["documents"] == 2
        assert {path.name for path in inputs} < set(results(tmp_path / action))
    match = json.loads((tmp_path / "cut" / "matches.jsonl").read_bytes())
    assert (match["id"], match["example"]) == ("\ud801", "\udfff")
    assert json.loads((tmp_path / "cut" / "a.jsonl").read_bytes()) == {"id": "\ud801", "text": "see "}


def test_a_column_without_text_is_all_broken(tmp_path, bench):
    path = made.parquet(tmp_path / "n.parquet", [{"text": i} for i in range(100)])
    totals = run([path], [bench], tmp_path / "out")["totals"]
    assert (totals["documents"], totals["broken"]) == (0, 100) and pyarrow.parquet.read_table(
        tmp_path / "out" / "n.parquet"
    ).num_rows == 0


def training_text(path: Path, documents: int, seed: int = 5) -> Path:
    rng = random.Random(seed)
    lines = []
    for i in range(documents):
        words = [f"t{rng.randrange(5000)}" for _ in range(rng.randint(1, 3000))]
        if i % 7 == 3:
            words.insert(rng.randrange(len(words)), QUESTION if i % 2 else SOLUTION)
        lines.append({"id": i, "text": " ".join(words)})
    return made.jsonl(path, lines)


def results(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_one_and_four_workers_write_the_same_bytes(tmp_path, bench):
    inputs = [
        training_text(tmp_path / "a.jsonl", 700),
        training_text(tmp_path / "b.jsonl.gz", 50, seed=6),
        tmp_path / "c.parquet",
    ]
    made.parquet(inputs[2], [json.loads(line) for line in inputs[0].read_bytes().splitlines()])
    for workers in (1, 4):
        run(inputs, [bench], tmp_path / str(workers), action="cut", workers=workers)
    one, four = results(tmp_path / "1"), results(tmp_path / "4")
    assert one == four and one["matches.jsonl"].count(b"\n") == 100 + 7 + 100
    table = pyarrow.parquet.read_table(tmp_path / "4" / "c.parquet")
    assert table.to_pylist() == [json.loads(line) for line in one["a.jsonl"].splitlines()]
    assert not (tmp_path / "4" / ".decontaminate" / "partial").exists()


def test_a_killed_run_resumes(tmp_path, bench):
    """SIGKILL after the first of three files: only a hidden name is half-written, the first file is not
    touched again."""
    inputs = [training_text(tmp_path / f"{i}.jsonl", count, seed=i) for i, count in enumerate((40, 900, 40))]
    run(inputs, [bench], tmp_path / "whole", action="cut")
    words = [
        sys.executable,
        ROOT / "tools" / "prepare_data.py",
        "decontaminate",
        "--input",
        *inputs,
        "--benchmark",
        bench,
        "--output",
        tmp_path / "out",
        "--action",
        "cut",
        "--workers",
        "2",
    ]
    tool = processes.Popen(words, own_children=True, stdout=processes.DEVNULL, stderr=processes.DEVNULL)
    partial = tmp_path / "out" / ".1.jsonl.partial"
    while not (partial.exists() and partial.stat().st_size):
        assert tool.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    workers = psutil.Process(tool.pid).children(recursive=True)
    tool.send_signal(signal.SIGKILL)
    tool.wait()
    assert workers and not psutil.wait_procs(workers, timeout=20)[1], "a worker outlived the tool"
    assert set(results(tmp_path / "out")) == {"0.jsonl", partial.name}
    before = (tmp_path / "out" / "0.jsonl").stat().st_mtime_ns
    run(inputs, [bench], tmp_path / "out", action="cut")
    assert results(tmp_path / "out") == results(tmp_path / "whole")
    assert (tmp_path / "out" / "0.jsonl").stat().st_mtime_ns == before


def test_complete_files_are_kept_unless_something_changed(tmp_path, bench, capsys):
    path, output = training_text(tmp_path / "a.jsonl", 20), tmp_path / "out"
    first = run([path], [bench], output)
    before = (output / "a.jsonl").stat().st_mtime_ns
    assert run([path], [bench], output) == first and (output / "a.jsonl").stat().st_mtime_ns == before
    for changed, name in (
        ({"ngram": 12}, "rules"),
        ({"action": "report"}, "treatment"),
        ({"normalise": "exact"}, "normalise"),
    ):
        with pytest.raises(
            UserError,
            match=f"started with other settings \\({name}.*; choose another directory, or remove it",
        ):
            run([path], [bench], output, **changed)
    own = made.jsonl(tmp_path / "other.jsonl", [{"text": SOLUTION}])
    with pytest.raises(UserError, match="started with other settings \\(benchmarks\\)"):
        run([path], [f"text={own}"], output)
    training_text(path, 30)
    again = run([path], [bench], output)
    assert again["totals"]["documents"] == 30 and (output / "a.jsonl").stat().st_mtime_ns != before
    (output / "a.jsonl").unlink()
    assert run([path], [bench], output)["totals"] == again["totals"] and (output / "a.jsonl").exists()


def test_the_digest_of_benchmarks_does_not_change():
    """Otherwise a folder that an earlier version started could not be resumed."""
    _, index = scan([example("one two three four five six seven eight nine")], [])
    assert index.digest() == "417ef959bd10610b9965c8da98790205ca187dcef529080d398d1b8c04dabbe7"


def test_official_files_through_the_tool(tmp_path, monkeypatch, capsys):
    import runpy

    folders = [
        f"{name}={getattr(made, name)(tmp_path / name)}"
        for name in ("mmlu", "mmlu_pro", "math", "gsm8k", "humaneval", "ruler", "lveval", "infinitebench")
    ]
    path = made.jsonl(tmp_path / "in.jsonl", [{"text": "clean"}, {"text": QUESTION.upper()}])
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "prepare_data.py",
            "decontaminate",
            "--input",
            str(path),
            "--benchmark",
            *folders,
            "--output",
            str(tmp_path / "out"),
            "--workers",
            "1",
        ],
    )
    monkeypatch.setattr("signal.signal", lambda *args: None)
    runpy.run_path(str(ROOT / "tools" / "prepare_data.py"))["main"]()
    printed = capsys.readouterr().out
    assert "2 documents, 1 contaminated: 1 dropped" in printed and "infinitebench" in printed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["benchmarks"]["mmlu"]["tasks"]["sea_lore"] == {
        "found": 1,
        "matches": 1,
        "documents": 1,
        "examples": 2,
    }
    assert report["benchmarks"]["gsm8k"]["too_short"] == 2 and report["benchmarks"]["gsm8k"]["matches"] == 0
    assert (tmp_path / "out" / "in.jsonl").read_bytes() == b'{"text": "clean"}\n'


def test_conversations_of_every_form(tmp_path, bench):
    """All messages are searched, whatever their columns; the output has one form, which the next stages
    read."""
    sharegpt = [
        {
            "id": "s1",
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "ho"},
                {"from": "human", "value": QUESTION},
                {"from": "gpt", "value": "twelve"},
            ],
        },
        {
            "id": "s2",
            "conversations": [
                {"from": "system", "value": "be kind"},
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "ho"},
                {"from": "human", "value": "unanswered"},
            ],
        },
    ]
    (tmp_path / "share.json").write_text(json.dumps(sharegpt))
    lines = [
        {"instruction": "do", "input": "this", "output": "done", "text": QUESTION},
        "",
        {"instruction": "do", "input": SOLUTION, "output": "x"},
        {"other": 1},
        {"instruction": "do", "input": "", "output": ""},
        {"instruction": "a", "output": "b", "domain": "code", "id": 7},
    ]
    raw = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()
    (tmp_path / "alpaca.jsonl.zst").write_bytes(zstandard.compress(raw))
    made.parquet(
        tmp_path / "sub" / "pairs.parquet",
        [
            {"question": "q", "answer": "a"},
            {"question": f"Now: {QUESTION}", "answer": "b"},
            {"question": "r", "answer": None},
        ],
    )
    kept = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        "id": "m",
        "more": [1],
    }
    made.jsonl(tmp_path / "sub" / "plain.jsonl", [kept])
    reports = {
        workers: run(
            [tmp_path / "share.json", tmp_path / "alpaca.jsonl.zst", tmp_path / "sub"],
            [bench],
            tmp_path / f"out{workers}",
            form="auto",
            workers=workers,
        )
        for workers in (1, 2)
    }
    out = tmp_path / "out1"
    assert {path.name for path in out.iterdir()} == {
        "share.jsonl",
        "alpaca.jsonl.zst",
        "pairs.jsonl",
        "plain.jsonl",
        "report.json",
        "matches.jsonl",
        "broken.jsonl",
        ".decontaminate",
    }

    def said(*texts):
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]

    def read(path):
        text = zstandard.open(path, "rb").read().decode() if path.suffix == ".zst" else path.read_text()
        return [json.loads(line) for line in text.splitlines()]

    assert read(out / "share.jsonl") == [
        {"id": "s2", "messages": [{"role": "system", "content": "be kind"}, *said("hi", "ho")]}
    ]
    # A column that is not a message is neither searched nor kept: it would be read as the text of a document.
    assert read(out / "alpaca.jsonl.zst") == [
        {"id": "alpaca.jsonl.zst:1", "messages": said("do\n\nthis", "done")},
        {"domain": "code", "id": "7", "messages": said("a", "b")},
    ]
    assert read(out / "pairs.jsonl") == [{"id": "pairs.parquet:1", "messages": said("q", "a")}]
    assert read(out / "plain.jsonl") == [kept]
    matches = read(out / "matches.jsonl")
    assert [(Path(m["file"]).name, m["line"], m["message"], m["id"]) for m in matches] == [
        ("share.json", 1, 2, "s1"),
        ("alpaca.jsonl.zst", 3, 0, "alpaca.jsonl.zst:3"),
        ("pairs.parquet", 2, 0, "pairs.parquet:2"),
    ]
    broken = [(Path(b["file"]).name, b["line"], b["reason"]) for b in read(out / "broken.jsonl")]
    assert broken == [
        ("alpaca.jsonl.zst", 4, "no known columns among other"),
        ("alpaca.jsonl.zst", 5, "turn 2 (assistant) is empty"),
        ("pairs.parquet", 3, "turn 2 (assistant) is empty"),
    ]
    totals = reports[1]["totals"]
    assert (totals["documents"], totals["dropped"], totals["broken"]) == (8, 3, 3) and totals == reports[2][
        "totals"
    ]
    for name in ("share.jsonl", "alpaca.jsonl.zst", "pairs.jsonl", "matches.jsonl", "broken.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "out2" / name).read_bytes()

    # Complete files are kept; and the next stage reads the data, not the reports about it.
    before = (out / "share.jsonl").stat().st_mtime_ns
    run([tmp_path / "share.json", tmp_path / "alpaca.jsonl.zst", tmp_path / "sub"], [bench], out, form="auto")
    assert (out / "share.jsonl").stat().st_mtime_ns == before
    names = ["alpaca.jsonl.zst", "pairs.jsonl", "plain.jsonl", "share.jsonl"]
    assert (
        [path.name for path in conversations.files([str(out)])]
        == names
        == [path.name for path in sources.expand([out])]
    )
    with pytest.raises(UserError, match="started with other settings \\(form\\)"):
        run([tmp_path / "sub" / "plain.jsonl"], [bench], out)


def test_a_named_form_is_searched_alone(tmp_path, bench):
    path = made.jsonl(
        tmp_path / "a.jsonl",
        [{"ask": "q", "reply": SOLUTION, "question": "x", "answer": "y"}, {"ask": "q", "reply": "a"}],
    )
    assert run([path], [bench], tmp_path / "out", form="ask/reply")["totals"]["dropped"] == 1
    assert json.loads((tmp_path / "out" / "a.jsonl").read_text())["messages"][1]["content"] == "a"
    assert (
        run([path], [bench], tmp_path / "report", form="ask/reply", action="report")["totals"]["contaminated"]
        == 1
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"inputs": ["a.jsonl", "a.json"], "form": "auto"},
            "a.jsonl and a.json have the same name, and both would be written as",
        ),
        ({"inputs": ["a.json"], "form": "auto"}, "a.json: not JSON"),
        ({"inputs": ["a.txt"], "form": "auto"}, "a.txt: unknown kind of file"),
        ({"form": "alpaka"}, "form alpaka: must be auto, sharegpt"),
        (
            {"inputs": ["a.jsonl", "sub/a.jsonl"]},
            "a.jsonl and .*sub/a.jsonl have the same name, and both would be written as",
        ),
        ({"inputs": ["a.json"]}, "a.json: unknown kind of file"),
        ({"inputs": ["none.jsonl"]}, "none.jsonl: cannot be read: No such file"),
        ({"inputs": ["report.json"]}, "report.json: unknown kind of file"),
        ({"inputs": ["matches.jsonl"]}, "matches.jsonl is the name of an output file"),
        (
            {"inputs": ["a.txt"], "action": "cut", "pieces": "split"},
            "a.txt: a .txt contains one document; use --pieces join",
        ),
        ({"inputs": ["b.parquet"]}, "b.parquet: cannot be read as parquet"),
        ({"inputs": ["b.jsonl.gz"]}, "b.jsonl.gz: cannot be read: "),
        ({"output": "."}, "contains the input a.jsonl, which would be replaced"),
        ({"output": "sub"}, "sub: is not empty; choose another directory"),
        ({"output": "a.jsonl/x"}, "x cannot be written: Not a directory"),
        ({"benchmarks": ["mmlu"]}, "--benchmark mmlu: give NAME=PATH or NAME=hub"),
        ({"benchmarks": ["text=none"]}, "--benchmark text=none: no such file"),
        ({"benchmarks": ["squad=x"]}, "unknown benchmark 'squad'; known are"),
        ({"ngram": 1}, "--ngram 1: must be from 2 to 1000"),
        ({"min_words": 14}, "--min-words 14: must be from 1 to --ngram, 13"),
        ({"common": 0}, "--common 0: must be at least 1"),
        ({"margin": 3}, "--margin, --pieces and --min-piece require --action cut, but it is drop"),
        ({"action": "cut", "margin": -1}, "--margin -1: must be 0 or more"),
        ({"inputs": ["a.parquet"], "text_key": "body"}, "a.parquet: no column 'body' among text"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, bench, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "sub/a.jsonl", "matches.jsonl"):
        made.jsonl(tmp_path / name, [{"text": "x"}])
    made.parquet(tmp_path / "a.parquet", [{"text": "x"}])
    for name in ("a.txt", "a.json", "report.json", "b.parquet", "b.jsonl.gz"):
        (tmp_path / name).write_text("x")
    settings = {"inputs": ["a.jsonl"], "benchmarks": [bench], "output": "out"} | change
    with pytest.raises(UserError, match=message) as error:
        run(settings.pop("inputs"), settings.pop("benchmarks"), settings.pop("output"), **settings)
    assert "\n" not in str(error.value)
    assert not results(tmp_path / "out") if (tmp_path / "out").exists() else True
