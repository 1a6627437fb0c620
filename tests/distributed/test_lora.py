"""LoRA against PEFT on transformers' model: logits, loss and the gradient of every trained weight under each
kind of layout and memory mode; checkpoints of adapters."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from megatron_ultralong import lora
from megatron_ultralong.checkpoint import integrity
from megatron_ultralong.config import Model, Parallel, Run, Runtime, Train
from megatron_ultralong.lora import Lora
from megatron_ultralong.model import weight_mapping
from tests import processes, train_tool
from tests.distributed.test_model import MEMORY, ROPE, UNTIED, S, _logits, _rows, complete_gradients
from tests.spawn import leave_groups, run_ranks
from tests.tiny import FAMILY_MODELS, LLAMA3, hf_model
from tests.train_tool import Tool, saved, write_inputs

TIED = replace(FAMILY_MODELS["qwen3"], layers=2)
MODEL = replace(UNTIED, layers=2)
ALL = Lora(rank=3, alpha=12.0)
SOME = Lora(
    rank=2,
    alpha=4.0,
    targets=("q_proj", "v_proj", "up_proj", "down_proj"),
    train_norms=True,
    train_embeddings=True,
)
LAYOUTS = (
    (Parallel(tp=2, cp=2), (0, 2, 4)),
    (Parallel(tp=2, pp=2), (0, 3)),
    (Parallel(pp=2, cp=2), (3, 5)),
    (Parallel(), (0, 1, 3)),
)


def reference_model(model: Model, settings: Lora) -> Any:
    """PEFT's model with adapters whose B is not zero."""
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=list(settings.targets), lora_dropout=0.0
    )
    built = peft.get_peft_model(hf_model(model, LLAMA3), config)
    torch.manual_seed(3)
    for name, parameter in built.named_parameters():
        is_norm = "norm" in name.rpartition(".")[0].rpartition(".")[2]
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.05)
        elif (settings.train_norms and is_norm) or (settings.train_embeddings and "embed_tokens" in name):
            parameter.requires_grad_()
    return built


def hf_values(reference: Any, gradients: bool = False) -> dict[str, torch.Tensor]:
    """Weights of the model by Hugging Face's names, and adapters by (layer, linear, a or b)."""
    values: dict[Any, torch.Tensor] = {}
    for name, parameter in reference.named_parameters():
        value = parameter.grad if gradients else parameter.data
        if value is not None:
            name = name.replace(".base_layer", "").replace(".default", "")
            values[name.removeprefix("base_model.model.") if "lora_" not in name else name] = value
    return values


@pytest.mark.slow
@pytest.mark.complete
def test_equals_peft() -> None:
    run_ranks(_equals_peft, 4)


def _equals_peft(rank: int, world: int) -> None:
    from megatron_ultralong.runtime import launch

    cases = [
        (model, settings, reference_model(model, settings))
        for model in (MODEL, TIED)
        for settings in (ALL, SOME)
    ]
    wanted = []
    for model, _, reference in cases:
        rows = _rows(model, 4)
        logits = reference(rows["tokens"]).logits
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), rows["labels"].flatten(), reduction="none"
        )
        loss = (losses * rows["loss_mask"].flatten()).sum() / rows["loss_mask"].sum()
        loss.backward()
        wanted.append((rows, logits.detach(), float(loss), hf_values(reference, gradients=True)))
    for parallel, modes in LAYOUTS:
        ranks = launch.start(Runtime(device="cpu"), parallel)
        for number, (model, settings, reference) in enumerate(cases):
            for mode in modes if number == 0 else modes[number % len(modes) :][:1]:
                _check(model, settings, hf_values(reference), ranks, parallel, MEMORY[mode], *wanted[number])
        leave_groups()


