"""Scorers of LV-Eval and InfiniteBench against what the official ones gave (tests/golden: README.md and
own_scores.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ultralong.evaluate.scorers import infinitebench as infinitebench_scores
from megatron_ultralong.evaluate.scorers import lveval as lveval_scores
from megatron_ultralong.official_files import infinitebench, lveval

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [
    json.loads(line)
    for name in ("official_scores.jsonl", "own_scores.jsonl")
    for line in (GOLDEN / name).read_text(encoding="utf-8").splitlines()
]


def ours(case):
    if case["bench"] == "lveval":
        return lveval_scores.score(case["task"], case["pred"], case["answers"], case["answer_keywords"])
    return infinitebench_scores.score(case["task"], case["pred"], case["answers"])


@pytest.mark.parametrize("bench, tasks", [("lveval", lveval.SETS), ("infinitebench", infinitebench.TASKS)])
def test_scores_are_the_official_ones(bench, tasks):
    cases = [case for case in CASES if case["bench"] == bench]
    assert {case["task"] for case in cases} == set(tasks)
    wrong = [(case, found) for case in cases if abs((found := ours(case)) - case["score"]) > 1e-6]
    assert not wrong, wrong[:3]
    for task in tasks:  # a scorer that gives one value to everything would pass otherwise
        assert len({case["score"] for case in cases if case["task"] == task}) > 1, task
