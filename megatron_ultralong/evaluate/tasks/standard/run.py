"""Standard benchmarks through lm-evaluation-harness: the paper's five by its protocol, and every other task the harness has.

    paper/mmlu        mmlu                  5 shots, accuracy of the likeliest of four letters
    paper/mmlu_pro    mmlu_pro              5 shots with their reasoning, "answer is (X)" is read
    paper/math        hendrycks_math        0 shots, exact match; asked here for \\boxed{}, whose content is compared as the task compares
    paper/gsm8k       gsm8k_cot_llama       8 shots with their reasoning, exact match of the last number
    paper/humaneval   humaneval(_instruct)  0 shots, pass@1 of the greedy answer; run by code_sandbox.py, not by the harness

Prompts, examples, answers and comparisons are the harness's own but for those two changes (arXiv 2504.06214 says shots and metrics, not prompts).
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends.protocol import identity
from megatron_ultralong.evaluate.tasks.standard import code_sandbox

FORMAT = 1
"""Version of the results JSON."""
BOXED = "{{problem}}\n\nReason step by step, and give the final answer at the end as \\boxed{answer}."
CODE_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One of the paper's."""

    name: str
    """As the paper's table has it."""
    task: str
    """Of the harness."""
    folder: str
    """Where the harness keeps it."""
    shots: int
    metric: str
    """As the harness reports it: metric,filter."""
    answer_tokens: int | None = None
    """Written at most; None = as the task says."""


