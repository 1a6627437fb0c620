"""Passkey prompts, scoring, results and the command, with a tokenizer made here and models that are plain
functions."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends.protocol import Completion, GenerationRequest
from megatron_ultralong.evaluate.backends.transformers_model import TransformersModel
from megatron_ultralong.evaluate.pipeline.results import BenchmarkResult, TaskScore, short_count
from megatron_ultralong.evaluate.report import heat_map, read_results
from megatron_ultralong.evaluate.tasks.niah import prompts
from megatron_ultralong.evaluate.tasks.niah import run as niah
from megatron_ultralong.evaluate.tasks.niah.prompts import NiahPromptBuilder, NiahSettings
from megatron_ultralong.io import atomic_files
from tests.text import LFS_POINTER

CHAT = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}<|assistant|>"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    text = [
        " ".join(prompts.FILLER),
        prompts.needle("Ada", "1"),
        prompts.question("Ben"),
        prompts.INTRODUCTION,
    ]
    bpe.train_from_iterator(
        text * 5,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|begin|>", eos_token="<|end|>")


class Reader:
    """A backend that reads the answer in the prompt; blind to all but the last `sight` tokens."""

    chat, max_position = "auto", 200

    def __init__(self, tokenizer: PreTrainedTokenizerFast, sight: int) -> None:
        self.tokenizer, self.sight = tokenizer, sight
        self.calls: list[int] = []

    def check(self, length: int, batch: int) -> None:
        self.checked = (length, batch)

    def generate(self, requests: list[GenerationRequest]) -> Iterator[tuple[int, Completion]]:
        self.calls.append(len(requests))
        for i, request in reversed(list(enumerate(requests))):  # in any order
            assert (
                request.text.startswith("Some pass keys")
                and request.text.endswith("?")
                and request.prefix.endswith((" is", " are"))
            )
            match = re.search(r"is (\d+)", self.tokenizer.decode(request.ids[-self.sight :]))
            tokens = self.tokenizer.encode(f" {match[1] if match else 'unknown'}.")[: request.max_tokens]
            yield (
                i,
                Completion(
                    text=self.tokenizer.decode(tokens),
                    tokens_in=len(request.ids),
                    tokens_out=len(tokens),
                    finish="stop",
                ),
            )

    def describe(self) -> dict:
        return {"path": "reader", "max_position": 200}

    def close(self) -> None:
        pass


def grid(**change) -> NiahSettings:
    return NiahSettings(**{"lengths": (150, 333), "depths": (0.0, 50.0, 100.0), "trials": 4, **change})


@pytest.mark.parametrize("chat", ["no", "yes"])
@pytest.mark.parametrize("length", [150, 151, 333, 1024])
def test_a_prompt_fills_its_length_exactly_and_holds_one_needle(tokenizer, chat, length):
    tokenizer.chat_template = CHAT if chat == "yes" else None
    builder = NiahPromptBuilder(tokenizer, grid(chat=chat))
    for depth in (0, 30, 100):
        prompt = builder.prompt(length, depth, 3)
        text = tokenizer.decode(prompt.tokens)
        assert len(prompt.tokens) + prompt.answer_tokens == length
        assert len(prompt.answer) == 5 and text.count(prompt.answer) == 1
        assert (
            text.endswith(f"The pass key of {prompt.name} is") and text.count("What is the pass key of") == 1
        )
        needle = tokenizer.encode(prompts.needle(prompt.name, prompt.answer), add_special_tokens=False)
        assert prompt.tokens[prompt.needle_at : prompt.needle_at + len(needle)] == needle
        assert tokenizer.decode(prompt.tokens[: prompt.needle_at]).endswith("."), (
            "a needle stands between sentences"
        )
    tokenizer.chat_template = None


def test_depth_moves_the_needle_and_seeds_decide_the_prompt(tokenizer):
    builder = NiahPromptBuilder(tokenizer, grid())
    at = [builder.prompt(1000, depth, 0).needle_at for depth in (0, 25, 50, 75, 100)]
    first, room = at[0], at[-1] - at[0]
    assert first == len(tokenizer.encode(prompts.INTRODUCTION)) and room > 900
    assert [round(4 * (x - first) / room) for x in at] == [0, 1, 2, 3, 4]
    assert builder.prompt(500, 50, 1) == NiahPromptBuilder(tokenizer, grid(trials=9)).prompt(500, 50, 1)
    assert builder.prompt(500, 50, 1).tokens != builder.prompt(500, 50, 2).tokens
    assert (
        builder.prompt(500, 50, 1).answer
        != NiahPromptBuilder(tokenizer, grid(seed=1)).prompt(500, 50, 1).answer
    )


@pytest.mark.parametrize("chat", ["no", "yes"])
def test_several_needles_are_spread_from_the_depth_on_and_all_asked_for(tokenizer, chat):
    tokenizer.chat_template = CHAT if chat == "yes" else None
    builder = NiahPromptBuilder(tokenizer, grid(needles=4, chat=chat))
    for depth in (0, 40, 100):
        prompt = builder.prompt(1500, depth, 1)
        text = tokenizer.decode(prompt.tokens)
        assert (
            len(prompt.tokens) + prompt.answer_tokens == 1500
            and len(set(prompt.answers)) == len(set(prompt.names)) == 4
        )
        found = [
            (text.index(prompts.needle(name, value)) / len(text), text.count(value))
            for name, value in zip(prompt.names, prompt.answers, strict=True)
        ]
        at = sorted(place for place, _ in found)
        assert [count for _, count in found] == [1] * 4
        assert at == pytest.approx(
            [(depth + (100 - depth) * i / 3) / 100 * 0.8 + 0.05 for i in range(4)], abs=0.12
        )
        a, b, c, d = prompt.names
        assert (
            text.endswith(f"The pass keys of {a}, {b}, {c} and {d} are")
            and f"What are the pass keys of {a}, {b}, {c} and {d}, in this order?" in text
        )
        assert prompt.answer == "{}, {}, {} and {}".format(*prompt.answers)
    tokenizer.chat_template = None
    for count, digits in ((0, 5), (99, 5), (6, 1)):
        with pytest.raises(UserError, match="--needles"):
            grid(needles=count, digits=digits)


def test_several_needles_score_the_share_found(tokenizer):
    result = niah.run(
        Reader(tokenizer, sight=10**6), grid(needles=3, lengths=(400,), depths=(0.0, 50.0), trials=2)
    )
    # The reader gives the first pass key it sees.
    assert [
        (cell["needles"], cell["found"], cell["correct"], cell["accuracy"]) for cell in result.extra["cells"]
    ] == [(6, 2, 0, 0.3333)] * 2
    assert result.scores == (
        TaskScore(task="passkeys", length=400, score=pytest.approx(33.33), count=4, notes={"refused": 0}),
    )
    assert result.extra["accuracy"] == 0.3333 and result.settings["grid"] == "own grid"
    single = niah.run(Reader(tokenizer, sight=10**6), grid(lengths=(400,), depths=(0.0,), trials=2))
    assert single.extra["cells"][0] == {
        "length": 400,
        "depth": 0.0,
        "trials": 2,
        "correct": 2,
        "needles": 2,
        "found": 2,
        "accuracy": 1.0,
        "refused": 0,
    }
    assert single.scores[0].task == "passkey"


def test_chat_template_wraps_the_text_and_the_answer_starts_after_it(tokenizer):
    tokenizer.chat_template = CHAT
    prompt = NiahPromptBuilder(tokenizer, grid()).prompt(300, 50, 0)
    text = tokenizer.decode(prompt.tokens)
    assert text.startswith("<|begin|><|user|>Some pass keys") and text.endswith(
        f"?<|end|><|assistant|>The pass key of {prompt.name} is"
    )
    assert prompt.tokens[:2] == tokenizer.convert_tokens_to_ids(["<|begin|>", "<|user|>"])
    assert NiahPromptBuilder(tokenizer, grid(chat="no")).encoder.chat is False
    tokenizer.chat_template = None
    assert text == f"<|begin|><|user|>{prompt.text}<|end|><|assistant|>{prompt.prefix}", (
        "message and tokens are one prompt"
    )
    with pytest.raises(UserError, match="no chat template"):
        NiahPromptBuilder(tokenizer, grid(chat="yes"))


def test_own_haystack_is_read_in_order(tokenizer):
    builder = NiahPromptBuilder(tokenizer, grid(), haystack="One comes first.  Two follows\nit. Three ends!")
    text = tokenizer.decode(builder.prompt(400, 100, 0).tokens)
    assert "One comes first. Two follows it. Three ends! One comes first. Two" in text
    with pytest.raises(UserError, match="no text"):
        NiahPromptBuilder(tokenizer, grid(), haystack=" \n ")


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        (" 48213.", True),
        ("48213", True),
        ("It is **48213**, as told", True),
        ("4821", False),
        ("482134", False),
        ("148213", False),
        ("48,213", False),
        ("", False),
        ("12345 or 48213", True),
    ],
)
def test_scoring_wants_exactly_the_digits(prediction, right):
    assert niah.is_correct(prediction, "48213") is right


def test_run_counts_every_cell(tokenizer):
    backend, done = Reader(tokenizer, sight=180), []
    result = niah.run(backend, grid(), batch=3, progress=done.append)
    cells = {(cell["length"], cell["depth"]): cell["correct"] for cell in result.extra["cells"]}
    # 180 tokens back from the end: all of 150; of 333 only what is deep.
    assert cells == {
        (150, 0.0): 4,
        (150, 50.0): 4,
        (150, 100.0): 4,
        (333, 0.0): 0,
        (333, 50.0): 4,
        (333, 100.0): 4,
    }
    assert [(one.length, one.score, one.count) for one in result.scores] == [
        (150, 100.0, 12),
        (333, pytest.approx(66.67), 12),
    ]
    assert result.extra["accuracy"] == 0.8333
    assert sum(done) == sum(backend.calls) == len(result.extra["trials"]) == 24 and max(backend.calls) == 3
    assert backend.checked == (333, 3)
    wrong = [trial for trial in result.extra["trials"] if not trial["correct"]]
    assert {(trial["depth"], trial["prediction"]) for trial in wrong} == {(0.0, " unknown.")} or len(
        wrong
    ) == 4
    assert result.settings["prompt"] == "own wording" and result.settings["chat"] is False


def test_results_are_written_whole_with_a_plot_and_a_table(tokenizer, tmp_path):
    result = niah.run(Reader(tokenizer, sight=180), grid())
    atomic_files.check_writable(tmp_path / "deep" / "er", "--output")
    result.write(tmp_path / "a.json")
    written = json.loads((tmp_path / "a.json").read_text())
    assert written == json.loads(json.dumps(result.to_json())) and written["format"] == 2
    again = read_results.read_for(tmp_path / "a.json", heat_map.check)
    assert again.scores == result.scores and again.extra == result.extra
    heat_map.heat_maps([result, result], ["before", "after"], tmp_path / "a.png", trained=[200, None])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and sorted(
        p.name for p in tmp_path.iterdir()
    ) == ["a.json", "a.png", "deep"]
    table = niah.table(result).splitlines()
    assert table[0].split() == ["depth", "150", "333*"] and table[1].split() == ["0%", "100%", "0%"]
    assert table[-2].split() == ["all", "100%", "67%"] and "beyond the 200 positions" in table[-1]
    assert [short_count(n) for n in (512, 1024, 131072, 1024**2, 1500)] == [
        "512",
        "1K",
        "128K",
        "1M",
        "1,500",
    ]


@pytest.fixture(scope="module")
def model_dir(tokenizer, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "model"
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
            eos_token_id=1,
            bos_token_id=0,
        )
    ).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_hugging_face_backend_is_greedy(model_dir):
    from megatron_ultralong.evaluate.backends.transformers_model import TransformersModel

    backend = TransformersModel(model_dir, device="cpu")
    prompts = torch.randint(5, 300, (3, 40), generator=torch.Generator().manual_seed(1)).tolist()
    requests = [GenerationRequest(id=str(i), ids=prompt, max_tokens=4) for i, prompt in enumerate(prompts)]
    found = dict(backend.generate(requests))
    model = LlamaForCausalLM.from_pretrained(model_dir)
    for place, prompt in enumerate(prompts):
        written: list[int] = []
        while len(written) < 4 and 1 not in written:
            written.append(int(model(torch.tensor([prompt + written])).logits[0, -1].argmax()))
        assert found[place] == Completion(
            text=backend.tokenizer.decode(written, skip_special_tokens=True),
            tokens_in=40,
            tokens_out=len(written),
            finish="stop" if 1 in written else "length",
        )
    assert backend.describe()["max_position"] == 128 and backend.describe()["dtype"] == "float32"


def test_hugging_face_backend_needs_no_template_for_ids(model_dir):
    from megatron_ultralong.evaluate.backends.transformers_model import TransformersModel

    backend = TransformersModel(model_dir, device="cpu")
    backend.tokenizer.chat_template = "without the message"
    [(_, one)] = backend.generate([GenerationRequest(id="x", ids=[5, 6, 7], max_tokens=1)])
    assert one.tokens_in == 3
    with pytest.raises(UserError, match="does not contain the user message"):
        list(backend.generate([GenerationRequest(id="x", text="Why?", max_tokens=1)]))


def test_hugging_face_backend_stops_and_samples(model_dir):
    from megatron_ultralong.evaluate.backends.sampling import Sampling
    from megatron_ultralong.evaluate.backends.transformers_model import TransformersModel

    def asked(backend: TransformersModel, **more) -> dict[int, Completion]:
        return dict(
            backend.generate(
                [
                    GenerationRequest(id=str(n), ids=list(range(5, 5 + n)), max_tokens=8, **more)
                    for n in (9, 4, 9)
                ]
            )
        )

    plain = asked(TransformersModel(model_dir, device="cpu"))
    assert (
        sorted(plain) == [0, 1, 2] and plain[0] == plain[2] and {plain[i].tokens_in for i in (0, 1)} == {9, 4}
    ), "prompts of several sizes in a call"
    stop = plain[0].text[len(plain[0].text) // 2]
    for i, one in asked(TransformersModel(model_dir, device="cpu"), stop=(stop,)).items():
        whole = plain[i].text
        assert one.text == whole[: whole.index(stop)] if stop in whole else one == plain[i]
    drawn = [
        asked(TransformersModel(model_dir, device="cpu", sampling=Sampling(temperature=2.0, seed=seed)))
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    # An answer does not depend on what else is asked: an equal prompt beside it, or nothing.
    alone = TransformersModel(model_dir, device="cpu", sampling=Sampling(temperature=2.0, seed=1)).generate(
        [GenerationRequest(id="x", ids=list(range(5, 14)), max_tokens=8)]
    )
    assert drawn[0][0] == drawn[0][2] == dict(alone)[0]


def test_hugging_face_backend_looks_for_stop_texts_in_what_was_written_alone(model_dir):
    from megatron_ultralong.evaluate.backends.transformers_model import TransformersModel

    backend = TransformersModel(model_dir, device="cpu")
    prompts = torch.randint(5, 300, (6, 20), generator=torch.Generator().manual_seed(2)).tolist()

    def asked(*places: int, stop: tuple[str, ...] = ()) -> list[Completion]:
        found = dict(
            backend.generate(
                [GenerationRequest(id=str(i), ids=prompts[i], max_tokens=12, stop=stop) for i in places]
            )
        )
        return [found[i] for i in range(len(places))]

    plain = asked(*range(6))
    over = (
        backend.tokenizer.decode(prompts[0])[-1] + plain[0].text[0]
    )  # the prompt's last sign and the answer's first
    assert over not in plain[0].text and asked(0, stop=(over,)) == plain[:1]
    # One stop text, of which some answers of a batch have none: each ends as it does alone, with the token
    # that brings the stop text.
    stop = (plain[1].text[5], plain[2].text[8:10])
    together = asked(*range(6), stop=stop)
    assert (
        together == [asked(i, stop=stop)[0] for i in range(6)]
        and len({one.tokens_out for one in together}) > 1
    )
    for one, whole in zip(together, plain, strict=True):
        cut = min((whole.text.index(text) for text in stop if text in whole.text), default=None)
        assert one.text == whole.text[:cut] and (
            one.tokens_out < whole.tokens_out or one.tokens_out == whole.tokens_out == 12 or one == whole
        )


@pytest.mark.parametrize("device", ["foo", "mps", "cuda:99"])
def test_a_device_that_is_none(model_dir, device):
    from megatron_ultralong.evaluate.backends.transformers_model import TransformersModel

    with pytest.raises(UserError, match=f"--device {device}: ") as error:
        TransformersModel(model_dir, device=device)
    assert "\n" not in str(error.value)


def command(monkeypatch, *words) -> None:
    """Run tools/evaluate.py's main in this process, so that its UserError is seen."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    tool = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "evaluate.py"))
    tool["main"]()


