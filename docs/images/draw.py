"""Draw the README's pictures into this folder.

    make demo && python docs/images/draw.py      the passkey map is drawn from the results in runs/demo

ring.png and layer_memory.png are drawn from the code: the zigzag order of context_parallel/zigzag.py, the
bytes of planning/memory.py.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ultralong import recipes, shapes
from megatron_ultralong.config import Memory
from megatron_ultralong.context_parallel import zigzag
from megatron_ultralong.evaluate.report import heat_map, read_results
from megatron_ultralong.planning import memory
from megatron_ultralong.runtime import cli

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CP = 4
RANKS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")  # Okabe and Ito's palette
DARK = ("#0072B2", "#009E73")
INK, QUIET = "#1f2430", "#6b7280"
KEPT, RECOMPUTED, ONCE = "#56B4E9", "#E5E7EB", "#F0E442"
KI, GB = 1024, 1e9
MODEL = shapes.LLAMA_3_1_8B


def main() -> int:
    passkey_map(ROOT / "runs" / "demo", HERE / "demo_passkey.png")
    ring(HERE / "ring.png")
    layer_memory(HERE / "layer_memory.png")
    return 0


def passkey_map(results: Path, path: Path) -> None:
    """The demo's passkey grids before and after training, from the results in a folder of its runs."""
    sys.path.insert(0, str(ROOT / "examples" / "demo"))
    import demo

    grids = [
        read_results.read_for(results / name / "niah.json", heat_map.check) for name in ("before", "after")
    ]
    demo.draw(*grids, path)
    print(f"wrote {path}")


# ---- the ring ----------------------------------------------------------------------------------


def owner(chunk: int) -> int:
    """The rank that holds one of the 2 CP chunks."""
    return next(rank for rank in range(CP) if chunk in zigzag.chunk_ids(rank, CP))


def blocks_by_hop() -> dict[tuple[int, int], tuple[int, bool]]:
    """{(query chunk, key chunk): (the hop in which it is computed, whether it is causal)}, from the blocks
    that the ring computes."""
    s = 2  # tokens of a rank, one in each of its chunks
    found: dict[tuple[int, int], tuple[int, bool]] = {}
    for rank in range(CP):
        mine = zigzag.chunk_ids(rank, CP)
        for hop in range(CP):
            source = (rank - hop) % CP
            block, theirs = zigzag.block_between(rank, source, s), zigzag.chunk_ids(source, CP)
            for query in mine[block.queries]:
                for key in theirs[block.keys]:
                    if not block.causal or key <= query:
                        found[query, key] = (hop, query == key)
    return found


