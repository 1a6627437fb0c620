"""The library of tools/benchmark.py on a GPU at small sizes: events, peak memory, MFU, out of memory."""

from __future__ import annotations

import pytest
import torch

from megatron_ultralong.config import Model
from megatron_ultralong.measure import attention, loss, timing

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

CUDA = torch.device("cuda", 0)


def test_peak_and_time() -> None:
    with timing.peak_memory(CUDA) as peak:
        x = torch.ones(2**20, device=CUDA)  # 4 MiB
        y = x + 1
    assert peak.bytes == 8 * 2**20
    del x, y
    assert 0 < timing.median_seconds(lambda: torch.ones(2**20, device=CUDA), CUDA, repeats=3) < 1


def test_attention() -> None:
    settings = attention.AttentionSettings(
        length=4096,
        cp=[2, 4],
        ulysses=[2],
        heads=8,
        kv_heads=2,
        head_dim=128,
        dtype=torch.bfloat16,
        documents=7,
        error_length=2048,
        repeats=2,
    )
    for row in attention.run(settings, CUDA, "test").rows:
        if "note" in row:
            assert "not installed" in row["note"] or "not measured" in row["note"], row
            continue
        assert row["error_out"] < 1e-2 and row["error_gradients"] < 2e-2 and row["both_ms"] > 0, row


def test_loss() -> None:
    settings = loss.LossSettings(
        tokens=4096, hidden=256, vocab=8000, chunks=[512], dtype=torch.bfloat16, error_tokens=256, repeats=2
    )
    rows = loss.run(settings, CUDA, "test").rows
    assert rows[1]["peak_bytes"] < rows[0]["peak_bytes"]
    for row in rows:
        assert "note" in row or row["error_gradients"] < 2e-2, row


def test_step() -> None:
    from megatron_ultralong.measure import step

    model = Model(hidden_size=512, ffn_size=1024, layers=4, heads=8, kv_heads=2, head_dim=64, vocab_size=1000)

    def settings(names: list[str], **more: object) -> step.StepSettings:
        return step.StepSettings(
            model=model, settings=names, precision="bf16", layer_chunk=1024, loss_chunk=512, repeats=2, **more
        )  # type: ignore[arg-type]

    rows = {
        row["setting"]: row
        for row in step.run(settings(list(step.SETTINGS), lengths=[8192]), CUDA, "test").rows
    }
    assert all("note" not in row and row["seconds"] > 0 for row in rows.values()), rows
    token = {name: row["bytes_per_token"] for name, row in rows.items()}
    assert (
        token["none"]
        > token["full"]
        > token["all-but-attention"]
        > token["offload-layer-inputs"]
        > token["offload-all"]
    )
    assert token["save-on-cpu"] < token["none"]
    # Room for the attention setting, not for keeping every activation; what failed leaves nothing behind for
    # the next row.
    limit = (rows["all-but-attention"]["peak_bytes"] + rows["none"]["peak_bytes"]) // 2 + 2**28
    long = step.run(
        settings(
            ["none", "all-but-attention"], lengths=[8192], longest=True, granularity=8192, limit=int(limit)
        ),
        CUDA,
        "test",
    ).rows
    assert long[1]["tokens"] >= long[0].get("tokens", 0) and all(
        "out of memory" in row["note"] for row in long
    )


def test_generate() -> None:
    from megatron_ultralong.measure import generation

    model = Model(
        hidden_size=512,
        ffn_size=1024,
        layers=4,
        heads=8,
        kv_heads=2,
        head_dim=64,
        vocab_size=1000,
        tied_embeddings=True,
    )
    settings = generation.GenerationSettings(
        model=model, lengths=[2048, 16384], sequences=4, written=8, chunk=1024, precision="bf16", repeats=2
    )
    for row in generation.run(settings, CUDA, "test").rows:
        assert (
            row["prefill_seconds"] > 0
            and row["decode_seconds"] > 0
            and row["peak_bytes"] < 1.2 * row["planned_bytes"]
        ), row
