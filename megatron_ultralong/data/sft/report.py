"""The printed summary of prepared instruction data, and conversations token by token."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_ultralong.data import conversations
from megatron_ultralong.data.conversations import Unusable
from megatron_ultralong.data.sft.chat_template import NotRendered
from megatron_ultralong.data.sft.encode_sources import COUNTS, ChatEncoder
from megatron_ultralong.data.sft.select_examples import ConversationSource
from megatron_ultralong.data.sft.tokenise_chat import encode_batch
from megatron_ultralong.data.special_tokens import MixedEncoder, report_lines
from megatron_ultralong.io.text_table import text_table

SHOWN_UNUSABLE = 5
"""Records that could not be used, printed at the end."""
_COLUMNS = (*COUNTS[:6], "chosen", "tokens", "trained_tokens")


def summary_lines(manifest: dict[str, Any], broken: Path) -> list[str]:
    """Return the summary of a manifest, with the first records that could not be used out of the file
    `broken`, if it exists."""
    sources, domains = manifest["sources"], manifest["domains"]
    rows = [_cells("source", "domain", *(name.replace("_", " ") for name in _COLUMNS))]
    for entry in sources:
        rows.append(_cells(entry["name"], entry["domain"] or "own", *(entry[key] for key in _COLUMNS)))
    for name, entry in domains.items():
        rows.append(_cells("all", name, *(entry.get(key, "") for key in _COLUMNS)))
    lines = text_table(rows)
    for name, entry in domains.items():
        if entry["chosen"] < entry["wanted"]:
            lines.append(
                f"{name}: {entry['chosen']:,} of {entry['wanted']:,} requested; no more are available"
            )
    if broken.exists():
        with broken.open(encoding="utf-8") as file:
            unusable = [json.loads(line) for line in islice(file, SHOWN_UNUSABLE)]
        lines += [f"not used: {record['place']}: {record['reason']}" for record in unusable]
        lines.append(f"not used: {broken} lists all of them")
    cut = {key: sum(entry[key] for entry in sources) for key in ("turns_cut", "cut_to_length")}
    lines += report_lines("contents", manifest["special_tokens"])
    row_tokens = manifest["rows"] * (manifest["seq_length"] + 1)
    lines.append(
        f"{manifest['rows']:,} rows of {manifest['seq_length']:,} + 1 tokens, {manifest['documents']:,} conversations, "
        f"{manifest['documents'] / manifest['rows']:.1f} per row; "
        f"{manifest['trained_tokens']:,} of {manifest['tokens']:,} tokens trained on; "
        f"{manifest['padding'] / row_tokens:.2%} padding; {cut['turns_cut']:,} turns removed before the first question or "
        f"after the last answer, {cut['cut_to_length']:,} conversations cut to length"
    )
    return lines


def _cells(*values: Any) -> list[str]:
    return [f"{value:,}" if isinstance(value, int) else value for value in values]


def show_conversations(
    sources: Sequence[ConversationSource], encoder: ChatEncoder, count: int
) -> Iterator[str]:
    """Yield the lines of the first `count` conversations, token by token, to check by eye: `*` where a token
    is trained on."""
    backend, template = encoder.tokenizer.backend, encoder.template
    encode = MixedEncoder(backend)
    yield f"template {template.name} ({template.spans}); * = trained on"
    records = (
        record
        for source in sources
        for path in source.files
        for record in conversations.read(path, source=source.name, domain=source.domain, form=source.form)
    )
    for record in islice(records, count):
        try:
            if isinstance(record, Unusable):
                raise NotRendered(record.reason)
            ((ids, trained),) = encode_batch(encode, [template.render(record.messages)])
        except NotRendered as error:
            yield f"\n{record.place}: cannot be used: {error}"
            continue
        yield f"\n{record.place}: {record.domain}, {len(ids)} tokens, {int(trained.sum())} trained on"
        for token, on in zip(ids.tolist(), trained.tolist(), strict=True):
            yield f"{'*' if on else ' '} {token:7}  {backend.decode([token], skip_special_tokens=False)!r}"
