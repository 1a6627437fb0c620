"""Official files of every benchmark to examples; content that is not official raises an error of one line."""

from __future__ import annotations

import gzip
import json
import shutil

import pytest

from megatron_ultralong.errors import UserError
from megatron_ultralong.official_files import find as official_files
from megatron_ultralong.official_files import infinitebench, lveval, mmlu_pro, ruler
from tests import benchmark_files as made


def read(name, folder, splits=("test",)):
    return list(official_files.read_examples(name, official_files.find_files(name, folder, splits)))


def test_mmlu_csv_and_hub_agree(tmp_path):
    official, hub = read("mmlu", made.mmlu(tmp_path / "a")), read("mmlu", made.mmlu_hub(tmp_path / "b"))
    for examples in (official, hub):
        first, second = examples
        assert (first.benchmark, first.task, first.split, first.id) == ("mmlu", "sea_lore", "test", "0")
        assert (
            first.question == made.QUESTION + "?"
            and first.choices == tuple(made.CHOICES)
            and first.answers == ("C",)
        )
        assert second.id == "1" and second.answers == ("D",) and second.context == ""
    assert official[1].question == '2 + 2,\n"quoted"' and official[1].place.endswith(
        "sea_lore_test.csv, line 3"
    )
    assert hub[1].place.endswith("test-00000-of-00001.parquet, row 2")
    assert [(e.split, e.task) for e in read("mmlu", tmp_path / "a", ("dev",))] == [("dev", "sea_lore")]
    assert [e.split for e in read("mmlu", tmp_path / "b", ("test", "dev"))] == ["dev", "test", "test"]
    shutil.rmtree(tmp_path / "b" / "all")  # a single subject alone is read
    assert len(read("mmlu", tmp_path / "b")) == 2


def test_mmlu_pro(tmp_path):
    (example,) = read("mmlu_pro", made.mmlu_pro(tmp_path))
    assert (example.task, example.id, example.answers, len(example.choices)) == ("history", "70", ("I",), 10)
    assert example.meta == {"cot_content": "", "src": "made"}
    (example,) = read("mmlu_pro", tmp_path, ("validation",))
    assert example.split == "validation" and example.meta["cot_content"].startswith("A: Let's")


def test_math_gsm8k_humaneval_in_both_formats(tmp_path):
    for official, hub in (
        (made.math, made.math_hub),
        (made.gsm8k, made.gsm8k_hub),
        (made.humaneval, made.humaneval_hub),
    ):
        name = official.__name__
        (a,), (b,) = read(name, official(tmp_path / name)), read(name, hub(tmp_path / f"{name}_hub"))
        assert (a.task, a.split, a.question, a.answers, a.meta) == (
            b.task,
            b.split,
            b.question,
            b.answers,
            b.meta,
        )
        assert (a.id, a.task) == {
            "math": ("12", "Number Theory"),
            "gsm8k": ("0", "gsm8k"),
            "humaneval": ("HumanEval/0", "humaneval"),
        }[name]
    (example,) = read("math", tmp_path / "math", ("train",))
    assert (
        "(train)" in example.question
        and example.answers == ("It is $\\boxed{2}$.",)
        and example.meta == {"level": "Level 1"}
    )
    (example,) = official_files.read_examples(
        "humaneval",
        official_files.find_files("humaneval", tmp_path / "humaneval" / "data" / "HumanEval.jsonl.gz"),
    )
    assert example.meta["entry_point"] == "f" and example.answers == ("    return 2 * x\n",)


def test_ruler_prompts_are_split_and_nothing_is_lost(tmp_path):
    examples = {example.task: example for example in read("ruler", made.ruler(tmp_path))}
    for task, example in examples.items():
        path = tmp_path / "4096" / "data" / task / "validation.jsonl"
        assert example.context + example.question == json.loads(path.read_text())["input"]
        assert (
            example.question.startswith(("What ", "Question: "))
            and example.meta["answer_prefix"] == " Answer:"
            and example.id == "0"
        )
    assert examples["vt"].question.endswith("value 12 in the text above.")
    assert examples["niah_single_2"].question.startswith("What is the special magic number for grey-owl")
    assert examples["qa_1"].answers == ("owl", "an owl")
    (example,) = ruler.read_file(
        made.jsonl(
            tmp_path / "cwe.jsonl", [{"index": 5, "input": "no such thing", "outputs": ["a"], "length": 1}]
        )
    )
    assert (example.task, example.context, example.question) == ("cwe", "no such thing", "")


