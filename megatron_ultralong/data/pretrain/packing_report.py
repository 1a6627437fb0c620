"""Reports on packed documents: a table of all documents, lengths before and after packing as a table and a
plot, and warnings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy

from megatron_ultralong.data import documents
from megatron_ultralong.data.pretrain.manifest import DocumentUses
from megatron_ultralong.data.pretrain.tokenise_worker import BROKEN, EMPTY, OK
from megatron_ultralong.data.special_tokens import report_lines
from megatron_ultralong.io import plot_style
from megatron_ultralong.io.plot_style import AREAS, HATCHES
from megatron_ultralong.io.text_table import text_table

_SKIPPED = {EMPTY: "empty", BROKEN: "broken"}


def length_table(manifest: dict[str, Any]) -> str:
    """Tokens by length of document, before and after packing, for the terminal."""
    total = sum(source["tokens"] for source in manifest["sources"])
    packed = sum(source["packed"]["tokens"] for source in manifest["sources"])

    def row(name: str, before: dict[str, int], after: tuple[int, int]) -> list[str]:
        return [
            f"  {name}",
            *(f"{before[key]:,}" for key in ("documents", "tokens")),
            f"{before['tokens'] / max(total, 1):.1%}",
            *(f"{number:,}" for number in after),
            f"{after[1] / max(packed, 1):.1%}",
        ]

    rows = [["length", "documents", "tokens", "share", "packed", "tokens", "share"]]
    for source in manifest["sources"]:
        rows.append([source["name"]])
        for bucket in source["lengths"]:
            rows.append(row(bucket["bucket"], bucket, (bucket["packed_documents"], bucket["packed_tokens"])))
        rows.append(row("all", source, (source["packed"]["documents"], source["packed"]["tokens"])))
    if len(manifest["sources"]) > 1:
        count = sum(source["documents"] for source in manifest["sources"])
        packed_count = sum(source["packed"]["documents"] for source in manifest["sources"])
        rows.append(["all sources"])
        rows.append(row("all", {"documents": count, "tokens": total}, (packed_count, packed)))
    return "\n".join(text_table(rows))


def warnings(manifest: dict[str, Any], output: str) -> list[str]:
    """Warnings about the packed documents, one line each."""
    lines = []
    skipped, duplicates = manifest["skipped"], manifest["duplicates"]
    if skipped["broken"]:
        lines.append(
            f"{skipped['broken']} broken documents left out, the first: {manifest['first_broken']}; all of them: "
            f"{output}.broken.jsonl"
        )
    if duplicates:
        what = "left out" if skipped["duplicate"] else "kept (--duplicates drop leaves them out)"
        lines.append(f"{duplicates} documents have the same tokens as an earlier one: {what}")
    for source in manifest["sources"]:
        lines += report_lines(source["name"], source["special_tokens"])
        unused = [
            bucket["bucket"]
            for bucket in source["lengths"]
            if bucket.get("rate", bucket.get("share")) and not bucket["packed_documents"]
        ]
        if unused:
            lines.append(
                f"{source['name']}: no document of {', '.join(unused)} is used: less than half of one was requested"
            )
        if source["ends_with"] is not None:
            lines.append(
                f"{source['name']}: every document ends with token {source['ends_with']}, which is kept before the separator; "
                f"strip_id: {source['ends_with']} in a --sources file removes it"
            )
    return lines


def write(stage: Path, uses: DocumentUses, manifest: dict[str, Any]) -> None:
    """Write the table of documents, the list of broken ones and the plot into a staging folder."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema(
        [
            ("source", pyarrow.string()),
            ("file", pyarrow.string()),
            ("number", pyarrow.int64()),
            ("id", pyarrow.string()),
            ("tokens", pyarrow.int64()),
            ("used", pyarrow.int32()),
            ("what", pyarrow.string()),
            ("reason", pyarrow.string()),
        ]
    )
    lines_before = numpy.zeros(len(uses.mix.files), numpy.int64)
    with (
        pyarrow.parquet.ParquetWriter(stage / ".documents.parquet", schema) as writer,
        (stage / ".broken.jsonl").open("w", encoding="utf-8") as broken,
    ):
        for unit in range(len(uses.cache.units)):
            columns = _document_columns(uses, unit, lines_before)
            arrays = [pyarrow.array(columns[field.name], field.type) for field in schema]
            writer.write_table(pyarrow.table(arrays, schema=schema))
            for row in numpy.flatnonzero(columns["what"] == _SKIPPED[BROKEN]):
                record = {"file": columns["file"][row], "line": int(columns["number"][row])}
                record["reason"] = columns["reason"][row]
                broken.write(json.dumps(record, ensure_ascii=False) + "\n")
    if not (stage / ".broken.jsonl").stat().st_size:
        (stage / ".broken.jsonl").unlink()
    plot(manifest, stage / ".lengths.png")


