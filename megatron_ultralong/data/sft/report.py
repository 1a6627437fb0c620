"""What preparing instruction data says to people: a table of what was made, and conversations token by token."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_ultralong.data import conversations
from megatron_ultralong.data.conversations import Unusable
from megatron_ultralong.data.sft import chat_template, tokenise_chat
from megatron_ultralong.data.sft.select_examples import Source
from megatron_ultralong.data.tokenizer import load_tokenizer

MOST = 5
"""Records that could not be used, printed at the end."""


def report(manifest: dict[str, Any], broken: Path) -> list[str]:
    """What was made, and the first records that could not be used, of those that the file `broken` tells
    (where it is there). Lines."""
    columns = (
        "read",
        "broken",
        "unsupported",
        "duplicates",
        "too_long",
        "usable",
        "chosen",
        "tokens",
        "trained_tokens",
    )
    lines = ["".join([f"{'source':24}{'domain':10}", *(f"{name.replace('_', ' '):>15}" for name in columns)])]
    lines += [
        "".join(
            [f"{one['name'][:23]:24}{one['domain'] or 'own':10}", *(f"{one[name]:15,}" for name in columns)]
        )
        for one in manifest["sources"]
    ]
    lines += [
        "".join([f"{'all':24}{name:10}", *(f"{one[key]:15,}" if key in one else " " * 15 for key in columns)])
        for name, one in manifest["domains"].items()
    ]
    lines += [
        f"{name}: {one['chosen']:,} of {one['wanted']:,} wanted; there are no more"
        for name, one in manifest["domains"].items()
        if one["chosen"] < one["wanted"]
    ]
    cut = {key: sum(one[key] for one in manifest["sources"]) for key in ("turns_cut", "cut_to_length")}
    room = manifest["rows"] * (manifest["seq_length"] + 1)
    if broken.exists():
        with broken.open(encoding="utf-8") as file:
            told = [json.loads(line) for line in islice(file, MOST)]
        lines += [f"not used: {one['place']}: {one['reason']}" for one in told]
        lines += [f"not used: all of them, with file and line, in {broken}"]
    return [
        *lines,
        f"{manifest['rows']:,} rows of {manifest['seq_length']:,} + 1 tokens, {manifest['documents']:,} conversations, "
        f"{manifest['documents'] / manifest['rows']:.1f} a row; "
        f"{manifest['trained_tokens']:,} of {manifest['tokens']:,} tokens trained on; {manifest['padding'] / room:.2%} padding; "
        f"{cut['turns_cut']:,} turns cut off before the first question or after the last answer, {cut['cut_to_length']:,} conversations "
        "cut to length",
    ]


def show(
    sources: Sequence[Source], tokenizer_dir: Path, template_name: str, date: str, count: int
) -> Iterator[str]:
    """The first `count` conversations token by token, for people to check: `*` where a token is trained on.
    Lines."""
    backend = load_tokenizer(tokenizer_dir).backend
    template = chat_template.choose(tokenizer_dir, template_name, date)
    yield f"template {template.name} ({template.spans}); * = trained on"
    for source in sources:
        for path in source.files:
            for one in conversations.read(path, source=source.name, domain=source.domain, form=source.form):
                if not count:
                    return
                count -= 1
                try:
                    if isinstance(one, Unusable):
                        raise chat_template.NotRendered(one.reason)
                    ((ids, trained),) = tokenise_chat.encode(backend, [template.render(one.messages)])
                except chat_template.NotRendered as error:
                    yield f"\n{one.place}: cannot be used: {error}"
                    continue
                yield f"\n{one.place}: {one.domain}, {len(ids)} tokens, {int(trained.sum())} trained on"
                for token, on in zip(ids.tolist(), trained.tolist(), strict=True):
                    yield f"{'*' if on else ' '} {token:7}  {backend.decode([token], skip_special_tokens=False)!r}"