def ring(path: Path) -> None:
    """Which rank holds which tokens, and which block of attention it computes in which hop."""
    figure, (strip, matrix, table) = _figure(
        (9.4, 5.6), [["strip", "strip"], ["matrix", "table"]], [0.6, 4], [1, 1.25]
    )
    figure.suptitle(f"Ring attention in zigzag order on {CP} ranks", fontsize=12, weight="bold", color=INK)
    chunks = 2 * CP
    for chunk in range(chunks):
        _box(strip, (chunk, 0, 1, 1), RANKS[owner(chunk)], f"chunk {chunk}\nrank {owner(chunk)}")
    _plain(strip, (0, chunks), (0, 1), "a sequence in 8 equal chunks: rank r holds chunks r and 7 - r")

    for (query, key), (hop, causal) in blocks_by_hop().items():
        if causal:
            matrix.fill(
                [key, key, key + 1], [query, query + 1, query + 1], color=RANKS[owner(query)], linewidth=0
            )
            _text(matrix, key + 0.3, query + 0.7, str(hop), RANKS[owner(query)])
        else:
            _box(matrix, (key, query, 1, 1), RANKS[owner(query)], str(hop))
    _plain(matrix, (0, chunks), (chunks, 0), "attention: colour = rank of the queries,\nnumber = hop")
    matrix.set_aspect("equal")
    matrix.set_xlabel("chunk of keys", color=QUIET, fontsize=9)
    matrix.set_ylabel("chunk of queries", color=QUIET, fontsize=9)
    matrix.set_xticks([i + 0.5 for i in range(chunks)], range(chunks), fontsize=8, color=QUIET)
    matrix.set_yticks([i + 0.5 for i in range(chunks)], range(chunks), fontsize=8, color=QUIET)

    for rank in range(CP):
        for hop in range(CP):
            source = (rank - hop) % CP
            seen = (
                "both chunks see\nits first chunk" if source < rank else "second chunk sees\nboth its chunks"
            )
            seen = "own chunks,\ncausal" if source == rank else seen
            _box(table, (hop, rank, 1, 1), RANKS[source], f"K, V of rank {source}\n{seen}", 7)
    _plain(
        table,
        (0, CP),
        (CP, 0),
        "keys and values at each rank: colour = where they are from;\nthe next hop is in flight while this one is computed",
    )
    table.set_xticks([i + 0.5 for i in range(CP)], [f"hop {i}" for i in range(CP)], fontsize=8, color=QUIET)
    table.set_yticks([i + 0.5 for i in range(CP)], [f"rank {i}" for i in range(CP)], fontsize=8, color=QUIET)
    sent, expanded = (2 * heads * MODEL.head_dim * 2 // KI for heads in (MODEL.kv_heads, MODEL.heads))
    table.set_xlabel(
        f"In every hop every rank computes the same number of blocks.\n"
        f"A hop of Llama-3.1-8B in bf16 is {sent} KiB a token of the rank:\n"
        f"{MODEL.kv_heads} KV heads, never expanded to {MODEL.heads} ({expanded} KiB).",
        color=QUIET,
        fontsize=8.5,
    )
    _save(figure, path)


# ---- the memory of a layer ---------------------------------------------------------------------


class Mode(NamedTuple):
    """A memory setting in the recipe ultralong_1m, and what it keeps for the backward."""

    name: str
    layer_bytes: int
    """A token's, of one layer."""
    gpu_gb: float
    """Saved activations on each GPU."""
    host_gb: float
    attention_forwards: int
    """How often the forward of attention is computed in an iteration."""


def modes() -> list[Mode]:
    """The settings of memory.recompute and memory.offload, by what they keep on a GPU, as planned."""
    run, world = recipes.ultralong_1m(), 32
    tokens = run.train.seq_length // run.parallel.cp // run.parallel.tp
    kinds = (
        ("none", "off", "recompute: none", 1),
        ("full", "off", "full", 2),
        ("all_but_attention", "off", "all_but_attention", 1),
        ("all_but_attention", "all", "the same, offload: all", 1),
    )
    result = []
    for recompute, offload, name, forwards in kinds:
        one = replace(run, memory=Memory(recompute=recompute, offload=offload))  # type: ignore[arg-type]
        layer = sum(memory.saved_per_layer(one, MODEL).values())
        saved = memory.gpu_memory(one, MODEL, world)["saved activations"]
        host = sum(memory.host_memory(one, MODEL, world).values())
        result.append(Mode(name, layer // tokens, saved / GB, host / GB, forwards))
    return result


def layer_memory(path: Path) -> None:
    """What a layer keeps for its backward, what it computes again, and what that takes."""
    figure, (flow, bars) = _figure((9.4, 4.4), [["flow"], ["bars"]], [1.2, 2])
    figure.suptitle(
        "memory.recompute=all_but_attention: attention is computed once",
        fontsize=12,
        weight="bold",
        color=INK,
    )
    _layer(flow)
    found = modes()
    columns = ((200, "GPU, GB"), (238, "host, GB"), (280, "token, KiB"), (322, "attention\nforward"))
    for x, heading in columns:
        bars.text(x, -0.75, heading, ha="right", va="center", fontsize=8, color=QUIET)
    for y, mode in enumerate(found):
        bars.barh(y, mode.gpu_gb, height=0.62, color=KEPT)
        cells = (
            f"{mode.gpu_gb:.1f}",
            f"{mode.host_gb:.1f}",
            f"{mode.layer_bytes / KI:.1f}",
            "twice" if mode.attention_forwards == 2 else "once",
        )
        for (x, _), cell in zip(columns, cells, strict=True):
            bars.text(x, y, cell, ha="right", va="center", fontsize=8.5, color=INK)
    bars.set_yticks(range(len(found)), [mode.name for mode in found], fontsize=8.5, color=INK)
    bars.set_xlim(0, 326)
    bars.set_ylim(len(found) - 0.5, -1.1)
    bars.plot([80, 80], [len(found) - 0.5, -0.55], color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    bars.text(80, -0.75, "an H100 has 80 GB", fontsize=8, color=QUIET, ha="center", va="center")
    bars.set_xticks([0, 40, 80, 120, 160], [0, 40, 80, 120, 160], fontsize=8, color=QUIET)
    bars.set_xlabel(
        "Saved activations, planned: GB on each GPU and in host memory for each GPU, 1M tokens on 32 GPUs (TP 8 x CP 4);\n"
        "KiB a token and layer; how often the forward of attention is computed in an iteration",
        color=QUIET,
        fontsize=8.5,
    )
    bars.tick_params(length=0)
    for side in ("top", "right", "left", "bottom"):
        bars.spines[side].set_visible(False)
    _save(figure, path)


def _layer(axes: Any) -> None:
    hidden, q, kv = MODEL.hidden_size, MODEL.heads * MODEL.head_dim, MODEL.kv_heads * MODEL.head_dim
    boxes = (
        (0.9, KEPT, f"input\n{hidden * 2 // KI} KiB"),
        (1.45, RECOMPUTED, f"norm, QKV, RoPE\nq {q * 2 // KI} + k, v {2 * kv * 2 // KI} KiB"),
        (1.25, ONCE, "attention kernel\nforward"),
        (1.5, KEPT, f"output, logsumexp\n{q * 2 // KI} KiB + {MODEL.heads * 4} B"),
        (2.1, RECOMPUTED, f"projection, norm, MLP\n{3 * MODEL.ffn_size * 2 // KI} KiB, a chunk at a time"),
        (0.95, KEPT, "next layer's\ninput"),
    )
    left, gap = 0.0, 0.25
    for i, (width, color, text) in enumerate(boxes):
        _box(axes, (left, 0.25, width, 0.6), color, text)
        left += width + gap
        if i < len(boxes) - 1:
            arrow = {"arrowstyle": "->", "color": QUIET}
            axes.annotate("", (left - 0.02, 0.55), (left - 0.23, 0.55), arrowprops=arrow)
    _plain(axes, (0, left - gap), (-0.15, 0.95), "a layer of Llama-3.1-8B in bf16, bytes a token")
    legend = ((0.0, KEPT, "kept for the backward"), (2.3, RECOMPUTED, "computed again in the backward"))
    for x, color, text in (*legend, (5.2, ONCE, "once: its backward takes the kept output")):
        _box(axes, (x, -0.12, 0.22, 0.2), color, "")
        axes.text(x + 0.3, -0.02, text, va="center", fontsize=8.5, color=INK)


# ---- drawing -----------------------------------------------------------------------------------


def _figure(
    size: tuple[float, float],
    layout: list[list[str]],
    heights: list[float],
    widths: list[float] | None = None,
) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplot_mosaic(layout, height_ratios=heights, width_ratios=widths).values())


def _box(axes: Any, box: tuple[float, float, float, float], color: str, text: str, size: float = 8) -> None:
    """A filled rectangle (left, bottom, width, height) with text in its middle."""
    from matplotlib.patches import Rectangle

    x, y, width, height = box
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="white", linewidth=1.2))
    _text(axes, x + width / 2, y + height / 2, text, color, size)


def _text(axes: Any, x: float, y: float, text: str, color: str, size: float = 8) -> None:
    """Text on a background of `color`."""
    ink = "white" if color in DARK else INK
    axes.text(x, y, text, ha="center", va="center", fontsize=size, color=ink)


def _plain(axes: Any, x: tuple[float, float], y: tuple[float, float], title: str) -> None:
    """Limits and a title; no ticks, no frame."""
    axes.set_xlim(*x)
    axes.set_ylim(*y)
    axes.set_title(title, fontsize=9, color=INK)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, format="png", metadata={"Software": None})
    print(f"wrote {path}")


if __name__ == "__main__":
    cli.main(main)
