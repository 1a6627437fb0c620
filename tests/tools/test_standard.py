"""The standard benchmarks: the harness's own model against ours, and the paper's protocol on data made
here."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends import likelihood
from megatron_ultralong.evaluate.backends.protocol import Completion, GenerationRequest
from megatron_ultralong.evaluate.backends.transformers_model import TransformersModel
from megatron_ultralong.evaluate.code_sandbox import sandbox
from megatron_ultralong.evaluate.pipeline.results import BenchmarkResult
from megatron_ultralong.evaluate.tasks.standard import paper
from megatron_ultralong.evaluate.tasks.standard import run as standard
from tests import processes, text

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

ROOT = Path(__file__).parents[2]
BASE = ROOT / "examples" / "demo" / "base"
NAMES = "Ada Ben Cleo Dan Eva Finn".split()
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if not loop.last or add_generation_prompt %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets that the tests make stay with them."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()


# ---- the same answers as the harness's own model -----------------------------------------------


def write_tasks(folder: Path) -> list[str]:
    """Task files in the harness's form with local data: choices of several tokens, of one, answers to write,
    whole texts."""
    folder.mkdir()
    with (folder / "data.jsonl").open("w") as file:
        for i, name in enumerate(NAMES):
            keys = [str(10000 + 1234 * i), str(20000 + 777 * i), "12345"]
            file.write(
                json.dumps(
                    {
                        "question": f"The sky is blue today. The pass key of {name} is {keys[i % 3]}. The grass is green in spring. What is the pass key of "
                        f"{name}? The pass key of {name} is",
                        "keys": [f" {key}" for key in keys],
                        "answer": i % 3,
                    }
                )
                + "\n"
            )
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}}}\ntest_split: test\nfewshot_split: test\n"
    right = "doc_to_text: '{{question}}'\ndoc_to_target: answer\n"
    accuracy = "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    (folder / "many.yaml").write_text(
        f"task: many\n{data}{right}doc_to_choice: '{{{{keys}}}}'\noutput_type: multiple_choice\n{accuracy}"
    )
    (folder / "digit.yaml").write_text(
        f"task: digit\n{data}{right}doc_to_choice: [A, B, C]\noutput_type: multiple_choice\nnum_fewshot: 2\n"
        f"fewshot_config: {{sampler: first_n}}\n{accuracy}"
    )
    (folder / "write.yaml").write_text(
        f"task: write\ntag: written\n{data}doc_to_text: '{{{{question}}}}'\ndoc_to_target: '{{{{keys[answer]}}}}'\noutput_type: generate_until\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 12, do_sample: false}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    (folder / "whole.yaml").write_text(
        f"task: whole\n{data}doc_to_text: ''\ndoc_to_target: '{{{{question * 7}}}}'\noutput_type: loglikelihood_rolling\n"
        "metric_list: [{metric: word_perplexity}]\n"
    )
    return ["many", "digit", "write", "whole"]


def percents(result: BenchmarkResult) -> dict[str, float | None]:
    return {one.task: one.score for one in result.scores}


def assert_parity(model: Path, tasks: list[str], folder: Path, out: Path, chat: bool) -> BenchmarkResult:
    """The same scores, likelihoods to 1e-4 and texts from our adapter and from the harness's `hf`; returns
    our results."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    out.mkdir()
    ours, samples = standard.run(
        TransformersModel(model, device="cpu"),
        standard.StandardSettings(tasks=tuple(tasks), include_path=folder, chat="yes" if chat else "no"),
        out,
    )
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=1),
        tasks=tasks,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    for task in tasks:
        for key, value in ours.extra["metrics"][task].items():
            assert value == pytest.approx(theirs["results"][task][key], rel=1e-5), (task, key)
        mine = {sample["question"]: sample["answers"] for sample in samples if sample["task"] == task}
        assert len(mine) == len(theirs["samples"][task]) > 0
        for sample in theirs["samples"][task]:
            for got, want in zip(mine[sample["doc_id"]], sample["resps"], strict=True):
                got, want = got[0], want[0]
                if isinstance(want, tuple):
                    assert got[0] == pytest.approx(want[0], abs=1e-4, rel=1e-6) and bool(got[1]) == want[1]
                else:
                    assert got == (pytest.approx(want, rel=1e-5) if isinstance(want, float) else want)
    return ours


