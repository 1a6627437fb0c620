"""Generation over tensor, pipeline and context parallel ranks against transformers in one process."""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ultralong.config import Model, Parallel, Runtime
from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends import memory_check
from megatron_ultralong.evaluate.backends.decoding import DecodingSession
from megatron_ultralong.evaluate.backends.sampling import Sampling
from megatron_ultralong.model import weight_mapping
from megatron_ultralong.rope.hf_config import from_hf
from tests import processes
from tests.spawn import leave_groups, run_ranks
from tests.text import write_jsonl
from tests.tiny import FAMILY_MODELS, LLAMA3, SMALL, hf_model

UNTIED = SMALL
TIED = Model(
    hidden_size=48,
    ffn_size=80,
    layers=2,
    heads=4,
    kv_heads=4,
    head_dim=8,
    vocab_size=97,
    tied_embeddings=True,
)
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
CASES = (
    (UNTIED, LLAMA3),
    (UNTIED, YARN),
    (TIED, LLAMA3),
    *((model, YARN) for model in FAMILY_MODELS.values()),
)
LAYOUTS = {
    1: (Parallel(),),
    2: (Parallel(cp=2), Parallel(tp=2), Parallel(pp=2)),
    4: (Parallel(cp=4), Parallel(tp=2, cp=2), Parallel(pp=2, cp=2), Parallel(tp=2, pp=2)),
}
CHUNKS = (5, 100, 1)
"""Rounded up to a multiple of CP."""
WRITTEN = 4


def ids(length: int, seed: int) -> list[int]:
    return torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


CONTEXT = ids(41, 0)
PROMPTS = [ids(1, 1), ids(3, 2), ids(38, 3), ids(67, 4)]
"""Nothing in common, one and three tokens: shorter than CP."""
QUESTIONS = [CONTEXT + ids(n, 10 + n) for n in (1, 9, 4)]
SAMPLING = Sampling(temperature=0.7, top_p=0.9, top_k=20, seed=5)


@functools.cache
def reference_of(case: int) -> Any:
    return hf_model(*CASES[case])


@functools.cache
def logits_of(case: int, tokens: tuple[int, ...]) -> torch.Tensor:
    """[tokens, 97] by transformers."""
    with torch.no_grad():
        return reference_of(case)(torch.tensor([tokens])).logits[0]


def written_by(case: int, prompt: list[int], sampling: Sampling, tokens: int = WRITTEN) -> list[int]:
    found, generator = list(prompt), sampling.generator(prompt)
    for _ in range(tokens):
        found.append(sampling.choose(logits_of(case, tuple(found))[-1], generator))
    return found[len(prompt) :]


def reader_of(case: int, ranks: Any, parallel: Parallel, chunk: int) -> Any:
    from megatron_ultralong.model import llama
    from megatron_ultralong.model.inference.prefill_decode import InferenceModel

    model, rope = CASES[case]
    reader = InferenceModel(
        model,
        from_hf({"rope_parameters": rope, "max_position_embeddings": 512}),
        ranks,
        parallel,
        "fp32",
        chunk,
    )
    whole = {name: p.data for name, p in reference_of(case).named_parameters()}
    for name, parameter in llama.named_parameters(reader.chunk).items():
        parameter.data.copy_(weight_mapping.split(name, whole, model, ranks.tp_rank, ranks.tp))
    return reader


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.complete), 4])
def test_answers_equal_transformers(world: int) -> None:
    run_ranks(_answers, world)


def _answers(rank: int, world: int) -> None:
    from megatron_ultralong.runtime import launch

    for parallel in LAYOUTS[world]:
        ranks = launch.start(Runtime(device="cpu"), parallel)
        for case in range(len(CASES)):
            if case == 1 and parallel is not LAYOUTS[world][0]:
                continue  # positions are counted alike whatever their frequencies
            if case > 2 and parallel is not LAYOUTS[2][case % 2]:
                continue  # the families differ inside of a layer only
            for chunk in CHUNKS[:1] if case else CHUNKS if world < 4 else CHUNKS[:2]:
                reader = reader_of(case, ranks, parallel, chunk)
                assert reader.chunk_tokens >= chunk and reader.chunk_tokens % parallel.cp == 0
                with torch.no_grad():
                    _check_logits(reader, case)
                    if world == 1 or chunk == CHUNKS[0]:
                        _check_generation(reader, case, (case, chunk, parallel))
                    if chunk == CHUNKS[0]:
                        _check_scores(reader, case)
                        _check_memory(reader)
        leave_groups()


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


