"""Settings as text: what is printed can be given to --set again, and every setting is described."""

from __future__ import annotations

import dataclasses
import runpy
import sys
from pathlib import Path

import pytest

from megatron_ultralong import __version__, recipes, settings_text
from megatron_ultralong.command_settings import override, type_hints
from megatron_ultralong.config import Lora, Run, sections
from megatron_ultralong.rope.methods import METHODS

ROOT = Path(__file__).parents[2]


def without_notes(run: Run) -> Run:
    return dataclasses.replace(run, notes="", unpublished=())


@pytest.mark.parametrize("name", recipes.names())
def test_what_is_printed_makes_the_same_run(name: str) -> None:
    run = recipes.get(name)
    lines = settings_text.stated(run)
    if run.rope is None:
        assert not [line for line in lines if line.startswith("rope.")]
    assert without_notes(override(run, lines)) == without_notes(run)
    # Also on another recipe, whose own values differ.
    other = recipes.get("smollm2_135m")
    if run.rope is not None and run.model is None:
        assert override(other, lines).train == run.train and override(other, lines).rope == run.rope


def test_changed_values_are_printed() -> None:
    run = override(
        recipes.get("tiny_extend"),
        ["train.lr=1e-5", "train.min_lr=0", "lora.rank=8", "lora.targets=q_proj,v_proj", "parallel.dp=none"],
    )
    lines = settings_text.stated(run)
    for line in ("train.lr=1e-05", "lora.targets=q_proj,v_proj", "parallel.dp=none", "train.async_save=true"):
        assert line in lines
    assert isinstance(run.lora, Lora)


def test_every_setting_is_described() -> None:
    def names(recipe: str) -> set[str]:
        lines = settings_text.described(recipes.get(recipe))
        assert max(len(line) for line in lines if line.startswith(" ")) <= 80
        return {line.partition("=")[0] for line in lines if not line.startswith(" ")}

    assert recipes.get("tiny_extend_sft").rope is None
    assert names("tiny_extend_sft") == set(type_hints())
    of_yarn = {"rope.type", *(f"rope.{f.name}" for f in dataclasses.fields(METHODS["yarn"]))}
    others = {name for name in type_hints() if not name.startswith("rope.")}
    assert names("ultralong_1m") == others | of_yarn


def test_every_setting_has_a_description() -> None:
    kinds = {**sections(), **{f"rope.{name}": kind for name, kind in METHODS.items()}}
    for section, kind in kinds.items():
        for setting in settings_text.documented(section.partition(".")[0], kind):
            assert setting.about and setting.type, setting
    documented = settings_text.documented("train", sections()["train"])
    defaults = {setting.name: setting.default for setting in documented}
    assert defaults["train.seq_length"] is None and defaults["train.async_save"] == "true"


def test_values_types_and_descriptions() -> None:
    text = "\n".join(settings_text.described(recipes.get("ultralong_1m")))
    assert "train.seq_length=1048576    integer, also with K or M\n    Tokens" in text
    assert "memory.recompute=all_but_attention    none | full | all_but_attention\n" in text
    assert "model.hidden_size=(of the loaded model)    integer, also with K or M\n" in text
    # Descriptions of a method's own settings and of those that it inherits.
    assert "rope.ramp=rotation    rotation | dimension\n    Whether the ramp" in text
    assert "rope.theta=500000.0    number | none\n    RoPE base" in text


def tool(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "tools" / "train.py"), run_name="__main__")
    return int(end.value.code or 0)


def test_the_options_of_train(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"megatron_ultralong {__version__}\n"
    assert tool(monkeypatch, "--list-recipes") == 0
    listed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert [line.split()[0] for line in listed] == [*recipes.names(), *recipes.STAGES]
    assert all(len(line.split()) > 2 for line in listed)
    assert tool(monkeypatch, "--recipe", "tiny_stages", "--set", "tiny:train.lr=3e-4", "--print-config") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# tiny\n") and "\n# tiny_extend\n" in printed
    assert printed.count("train.lr=0.0003\n") == 1
    assert tool(monkeypatch, "--recipe", "ultralong_1m", "--set", "help", "train.seq_length=512K") == 0
    printed = capsys.readouterr().out
    assert "train.seq_length=524288    integer" in printed
    heading = " ".join(line.removeprefix("# ") for line in printed.splitlines() if line.startswith("# "))
    assert heading.startswith("ultralong_1m arXiv 2504.06214: ")
    unpublished = recipes.get("ultralong_1m").unpublished
    assert len(unpublished) > 3
    assert heading.endswith(f"not published, this project's own choice: {', '.join(unpublished)}")
    assert tool(monkeypatch, "--recipe", "tiny_stages", "--set", "tiny:help") == 0
    assert "# tiny\n" in capsys.readouterr().out
    assert tool(monkeypatch, "--recipe", "tiny") == 2
    assert "the following arguments are required: --data, --save" in capsys.readouterr().err