@pytest.mark.parametrize("chat", [False, True])
def test_answers_equal_those_of_the_harness_s_own_model(tmp_path: Path, chat: bool) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in BASE.iterdir():
        (model / file.name).symlink_to(file)
    if chat:
        (model / "chat_template.jinja").write_text(CHAT)
    ours = assert_parity(model, write_tasks(tmp_path / "tasks"), tmp_path / "tasks", tmp_path / "out", chat)
    if not chat:
        scores = percents(ours)
        assert scores["write"] == 100 and 0 < scores["many"] < 100, "the demo's model reads keys"
    assert ours.extra["questions"] == dict.fromkeys(["many", "digit", "write", "whole"], 6)


def test_pairs_are_scored_as_by_whole_logits_and_share_their_context() -> None:
    backend = TransformersModel(BASE, device="cpu")
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, backend.model.config.vocab_size, (6, 40), generator=generator).tolist()
    cuts = ((1, 9), (7, 1), (20, 20), (33, 7), (39, 1), (5, 2))
    pairs = [(rows[0][:30], [a]) for a in range(5)] + [
        (row[:n], row[n : n + size]) for row, (n, size) in zip(rows, cuts, strict=True)
    ]
    passes = []
    hook = backend.model.base_model.register_forward_hook(lambda *_: passes.append(1))
    got = likelihood.pair_loglikelihoods(backend.model, pairs, batch_tokens=90)
    hook.remove()
    assert len(passes) <= 5  # 7 inputs, of which the short ones share a pass
    for (context, continuation), (value, greedy) in zip(pairs, got, strict=True):
        with torch.no_grad():
            logits = (
                backend.model(torch.tensor([[*context, *continuation]]))
                .logits[0, len(context) - 1 : -1]
                .log_softmax(-1)
            )
        assert value == pytest.approx(float(logits[range(len(continuation)), continuation].sum()), abs=1e-4)
        assert greedy == (logits.argmax(-1).tolist() == continuation)


def test_the_harness_knows_the_model_by_name(tmp_path: Path) -> None:
    """Its own way in: a name and arguments, as a dictionary or a text."""
    from lm_eval.tasks import TaskManager

    import megatron_ultralong.evaluate.tasks.standard.lm_eval_model  # noqa: F401

    [task] = [name for name in write_tasks(tmp_path / "tasks") if name == "write"]
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    for arguments in ({"model": str(BASE), "engine": "hf", "chat": "no"}, f"model={BASE},engine=hf"):
        found = lm_eval.simple_evaluate(
            model="megatron_ultralong",
            model_args=arguments,
            device="cpu",
            tasks=[task],
            task_manager=manager,
            bootstrap_iters=0,
        )
        assert found["results"][task]["exact_match,none"] == 1
    for wrong, message in (
        ({"model": str(BASE), "size": 3}, "model_args: size is not a model option"),
        ({"engine": "hf"}, "give --model DIR"),
        ({"model": str(BASE), "engine": "tensorflow"}, "model_args: .*invalid choice"),
        ({"model": str(BASE), "temperature": 0.7}, "--temperature 0.7: this benchmark's answers are greedy"),
        (
            {"model": str(BASE), "max_length": 10},
            "12 tokens of answer, but prompt and answer together may have 10",
        ),
    ):
        with pytest.raises(UserError, match=message):
            lm_eval.simple_evaluate(
                model="megatron_ultralong", model_args=wrong, device="cpu", tasks=[task], task_manager=manager
            )


def test_kept_answers_are_those_of_a_model_and_its_tokenizer(tmp_path: Path) -> None:
    backend = TransformersModel(BASE, device="cpu")
    names = {standard.cache_key(backend, None), standard.cache_key(backend, 100)}
    backend.tokenizer.chat_template = CHAT
    names.add(standard.cache_key(backend, None))
    backend.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=text.tokenizer("llama3"), bos_token="<|begin|>", eos_token="<|end|>"
    )
    names.add(standard.cache_key(backend, None))
    assert len(names) == 4 and standard.cache_key(TransformersModel(BASE, device="cpu"), None) in names


def test_answers_are_kept(tmp_path: Path) -> None:
    backend, tasks = TransformersModel(BASE, device="cpu"), write_tasks(tmp_path / "tasks")
    settings = standard.StandardSettings(tasks=tuple(tasks), include_path=tmp_path / "tasks")
    first, _ = standard.run(backend, settings, tmp_path)
    backend.generate = backend.loglikelihood = None  # type: ignore[assignment, method-assign]
    again, _ = standard.run(backend, settings, tmp_path)
    assert again.scores == first.scores and again.extra["metrics"] == first.extra["metrics"]


