"""What became of every document: the manifest's sources, a table of all documents, and lengths before and
after as a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from megatron_ultralong.data import documents
from megatron_ultralong.data.pretrain import length_resampling, tokenise_worker
from megatron_ultralong.data.pretrain.sources import EDGES, Lengths, Sources
from megatron_ultralong.data.pretrain.token_cache import Store

_SKIPPED = {tokenise_worker.EMPTY: "empty", tokenise_worker.BROKEN: "broken"}


def sources(
    store: Store, wanted: Sources, times: NDArray[numpy.int32], duplicate: NDArray[numpy.bool_], dropped: bool
) -> list[dict[str, Any]]:
    """Of each source: its documents and tokens, those packed, by file and by length. Tokens are without
    separators.

    dropped: duplicates were left out.
    """
    files = [path for source in wanted.sources for path in source.files]
    by_file = store.counts_by_file()
    source_of = numpy.array([unit.source for unit in store.units], numpy.int32)[store.unit_of]
    found, number = [], 0
    for which, source in enumerate(wanted.sources):
        own = source_of == which
        numbers = range(number, number + len(source.files))
        number = numbers.stop
        skipped = {name: sum(by_file[k][name] for k in numbers) for name in ("empty", "broken")}
        found.append(
            {
                "name": source.name,
                "weight": None if source.weight is None else float(source.weight),
                "text_key": source.text_key,
                "id_key": source.id_key,
                "strip_id": source.strip_id,
                "ends_with": _ends_with(store, which) if source.strip_id is None else None,
                "documents": int(own.sum()),
                "tokens": int(store.lengths[own].sum()),
                "skipped": {**skipped, "duplicate": int(duplicate[own].sum()) if dropped else 0},
                "packed": {
                    "documents": int(times[own].sum()),
                    "tokens": int((store.lengths[own] * times[own]).sum()),
                    "most_repeated": int(times[own].max(initial=0)),
                },
                "lengths": _lengths(store.lengths[own], times[own], source.lengths),
                "files": [
                    {
                        "path": str(files[k]),
                        "sha256": store.hashes[k],
                        "bytes": tokenise_worker.data(files[k]).stat().st_size,
                        **{
                            key: value
                            for key, value in by_file[k].items()
                            if key not in ("lines", "first_broken")
                        },
                    }
                    for k in numbers
                ],
            }
        )
    return found


def _ends_with(store: Store, source: int) -> int | None:
    """The token that every document of a source ends with, if it is a Megatron corpus and there is one."""
    last = {
        totals["last_id"]
        for unit, totals in zip(store.units, store.totals, strict=True)
        if unit.source == source
    }
    return last.pop() if len(last) == 1 else None


def _lengths(
    lengths: NDArray[numpy.int64], times: NDArray[numpy.int32], wanted: Lengths | None
) -> list[dict[str, Any]]:
    """Documents and tokens by length, before and after; buckets part at 1K, 2K ... 1M and where the source's
    own do."""
    own = Lengths(edges=(), values=(1.0,), shares=False) if wanted is None else wanted
    edges = sorted({*EDGES, *own.edges})
    place = numpy.searchsorted(edges, lengths, side="right")
    told = numpy.searchsorted(numpy.array(own.edges, numpy.int64), [0, *edges], side="right")
    named = Lengths(edges=tuple(edges), values=(1.0,) * (len(edges) + 1), shares=False)
    found = []
    for k in range(len(edges) + 1):
        here = place == k
        if here.any():
            found.append(
                {
                    "bucket": length_resampling.name(named, k),
                    "from": 0 if k == 0 else edges[k - 1],
                    "share" if own.shares else "rate": own.values[told[k]],
                    "documents": int(here.sum()),
                    "tokens": int(lengths[here].sum()),
                    "packed_documents": int(times[here].sum()),
                    "packed_tokens": int((lengths[here] * times[here]).sum()),
                }
            )
    return found


def table(manifest: dict[str, Any]) -> str:
    """Tokens by length of document before and after, for the terminal."""
    lines = [
        f"{'source':14}{'length':>10}{'documents':>12}{'tokens':>16}{'share':>7}   {'packed':>12}{'tokens':>16}{'share':>7}"
    ]
    packed = sum(source["packed"]["tokens"] for source in manifest["sources"])
    everything = sum(source["tokens"] for source in manifest["sources"])

    def line(name: str, bucket: str, before: tuple[int, int], after: tuple[int, int]) -> str:
        return (
            f"{name[:13]:14}{bucket:>10}{before[0]:>12,}{before[1]:>16,}{before[1] / max(everything, 1):>7.1%}   "
            f"{after[0]:>12,}{after[1]:>16,}{after[1] / max(packed, 1):>7.1%}"
        )

    for source in manifest["sources"]:
        for k, row in enumerate(source["lengths"]):
            lines.append(
                line(
                    "" if k else source["name"],
                    row["bucket"],
                    (row["documents"], row["tokens"]),
                    (row["packed_documents"], row["packed_tokens"]),
                )
            )
        lines.append(
            line(
                "",
                "all",
                (source["documents"], source["tokens"]),
                (source["packed"]["documents"], source["packed"]["tokens"]),
            )
        )
    if len(manifest["sources"]) > 1:
        lines.append(
            line(
                "all",
                "",
                (sum(source["documents"] for source in manifest["sources"]), everything),
                (sum(source["packed"]["documents"] for source in manifest["sources"]), packed),
            )
        )
    return "\n".join(lines)


def notes(manifest: dict[str, Any], output: str) -> list[str]:
    """What a user should know of the documents that were not simply packed, a line each."""
    found = []
    broken, copies, dropped = (
        manifest["skipped"]["broken"],
        manifest["duplicates"],
        manifest["skipped"]["duplicate"],
    )
    if broken:
        found.append(
            f"{broken} broken lines left out, the first: {manifest['first_broken']}; all of them: {output}.broken.jsonl"
        )
    if copies:
        found.append(
            f"{copies} documents have the same tokens as an earlier one: {'left out' if dropped else 'kept (--duplicates drop leaves them out)'}"
        )
    for source in manifest["sources"]:
        none = [
            row["bucket"]
            for row in source["lengths"]
            if row.get("rate", row.get("share")) and not row["packed_documents"]
        ]
        if none:
            found.append(
                f"{source['name']}: nothing of {', '.join(none)} was taken: what is wanted of it is less than half a document"
            )
        if source["ends_with"] is not None:
            found.append(
                f"{source['name']}: every document ends with token {source['ends_with']}, kept before the separator; "
                f"strip_id: {source['ends_with']} in a file of sources takes it off"
            )
    return found


def write(
    stage: Path,
    store: Store,
    wanted: Sources,
    times: NDArray[numpy.int32],
    duplicate: NDArray[numpy.bool_],
    manifest: dict[str, Any],
) -> None:
    """The table of documents, the list of broken ones and the plot, into a staging folder."""
    import pyarrow
    import pyarrow.parquet

    files = [str(path) for source in wanted.sources for path in source.files]
    names = [source.name for source in wanted.sources]
    dropped = sum(source["skipped"]["duplicate"] for source in manifest["sources"]) > 0
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
    lines_before = numpy.zeros(len(files), numpy.int64)
    at = 0
    with (
        pyarrow.parquet.ParquetWriter(stage / ".documents.parquet", schema) as writer,
        (stage / ".broken.jsonl").open("w", encoding="utf-8") as broken,
    ):
        for k, unit in enumerate(store.units):
            part, number, ids, status, reason, tokens = store.column(
                "part", "number", "id", "status", "reason", "tokens", unit=k
            )
            good = status == tokenise_worker.OK
            count = int(good.sum())
            used = numpy.zeros(len(status), numpy.int32)
            used[good] = times[at : at + count]
            again = numpy.zeros(len(status), numpy.bool_)
            again[good] = duplicate[at : at + count]
            at += count
            file = numpy.array(unit.files)[part]
            # Of a .jsonl in several parts each counts its own lines; rows of a .parquet are counted through
            # the file.
            cut = numpy.array([documents.kind(p.path)[0] == ".jsonl" for p in unit.parts])
            number = number + numpy.where(cut[part], lines_before[file], 0)
            for which, counts in zip(unit.files, store.totals[k]["parts"], strict=True):
                lines_before[which] += counts["lines"]
            what = numpy.where(
                used > 0, "packed", numpy.where(again & dropped, "duplicate", "left out")
            ).astype(object)
            for value, name in _SKIPPED.items():
                what[status == value] = name
            paths = numpy.array(files, dtype=object)[file]
            source = numpy.full(len(status), names[unit.source], dtype=object)
            columns = (source, paths, number, ids, tokens, used, what, reason)
            writer.write_table(
                pyarrow.table(
                    [
                        pyarrow.array(values, field.type)
                        for values, field in zip(columns, schema, strict=True)
                    ],
                    schema=schema,
                )
            )
            for row in numpy.flatnonzero(status == tokenise_worker.BROKEN):
                broken.write(
                    json.dumps(
                        {"file": paths[row], "line": int(number[row]), "reason": reason[row]},
                        ensure_ascii=False,
                    )
                    + "\n"
                )
    if not (stage / ".broken.jsonl").stat().st_size:
        (stage / ".broken.jsonl").unlink()
    plot(manifest, stage / ".lengths.png")


def equal_pair(
    store: Store, low: NDArray[numpy.uint64], high: NDArray[numpy.uint64], second: int
) -> tuple[str, str]:
    """Where a document and the first one with the same hash stand."""
    first = int(numpy.flatnonzero((low == low[second]) & (high == high[second]))[0])
    return _place(store, second), _place(store, first)


def plot(manifest: dict[str, Any], path: Path) -> None:
    """Tokens by length of document, before and after, each source in a colour of its own; PNG."""
    from matplotlib.figure import Figure

    begins = sorted({row["from"] for source in manifest["sources"] for row in source["lengths"]})
    names = {row["from"]: row["bucket"] for source in manifest["sources"] for row in source["lengths"]}
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)  # shares on one scale, to be compared
    highest = 0.0
    for axes, key, title in ((left, "tokens", "in the sources"), (right, "packed_tokens", "packed")):
        bottom = numpy.zeros(len(begins))
        total = max(sum(row[key] for source in manifest["sources"] for row in source["lengths"]), 1)
        for source in manifest["sources"]:
            values = {row["from"]: row[key] for row in source["lengths"]}
            heights = numpy.array([100 * values.get(begin, 0) / total for begin in begins])
            axes.bar(range(len(begins)), heights, bottom=bottom, label=source["name"], width=0.85)
            bottom += heights
        highest = max(highest, bottom.max())
        axes.set_title(f"{title}: {total:,} tokens", fontsize=10)
        axes.set_xticks(
            range(len(begins)), [names[begin] for begin in begins], rotation=45, ha="right", fontsize=8
        )
        axes.set_xlabel("tokens of the document", fontsize=9)
        axes.tick_params(axis="y", labelsize=8, labelleft=True)
        axes.grid(axis="y", alpha=0.3, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("share of tokens, %", fontsize=9)
    left.set_ylim(0, 1.05 * highest or 1)
    if len(manifest["sources"]) > 1:
        handles, labels = left.get_legend_handles_labels()
        figure.legend(
            handles[::-1], labels[::-1], loc="outside right upper", frameon=False, fontsize=8
        )  # in the order of the bars
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})


def _place(store: Store, document: int) -> str:
    unit = int(store.unit_of[document])
    part, number, status = store.column("part", "number", "status", unit=unit)
    row = numpy.flatnonzero(status == tokenise_worker.OK)[
        document - int(numpy.searchsorted(store.unit_of, unit))
    ]
    return documents.place(store.units[unit].parts[part[row]], int(number[row]))