def test_the_command(model_dir, tmp_path, monkeypatch, capsys):
    command(
        monkeypatch,
        "niah",
        "--model",
        model_dir,
        "--lengths",
        "100,0.2K".replace("0.2K", "1K"),
        "--depth-count",
        "3",
        "--samples",
        "2",
        "--output",
        tmp_path / "out",
        "--device",
        "cpu",
    )
    result = json.loads((tmp_path / "out" / "niah.json").read_text())
    assert [(cell["length"], cell["depth"]) for cell in result["extra"]["cells"]] == [
        (n, d) for n in (100, 1024) for d in (0.0, 50.0, 100.0)
    ]
    assert (
        result["model"]["path"] == "model"
        and len(result["extra"]["trials"]) == 12
        and (tmp_path / "out" / "niah.png").exists()
    )
    assert "1K*" in capsys.readouterr().out


@pytest.mark.parametrize("sizes", [{"intermediate_size": None}, {"intermediate_size": [8, 8]}, {}])
def test_memory_is_checked_by_the_sizes_that_a_config_states(sizes):
    """Other models than Llama state them otherwise, or not at all."""
    backend = TransformersModel.__new__(TransformersModel)
    backend.device = "cpu"
    backend.model = SimpleNamespace(config=SimpleNamespace(**sizes), dtype=torch.bfloat16)
    backend.check(2**50, 1)
    backend.model.config.hidden_size = 64
    backend.check(1000, 10**6)  # batches are of prompts of one length, at least one
    with pytest.raises(UserError, match="plain transformers needs at least"):
        backend.check(2**50, 1)