def test_cut_and_refused_prompts_are_counted_when_the_command_is_given_again(tmp_path: Path) -> None:
    """Cut ones whoever asked them; refused ones are asked again, and only they."""
    tasks = write_tasks(tmp_path / "tasks")
    settings = standard.StandardSettings(tasks=tuple(tasks), include_path=tmp_path / "tasks", max_length=100)
    refusing = Scholar(False)
    refusing.refuses = "of Cleo"
    first, _ = standard.run(refusing, settings, tmp_path)
    assert (first.extra["prompts_cut"], first.extra["unanswered"], first.settings["max_length"]) == (
        4 + 6 * 3,
        1,
        100,
    ), "of `write` and of `digit`"
    assert [
        len(refusing.tokenizer.encode(prompt, add_special_tokens=False)) for prompt, _ in refusing.prompts
    ] == [*[100 - 12] * 5, 86]
    assert (
        "22 prompts were truncated at the beginning, to 100 tokens including the answer\n1 prompts were refused by the endpoint and "
        "count as wrong: HTTP 400: no (1); the same command requests them again" in standard.table(first)
    )
    again = Scholar(False)
    second, _ = standard.run(again, settings, tmp_path)
    assert len(again.prompts) == 1 and "of Cleo" in again.prompts[0][0] and not again.choices
    assert (second.extra["prompts_cut"], second.extra["unanswered"]) == (22, 0)
    third, _ = standard.run(again, settings, tmp_path)
    assert len(again.prompts) == 1 and third.extra["prompts_cut"] == 22
    # Other room, other answers: none of those kept are taken.
    roomy, _ = standard.run(
        again, standard.StandardSettings(tasks=tuple(tasks), include_path=tmp_path / "tasks"), tmp_path
    )
    assert len(again.prompts) == 7 and roomy.extra["prompts_cut"] == 0


def test_nothing_is_cut_where_positions_are_not_known(tmp_path: Path) -> None:
    """As an endpoint's: prompts of more than 2,048 tokens, answers of as many."""
    write_tasks(tmp_path / "tasks")
    path = tmp_path / "tasks" / "write.yaml"
    path.write_text(
        path.read_text()
        .replace("'{{question}}'", "'{{question * 40}}'")
        .replace("max_gen_toks: 12", "max_gen_toks: 2048")
    )
    scholar = Scholar(False)
    scholar.max_position = None  # type: ignore[assignment]
    settings = {"tasks": ("write", "many", "whole"), "include_path": tmp_path / "tasks", "limit": 2}
    result, _ = standard.run(scholar, standard.StandardSettings(**settings), tmp_path)
    assert result.extra["prompts_cut"] == 0 and result.settings["max_length"] is None
    assert (
        all(size == 2048 and len(scholar.tokenizer.encode(prompt)) > 2500 for prompt, size in scholar.prompts)
        and len(scholar.prompts) == 2
    )
    result, _ = standard.run(scholar, standard.StandardSettings(**settings, max_length=4096), tmp_path)
    assert (
        all(
            len(scholar.tokenizer.encode(prompt, add_special_tokens=False)) <= 2048
            for prompt, _ in scholar.prompts[2:]
        )
        and result.extra["prompts_cut"] == 2
    )
    with pytest.raises(
        UserError,
        match="2048 tokens of answer, but prompt and answer together may have 2048: the model's positions, or --max-length",
    ):
        standard.run(scholar, standard.StandardSettings(**settings, max_length=2048), tmp_path)


def test_a_killed_run_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    """kill -9 in the middle of the answers: those that were there are not asked for again, and the results
    are those of a run left alone."""
    tasks = write_tasks(tmp_path / "tasks")
    command = [sys.executable, str(Path(__file__)), str(tmp_path)]
    (tmp_path / "killed").mkdir()
    killed = processes.run([*command, "killed", "20"], capture_output=True)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "killed" / "result.json").exists(), (
        killed.stderr
    )
    (tmp_path / "whole").mkdir()
    results = {}
    for name in ("killed", "whole"):
        done = processes.run([*command, name, "1000"], capture_output=True)
        assert done.returncode == 0, done.stderr
        results[name] = json.loads((tmp_path / name / "result.json").read_text())
    asked = (tmp_path / "killed" / "asked").read_text().splitlines()
    whole = (tmp_path / "whole" / "asked").read_text().splitlines()
    assert sorted(asked) == sorted(whole) and len(set(whole)) == len(whole) > 20
    assert results["killed"] == results["whole"] and set(results["whole"]["metrics"]) == set(tasks)