def _document_columns(uses: DocumentUses, which: int, lines_before: Any) -> dict[str, Any]:
    """The table of a unit's documents. lines_before: lines of each file in the units before; this unit's are
    added."""
    cache, unit = uses.cache, uses.cache.units[which]
    part, number, ids, status, reason, tokens = cache.columns(
        "part", "number", "id", "status", "reason", "tokens", unit=which
    )
    good, used, again = status == OK, numpy.zeros(len(status), numpy.int32), numpy.zeros(len(status), bool)
    own = slice(*numpy.searchsorted(cache.unit_of, [which, which + 1]))
    used[good], again[good] = uses.uses[own], uses.duplicate[own]
    file = numpy.array(unit.files)[part]
    # Each range of a .jsonl counts its own lines; rows of a .parquet are counted through the file.
    by_line = numpy.array([documents.kind(r.path) == ".jsonl" for r in unit.ranges])
    number = number + numpy.where(by_line[part], lines_before[file], 0)
    for k, counts in zip(unit.files, cache.totals[which]["parts"], strict=True):
        lines_before[k] += counts["lines"]
    left_out = numpy.where(again & uses.drop_duplicates, "duplicate", "left out")
    what = numpy.where(used > 0, "packed", left_out).astype(object)
    for value, name in _SKIPPED.items():
        what[status == value] = name
    return {
        "source": numpy.full(len(status), uses.mix.sources[unit.source].name, dtype=object),
        "file": numpy.array([str(path) for path in uses.mix.files], dtype=object)[file],
        "number": number,
        "id": ids,
        "tokens": tokens,
        "used": used,
        "what": what,
        "reason": reason,
    }


def plot(manifest: dict[str, Any], path: Path) -> None:
    """Plot tokens by length of document, before and after packing, one colour and hatch per source, as
    PNG."""
    names = {row["from"]: row["bucket"] for source in manifest["sources"] for row in source["lengths"]}
    begins = sorted(names)
    figure = plot_style.new_figure(10, 4.2)
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)  # shares on one scale, to be compared
    highest = 0.0
    for axes, key, title in ((left, "tokens", "in the sources"), (right, "packed_tokens", "packed")):
        bottom = numpy.zeros(len(begins))
        total = max(sum(row[key] for source in manifest["sources"] for row in source["lengths"]), 1)
        for i, source in enumerate(manifest["sources"]):
            values = {row["from"]: row[key] for row in source["lengths"]}
            heights = numpy.array([100 * values.get(begin, 0) / total for begin in begins])
            axes.bar(
                range(len(begins)),
                heights,
                bottom=bottom,
                label=source["name"],
                width=0.85,
                color=AREAS[i % len(AREAS)],
                edgecolor="white",
                hatch=HATCHES[i % len(HATCHES)],
            )
            bottom += heights
        highest = max(highest, bottom.max())
        plot_style.style_axes(axes)
        axes.set_title(f"{title}: {total:,} tokens", fontsize=10, color=plot_style.INK)
        axes.set_xticks(
            range(len(begins)), [names[begin] for begin in begins], rotation=45, ha="right", fontsize=8
        )
        axes.set_xlabel("length of the document in tokens (1K = 1,024)", fontsize=9, color=plot_style.QUIET)
        axes.tick_params(axis="y", labelleft=True)
        axes.grid(axis="x", visible=False)
    left.set_ylabel("share of all tokens, %", fontsize=9, color=plot_style.QUIET)
    left.set_ylim(0, 1.05 * highest or 1)
    figure.suptitle("Tokens by length of document", fontsize=12, fontweight="bold", color=plot_style.INK)
    if len(manifest["sources"]) > 1:
        handles, labels = left.get_legend_handles_labels()
        # In the order of the bars, from the top.
        figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False, fontsize=8)
    plot_style.save_figure(figure, path)
