"""Files of format 1, written before all benchmarks had one form of results: reports over them, and stopped
runs that resume from their kept answers. The files in tests/golden/format_1 were written by that version."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from megatron_ultralong.evaluate.backends.protocol import Completion, GenerationRequest
from megatron_ultralong.evaluate.pipeline import command, stages
from megatron_ultralong.evaluate.pipeline.results import BENCHMARKS
from megatron_ultralong.evaluate.report import curves, heat_map, read_results, tables
from megatron_ultralong.evaluate.tasks import lveval
from megatron_ultralong.evaluate.tasks.niah import run as niah
from megatron_ultralong.evaluate.tasks.niah.prompts import NiahSettings
from megatron_ultralong.evaluate.tasks.ruler import run as ruler
from megatron_ultralong.evaluate.tasks.ruler.settings import RulerSettings
from tests import text
from tests.answering import Answering

OLD = Path(__file__).parents[1] / "golden" / "format_1"


def table_rows(markdown: str) -> list[str]:
    """Rows of the tables, with their marks; not the notes, whose wording is not part of a result."""
    return [line for line in markdown.splitlines() if line.startswith(("|", "##"))]


def test_a_report_over_old_files_has_the_same_tables(tmp_path: Path) -> None:
    lines = tables.write([str(OLD)], tmp_path)
    assert not any("left out" in line for line in lines), lines
    expected = table_rows((OLD / "report" / "report.md").read_text(encoding="utf-8"))
    heading = "## Several pass keys per prompt, fraction found"
    expected = [row.replace("## Several pass keys in a prompt, share found", heading) for row in expected]
    assert table_rows((tmp_path / "report.md").read_text(encoding="utf-8")) == expected
    names = sorted(path.name for path in (OLD / "report").glob("*.csv"))
    assert names == sorted(path.name for path in tmp_path.glob("*.csv")) and len(names) == 8
    for name in names:
        old, new = (
            [
                {key: value for key, value in row.items() if key != "notes"}
                for row in csv.DictReader((folder / name).read_text(encoding="utf-8").splitlines())
            ]
            for folder in (OLD / "report", tmp_path)
        )
        assert old == new, name


def test_every_old_form_is_converted_and_written_as_format_2(tmp_path: Path) -> None:
    results = {}
    for path in sorted(OLD.glob("*/*.json")):
        result = read_results.read_for(path, lambda result: None)
        result.write(tmp_path / path.name)
        assert read_results.read_for(tmp_path / path.name, lambda result: None) == result
        results[path.parent.name] = result
    assert {result.task for result in results.values()} == set(BENCHMARKS)
    heat_map.check(results["niah"])
    curves.check(results["perplexity"])
    first = results["lveval"].scores[0]
    assert (first.task, first.length, first.score, first.count) == ("hotpotwikiqa_mixup", 16384, 0.0, 2)
    assert results["ruler"].settings["prompts"]["vt"]["wording"] == "own"
    assert results["infinitebench"].settings["limit"] == 1
    assert results["niah_several"].settings["needles"] == 3


def test_replacing_an_old_file_says_what_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for old in sorted(OLD.glob("*/*.json")):
        result = read_results.read_for(old, lambda result: None)
        path = tmp_path / f"{result.task}.json"
        other_model = {**result.model, "path": "other"}
        for changed, words in (
            (replace(result, settings={}), ""),
            (replace(result, model=other_model), "model"),
            (replace(result, model=other_model, scores=result.scores[:-1]), "model, tasks or lengths"),
        ):
            shutil.copyfile(old, path)
            command.write_results(changed, tmp_path, "table")
            line = f"{path} replaces results with other {words}; give another --output to keep both\n"
            assert capsys.readouterr().out == (line if words else "") + f"table\n{path} written\n", old


# ---- kept answers ------------------------------------------------------------------------------


class Silent(Answering):
    """A backend that must not be asked; it describes itself as the one of the old files."""

    def __init__(self) -> None:
        super().__init__(lambda prompt: "", dies_after=0, max_position=4096)
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=text.tokenizer("llama3"), bos_token="<|begin|>", eos_token="<|end|>"
        )

    def describe(self) -> dict:
        return {
            "backend": "transformers",
            "path": "base",
            "fingerprint": "0123456789ab",
            "max_position": 4096,
            "settings": {"temperature": 0.0},
        }


def test_kept_answers_of_niah(tmp_path: Path) -> None:
    shutil.copytree(OLD / "niah", tmp_path / "niah")
    settings = NiahSettings(lengths=(400, 8192), depths=(0.0, 100.0), trials=1)
    result = niah.run(Silent(), settings, answers=tmp_path / "niah" / "niah.predictions.jsonl")
    old = json.loads((OLD / "niah" / "niah.json").read_text())
    assert result.extra["trials"] == old["trials"] and result.extra["cells"] == old["cells"]


@pytest.mark.parametrize("stopped", [False, True])
def test_kept_answers_of_ruler(stopped: bool, tmp_path: Path) -> None:
    shutil.copytree(OLD / "ruler", tmp_path / "ruler")
    settings = RulerSettings(
        out=tmp_path / "ruler", tasks=("niah_single_1",), lengths=(2000,), samples=2, own_words=True
    )
    predictions = settings.prediction_file("niah_single_1", 2000)
    written = predictions.read_bytes()
    if stopped:
        predictions.unlink()
        prompts = settings.prompt_file("niah_single_1", 2000)
        first = prompts.read_text().splitlines(keepends=True)[0]
        prompts.with_name("2000.jsonl.part").write_text(first + '{"index": 1, "inp')
        prompts.unlink()
    ruler.prepare(settings, Silent().tokenizer)
    assert (
        settings.prompt_file("niah_single_1", 2000).read_bytes()
        == (OLD / "ruler" / "data" / "niah_single_1" / "2000.jsonl").read_bytes()
    )
    ruler.predict(settings, Silent())
    assert predictions.read_bytes() == written
    old = read_results.read_for(OLD / "ruler" / "ruler.json", lambda result: None)
    assert ruler.score(settings).scores == tuple(
        one for one in old.scores if (one.task, one.length) == ("niah_single_1", 2000)
    )


@pytest.mark.parametrize("stopped", [False, True])
def test_kept_answers_of_lveval(stopped: bool, tmp_path: Path) -> None:
    shutil.copytree(OLD / "lveval", tmp_path / "lveval")
    out = tmp_path / "lveval"
    written = (out / "lveval.predictions.jsonl").read_bytes()
    if stopped:
        (out / "lveval.predictions.jsonl").unlink()

    class Refusing(Answering):
        """Refuses again what the old endpoint refused."""

        def generate(self, requests: list[GenerationRequest]):
            for place, (request, finish) in enumerate(zip(requests, refused, strict=True)):
                self.prompts.append(request.id)
                yield place, Completion(text="", tokens_in=0, tokens_out=0, finish=finish)

    lines = [json.loads(line) for line in written.decode().splitlines()[1:]]
    refused = [line["refused"] for line in lines if "refused" in line]
    backend = Refusing(lambda prompt: "", name="one", max_position=240)
    stages.predict(backend, out, "lveval")
    assert len(backend.prompts) == len(refused) == 2, "only refused prompts are asked again"
    assert (out / "lveval.predictions.jsonl").read_bytes() == written
    old = read_results.read_for(OLD / "lveval" / "lveval.json", lambda result: None)
    assert lveval.results(out).scores == old.scores