def _check(
    model: Model,
    settings: Lora,
    values: dict[Any, torch.Tensor],
    ranks: Any,
    parallel: Parallel,
    memory: Any,
    rows: dict[str, torch.Tensor],
    logits: torch.Tensor,
    loss: float,
    grads: dict[Any, torch.Tensor],
) -> None:
    from megatron_ultralong.context_parallel import zigzag
    from megatron_ultralong.model import adapters, llama
    from megatron_ultralong.train import optimizer as optim
    from megatron_ultralong.train.loss_normalisation import global_mean
    from megatron_ultralong.train.step import Trainer, forward_backward

    where = f"{parallel} {memory} {settings} {model.family}"
    chunks = llama.build(model, ROPE, ranks, parallel, memory, "fp32", lora=settings)

    def mine(name: str, whole: dict[Any, torch.Tensor]) -> torch.Tensor | None:
        """This rank's part of a parameter, or of a gradient."""
        if adapters.is_adapter(name):
            layer, target, which = adapters.parse_name(name)
            tensor = whole[lora.peft_name(target, layer, which)]
            return adapters.shard(target, which, tensor, ranks.tp_rank, ranks.tp)
        if not all(hf in whole for hf in weight_mapping.hf_names(name, model)):
            return None
        return weight_mapping.split(name, whole, model, ranks.tp_rank, ranks.tp)

    for chunk in chunks:
        for name, parameter in llama.named_parameters(chunk).items():
            parameter.data.copy_(mine(name, values))

    def batches() -> Any:
        for row in range(ranks.dp_rank, 4, ranks.dp):
            yield {
                name: zigzag.shard(x[row : row + 1], ranks.cp_rank, ranks.cp, 1) for name, x in rows.items()
            }

    for part, row in zip(_logits(chunks, [batches()], 4 // ranks.dp), range(ranks.dp_rank, 4, ranks.dp)):
        parts = [torch.empty_like(part) for _ in range(ranks.tp)]
        torch.distributed.all_gather(parts, part, group=ranks.groups.tp)
        got = torch.cat(parts, dim=-1)[..., : model.vocab_size]
        want = zigzag.shard(logits[row : row + 1], ranks.cp_rank, ranks.cp, 1)
        assert (got - want).abs().max() < 1e-4, where

    train = Train(seq_length=S, global_batch=4, iterations=1, lr=1e-3, precision="fp32")
    run = Run(name="test", train=train, parallel=parallel, lora=settings)
    chunks = optim.data_parallel(chunks, ranks)
    optimizer = optim.build(chunks, run.optim, run.train, ranks)
    for chunk in chunks:
        chunk.zero_grad_buffer()
    trainer = Trainer(run=run, ranks=ranks, chunks=chunks, optimizer=optimizer)
    sums = forward_backward(trainer, [batches()], run.micro_batches(ranks.dp))
    mean, _, _ = global_mean(sums, ranks)
    assert abs(mean - loss) <= 1e-5 * abs(loss), (where, mean, loss)
    trained = 0
    complete_gradients(chunks, ranks)
    for chunk in chunks:
        for name, parameter in llama.named_parameters(chunk).items():
            want = mine(name, grads)
            assert (want is not None) == parameter.requires_grad, (where, name)
            if want is not None:
                trained += 1
                error = float((parameter.main_grad - want).norm() / want.norm())
                assert error < 1e-5, (where, name, error)
    assert trained
    norm = float(torch.stack([grad.norm() for grad in grads.values()]).norm())
    assert abs(optimizer.step()[1] - norm) < 1e-5 * norm, where


# ---- checkpoints and exports -------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_and_its_exports(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path)
    settings = (
        "lora.rank=3",
        "lora.alpha=12",
        "lora.targets=q_proj,k_proj,o_proj,gate_proj,down_proj",
        "lora.train_norms=true",
        "train.save_every=2",
        "train.warmup=1",
        "train.precision=fp32",
    )

    def train(save: Path, *more: str, **options: Any) -> dict[int, float]:
        with Tool(inputs, save, *settings, *more, **options) as tool:
            assert tool.finish() == 0, tool.errors()
            return {n: float(line["loss"]) for n, line in tool.iterations().items()}

    def refused(text: str, save: Path, *more: str, **options: Any) -> None:
        with Tool(inputs, save, *settings, *more, **options) as tool:
            assert tool.finish() == 2
            assert tool.errors().startswith("error: ") and text in tool.errors(), tool.errors()

    whole = train(tmp_path / "whole", "train.iterations=4", "parallel.tp=2", ranks=2)
    assert saved(tmp_path / "whole") == [2, 4] and whole[4] != whole[3]
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "whole" / "iter_0000002", again / "iter_0000002")
    refused("lora.alpha=12.0 and cannot resume with 6.0", again, "train.iterations=4", "lora.alpha=6")
    other = tmp_path / "other"
    hf_model(train_tool.MODEL, seed=1).save_pretrained(other)
    refused(f"{other} is not the model that the adapters", again, "train.iterations=4", base=other)
    resumed = train(again, "train.iterations=4")
    assert all(abs(resumed[n] - whole[n]) < 1e-5 * whole[n] for n in (3, 4)) and set(resumed) == {3, 4}

    stored = integrity.read(tmp_path / "whole" / "iter_0000004")
    assert stored is not None
    assert not [name for name in stored.tensors if "adapters" not in name and "norm" not in name]
    assert any("linear_qkv.layer_norm" in name for name in stored.tensors)

    def convert(*words: str) -> Any:
        command = [sys.executable, "tools/convert_hf.py", "export", "--load", str(tmp_path / "whole"), *words]
        return processes.run(command, cwd=train_tool.ROOT, capture_output=True, text=True)

    base, merged, adapter = (
        str(path) for path in (inputs / "base", tmp_path / "merged", tmp_path / "adapter")
    )
    for words, text in (
        ((), "contains adapters only: give the model that they belong to by --base DIR"),
        (("--base", str(other)), f"--base {other} is not the model that the adapters of"),
    ):
        failed = convert("--output", merged, *words)
        assert failed.returncode == 2 and text in failed.stderr and not Path(merged).exists(), failed.stderr
    for words in (("--output", merged, "--base", base), ("--output", adapter, "--adapter", "--base", base)):
        done = convert(*words)
        assert done.returncode == 0, done.stderr
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(1))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = plain(tokens).logits
    by_peft = peft.PeftModel.from_pretrained(plain, adapter)
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(tokens).logits
        theirs = by_peft.eval()(tokens).logits
    assert (ours - theirs).abs().max() < 1e-5 and (ours - before).abs().max() > 1e-3
    ckpt, out = str(tmp_path / "whole"), str(tmp_path / "out")
    command = ["tools/evaluate.py", "niah", "--load", ckpt, "--lengths", "64", "--output", out]
    evaluated = processes.run([sys.executable, *command], cwd=train_tool.ROOT, capture_output=True, text=True)
    assert evaluated.returncode == 2 and "contains adapters only" in evaluated.stderr, evaluated.stderr