def test_a_failed_figure_loses_no_results(model_dir, tmp_path, monkeypatch, capsys):
    (tmp_path / "niah.png").mkdir()
    words = ["--lengths", "100", "--depths", "1", "--samples", "1", "--device", "cpu"]
    with pytest.raises(UserError, match="niah.png cannot be written"):
        command(monkeypatch, "niah", "--model", model_dir, *words, "--output", tmp_path)
    assert json.loads((tmp_path / "niah.json").read_text())["scores"][0]["count"] == 1
    assert "depth" in capsys.readouterr().out


def test_grids_of_several_models_side_by_side(tokenizer, tmp_path, monkeypatch):
    import struct

    result = niah.run(Reader(tokenizer, sight=180), grid(trials=1))
    paths = [tmp_path / f"{i}.json" for i in range(4)]
    for path in paths:
        result.write(path)
    sizes = []
    for count in (1, 3, 4):
        command(
            monkeypatch,
            "compare",
            "--results",
            *paths[:count],
            "--titles",
            *"abcd"[:count],
            "--output",
            tmp_path / "c.png",
        )
        sizes.append(struct.unpack(">II", (tmp_path / "c.png").read_bytes()[16:24]))
    (one, low), (three, _), (four, high) = sizes
    assert 2 * one < three == four and 1.8 * low < high <= 2 * low, "three across, then below"
    BenchmarkResult(task="ruler", model={}, settings={}, scores=()).write(tmp_path / "x.json")
    for words, message in (
        ([tmp_path / "x.json"], "no passkey results"),
        ([tmp_path / "none.json"], "cannot be read"),
        ([*paths[:2], "--titles", "a"], "need 2 titles"),
    ):
        with pytest.raises(UserError, match=message):
            command(monkeypatch, "compare", "--output", tmp_path / "d.png", "--results", *words)


