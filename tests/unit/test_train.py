"""Before any rank starts: what tools/train.py refuses, and the figures of a run's schedule and FLOPs."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_ultralong import recipes
from megatron_ultralong.checkpoint import run_directory, training_state
from megatron_ultralong.checkpoint.training_state import TrainingState
from megatron_ultralong.config import Model, Train
from megatron_ultralong.errors import UserError
from megatron_ultralong.model import weight_mapping
from megatron_ultralong.planning import flops
from megatron_ultralong.rope.methods import YaRN
from megatron_ultralong.runtime import agreement
from megatron_ultralong.shapes import LLAMA_3_1_8B
from megatron_ultralong.train.log import Log
from megatron_ultralong.train.optimizer import learning_rate
from tests.checkpoints import write_without_tensors
from tests.text import write_rows

TOOL = Path(__file__).parents[2] / "tools" / "train.py"
MODEL = Model(hidden_size=32, ffn_size=48, layers=2, heads=4, kv_heads=2, head_dim=8, vocab_size=61)
HF = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 61,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
SHORT = (
    "--set",
    "train.seq_length=32",
    "train.iterations=10",
    "train.warmup=0",
    "parallel.cp=1",
    "rope.factor=1",
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model directories `base`, `mixtral`; packed rows `rows`, `empty`, `foreign`, `long`; run directories
    `theirs`, `newer`, `nothing`."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, config in (
        ("base", HF),
        ("mixtral", HF | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}),
    ):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        tensors = {tensor: torch.zeros(shape) for tensor, shape in weight_mapping.hf_shapes(MODEL).items()}
        save_file(tensors, folder / name / "model.safetensors")
    write_rows(folder / "rows", [[1] * 33] * 4)
    write_rows(folder / "foreign", [[1] * 32 + [61]] * 4)
    write_rows(folder / "long", [[1] * 65] * 4)
    write_rows(folder / "empty", [])
    for name, version in (("theirs", training_state.FORMAT), ("newer", training_state.FORMAT + 1)):
        checkpoint = folder / name / "iter_0000007"
        write_without_tensors(checkpoint)
        progress = TrainingState(model=MODEL, rope=YaRN(factor=4.0), iteration=7)
        (checkpoint / "run.json").write_text(json.dumps({"format": version, **dataclasses.asdict(progress)}))
    (folder / "nothing").mkdir()
    (folder / "nothing" / "iter_0000009").mkdir()  # cut short: it holds nothing
    return folder


def train(monkeypatch: pytest.MonkeyPatch, *arguments: object, ranks: int = 1) -> None:
    """tools/train.py in this process, as one of `ranks`."""
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, arguments)])
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    runpy.run_path(str(TOOL), run_name="train")["main"]()


# Arguments with {} for the inputs' folder, ranks, and the line.
REFUSED: list[tuple[str, int, str]] = [
    # Recipe and settings.
    (
        "--recipe tiny-extend --data {}/rows",
        1,
        r"--recipe tiny-extend: no such recipe; did you mean tiny_extend\?",
    ),
    (
        "--recipe tiny --set train.seqlength=32 --data {}/rows",
        1,
        r"--set train.seqlength: no such setting; did you mean train.seq_length\?",
    ),
    (
        "--recipe tiny_extend --data {}/rows",
        2,
        "recipe tiny_extend starts from a model: give --load-hf DIR or --load CKPT",
    ),
    (
        "--recipe tiny --set lora.rank=4 train.seq_length=32 --data {}/rows",
        1,
        "lora.rank trains adapters of a model: give --load-hf DIR or --load CKPT",
    ),
    # Layouts.
    (
        "--recipe tiny_extend --set train.seq_length=66 rope.factor=8 --load-hf {}/base --data {}/rows",
        2,
        "train.seq_length=66 is not divisible by 2 x parallel.cp = 4; the nearest that are: 64 and 68",
    ),
    (
        "--recipe tiny_extend --load-hf {}/base --data {}/rows",
        1,
        "parallel.tp=1 x pp=1 x cp=2 needs a multiple of 2 ranks, but 1 were started",
    ),
    (
        "--recipe tiny_extend --set parallel.cp=1 parallel.tp=8 --load-hf {}/base --data {}/rows",
        8,
        "model.heads=4 is not divisible by parallel.tp=8",
    ),
    (
        "--recipe tiny_extend --set parallel.cp=1 parallel.tp=4 --load-hf {}/base --data {}/rows",
        4,
        "model.kv_heads=2 is not divisible by parallel.tp=4; use a parallel.tp that divides it and more parallel.cp",
    ),
    (
        "--recipe tiny_extend --set parallel.cp=1 parallel.pp=4 --load-hf {}/base --data {}/rows",
        4,
        "model.layers=2 is not divisible by",
    ),
    # Data.
    (
        "--recipe tiny_extend SHORT --load-hf {}/base --data {}/foreign",
        1,
        "foreign contains token id 61, but the model has a vocabulary of 61; it was made with by-hand: prepare the data again",
    ),
    (
        "--recipe tiny_extend SHORT --load-hf {}/base --data {}/rows --valid {}/foreign",
        1,
        "foreign contains token id 61",
    ),
    (
        "--recipe tiny_extend SHORT data.documents=masked --load-hf {}/base --data {}/rows",
        1,
        "rows has no document starts, which data.documents=masked requires; prepare it with --document-starts",
    ),
    (
        "--recipe tiny_extend SHORT data.documents=masked train.micro_batch=2 --load-hf {}/base --data {}/rows",
        1,
        "data.documents=masked requires train.micro_batch=1, not 2",
    ),
    (
        "--recipe tiny_extend SHORT parallel.ulysses=2 --load-hf {}/base --data {}/rows",
        1,
        "parallel.cp=1 is not divisible by parallel.ulysses=2",
    ),
    (
        "--recipe tiny_extend SHORT --load-hf {}/base --data {}/empty",
        1,
        "empty contains no rows; prepare the data again",
    ),
    (
        "--recipe tiny_extend SHORT --load-hf {}/base --data {}/none",
        1,
        "none.json is missing; make packed rows with `ultralong prepare`",
    ),
    (
        "--recipe tiny_extend SHORT --load-hf {}/base --data {}/long",
        1,
        "long has rows of 65 tokens, but sequence length 32 requires 33",
    ),
    # Where the weights come from.
    (
        "--recipe tiny_extend SHORT --load-hf {}/mixtral --data {}/rows",
        1,
        "model_type=mixtral is not supported .supported: llama",
    ),
    (
        "--recipe tiny_extend SHORT --load-hf {}/none --data {}/rows",
        1,
        "none is not a directory; download the Hugging Face model first",
    ),
    (
        "--recipe tiny --load-hf {}/base --data {}/rows",
        1,
        "base has model.hidden_size=32, but the recipe specifies 128; use another recipe or --set",
    ),
    (
        "--recipe tiny_extend SHORT --load {}/nothing --data {}/rows",
        1,
        r"nothing contains no undamaged checkpoint \(iter_0000009: metadata.json is missing\); use another checkpoint",
    ),
    (
        "--recipe tiny_extend SHORT --load {}/newer --data {}/rows",
        1,
        "unsupported format version 3 .expected 1 or 2.; use the release that wrote it",
    ),
]


@pytest.mark.parametrize(("arguments", "ranks", "line"), REFUSED, ids=[line[:40] for _, _, line in REFUSED])
def test_refused(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, ranks: int, line: str
) -> None:
    words = [
        part
        for word in arguments.split()
        for part in (SHORT if word == "SHORT" else (word.replace("{}", str(inputs)),))
    ]
    with pytest.raises(UserError, match=line) as error:
        train(monkeypatch, *words, "--save", tmp_path / "run", ranks=ranks)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists(), "nothing is written before all is known to fit"


def test_a_run_directory_of_another_run_is_refused(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(inputs.rglob("*"))
    line = "theirs/iter_0000007 was trained with .*rope.factor=4.0.* but this run specifies .*rope.factor=1.0.*; use a new --save folder"
    with pytest.raises(UserError, match=line):
        train(
            monkeypatch,
            "--recipe",
            "tiny_extend",
            *SHORT,
            "--data",
            inputs / "rows",
            "--save",
            inputs / "theirs",
        )
    with pytest.raises(
        UserError, match="theirs/iter_0000007 has model.hidden_size=32, but the recipe specifies 128"
    ):
        train(monkeypatch, "--recipe", "tiny", "--data", inputs / "rows", "--save", inputs / "theirs")
    assert sorted(inputs.rglob("*")) == before


def test_a_log_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "on_every_rank", lambda act: act())  # one rank, no process group
    (tmp_path / "tensorboard").touch()
    with pytest.raises(UserError, match=f"^--save {tmp_path} cannot be written: tensorboard: File exists$"):
        Log(
            recipes.tiny(),
            SimpleNamespace(is_main=True, device=torch.device("cpu")),
            MODEL,
            tmp_path,
            0,
            None,
        )


def test_weights_come_from_one_place(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        train(
            monkeypatch,
            "--recipe",
            "tiny",
            "--load-hf",
            inputs / "base",
            "--load",
            inputs / "theirs",
            "--data",
            "x",
            "--save",
            "y",
        )
    assert stop.value.code == 2 and "--load: not allowed with argument --load-hf" in capsys.readouterr().err


# ---- figures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, {1: 4.0, 5: 4.0, 10: 4.0}),
        ("constant", 4, {1: 1.0, 2: 2.0, 4: 4.0, 5: 4.0, 10: 4.0}),
        # From 4 to 1 by a half cosine over the 8 iterations after warm-up: a third of the way down at 60
        # degrees, half at 90.
        ("cosine", 2, {1: 2.0, 2: 4.0, 6: 2.5, 10: 1.0, 4: 1.0 + 3.0 * 0.5 * (1.0 + 0.5**0.5), 12: 1.0}),
    ],
)
def test_learning_rate(schedule: Any, warmup: int, expected: dict[int, float]) -> None:
    train = Train(seq_length=8, iterations=10, lr=4.0, min_lr=1.0, schedule=schedule, warmup=warmup)
    for iteration, value in expected.items():
        assert learning_rate(train, iteration) == pytest.approx(value, rel=1e-12), iteration


def test_flops_of_llama() -> None:
    """Llama-3.1-8B: 7,504,658,432 weights in matrix products; 32 layers x 4096 x S of causal attention, 6
    each."""
    assert flops.flops_per_token(LLAMA_3_1_8B, 8192) == 6 * 7_504_658_432 + 6 * 32 * 4096 * 8192
    assert flops.peak_flops(torch.device("cpu")) is None


def test_a_run_directory_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root reads everything: as if this user were another one."""

    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match=f"^{tmp_path} cannot be read: Permission denied$"):
        run_directory.complete_checkpoints(tmp_path)
