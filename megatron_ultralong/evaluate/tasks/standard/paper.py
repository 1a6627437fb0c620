"""The paper's five benchmarks (arXiv 2504.06214) as tasks of lm-evaluation-harness, and how tasks are loaded.

    paper/mmlu        mmlu                  5 shots, accuracy of the most likely of four letters
    paper/mmlu_pro    mmlu_pro              5 shots with reasoning; the answer is read from "answer is (X)"
    paper/math        hendrycks_math        0 shots, exact match of the content of \\boxed{}
    paper/gsm8k       gsm8k_cot_llama       8 shots with reasoning, exact match of the last number
    paper/humaneval   humaneval(_instruct)  0 shots, pass@1 of the greedy answer, run by evaluate/code_sandbox

Prompts, examples, answers and comparisons are the harness's own, except for the question of paper/math, which
asks for \\boxed{}, and the way programs are run: the paper specifies shots and metrics, but no prompts.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.code_sandbox import sandbox

BOXED = "{{problem}}\n\nReason step by step, and give the final answer at the end as \\boxed{answer}."
CODE_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class PaperBenchmark:
    """One of the paper's benchmarks."""

    name: str
    """In the paper's table."""
    task: str
    """Task or group of the harness."""
    folder: str
    """Folder of the task in the harness."""
    shots: int
    metric: str
    """As the harness reports it: metric,filter."""
    answer_tokens: int | None = None
    """Maximum tokens to generate; None = as the task defines."""


PAPER = {
    "paper/mmlu": PaperBenchmark(name="MMLU", task="mmlu", folder="mmlu/default", shots=5, metric="acc,none"),
    "paper/mmlu_pro": PaperBenchmark(
        name="MMLU-Pro", task="mmlu_pro", folder="mmlu_pro", shots=5, metric="exact_match,custom-extract"
    ),
    # The next two define no maximum, and the harness's default of 256 tokens cuts reasoning off.
    "paper/math": PaperBenchmark(
        name="MATH",
        task="hendrycks_math",
        folder="hendrycks_math",
        shots=0,
        metric="exact_match,none",
        answer_tokens=2048,
    ),
    "paper/gsm8k": PaperBenchmark(
        name="GSM8K",
        task="gsm8k_cot_llama",
        folder="gsm8k",
        shots=8,
        metric="exact_match,flexible-extract",
        answer_tokens=1024,
    ),
    "paper/humaneval": PaperBenchmark(
        name="HumanEval", task="humaneval", folder="humaneval", shots=0, metric="pass@1,none"
    ),
}


def task_manager(names: list[str], include_path: Path | None) -> Any:
    """The harness's index of tasks: only of the folders that `names` need where these suffice, otherwise of
    all its thousands of files, which takes long."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    own = [str(include_path)] if include_path else []
    folders = sorted({str(root / PAPER[name].folder) for name in names if name in PAPER})
    few = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[*folders, *own])
    if all(name in PAPER or name in few.all_subtasks for name in names):
        return few
    return lm_eval.tasks.TaskManager(include_path=own)


def load_tasks(manager: Any, name: str, chat: bool, runner: CodeRunner) -> list[Any]:
    """Load a task, a group or the tasks of a tag, with the paper's settings where it is one of the
    paper's."""
    benchmark = PAPER.get(name)
    task = benchmark.task if benchmark else name
    if benchmark is None and name not in manager.all_tasks:
        near = difflib.get_close_matches(name, [*PAPER, *manager.all_tasks], 1)
        raise UserError(
            f"--tasks {name}: lm-evaluation-harness has no such task"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    try:
        loaded = manager.load([_humaneval(chat, runner) if benchmark and task == "humaneval" else task])
    except Exception as error:  # anything that data sets and tasks raise: no network, a missing file or package, a broken cache
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"--tasks {name}: cannot be loaded ({line[:200]}); its data is downloaded once where the Hugging Face hub can be "
            "reached: set HF_HOME to that cache"
        ) from None
    leaves = list(loaded["tasks"].values())
    if any(getattr(leaf, "UNSAFE_CODE", False) for leaf in leaves):
        raise UserError(
            f"--tasks {name}: the harness would run the model's programs without limits; only paper/humaneval runs programs here"
        )
    if benchmark:
        for leaf in leaves:
            _apply_protocol(leaf, benchmark)
    return [loaded["groups"][task]] if task in loaded["groups"] else leaves


def _apply_protocol(task: Any, benchmark: PaperBenchmark) -> None:
    """Give a task of the harness the paper's settings."""
    task.set_config("num_fewshot", benchmark.shots)
    if benchmark.answer_tokens:
        task.set_config("generation_kwargs", {"max_gen_toks": benchmark.answer_tokens}, update=True)
    if benchmark.task == "hendrycks_math":
        task.set_config("doc_to_text", BOXED)
        task.set_config("process_results", boxed_match)


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


def _humaneval(chat: bool, runner: CodeRunner) -> dict[str, Any]:
    """The harness's task without its functions, which download a scorer on import and run programs without
    limits."""
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


class CodeRunner:
    """Runs HumanEval's answers and records their outcomes. unconfined: also where the sandbox cannot hold all
    of its rules."""

    def __init__(self, unconfined: bool = False) -> None:
        self.unconfined = unconfined
        self.outcomes: list[sandbox.Outcome] = []

    def check(self) -> str:
        """Try the sandbox on this machine; returns a line on what programs may do here.

        UserError where no program can be run, since all answers would count as wrong, and where the sandbox
        does not hold.
        """
        outcome = sandbox.probe()
        failed = outcome.reason.removeprefix("AssertionError: ")
        if not outcome.passed and failed == outcome.reason:
            raise UserError(f"HumanEval: programs cannot be run on this machine ({outcome.reason})")
        if failed and not self.unconfined:
            raise UserError(
                f"--run-code: this machine cannot keep the model's programs from: {failed} (needs Linux on x86_64 or "
                "aarch64 with seccomp, and Landlock or user namespaces); in a container or virtual machine that may be "
                "lost, allow it with --run-code unconfined"
            )
        return (
            f"HumanEval's programs: {CODE_SECONDS:g} s, {sandbox.THREADS} threads; "
            f"held by: {' and '.join(outcome.held_by) or 'nothing'}"
            + (
                f"; NOT kept from: {failed}"
                if failed
                else "; no other processes, no sockets, no writes elsewhere"
            )
        )

    def pass_at_1(self, doc: dict[str, Any], results: list[str]) -> dict[str, int]:
        body = results[0].split("```")[0]  # in a chat the function is in a code block
        program = f"{doc['prompt']}{body}\n{doc['test']}\ncheck({doc['entry_point']})"
        self.outcomes.append(sandbox.run(program, seconds=CODE_SECONDS, unconfined=self.unconfined))
        return {"pass@1": int(self.outcomes[-1].passed)}

    def summary(self) -> dict[str, Any]:
        """The programs and the limits they ran under, for the results."""
        held_by = {outcome.held_by for outcome in self.outcomes}
        return {
            "programs": len(self.outcomes),
            "seconds": CODE_SECONDS,
            "confined": all(len(mechanisms) == 2 for mechanisms in held_by),
            "held_by": sorted({name for mechanisms in held_by for name in mechanisms}),
        }