PAPER = {
    "paper/mmlu": Benchmark(name="MMLU", task="mmlu", folder="mmlu/default", shots=5, metric="acc,none"),
    "paper/mmlu_pro": Benchmark(
        name="MMLU-Pro", task="mmlu_pro", folder="mmlu_pro", shots=5, metric="exact_match,custom-extract"
    ),
    # Neither says how much may be written, and the harness's 256 tokens cut reasoning off.
    "paper/math": Benchmark(
        name="MATH",
        task="hendrycks_math",
        folder="hendrycks_math",
        shots=0,
        metric="exact_match,none",
        answer_tokens=2048,
    ),
    "paper/gsm8k": Benchmark(
        name="GSM8K",
        task="gsm8k_cot_llama",
        folder="gsm8k",
        shots=8,
        metric="exact_match,flexible-extract",
        answer_tokens=1024,
    ),
    "paper/humaneval": Benchmark(
        name="HumanEval", task="humaneval", folder="humaneval", shots=0, metric="pass@1,none"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked."""

    tasks: tuple[str, ...] = ("paper",)
    """paper = the paper's five; one of them, like paper/math; or a task, group or tag of the harness, with
    its own settings."""
    limit: int | None = None
    """Questions of each task; None = all."""
    include_path: Path | None = None
    """A folder with task files of your own."""
    chat: str = "auto"
    """auto = with the tokenizer's chat template where it has one; yes, no."""
    run_code: bool = False
    """Run the programs that the model writes."""
    max_length: int | None = None
    """Prompt and answer together, tokens: longer prompts lose their beginning. None = the model's own
    positions; where they are not known, as an endpoint's, nothing is cut."""

    def names(self) -> list[str]:
        """The tasks, `paper` taken apart. UserError where one is named twice, or runs code and is not allowed
        to."""
        names = [name for task in self.tasks for name in (PAPER if task == "paper" else [task])]
        if not names or len({PAPER[name].task if name in PAPER else name for name in names}) < len(names):
            raise UserError("--tasks: give at least one task, and each only once")
        if "paper/humaneval" in names and not self.run_code:
            others = ",".join(name for name in names if name != "paper/humaneval")
            raise UserError(
                "HumanEval runs Python that the model wrote: allow it with --run-code (limited, see docs/how-to-evaluate-standard.md)"
                + (f", or leave it out: --tasks {others}" if others else "")
            )
        if self.limit is not None and self.limit < 1:
            raise UserError("--limit must be at least 1")
        if self.max_length is not None and self.max_length < 1:
            raise UserError("--max-length must be at least 1")
        if self.include_path is not None and not self.include_path.is_dir():
            raise UserError(f"--include-path {self.include_path}: no such directory")
        return names


def run(backend: Any, settings: Settings, out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(The results JSON's values, every question with what was answered).

    backend: see lm_eval_model.py. Answers are kept in `out` as they come, and are not asked for again.
    UserError where the harness is not installed, knows no such task, or cannot have its data.
    """
    names = settings.names()
    try:
        import lm_eval
    except ImportError:
        raise UserError(
            "standard benchmarks need lm-evaluation-harness: pip install 'megatron_ultralong[eval]'"
        ) from None
    from megatron_ultralong.evaluate.tasks.standard.lm_eval_model import Harness

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    template = bool(getattr(backend.tokenizer, "chat_template", None))
    if settings.chat == "yes" and not template:
        raise UserError("--chat yes: this model's tokenizer has no chat template; use --chat no")
    chat = template and settings.chat != "no"
    started, runner = time.time(), _CodeRunner()
    if "paper/humaneval" in names:
        runner.check()
    manager = _manager(names, settings.include_path)
    loaded = {name: _load(manager, name, chat, runner) for name in names}
    model = Harness(backend, max_length=settings.max_length)
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=[task for tasks in loaded.values() for task in tasks],
        task_manager=manager,
        limit=settings.limit,
        bootstrap_iters=0,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        use_cache=str(out / f"answers-{_identity(backend, model.max_length)}"),
    )
    scores: dict[str, float] = {}
    for name, tasks in loaded.items():
        if name in PAPER:
            scores[PAPER[name].name] = round(100 * found["results"][PAPER[name].task][PAPER[name].metric], 2)
        else:
            for task in tasks:  # one, or all of a tag
                scores |= _first_share(getattr(task, "task_name", name), found)
    # The samples tell a question once for each way its answer is read.
    asked = {
        (task, sample["doc_id"]): sample["arguments"]
        for task, every in found["samples"].items()
        for sample in every
    }
    result = {
        "format": FORMAT,
        "task": "standard",
        "harness": f"lm-evaluation-harness {lm_eval.__version__}",
        "model": backend.describe(),
        "settings": {
            "tasks": names,
            "limit": settings.limit,
            "chat": chat,
            "max_length": model.max_length,
            "paper": {name: asdict(PAPER[name]) for name in names if name in PAPER},
        },
        "scores": scores,
        "metrics": {task: _plain(values) for task, values in found["results"].items()},
        "shots": found.get("n-shot", {}),
        "questions": {task: counts["effective"] for task, counts in found["n-samples"].items()},
        "versions": found.get("versions", {}),
        "prompts_cut": model.cut_among(itertools.chain.from_iterable(asked.values())),
        "unanswered": model.unanswered,
        "seconds": round(time.time() - started, 1),
    }
    if runner.outcomes:
        result["code"] = {
            "programs": len(runner.outcomes),
            "seconds": CODE_SECONDS,
            "network_off": all(o.network_off for o in runner.outcomes),
            "writes_confined": all(o.writes_confined for o in runner.outcomes),
        }
    samples = [
        {
            "task": task,
            "question": sample["doc_id"],
            "prompt_sha256": sample["prompt_hash"],
            "target": sample["target"],
            "answers": sample["resps"],
            "read": sample["filtered_resps"],
            **{metric: sample[metric] for metric in sample["metrics"]},
        }
        for task, every in found["samples"].items()
        for sample in every
    ]
    return result, samples


# ---- tasks -------------------------------------------------------------------------------------


def _manager(names: list[str], include_path: Path | None) -> Any:
    """The harness's index of tasks: of the folders that are enough for `names`, else of all its thousands of
    files, which takes long."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    own = [str(include_path)] if include_path else []
    folders = sorted({str(root / PAPER[name].folder) for name in names if name in PAPER})
    few = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[*folders, *own])
    if all(name in PAPER or name in few.all_subtasks for name in names):
        return few
    return lm_eval.tasks.TaskManager(include_path=own)


def _load(manager: Any, name: str, chat: bool, runner: _CodeRunner) -> list[Any]:
    """The harness's task, group or tasks of a tag, with the paper's settings where it is one of the paper's."""
    benchmark = PAPER.get(name)
    task = benchmark.task if benchmark else name
    known = [*PAPER, *manager.all_tasks]
    if benchmark is None and name not in manager.all_tasks:
        near = difflib.get_close_matches(name, known, 1)
        raise UserError(
            f"--tasks {name}: lm-evaluation-harness has no such task"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    try:
        loaded = manager.load([_humaneval(chat, runner) if benchmark and task == "humaneval" else task])
    except Exception as error:  # whatever data sets and tasks raise: no network, no such file, a broken cache, a package that is missing
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"--tasks {name}: cannot be loaded ({line[:200]}); data is fetched once where the Hugging Face hub can be reached: "
            "point HF_HOME to that cache"
        ) from None
    if any(getattr(leaf, "UNSAFE_CODE", False) for leaf in loaded["tasks"].values()):
        raise UserError(
            f"--tasks {name}: the harness would run the model's programs with no limits; only paper/humaneval runs programs here"
        )
    if benchmark:
        for leaf in loaded["tasks"].values():
            leaf.set_config("num_fewshot", benchmark.shots)
            if benchmark.answer_tokens:
                leaf.set_config("generation_kwargs", {"max_gen_toks": benchmark.answer_tokens}, update=True)
            if task == "hendrycks_math":
                leaf.set_config("doc_to_text", BOXED)
                leaf.set_config("process_results", boxed_match)
    return [loaded["groups"][task]] if task in loaded["groups"] else list(loaded["tasks"].values())


def boxed_match(doc: dict[str, Any], results: list[str]) -> dict[str, int]:
    """1 where the content of the answer's last \\boxed{} equals the solution's, by hendrycks_math's own
    comparison."""
    from lm_eval.tasks.hendrycks_math import utils

    box = utils.last_boxed_only_string(results[0])
    try:
        answer = utils.remove_boxed(box) if box else None
    except AssertionError:  # a box that is not closed
        answer = None
    return {"exact_match": int(answer is not None and utils.is_equiv(answer, doc["answer"]))}


def _humaneval(chat: bool, runner: _CodeRunner) -> dict[str, Any]:
    """The harness's task without its functions: they fetch a scorer when they are imported, and run programs
    with no limits."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = Path(lm_eval.tasks.__file__).parent / "humaneval"
    task = load_yaml(folder / ("humaneval_instruct.yaml" if chat else "humaneval.yaml"), resolve_func=False)
    return {
        **task,
        "task": "humaneval",
        "unsafe_code": False,
        "filter_list": None,
        "process_results": runner.pass_at_1,
        "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
    }


class _CodeRunner:
    """Runs HumanEval's answers, and remembers what became of them."""

    def __init__(self) -> None:
        self.outcomes: list[code_sandbox.Outcome] = []

    def check(self) -> None:
        """UserError where no program can be run here: all would count as wrong."""
        outcome = code_sandbox.run("assert 1 + 1 == 2")
        if not outcome.passed:
            raise UserError(f"HumanEval: programs cannot be run on this machine ({outcome.reason})")

    def pass_at_1(self, doc: dict[str, Any], results: list[str]) -> dict[str, int]:
        body = results[0].split("```")[0]  # in a chat the function is told inside a code block
        self.outcomes.append(
            code_sandbox.run(
                f"{doc['prompt']}{body}\n{doc['test']}\ncheck({doc['entry_point']})", seconds=CODE_SECONDS
            )
        )
        return {"pass@1": int(self.outcomes[-1].passed)}


# ---- results -----------------------------------------------------------------------------------


def _first_share(task: str, found: dict[str, Any]) -> dict[str, float]:
    """{task: percent}: its first metric that is a share of 1 and better when higher."""
    higher = found.get("higher_is_better", {}).get(task, {})
    shares = [
        value
        for key, value in _plain(found["results"].get(task, {})).items()
        if higher.get(key.split(",")[0], True) and 0 <= value <= 1
    ]
    return {task: round(100 * shares[0], 2)} if shares else {}


def _plain(values: dict[str, Any]) -> dict[str, float]:
    """The numbers among a task's results; spreads are not computed here."""
    return {
        key: float(value)
        for key, value in values.items()
        if "," in key and "stderr" not in key and isinstance(value, (int, float))
    }


def _identity(backend: Any, max_length: int | None) -> str:
    """Of the model, its tokenizer and what it is shown, so that its kept answers are no other's: they are
    known by their texts alone."""
    tokenizer = backend.tokenizer
    words = [
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items()),
        tokenizer.chat_template,
    ]
    return hashlib.sha256(
        json.dumps([identity(backend), words, max_length], sort_keys=True, default=str).encode()
    ).hexdigest()[:12]


def table(result: dict[str, Any]) -> str:
    """Scores as plain text."""
    width = max((len(name) for name in result["scores"]), default=4)
    rows = [f"{name.ljust(width)}  {score:6.2f}" for name, score in result["scores"].items()]
    if result["prompts_cut"]:
        rows.append(
            f"{result['prompts_cut']} prompts lost their beginning, to {result['settings']['max_length']:,} tokens with the answer"
        )
    if result["unanswered"]:
        rows.append(
            f"{result['unanswered']} prompts were refused by the endpoint and count as wrong; the same command asks them again"
        )
    return "\n".join(rows)