def test_lveval_alone_and_zipped(tmp_path):
    plain, zipped = (
        read("lveval", made.lveval(tmp_path / "a")),
        read("lveval", made.lveval(tmp_path / "b", zipped=True)),
    )
    assert [(e.task, e.id, e.question, e.answers, e.context, e.meta) for e in plain] == [
        (e.task, e.id, e.question, e.answers, e.context, e.meta) for e in zipped
    ]
    assert [(e.task, e.id) for e in plain] == [
        ("dureader_mixup", "256k/0"),
        *(("hotpotwikiqa_mixup", f"{level}/{i}") for level in ("128k", "16k") for i in (0, 1)),
    ]
    assert (
        plain[1].answers == ("Mira", "She")
        and plain[1].meta["level"] == "128k"
        and plain[1].meta["answer_keywords"] == "Mira"
    )
    assert "answer_keywords" not in plain[0].meta
    made.lveval(tmp_path / "b")  # unpacked next to the .zip: read once
    assert len(read("lveval", tmp_path / "b")) == 5
    assert [
        e.id
        for path in official_files.find_files("lveval", tmp_path / "b", names=["hotpotwikiqa_mixup_16k"])
        for e in lveval.read_file(path)
    ] == ["16k/0", "16k/1"]
    zipped = made.lveval(tmp_path / "d", zipped=True)
    (zipped / "hotpotwikiqa_mixup_16k.jsonl.part").touch()  # of a download: nothing is unpacked
    assert len(read("lveval", zipped)) == 5
    folder = made.lveval(tmp_path / "c")
    for path in (folder / "hotpotwikiqa_mixup_16k.jsonl", folder / "dureader_mixup_256k.jsonl"):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()  # the other .gz has its plain file next to it and is not read
    assert [(e.task, e.id, e.answers) for e in read("lveval", folder)] == [
        (e.task, e.id, e.answers) for e in plain
    ]
    (found,) = official_files.find_files("lveval", folder, names=["dureader_mixup_256k"])
    assert found.name == "dureader_mixup_256k.jsonl.gz"
    assert len(lveval.SETS) == 11 and len(lveval.LEVELS) == 5


def test_infinitebench(tmp_path):
    examples = {example.task: example for example in read("infinitebench", made.infinitebench(tmp_path))}
    assert (
        examples["passkey"].answers == ("71432",)
        and examples["passkey"].choices == ()
        and examples["passkey"].context.startswith("Grass")
    )
    packed = tmp_path / "packed" / "passkey.jsonl.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress((tmp_path / "passkey.jsonl").read_bytes()))
    assert [example.answers for example in read("infinitebench", packed.parent)] == [("71432",)]
    assert examples["code_run"].answers == ("-3",) and examples["code_run"].meta["answer"] == -3
    assert (
        examples["longbook_choice_eng"].choices == ("Al", "Bo", "Ida", "Di")
        and examples["longbook_choice_eng"].id == "3"
    )
    nested = made.jsonl(
        tmp_path / "b" / "math_calc.jsonl",
        [{"id": 0, "context": "1 + 2", "input": "", "answer": [[1, 3]], "options": ""}],
    )
    assert next(iter(infinitebench.read_file(nested))).answers == ("1", "3")
    assert examples["math_calc"].answers == ("1", "3", "6") and len(infinitebench.TASKS) == 12


def test_custom_strings(tmp_path):
    path = made.jsonl(tmp_path / "own.jsonl", [{"text": "a b"}, {"text": "c", "id": "x"}])
    assert [(e.benchmark, e.id, e.question) for e in official_files.read_custom(path)] == [
        ("text", "0", "a b"),
        ("text", "x", "c"),
    ]