def _die_after(folder: Path, name: str, answers: int) -> None:
    """A run of its own process that kills itself when it is asked for more than so many answers."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = folder / "datasets"
    backend = TransformersModel(BASE, device="cpu")
    left = [answers]

    def counted(kind: str, ask: Any) -> Any:
        def until_killed(questions: Any) -> Any:
            left[0] -= len(questions)
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            with (folder / name / "asked").open("a") as file:
                file.writelines(f"{kind} {question}\n" for question in questions)
            return ask(questions)

        return until_killed

    def one_by_one(requests: list[GenerationRequest]) -> Iterator[tuple[int, Completion]]:
        for place, request in enumerate(requests):
            yield place, next(generate([request]))[1]

    generate = counted("text", backend.generate)
    backend.generate = one_by_one  # type: ignore[method-assign]
    backend.loglikelihood = counted("likelihood", backend.loglikelihood)  # type: ignore[method-assign]
    from megatron_ultralong.evaluate.tasks.standard import lm_eval_model

    lm_eval_model.SLICE = 3
    result, _ = standard.run(
        backend,
        standard.StandardSettings(tasks=("many", "digit", "write", "whole"), include_path=folder / "tasks"),
        folder / name,
    )
    (folder / name / "result.json").write_text(
        json.dumps({"scores": percents(result), "metrics": result.extra["metrics"]})
    )


# ---- the paper's protocol ----------------------------------------------------------------------

MATH = {
    "problem": "What is half of one?",
    "solution": "It is $\\boxed{\\frac{1}{2}}$.",
    "level": "1",
    "type": "Algebra",
}
HUMANEVAL = [
    {
        "task_id": f"HumanEval/{i}",
        "entry_point": "double",
        "prompt": 'def double(x):\n    """Twice x."""\n',
        "canonical_solution": "",
        "test": f"def check(f):\n    assert f({i}) == {2 * i}\n",
    }
    for i in (3, 4, 0)
]


def local(path: str, name: str | None = None, **_: Any) -> Any:
    """Small data of the hub's form."""
    from datasets import Dataset, DatasetDict

    def repeated(count: int, **row: Any) -> Any:
        return Dataset.from_list(
            [
                {
                    key: value.replace("NUMBER", str(i)) if isinstance(value, str) else value
                    for key, value in row.items()
                }
                for i in range(count)
            ]
        )

    if path == "cais/mmlu":
        row = {
            "question": f"About {name}, NUMBER?",
            "choices": ["one", "two", "three", "four"],
            "answer": 2,
            "subject": name,
        }
        return DatasetDict(test=repeated(2, **row), dev=repeated(7, **row))
    if path == "TIGER-Lab/MMLU-Pro":
        kinds = [
            "biology",
            "business",
            "chemistry",
            "computer science",
            "economics",
            "engineering",
            "health",
            "history",
            "law",
            "math",
            "other",
            "philosophy",
            "physics",
            "psychology",
        ]
        rows = [
            {
                "question": f"On {kind}?",
                "options": ["yes", "no"],
                "answer": "B",
                "category": kind,
                "cot_content": "A: Let's think step by step. No. The answer is (B).",
            }
            for kind in kinds
        ]
        return DatasetDict(test=Dataset.from_list(rows), validation=Dataset.from_list(rows * 6))
    if path == "EleutherAI/hendrycks_math":
        return DatasetDict(train=repeated(3, **MATH), test=repeated(1, **MATH))
    if path == "openai/gsm8k":
        return DatasetDict(
            train=repeated(9, question="NUMBER?", answer="#### 1"),
            test=repeated(2, question="Six and one, NUMBER?", answer="Seven.\n#### 7"),
        )
    assert path == "openai/openai_humaneval", path
    return DatasetDict(test=Dataset.from_list(HUMANEVAL))


