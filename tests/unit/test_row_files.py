"""Packed rows that were changed after they were written, or made with another tokenizer: each is found."""

from __future__ import annotations

import itertools
import json
import pickle
import random
import runpy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest

from megatron_ultralong import config, recipes
from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.command_settings import override
from megatron_ultralong.config import Run
from megatron_ultralong.data import loader, row_files, row_writer, tokenizer
from megatron_ultralong.data.packed_rows import BlendedDataset, PackedDataset, open_blend
from megatron_ultralong.errors import UserError
from megatron_ultralong.train import resume_changes
from tests.text import FAMILIES, save_tokenizer, write_rows

S, ROWS, VOCABULARY = 31, 40, 1000
TOOL = Path(__file__).parents[2] / "tools" / "prepare_data.py"


def write(prefix: Path, seed: int = 0) -> str:
    random_ids = numpy.random.default_rng(seed)
    with row_writer.staged(str(prefix)) as stage:
        writer = row_writer.RowWriter(stage, S + 1, numpy.int32, masks=True, starts=True)
        tokens = random_ids.integers(0, VOCABULARY, (ROWS, S + 1))
        writer.add(tokens, random_ids.integers(0, 2, (ROWS, S + 1)), [[0, 5, 9]] * ROWS)
        writer.finish()
        manifest = {"format": 1, "kind": "pretrain", "seq_length": S, "max_token_id": writer.largest}
        row_writer.write_manifest(stage, {**manifest, "mask": True, "document_starts": True})
    return str(prefix)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "BLOCK", 512)


