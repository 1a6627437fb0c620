"""The manifest of pretraining rows: where each token came from, and what was left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from megatron_ultralong.data.pretrain.length_buckets import EDGES, LengthBuckets
from megatron_ultralong.data.pretrain.sources import DocumentMix, DocumentSource
from megatron_ultralong.data.pretrain.token_cache import TokenCache
from megatron_ultralong.data.pretrain.tokenise_worker import content_file


@dataclass(frozen=True)
class DocumentUses:
    """The documents of a mix, and how they are used. Arrays have one entry per document with tokens."""

    cache: TokenCache
    mix: DocumentMix
    uses: NDArray[numpy.int32]
    """How often each is used."""
    duplicate: NDArray[numpy.bool_]
    """Whether an earlier one has the same tokens."""
    drop_duplicates: bool


def of_sources(documents: DocumentUses) -> list[dict[str, Any]]:
    """The manifest's `sources`: documents and tokens of each, before and after packing, by file and by
    length. Tokens are without separators."""
    cache, by_file, source_of = documents.cache, documents.cache.counts_by_file(), documents.cache.source_of
    sources, number = [], 0
    for which, source in enumerate(documents.mix.sources):
        numbers = range(number, number + len(source.files))
        number = numbers.stop
        own = source_of == which
        lengths, uses, duplicates = cache.lengths[own], documents.uses[own], documents.duplicate[own]
        skipped = {name: sum(by_file[k][name] for k in numbers) for name in ("empty", "broken")}
        sources.append(
            {
                "name": source.name,
                "weight": None if source.weight is None else float(source.weight),
                "text_key": source.text_key,
                "id_key": source.id_key,
                "strip_id": source.strip_id,
                "special_tokens": {
                    "encoded_as": source.special_tokens,
                    "spelled_out": sum(by_file[k]["special_tokens"] for k in numbers),
                },
                "ends_with": _ends_with(cache, which) if source.strip_id is None else None,
                "documents": int(own.sum()),
                "tokens": int(lengths.sum()),
                "skipped": {
                    **skipped,
                    "duplicate": int(duplicates.sum()) if documents.drop_duplicates else 0,
                },
                "packed": {
                    "documents": int(uses.sum()),
                    "tokens": int((lengths * uses).sum()),
                    "most_repeated": int(uses.max(initial=0)),
                },
                "lengths": _by_length(lengths, uses, source.lengths),
                "files": [_file(source, k - numbers.start, cache.hashes[k], by_file[k]) for k in numbers],
            }
        )
    return sources


def _file(source: DocumentSource, which: int, sha256: str, counts: dict[str, Any]) -> dict[str, Any]:
    path = source.files[which]
    counts = {key: value for key, value in counts.items() if key not in ("lines", "first_broken")}
    return {"path": str(path), "sha256": sha256, "bytes": content_file(path).stat().st_size, **counts}


def _ends_with(cache: TokenCache, source: int) -> int | None:
    """The token that every document of a source ends with, if it is a Megatron corpus with such a token."""
    last = {
        totals["last_id"]
        for unit, totals in zip(cache.units, cache.totals, strict=True)
        if unit.source == source
    }
    return last.pop() if len(last) == 1 else None


def _by_length(
    lengths: NDArray[numpy.int64], uses: NDArray[numpy.int32], buckets: LengthBuckets | None
) -> list[dict[str, Any]]:
    """Documents and tokens by length, before and after packing; edges are 1K, 2K ... 1M and those of the
    source's own buckets."""
    own = LengthBuckets(edges=(), values=(1.0,), shares=False) if buckets is None else buckets
    edges = sorted({*EDGES, *own.edges})
    place = numpy.searchsorted(edges, lengths, side="right")
    own_bucket = numpy.searchsorted(numpy.array(own.edges, numpy.int64), [0, *edges], side="right")
    reported = LengthBuckets(edges=tuple(edges), values=(1.0,) * (len(edges) + 1), shares=False)
    by_length = []
    for k in range(len(edges) + 1):
        here = place == k
        if here.any():
            by_length.append(
                {
                    "bucket": reported.name(k),
                    "from": 0 if k == 0 else edges[k - 1],
                    "share" if own.shares else "rate": own.values[own_bucket[k]],
                    "documents": int(here.sum()),
                    "tokens": int(lengths[here].sum()),
                    "packed_documents": int(uses[here].sum()),
                    "packed_tokens": int((lengths[here] * uses[here]).sum()),
                }
            )
    return by_length