class Scholar:
    """A backend that knows the answers, and remembers what it was asked."""

    max_position = 8192
    refuses: str | None = None
    """Prompts that hold it, as an endpoint would."""

    def __init__(self, chat: bool) -> None:
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=text.tokenizer("llama3"), bos_token="<|begin|>", eos_token="<|end|>"
        )
        self.tokenizer.chat_template = CHAT if chat else None
        self.choices: list[str] = []
        self.prompts: list[tuple[str, int]] = []

    def loglikelihood(self, pairs: Any) -> list[tuple[float, bool]]:
        self.choices += [self.tokenizer.decode(context) for context, _ in pairs]
        return [
            (0.0 if self.tokenizer.decode(continuation).strip() == "C" else -1.0, True)
            for _, continuation in pairs
        ]

    def generate(self, requests: list[GenerationRequest]) -> Iterator[tuple[int, Completion]]:
        for place, request in enumerate(requests):
            prompt = self.tokenizer.decode(request.ids)
            self.prompts.append((prompt, request.max_tokens))
            refused = self.refuses is not None and self.refuses in prompt
            yield (
                place,
                Completion(
                    text="" if refused else self.answer(prompt),
                    tokens_in=len(request.ids or ()),
                    tokens_out=1,
                    finish="HTTP 400: no" if refused else "stop",
                ),
            )

    def answer(self, prompt: str) -> str:
        if "def double" in prompt:
            return "    return x + 3\n```\nThat is it." if "```" in prompt else "    return x + 3\n"
        if "half of one" in prompt:
            return "One in two, $x$. \\boxed{\\frac12}"
        return (
            "So it is no. The answer is (B)."
            if "Options:" in prompt
            else "Six and 1 make 7. The final answer is 7"
        )

    def describe(self) -> dict[str, Any]:
        return {"path": "scholar", "chat": bool(self.tokenizer.chat_template)}