def test_every_change_is_found(tmp_path: Path) -> None:
    prefix = write(tmp_path / "rows")
    assert PackedDataset(prefix, S).check_files() and open_blend([prefix], S, VOCABULARY)
    names = sorted(path.name for path in tmp_path.iterdir() if path.suffix in (".bin", ".idx"))
    assert names == [f"rows{suffix}" for suffix in sorted(row_writer.SUFFIXES)]
    found, random_places = 0, random.Random(1)
    for name in names:
        data = (tmp_path / name).read_bytes()
        damaged = [None, data[: len(data) // 2], bytes(len(data)), data + b"\0", data[4:] + data[:4]]
        for _ in range(20):
            flipped = bytearray(data)
            flipped[random_places.randrange(len(data))] ^= 1 << random_places.randrange(8)
            damaged.append(bytes(flipped))
        for content in damaged:
            if content is None:
                (tmp_path / name).unlink()
            else:
                (tmp_path / name).write_bytes(content)
            with pytest.raises(UserError, match="rows") as error:
                PackedDataset(prefix, S).check_files()
            assert "\n" not in str(error.value)
            found += 1
        (tmp_path / name).write_bytes(data)
    assert found == 25 * len(names)

    # Rows of another set, with the same sizes.
    other = write(tmp_path / "other", seed=1)
    shutil.copy(f"{other}.bin", f"{prefix}.bin")
    with pytest.raises(
        UserError,
        match=r"rows.bin is not the file that its manifest describes \(its 512 bytes from [\d,]+ on",
    ):
        open_blend([prefix], S, VOCABULARY)


def test_a_start_reads_another_sample_on_each_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = PackedDataset(write(tmp_path / "rows"), S)
    data = bytearray((tmp_path / "rows.bin").read_bytes())
    data[700] ^= 2
    (tmp_path / "rows.bin").write_bytes(data)
    found = []
    for seed in range(20):
        try:
            rows.check_files(4, seed)
        except UserError as error:
            found.append(str(error))
    assert 3 < len(found) < 20, "4 of 10 blocks"
    seeds: list[int] = []
    monkeypatch.setattr(PackedDataset, "check_files", lambda rows, sample, seed: seeds.append(seed))
    for rank in ("0", "3"):
        monkeypatch.setenv("RANK", rank)
        open_blend([rows.prefix], S, VOCABULARY)
    assert len(set(seeds)) == 2


def test_values_are_checked_where_they_are_read(tmp_path: Path) -> None:
    ids, masks = [[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 1, 1, 1], [1, 1, 3, 0]]
    rows = open_blend([write_rows(tmp_path / "a", ids, masks)], 3, 100).datasets[0]
    assert rows[0][0].tolist() == ids[0]
    with pytest.raises(UserError, match=r"a.mask.bin, row 1: contains 3, but a mask is 0 or 1"):
        rows[1]
    for wrong in (100, -1):
        # A manifest that does not know of it.
        prefix = write_rows(tmp_path / "b", [[1, 2, 3, 4], [5, wrong, 7, 8]], max_token_id=8)
        rows = open_blend([prefix], 3, 100).datasets[0]
        with pytest.raises(
            UserError, match=f"b.bin, row 1: token id {wrong} is outside the vocabulary of 100"
        ):
            rows[1]
    for starts in ([1, 2], [0, 2, 2], [0, 4]):
        rows = PackedDataset(write_rows(tmp_path / "c", [[1, 2, 3, 4]], starts=[starts]), 3)
        with pytest.raises(UserError, match="c.docs.bin, row 0: starts of documents are not ascending"):
            rows.document_starts(0)
    with pytest.raises(UserError, match="d contains no token to train on"):
        open_blend([write_rows(tmp_path / "d", ids, trained_tokens=0)], 3, 100)


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    rows = BlendedDataset([PackedDataset(write_rows(tmp_path / "a", [[i] * 4097 for i in range(64)]), 4096)])
    batches = loader.batches(rows, loader.BatchShard(), consumed=0, seed=0, shuffle=False)
    next(batches)
    with (tmp_path / "a.bin").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(
        UserError, match=r"^\S*a.bin was cut short while it was in use; prepare the data again$"
    ):
        for _ in itertools.islice(batches, 64):
            pass
    in_worker = loader._InWorker(loader._TrainingBatches(rows, loader.BatchShard(), 0, 0, False))
    with pytest.raises(
        UserError, match=r"^\S*a.bin was cut short while it was in use; prepare the data again$"
    ):
        loader._batch_or_error(pickle.loads(pickle.dumps(in_worker))[5])


# ---- tokenizers --------------------------------------------------------------------------------


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    made = {}
    for family in FAMILIES:
        save_tokenizer(tmp_path / family, family)
        made[family] = tokenizer.load_tokenizer(tmp_path / family)
    assert len({one.encoding_sha256 for one in made.values()}) == len(FAMILIES)
    for family, one in made.items():
        manifest = {
            "tokenizer": {"name": family, "sha256": one.sha256, "encoding_sha256": one.encoding_sha256}
        }
        tokenizer.check_same(tmp_path / family, "rows", manifest)
        # The same one in another form, as another release writes it.
        again = tmp_path / f"{family} again"
        again.mkdir(exist_ok=True)
        values: dict[str, Any] = json.loads((tmp_path / family / "tokenizer.json").read_text())
        values["post_processor"] = values["truncation"] = None
        if values["model"].get("merges"):
            values["model"]["merges"] = [
                m.split(" ", 1) if isinstance(m, str) else " ".join(m) for m in values["model"]["merges"]
            ]
        (again / "tokenizer.json").write_text(json.dumps(values, indent=3))
        tokenizer.check_same(again, "rows", manifest)
        other = tmp_path / FAMILIES[FAMILIES.index(family) - 1]
        with pytest.raises(
            UserError,
            match=f"rows was made with the tokenizer of {family}, which encodes text differently than that of the model",
        ):
            tokenizer.check_same(other, "rows", manifest)
        values["added_tokens"].append({"id": 7, "content": "<extra>"})
        (again / "tokenizer.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match=r"data.allow_other_tokenizer=true"):
            tokenizer.check_same(again, "rows", manifest)
    tokenizer.check_same(tmp_path, "rows", manifest)  # no tokenizer is there
    tokenizer.check_same(other, "rows", {"tokenizer": {"name": "by-hand"}})


def test_the_check_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write(tmp_path / "rows")

    def check(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["prepare_data.py", "check", *words])
        runpy.run_path(str(TOOL), run_name="prepare")["main"]()
        return capsys.readouterr().out

    assert check(prefix) == f"{prefix}: {ROWS} rows of {S} + 1 tokens; all files match their checksums\n"
    by_hand = write_rows(tmp_path / "by-hand", [[1, 2, 3]], seq_length=2)
    assert "no checksums; file sizes and values are valid" in check(by_hand)
    other = Path(f"{by_hand}.json")
    manifest = json.loads(other.read_text())
    kept = manifest.pop("seq_length")
    other.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"by-hand\.json does not state seq_length"):
        check(by_hand)
    other.write_text(json.dumps({**manifest, "seq_length": kept}))
    with Path(f"{prefix}.bin").open("r+b") as file:
        file.write(b"\1\2\3")
    with pytest.raises(UserError, match="rows.bin is not the file that its manifest describes"):
        check(by_hand, prefix)


# ---- what a run that resumes does differently --------------------------------------------------


def test_changes_on_resume() -> None:
    run = recipes.get("tiny")
    assert isinstance(run, Run)
    stored = TrainingState(model=run.model, rope=run.rope, iteration=10, run=config.to_dict(run))  # type: ignore[arg-type]
    assert resume_changes.notes(stored, run, None, None) == []
    changed = override(run, ["train.lr=0.5", "optim.weight_decay=0.25", "parallel.tp=2", "train.log_every=7"])
    before = run.optim.weight_decay, run.train.lr
    assert resume_changes.notes(stored, changed, Path("a"), Path("b")) == [
        f"changed since iteration 10: train.lr: {before[1]} -> 0.5",
        f"changed since iteration 10: optim.weight_decay: {before[0]} -> 0.25",
        f"changed since iteration 10: parallel.tp: {run.parallel.tp} -> 2",
        "--load a and --load-hf b ignored: the run resumes from its own checkpoint",
    ]
    resume_changes.check(stored, changed)
    with pytest.raises(UserError, match="train.iterations=9 is below the 10 iterations of the checkpoint"):
        resume_changes.check(stored, override(run, ["train.iterations=9", "train.warmup=0"]))
    other = "bf16" if run.train.precision == "fp32" else "fp32"
    with pytest.raises(
        UserError, match=f"train.precision={run.train.precision} and cannot resume with {other}"
    ):
        resume_changes.check(stored, override(run, [f"train.precision={other}"]))
    done = replace(stored, iteration=run.train.iterations)
    assert resume_changes.notes(done, run, None, None)[-1].startswith("complete: iteration")
    by_iteration = override(run, ["data.mix=iterations"])
    started = replace(stored, run=config.to_dict(by_iteration))
    resume_changes.check(started, by_iteration)
    other = ["train.global_batch=2"] if run.train.global_batch != 2 else ["train.global_batch=4"]
    for settings in (other, ["data.mix=rows"]):
        with pytest.raises(UserError, match=r"data\.mix=iterations both decide which rows are used"):
            resume_changes.check(started, override(by_iteration, settings))
    with pytest.raises(UserError, match=r"data\.mix=iterations both decide"):
        resume_changes.check(stored, by_iteration)