def test_dynamic_frequencies_are_those_of_the_whole_request() -> None:
    run_ranks(_dynamic, 2)


def _dynamic(rank: int, world: int) -> None:
    """Against transformers reading every prompt in one pass, padded to the length of its request."""
    from megatron_ultralong.model import llama
    from megatron_ultralong.model.inference.prefill_decode import InferenceModel
    from megatron_ultralong.runtime import launch

    parallel = Parallel(cp=2)
    ranks = launch.start(Runtime(device="cpu"), parallel)
    reference = hf_model(UNTIED, DYNAMIC, max_position=16)
    rope = from_hf({"rope_parameters": DYNAMIC, "max_position_embeddings": 16})
    reader = InferenceModel(UNTIED, rope, ranks, parallel, "fp32", 5)
    whole = {name: p.data for name, p in reference.named_parameters()}
    for name, parameter in llama.named_parameters(reader.chunk).items():
        parameter.data.copy_(weight_mapping.split(name, whole, UNTIED, 0, 1))

    def logits(tokens: list[int], length: int) -> torch.Tensor:
        """[tokens, 97], with the frequencies of `length` tokens."""
        with torch.no_grad():
            return reference(torch.tensor([tokens + [0] * (length - len(tokens))])).logits[0, : len(tokens)]

    session = DecodingSession(reader)
    prompts, most = [CONTEXT + ids(3, 5), CONTEXT + ids(9, 6), ids(4, 7)], [4, 30, 6]
    answers = session.generate(prompts, most, [lambda tokens: False] * 3, Sampling())
    for prompt, count, answer in zip(prompts, most, answers, strict=True):
        want = list(prompt)
        for _ in range(count):
            want.append(int(logits(want, len(prompt) + count)[-1].argmax()))
        assert answer == want[len(prompt) :]
    # A prompt of the same length shares what was read of the last one, another reads all of it anew.
    for context, continuation in ((CONTEXT, ids(8, 1)), (CONTEXT, ids(8, 2)), (CONTEXT, ids(30, 2))):
        logp, _ = session.scores(context, continuation)
        n = len(context) + len(continuation)
        want_logp = logits(context + continuation, n).log_softmax(-1)[len(context) - 1 : -1]
        torch.testing.assert_close(
            logp, want_logp.gather(1, torch.tensor(continuation)[:, None])[:, 0], rtol=0, atol=1e-4
        )
    leave_groups()


def _check_logits(reader: Any, case: int) -> None:
    for prompt in PROMPTS:
        cache = reader.cache(reader.tokens_per_rank(len(prompt)))
        last = None
        for place, hidden in reader.read(prompt, cache):
            if place + len(hidden) == len(prompt):
                last = hidden[-1]
        assert cache.end == len(prompt) and cache.held <= cache.capacity
        if reader.last:
            logits = reader.logits(reader.gather_hidden([last]))
            assert (
                logits.shape == (1, 97)
                and (logits[0] - logits_of(case, tuple(prompt))[-1]).abs().max() < 1e-4
            )