def test_mistakes_are_told_in_one_line(model_dir, tmp_path, monkeypatch):
    empty, file = tmp_path / "empty", tmp_path / "file"
    empty.mkdir()
    file.write_text("x")
    pointer = tmp_path / "pointer.txt"
    pointer.write_text(LFS_POINTER)
    good = ["--model", model_dir, "--lengths", "100", "--output", tmp_path / "o", "--device", "cpu"]
    for change, words in (
        (["--model", tmp_path / "nowhere"], "no such directory"),
        (["--model", empty], "no config.json"),
        (["--lengths", "30"], "too short"),
        (["--lengths", "abc"], "whole number"),
        (["--lengths", "100,4000M"], "plain transformers needs at least .* GiB for the activations"),
        (["--lengths", "100,100"], "only once"),
        (["--depths", "0,101"], "0 to 100"),
        (["--depths", "nan"], "0 to 100"),
        (["--depths", "inf"], "0 to 100"),
        (["--depths", "10,nan"], "0 to 100"),
        (["--depths", "10,10.00001"], "each only once"),
        (["--depth-count", "1"], "from 2 to 1000"),
        (["--depths", "a,b"], "percents"),
        (["--samples", "0"], "at least 1"),
        (["--batch", "0"], "at least 1"),
        (["--output", file / "o"], "cannot be written"),
        (["--haystack", tmp_path / "none.txt"], "cannot be read"),
        (["--haystack", pointer], "pointer.txt is a Git LFS pointer"),
        (["--chat", "yes"], "no chat template"),
    ):
        with pytest.raises(UserError, match=words) as error:
            command(monkeypatch, "niah", *good, *change)
        assert "\n" not in str(error.value)