@pytest.mark.parametrize(
    "name, record, message",
    [
        ("gsm8k", {"question": "x"}, "line 2: no field 'answer' among question"),
        ("gsm8k", {"question": 3, "answer": "x"}, "line 2: field 'question' is of type int, not str"),
        (
            "humaneval",
            {"task_id": "a", "prompt": "b", "canonical_solution": "c", "entry_point": "f"},
            "line 2: no field 'test'",
        ),
        ("ruler", {"index": 0, "input": "x", "length": 3}, "line 2: no field 'outputs'"),
        (
            "ruler",
            {"index": 0, "input": "x", "length": 3, "outputs": [["a"]]},
            "line 2: field 'outputs' contains list in its list",
        ),
        ("ruler", {"index": 0, "input": "x", "length": 3, "outputs": []}, "line 2: field 'outputs' is empty"),
        ("lveval", {"input": "x", "answers": ["a"], "length": 3}, "line 2: no field 'context'"),
        (
            "lveval",
            {"input": "x", "answers": [], "length": 3, "context": "c"},
            "line 2: field 'answers' is empty",
        ),
        (
            "lveval",
            {"input": "x", "answers": ["a"], "length": 3, "context": "c", "answer_keywords": ["k"]},
            "line 2: field 'answer_keywords' is of type list",
        ),
        (
            "infinitebench",
            {"id": 1, "context": "c", "input": "x", "options": ["a", "b", "c", "d"]},
            "line 2: no field 'answer'",
        ),
        (
            "infinitebench",
            {"id": 1, "context": "c", "input": "x", "answer": "a", "options": ["a", "b"]},
            "line 2: field 'options' contains 2 choices",
        ),
    ],
)
def test_missing_fields_are_one_line(tmp_path, name, record, message):
    file = {
        "gsm8k": "test.jsonl",
        "humaneval": "HumanEval.jsonl",
        "ruler": "vt.jsonl",
        "lveval": "lic_mixup_16k.jsonl",
        "infinitebench": "code_debug.jsonl",
    }
    path = tmp_path / file[name]
    path.write_text("\n" + json.dumps(record) + "\n")
    with pytest.raises(UserError) as error:
        read(name, tmp_path)
    assert f"{path}, {message}" in str(error.value) and "\n" not in str(error.value)


def test_wrong_csv_parquet_and_json(tmp_path):
    path = tmp_path / "test" / "a_test.csv"
    path.parent.mkdir()
    path.write_text("q,a,b,c,d,A\nq,a,b,c,A\n")
    with pytest.raises(UserError, match=r"a_test.csv, line 2: 5 columns, not the 6 of question, A"):
        read("mmlu", tmp_path)
    path.write_text("q,a,b,c,d,E\n")
    with pytest.raises(UserError, match=r"line 1: field 'answer' is 'E', not one of 4 choices"):
        read("mmlu", tmp_path)
    row = {
        "question_id": 1,
        "question": "",
        "options": ["a", "b"],
        "answer": "B",
        "answer_index": 0,
        "category": "c",
    }
    bad = made.parquet(tmp_path / "test-00000-of-00001.parquet", [row])
    with pytest.raises(UserError, match="row 1: field 'answer_index' is 0, but 'answer' is B"):
        list(mmlu_pro.read_file(bad))
    bad.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        list(mmlu_pro.read_file(bad))
    bad = tmp_path / "test.jsonl"
    bad.write_text("{nonsense\n")
    with pytest.raises(UserError, match=r"test.jsonl, line 1: not JSON"):
        read("gsm8k", bad)


def test_finding(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="unknown benchmark 'nothing'; known are mmlu, mmlu_pro"):
        official_files.find_files("nothing", tmp_path)
    with pytest.raises(
        UserError,
        match="no such file or directory; download the data set openai/gsm8k from the Hugging Face hub",
    ):
        official_files.find_files("gsm8k", tmp_path / "none")
    with pytest.raises(
        UserError, match="contains none of its files for test; download the data set Infinigence/LVEval"
    ):
        official_files.find_files("lveval", tmp_path)
    with pytest.raises(
        UserError, match=r"ruler: not on the hub; generate them with https://github.com/NVIDIA/RULER"
    ):
        official_files.find_files("ruler", "hub")
    asked = {}

    def download(repo, *, repo_type, allow_patterns):
        asked.update(repo=repo, repo_type=repo_type, patterns=allow_patterns)
        return str(made.mmlu_hub(tmp_path / "snapshot"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert [path.name for path in official_files.find_files("mmlu", "hub")] == ["test-00000-of-00001.parquet"]
    assert asked == {"repo": "cais/mmlu", "repo_type": "dataset", "patterns": ["all/test-*.parquet"]}
    with pytest.raises(
        UserError, match="contains none of its files for test among those requested; download"
    ):
        official_files.find_files(
            "infinitebench", "hub", names=["passkey", "code_run"]
        )  # the snapshot here is of another benchmark
    assert asked["patterns"] == ["code_run.jsonl", "passkey.jsonl"]

    def offline(*args, **kwargs):
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError) as error:
        official_files.find_files("infinitebench", "hub")
    assert (
        "cannot be downloaded from the hub (no network); download the data set xinrongzhang2022/InfiniteBench"
        in str(error.value)
    )
    assert "\n" not in str(error.value)