def _check_generation(reader: Any, case: int, where: Any) -> None:
    session, read = DecodingSession(reader), Counter[str]()

    def never(tokens: list[int]) -> bool:
        return False

    def generate(
        name: str,
        prompts: list[list[int]],
        tokens: Any = WRITTEN,
        ends: Any = None,
        sampling: Sampling = Sampling(),  # noqa: B008
    ) -> list[list[int]]:
        most = [tokens] * len(prompts) if isinstance(tokens, int) else tokens
        return session.generate(
            prompts, most, ends or [never] * len(prompts), sampling, lambda n: read.update({name: n})
        )

    greedy = Sampling()
    want = {
        name: [written_by(case, prompt, greedy) for prompt in prompts]
        for name, prompts in (("prompts", PROMPTS), ("questions", QUESTIONS))
    }
    assert generate("prompts", PROMPTS) == want["prompts"], where
    # One context for all questions: read once, in two calls; then part of it, for a prompt that leaves it.
    for name in ("first", "again"):
        assert generate(name, QUESTIONS) == want["questions"], where
    own = sum(len(question) - len(CONTEXT) for question in QUESTIONS)
    assert read["first"] == len(CONTEXT) + own + 3 * WRITTEN and read["again"] == own + 3 * WRITTEN, (
        where,
        read,
    )
    branch = CONTEXT[:17] + ids(30, 9)
    assert generate("branch", [branch]) == [written_by(case, branch, greedy)], where
    assert read["branch"] == 30 + WRITTEN
    assert generate("back", QUESTIONS[1:2]) == want["questions"][1:2], where
    assert read["back"] == len(QUESTIONS[1]) - 17 + WRITTEN

    # Each ends for itself: by its own limit, and by what was written.
    second = want["questions"][2][1]
    ends = [never, never, lambda tokens: tokens[-1] == second]
    cut = want["questions"][2].index(second) + 1
    assert generate("ends", QUESTIONS, [3, 0, 5], ends) == [
        want["questions"][0][:3],
        [],
        want["questions"][2][:cut],
    ], where

    samples = generate("sampled", QUESTIONS, sampling=SAMPLING)
    assert samples == [written_by(case, question, SAMPLING) for question in QUESTIONS], where
    assert generate("alone", QUESTIONS[1:2], sampling=SAMPLING) == samples[1:2], (
        "an answer does not depend on its company"
    )


def _check_scores(reader: Any, case: int) -> None:
    session = DecodingSession(reader)
    follows = written_by(case, CONTEXT, Sampling(), 9)
    pairs = [
        (CONTEXT, follows),
        (CONTEXT, follows[:4] + ids(11, 77)),
        (CONTEXT[:1], CONTEXT[1:]),
        (ids(5, 3), ids(1, 4)),
    ]
    for (context, continuation), (score, greedy) in zip(pairs, session.loglikelihood(pairs), strict=True):
        logits = logits_of(case, tuple(context + continuation))[len(context) - 1 : -1]
        targets = torch.tensor(continuation)
        want = torch.log_softmax(logits, dim=-1).gather(1, targets[:, None]).sum()
        assert abs(score - float(want)) < 1e-3 and greedy == bool((logits.argmax(-1) == targets).all())
    assert session.loglikelihood(pairs[:1])[0][1] is True
    with pytest.raises(ValueError, match="at least one token of context"):
        session.loglikelihood([([], [1])])


def _check_memory(reader: Any) -> None:
    """A rank that lacks room ends the call on all of them, before anything is read, and the message names a
    layout that would do."""
    session = DecodingSession(reader)
    ranks = reader.ranks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            memory_check, "free_bytes", lambda device: 3 << 20 if ranks.rank == ranks.world - 1 else 1 << 30
        )
        with pytest.raises(
            UserError,
            match=r"keys and values of [\d,]+ tokens\) but has .* GiB at --tp .*; --cp \d+ .*would fit",
        ) as error:
            session.generate([ids(30000, 1)], [2], [lambda tokens: False], Sampling())
        assert "\n" not in str(error.value)
    assert len(session.generate([PROMPTS[1]], [2], [lambda tokens: False], Sampling())[0]) == 2


# ---- the tool, as torchrun starts it -------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo" / "base"


def tool(name: str, *words: Any, ranks: int = 1) -> processes.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / name, *words]
    if ranks > 1:
        return processes.torchrun(command, ranks)
    return processes.run(command, capture_output=True)


