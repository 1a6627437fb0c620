"""Our scorers beside what the official ones returned (tests/golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ultralong.evaluate.scorers import ruler as ruler_scores

CASES = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "golden" / "official_scores.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]


def of(bench: str) -> list[dict]:
    found = [case for case in CASES if case["bench"] == bench]
    assert found, f"no cases of {bench}"
    return found


# ---- RULER -------------------------------------------------------------------------------------

RULER = {
    "string_match_all": ruler_scores.string_match_all,
    "string_match_part": ruler_scores.string_match_part,
}


def test_ruler_cases_are_of_both_metrics_and_of_many_scores():
    assert {case["metric"] for case in of("ruler")} == set(RULER)
    assert len({case["score"] for case in of("ruler")}) >= 4


@pytest.mark.parametrize("case", of("ruler"), ids=lambda case: f"{case['metric']}-{case['score']}")
def test_ruler(case):
    scorer = RULER[case["metric"]]
    assert scorer([case["pred"]], [case["answers"]]) == pytest.approx(case["score"], abs=1e-6)
    assert scorer([ruler_scores.printable(case["pred"])], [case["answers"]]) == pytest.approx(
        case["score"], abs=1e-6
    )


def test_ruler_scores_of_several_answers_are_their_mean():
    for metric, scorer in RULER.items():
        cases = [case for case in of("ruler") if case["metric"] == metric]
        mean = sum(case["score"] for case in cases) / len(cases)
        assert scorer([case["pred"] for case in cases], [case["answers"] for case in cases]) == pytest.approx(
            mean, abs=0.01
        )
