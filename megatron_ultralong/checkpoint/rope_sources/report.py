"""The comparison of RoPE sources, as text and as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_ultralong.checkpoint.rope_sources.compare import TOLERANCE, Agreement, Computed
from megatron_ultralong.io.text_table import paragraphs, text_table

_TOLERANCE = f"{TOLERANCE:g}".replace("e-0", "e-")
_RAMP_ROWS = 16  # rows of the ramp that a table shows at most


def text(computed: Sequence[Computed], agreements: Sequence[Agreement]) -> str:
    """The sources, their settings side by side, ratios by index for each head dimension, and which agree."""
    lines = []
    for i, one in enumerate(computed):
        lines += [f"[{i + 1}] {one.source.name} ({one.source.kind})", f"    {one.source.describe()}"]
    lines += ["", *_settings(computed)]
    for agreement in agreements:
        members = sorted(i for group in agreement.close for i in group)
        lines += ["", *_ratios(computed, members)]
    lines += ["", *_agreements(computed, agreements)]
    notes = [f"note [{i + 1}]: {note}" for i, one in enumerate(computed) for note in one.source.notes]
    return "\n".join([*lines, *([""] if notes else []), *paragraphs(notes)])


def values(computed: Sequence[Computed], agreements: Sequence[Agreement]) -> dict[str, Any]:
    """The same as plain values, with all frequencies. Groups name sources by their position in `sources`."""
    return {
        "sources": [
            {
                "name": one.source.name,
                "kind": one.source.kind,
                "method": one.source.describe(),
                "theta": one.source.rope.theta,
                "original_length": one.source.original_length(),
                "factor": one.source.factor(),
                "max_position_embeddings": one.source.max_position,
                "head_dim": one.head_dim,
                "length": one.length,
                "attention_factor": one.attention_factor,
                "inverse_frequencies": one.frequencies.tolist(),
                "ratios": list(one.ratios),
                "notes": list(one.source.notes),
            }
            for one in computed
        ],
        "tolerance": TOLERANCE,
        "comparisons": [
            {
                "head_dim": agreement.head_dim,
                "identical": agreement.identical,
                "close": agreement.close,
                "differences": [
                    {"sources": [difference.first, difference.other], "first_index": difference.index}
                    for difference in agreement.differences
                ],
            }
            for agreement in agreements
        ],
    }


def _settings(computed: Sequence[Computed]) -> list[str]:
    rows = [["", *(_name(i) for i in range(len(computed)))]]
    for name, numbers in (
        ("theta", [one.source.rope.theta for one in computed]),
        ("original length", [one.source.original_length() for one in computed]),
        ("factor", [one.source.factor() for one in computed]),
        ("max_position_embeddings", [one.source.max_position for one in computed]),
        ("attention factor", [one.attention_factor for one in computed]),
        ("head dimension", [one.head_dim for one in computed]),
    ):
        rows.append([name, *("-" if number is None else f"{number:,.10g}" for number in numbers)])
    if any(one.source.rope.depends_on_length() for one in computed):
        rows.append(["frequencies for length", *(f"{one.length:,}" for one in computed)])
    return text_table(rows)


def _ratios(computed: Sequence[Computed], members: list[int]) -> list[str]:
    """Unscaled / actual frequency at the first index, on the ramp of any source, and at the last index."""
    ramp = sorted({i for member in members for i in computed[member].ramp()})
    shown = ramp
    if len(ramp) > _RAMP_ROWS:
        shown = [ramp[round(i * (len(ramp) - 1) / (_RAMP_ROWS - 1))] for i in range(_RAMP_ROWS)]
    last = computed[members[0]].head_dim // 2 - 1
    rows = [["index", *(_name(member) for member in members)]]
    for index in sorted({0, *shown, last}):
        rows.append([str(index), *(f"{computed[member].ratios[index]:g}" for member in members)])
    title = "unscaled / actual frequency, by each source's own theta"
    if len(shown) < len(ramp):
        title += f" ({len(shown)} of {len(ramp)} indices of the ramp)"
    return [f"{title}:", *text_table(rows)]


def _agreements(computed: Sequence[Computed], agreements: Sequence[Agreement]) -> list[str]:
    lines = []
    for agreement in agreements:
        lines += [f"agree bit for bit: {_list(group)}" for group in agreement.identical if len(group) > 1]
        lines += [
            f"agree to {_TOLERANCE} relative: {_list(group)}"
            for group in agreement.close
            if len(group) > 1 and group not in agreement.identical
        ]
        for difference in agreement.differences:
            a, b = computed[difference.first], computed[difference.other]
            pair = f"{_name(difference.first)} and {_name(difference.other)}"
            if difference.index is None:
                lines.append(f"differ: {pair} only in the attention factor")
                continue
            x, y = (one.frequencies[difference.index].item() for one in (a, b))
            lines.append(
                f"differ: {pair} first at index {difference.index}: {x:.8g} and {y:.8g} rad/position"
            )
    if len(agreements) > 1:
        sizes = ", ".join(
            f"{_list(sorted(i for group in agreement.close for i in group))}: {agreement.head_dim}"
            for agreement in agreements
        )
        lines.append(f"not compared, because head dimensions differ: {sizes}")
    return lines or ["one source, nothing to compare"]


def _name(position: int) -> str:
    return f"[{position + 1}]"


def _list(group: list[int]) -> str:
    return ", ".join(_name(i) for i in group)