@pytest.mark.slow
def test_tool_gives_the_same_answers_on_every_engine(tmp_path: Path) -> None:
    """Plain transformers; our own model over two context parallel ranks, read in place, in bfloat16 too; a
    checkpoint over two tensor parallel ranks."""
    assert tool("convert_hf.py", "import", "--load-hf", DEMO, "--output", tmp_path / "ckpt").returncode == 0
    grid = ["--lengths", "256,512", "--depths", "0,50,100", "--samples", 2, "--device", "cpu"]
    answers = {}
    for name, ranks, words in (
        ("hf", 1, ["--model", DEMO]),
        ("cp", 2, ["--model", DEMO, "--cp", 2, "--read-chunk", 100]),
        ("tp", 2, ["--load", tmp_path / "ckpt", "--tp", 2, "--batch", 5]),
        ("bf16", 2, ["--model", DEMO, "--dtype", "bf16"]),
    ):
        run = tool("evaluate.py", "niah", *words, *grid, "--output", tmp_path / name, ranks=ranks)
        assert run.returncode == 0, run.stderr
        assert run.stdout.count("niah.json and niah.png written") == 1, run.stdout
        found = json.loads((tmp_path / name / "niah.json").read_text())
        answers[name] = [trial["prediction"] for trial in found["extra"]["trials"]]
        assert found["extra"]["accuracy"] >= 0.9 and len(answers[name]) == 12
        if name != "hf":
            tp, cp = (2, 1) if name == "tp" else (1, 2)
            assert found["model"]["layout"] == {
                "tp": tp,
                "pp": 1,
                "cp": cp,
                "chunk": 100 if name == "cp" else 16384,
            }
            assert found["model"]["dtype"] == ("bfloat16" if name == "bf16" else "float32")
    assert answers["cp"] == answers["tp"] == answers["hf"]

    # A stopped run goes on, on another layout too; another model is refused, in one line and on all ranks.
    kept = tmp_path / "cp" / "niah.predictions.jsonl"
    lines = kept.read_bytes().splitlines(keepends=True)
    kept.write_bytes(b"".join(lines[:6]) + lines[6][:20])
    run = tool(
        "evaluate.py", "niah", "--model", DEMO, "--engine", "megatron", *grid, "--output", tmp_path / "cp"
    )
    assert run.returncode == 0 and sorted(
        json.loads(line).get("key", "") for line in kept.read_bytes().splitlines()
    ) == sorted(json.loads(line).get("key", "") for line in lines)
    assert [
        trial["prediction"]
        for trial in json.loads((tmp_path / "cp" / "niah.json").read_text())["extra"]["trials"]
    ] == answers["hf"]
    # Perplexity of the checkpoint over two ranks, each with half of the keys and values, is that of
    # transformers.
    books = write_jsonl(
        tmp_path / "books.jsonl", ["The grass is green. The pass key of Ada is 12345. " * 60] * 2
    )
    figures = {}
    for name, ranks, words in (
        ("hf", 1, ["--model", DEMO]),
        ("ckpt", 2, ["--load", tmp_path / "ckpt", "--read-chunk", 100]),
    ):
        run = tool(
            "evaluate.py",
            "perplexity",
            *words,
            "--data",
            books,
            "--lengths",
            "300,512",
            "--samples",
            2,
            "--device",
            "cpu",
            "--output",
            tmp_path / f"{name}-perplexity",
            ranks=ranks,
        )
        assert run.returncode == 0 and run.stdout.count("perplexity.png written") == 1, run.stderr
        found = json.loads((tmp_path / f"{name}-perplexity" / "perplexity.json").read_text())
        figures[name] = [
            part["nll"]
            for length in ("300", "512")
            for part in found["extra"]["by_length"][length]["by_sixteenth"]
        ]
    assert found["model"]["layout"]["cp"] == 2 and figures["ckpt"] == pytest.approx(figures["hf"], abs=1e-4)

    for words, message in (
        (
            ["--load", tmp_path / "ckpt", *grid, "--output", tmp_path / "cp"],
            "niah.predictions.jsonl was written with model.",
        ),
        (
            ["--model", DEMO, "--lengths", "20", "--output", tmp_path / "x", "--device", "cpu"],
            "--lengths 20: too short",
        ),
    ):
        run = tool("evaluate.py", "niah", *words, ranks=2)
        told = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
        assert run.returncode and len(told) == 1 and message in told[0], run.stderr
        assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in run.stderr, run.stderr