@pytest.mark.parametrize("chat", [False, True])
def test_the_paper_s_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat: bool) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", local)
    scholar = Scholar(chat)
    result, samples = standard.run(scholar, standard.StandardSettings(limit=3, run_code="confined"), tmp_path)
    assert percents(result) == {
        "MMLU": 100,
        "MMLU-Pro": 100,
        "MATH": 100,
        "GSM8K": 100,
        "HumanEval": pytest.approx(33.33),
    }
    assert sum(result.extra["questions"].values()) >= 114 + 14 + 7 + 2 + 3
    assert (
        result.extra["code"]["programs"] == 3
        and result.extra["code"]["confined"]
        and result.settings["chat"] is chat
        and result.extra["prompts_cut"] == 0
    )
    assert {sample["pass@1"] for sample in samples if sample["task"] == "humaneval"} == {0, 1}
    turn = "<|assistant|>" if chat else "\nAnswer: C"
    assert (
        all(prompt.count(turn) == 5 + chat for prompt in scholar.choices)
        and len(scholar.choices) == 57 * 2 * 4
    )
    kinds = {
        "Options:": (14, 6, 2048),
        "half of one": (7, 1, 2048),
        "Six and one": (2, 9, 1024),
        "def double": (3, 1, 1024),
    }
    for mark, (count, turns, tokens) in kinds.items():
        found = [(prompt, size) for prompt, size in scholar.prompts if mark in prompt]
        assert len(found) == count and all(size == tokens for _, size in found), mark
        if chat:
            assert all(prompt.count("<|assistant|>") == turns for prompt, _ in found), mark
    assert all("\\boxed" in prompt for prompt, _ in scholar.prompts if "half of one" in prompt)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("\\boxed{\\frac{1}{2}}", 1),
        ("$3$ so \\boxed{0.5}", 1),
        ("\\boxed{2} no, \\boxed{1/2}", 1),
        ("\\boxed{1/2} no, \\boxed{2}", 0),
        ("$\\frac{1}{2}$", 0),
        ("\\boxed{\\frac12", 0),
        ("", 0),
    ],
)
def test_the_last_box_is_the_answer(answer: str, right: int) -> None:
    assert paper.boxed_match({"answer": "\\frac{1}{2}"}, [answer]) == {"exact_match": right}


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scholar = Scholar(False)
    with pytest.raises(
        UserError,
        match=r"allow it with --run-code .*--tasks paper/mmlu,paper/mmlu_pro,paper/math,paper/gsm8k$",
    ):
        standard.run(scholar, standard.StandardSettings(), tmp_path)
    with pytest.raises(UserError, match="no such task; did you mean gsm8k"):
        paper.load_tasks(paper.task_manager(["paper/gsm8k"], None), "gsm9k", False, paper.CodeRunner())
    for tasks in (("paper", "paper/math"), ("paper/mmlu", "mmlu")):
        with pytest.raises(UserError, match="each only once"):
            standard.StandardSettings(tasks=tasks, run_code="confined").names()
    with pytest.raises(UserError, match="no such directory"):
        standard.StandardSettings(tasks=("mmlu",), include_path=tmp_path / "nothing").names()
    write_tasks(tmp_path / "tasks")
    path = tmp_path / "tasks" / "write.yaml"
    path.write_text(path.read_text() + "unsafe_code: true\n")
    with pytest.raises(UserError, match="only paper/humaneval runs programs here"):
        standard.run(
            scholar, standard.StandardSettings(tasks=("write",), include_path=tmp_path / "tasks"), tmp_path
        )
    import datasets

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no route"))
    )
    with pytest.raises(UserError, match=r"paper/gsm8k: cannot be loaded \(no route\).*HF_HOME"):
        standard.run(scholar, standard.StandardSettings(tasks=("paper/gsm8k",)), tmp_path)
    code = standard.StandardSettings(tasks=("paper/humaneval",), run_code="confined")
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "run", lambda *_, **__: sandbox.Outcome(passed=False, reason="broken"))
        with pytest.raises(UserError, match=r"cannot be run on this machine \(broken\)"):
            standard.run(scholar, code, tmp_path)
    # A machine on which writes cannot be confined: refused, also before a model is loaded, unless allowed.
    monkeypatch.setattr(sandbox, "MECHANISMS", ())
    with pytest.raises(UserError, match=r"cannot keep .* from: .*writes outside.*--run-code unconfined"):
        standard.run(scholar, code, tmp_path)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "evaluate.py",
            "standard",
            "--tasks",
            "paper/humaneval",
            "--run-code",
            "--model",
            "no/model",
            "--output",
            str(tmp_path / "out"),
        ],
    )
    with pytest.raises(UserError, match="writes outside"):
        runpy.run_path(str(ROOT / "tools" / "evaluate.py"))["main"]()
    allowed = paper.CodeRunner(unconfined=True)
    assert re.search("NOT kept from: .*writes outside", allowed.check())
    assert allowed.pass_at_1({"prompt": "x = 1", "test": "def check(y): y", "entry_point": "x"}, [""]) == {
        "pass@1": 1
    }
    assert not allowed.summary()["confined"]


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tasks(tmp_path / "tasks")
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "evaluate.py",
            "standard",
            "--model",
            str(BASE),
            "--tasks",
            "many,write",
            "--include-path",
            str(tmp_path / "tasks"),
            "--samples",
            "4",
            "--output",
            str(tmp_path / "out"),
            "--device",
            "cpu",
        ],
    )
    main = runpy.run_path(str(ROOT / "tools" / "evaluate.py"))["main"]
    whole = list(sys.argv)
    for change, message in (
        (["--temperature", "0.7"], "--temperature 0.7: this benchmark's answers are greedy; omit it"),
        (["--tasks", ""], "--tasks: give at least one task"),
        (["--tasks", " ,"], "--tasks: give at least one task"),
        (["--max-length", "0"], "--max-length must be at least 1"),
    ):
        monkeypatch.setattr(sys, "argv", [*whole, *change])
        with pytest.raises(UserError, match=message):
            main()
    monkeypatch.setattr(sys, "argv", [*whole, "--tasks", "many, write,", "--max-length", "4K"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "tools" / "evaluate.py"), run_name="__main__")
    assert not stop.value.code
    result = json.loads((tmp_path / "out" / "standard.json").read_text())
    (tag,) = paper.load_tasks(
        paper.task_manager(["write"], tmp_path / "tasks"), "written", False, paper.CodeRunner()
    )
    metrics = {"results": {"write": {"exact_match,none": 0.5}}}
    assert tag.task_name == "write" and standard.first_fraction("write", metrics) == 0.5
    assert (
        result["format"] == 2
        and result["task"] == "standard"
        and result["scores"][1] == {"task": "write", "score": 100.0, "count": 4}
        and result["extra"]["questions"] == {"many": 4, "write": 4}
    )
    assert result["settings"]["max_length"] == 4096
    lines = [
        json.loads(line) for line in (tmp_path / "out" / "standard_samples.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 8 and re.search(r"write +100\.00", capsys.readouterr().out)
    # The results come before the samples: where these fail, nothing is lost.
    for name in ("standard.json", "standard_samples.jsonl"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / "standard_samples.jsonl").mkdir()
    with pytest.raises(UserError, match="standard_samples.jsonl cannot be written"):
        main()
    assert json.loads((tmp_path / "out" / "standard.json").read_text())["scores"] == result["scores"]


if __name__ == "__main__":
    _die_after(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
