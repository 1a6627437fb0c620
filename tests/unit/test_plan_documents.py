"""Documents of packed rows in plans: what placement makes ranks compute and send, and where lengths come
from."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest

from megatron_ultralong.config import Parallel
from megatron_ultralong.context_parallel.placement import PAIRS, place
from megatron_ultralong.errors import UserError
from megatron_ultralong.measure import placement as measured
from megatron_ultralong.planning import documents, packing_report, report, time
from megatron_ultralong.planning.documents import DocumentLengths
from megatron_ultralong.planning.report import PlanRequest
from tests.text import write_rows
from tests.unit.test_context_parallel import tokens_passed

ODD = DocumentLengths((700, 3, 90, 1, 230, 40, 512, 17))


def test_rows_are_filled_and_the_last_document_is_cut() -> None:
    rows = DocumentLengths((5, 4)).rows(12)
    assert rows == [(0, 5, 9), (0, 4, 9), (0, 5, 9)]  # 5 4 3 of 5, 4 5 3 of 4, ...
    assert DocumentLengths((100,)).rows(12) == [(0,)] * 3
    for wrong in ((), (0,), (3, -1)):
        with pytest.raises(UserError, match="at least 1 token each"):
            DocumentLengths(wrong)


def test_span() -> None:
    assert DocumentLengths((16,)).span(64) == 16 and DocumentLengths((1000,)).span(64) == 64
    assert DocumentLengths((48, 16)).span(64) == (48**2 + 16**2) / 64


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_work_is_that_of_the_placement(ranks: int) -> None:
    length = 1024
    work, rows = ODD.work(length, ranks), ODD.rows(length)
    passed = [tokens_passed(starts, length, ranks) for starts in rows]
    held = length // ranks
    assert work.most_sent == pytest.approx(sum(int(x.sum(1).max()) for x in passed) / 3 / held)
    assert work.messages == pytest.approx(sum(int((x > 0).sum(1).max()) for x in passed) / 3)
    assert work.imbalance == pytest.approx(sum(place(s, length, ranks).imbalance for s in rows) / 3)
    assert 1 <= work.imbalance <= 1.05 and 0 < work.rounds <= ranks - 1
    assert work.most_sent <= 1.1 * work.sent_in_rings
    assert work.most_sent_far == work.most_sent, "a node has one rank"
    near = ODD.work(length, ranks, ranks_per_node=2)
    assert near.most_sent_far <= work.most_sent
    # Of the slowest rank. It is one of the row's, and none is slower by the same weights.
    starts = rows[0]
    one = DocumentLengths(tuple(b - a for a, b in itertools.pairwise([*starts, length])))
    slowest, placed = one.work(length, ranks), place(starts, length, ranks)
    mean = sum(placed.work) / ranks
    found = [
        (w / mean, int(sent) / held, int(received) / held)
        for w, sent, received in zip(placed.work, passed[0].sum(1), passed[0].sum(0), strict=True)
    ]
    assert (slowest.attention, slowest.sent, slowest.received) in [pytest.approx(x) for x in found]
    weight = held / mean
    assert slowest.attention + weight * sum(n * getattr(slowest, x) for x, n in PAIRS.items()) >= max(
        w + weight * (PAIRS["sent"] * s + PAIRS["received"] * r) for w, s, r in found
    )


def test_what_sending_costs_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """`placement.PAIRS`, by which documents are placed, are the estimates of plans."""
    run, model = packing_report.run_of(65536, Parallel(cp=8)), packing_report.MODEL
    machine, equal = packing_report.machine(ODD, 8), DocumentLengths((4096,))
    nothing = dataclasses.asdict(equal.work(65536, 8)) | {"attention": 1.0}
    tokens = 65536 // 8

    def seconds(**work: float) -> float:
        monkeypatch.setattr(time, "ring_work", lambda *_: documents.RowWork(**{**nothing, **work}))
        parts = time._micro_batch_time(run, time.workload(run, model, documents=equal), machine)
        return parts["attention"] + parts["CP ring, merges and hops"]

    pairs = tokens * (equal.span(65536) + 1) / 2
    of_a_pair = seconds() / pairs
    for name, count in PAIRS.items():
        assert (seconds(**{name: 1.0}) - seconds()) / tokens / of_a_pair == pytest.approx(count, rel=0.06), (
            name
        )


@pytest.mark.parametrize(("cp", "least"), [(8, 0.85), (64, 0.75)])
def test_estimated_share_of_ideal_of_every_distribution(cp: int, least: float) -> None:
    length = 1 << 20
    settings = measured.PlacementSettings(length=length, cp=[cp])
    run = packing_report.run_of(length, Parallel(cp=cp))
    for name, lengths in measured.distributions(settings):
        share = time.share_of_ideal(run, packing_report.MODEL, packing_report.machine(lengths, cp))
        assert least <= share <= 1, name
        work = time.ring_work(run, lengths)
        assert work.imbalance <= 1.05 and work.most_sent <= 1.1 * max(work.sent_in_rings, 0.3), name


def test_whole_documents_send_nothing() -> None:
    work = DocumentLengths((32,)).work(256, 8)
    assert (work.imbalance, work.most_sent, work.sent_in_rings, work.messages, work.rounds) == (1, 0, 0, 0, 0)


def test_lengths_are_read_from_rows_and_from_text(tmp_path: Path) -> None:
    text = tmp_path / "lengths.txt"
    text.write_text("5\n4\n")
    assert documents.read(text).lengths == (5, 4)
    prefix = write_rows(tmp_path / "rows", [[1] * 65] * 2, starts=[[0, 10, 64], [0]])
    assert documents.read(Path(prefix)).lengths == (10, 54, 64)
    text.write_text("few")
    with pytest.raises(UserError, match="expected the prefix of packed rows, or a text file with a length"):
        documents.read(text)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        documents.read(tmp_path / "none")
    masked = ["data.documents=masked"]
    for arguments, message in (
        ({"document_length": "8K", "documents": text, "settings": masked}, "both state lengths; leave one"),
        ({"documents": text}, "--documents applies only where attention stays inside documents"),
    ):
        text.write_text("7")
        with pytest.raises(UserError, match=message):
            report.report(PlanRequest(gpus=64, recipe="ultralong_1m", **arguments))  # type: ignore[arg-type]


def test_share_of_ideal() -> None:
    """Nothing to send: all of it. A row cut zigzag passes all keys on, and waits for the rank with most."""
    equal = DocumentLengths((4096,))
    run, machine = packing_report.run_of(65536, Parallel(cp=8)), packing_report.machine(equal, 8)
    model = packing_report.MODEL
    assert time.share_of_ideal(run, model, machine) == 1
    assert time.share_of_ideal(run, model, machine, imbalance=1.0) < 0.5
    assert time.share_of_ideal(run, model, machine, imbalance=2.0) < time.share_of_ideal(
        run, model, machine, imbalance=1.0
    )
    assert measured.zigzag_imbalance((0,), 64, 4) == pytest.approx(1)
    starts = [0, 32]
    work = []
    for rank in range(4):
        chunks = [range(8 * c, 8 * c + 8) for c in (rank, 7 - rank)]
        work.append(sum(at % 32 + 1 for at in itertools.chain(*chunks)))
    assert measured.zigzag_imbalance(starts, 64, 4) == pytest.approx(4 * max(work) / sum(work))


def test_what_is_said_of_rows(tmp_path: Path) -> None:
    length = 16384
    prefix = write_rows(
        tmp_path / "rows", [[1] * (length + 1)] * 2, starts=[list(range(0, length, 4096)), [0, 8192]]
    )
    lines = packing_report.lines(Path(prefix), length)
    assert lines[0].endswith("equal ones of 6,144 tokens; the row with most has 1.33 times the mean")
    assert len(lines) == 2 and lines[1].startswith("  on CP 8 ranks: the one with most has 1.000 of the mean")
