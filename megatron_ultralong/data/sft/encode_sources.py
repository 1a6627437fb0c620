"""Every usable conversation of the sources, rendered, encoded and put into the sample buffer; the rest
counted."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ultralong.data import conversations, input_files
from megatron_ultralong.data.conversations import DOMAINS, Unusable
from megatron_ultralong.data.sft.chat_template import (
    ChatTemplate,
    NotRendered,
    RenderedChat,
    select_template,
)
from megatron_ultralong.data.sft.sample_buffer import SampleBuffer
from megatron_ultralong.data.sft.select_examples import ConversationSource
from megatron_ultralong.data.sft.settings import SftSettings
from megatron_ultralong.data.sft.tokenise_chat import encode_chats, tokens_to_keep
from megatron_ultralong.data.special_tokens import SpecialTokenMode, spelled_pattern
from megatron_ultralong.data.tokenizer import Tokenizer, load_tokenizer

COUNTS = (
    "read",
    "broken",
    "unsupported",
    "duplicates",
    "too_long",
    "usable",
    "turns_cut",
    "cut_to_length",
    "special_tokens",
)
"""What the manifest counts of each source's records. special_tokens: those that contents spell out."""


@dataclass(frozen=True)
class ChatEncoder:
    """What turns conversations into tokens."""

    tokenizer: Tokenizer
    template: ChatTemplate

    @staticmethod
    def load(
        tokenizer_dir: Path, template: str, date: str, special_tokens: SpecialTokenMode = "text"
    ) -> ChatEncoder:
        """UserError if the tokenizer cannot be read or does not fit the template."""
        tokenizer = load_tokenizer(tokenizer_dir)
        return ChatEncoder(tokenizer, select_template(tokenizer_dir, template, date, special_tokens))

    @property
    def pad_id(self) -> int:
        """The padding token; the one that ends a turn or a text only if there is no other. It is masked in
        any case."""
        pad, eos = self.tokenizer.special["pad"], self.tokenizer.special["eos"]
        if pad is None or pad == eos:
            pad = self.tokenizer.backend.token_to_id("<|finetune_right_pad_id|>")
        return next((i for i in (pad, eos) if i is not None), 0)


def encode_sources(
    sources: Sequence[ConversationSource],
    encoder: ChatEncoder,
    settings: SftSettings,
    buffer: SampleBuffer,
    progress: Callable[[int], Any],
) -> list[dict[str, Any]]:
    """Put every usable conversation into `buffer`; return the manifest's entry of each source.

    Conversations with the same first question count once. progress: called with the bytes read since the last
    call.
    """
    counts: list[Counter[str]] = [Counter() for _ in sources]
    origins: deque[tuple[int, int]] = deque()
    """(source, domain) of each conversation that is being encoded, in order."""
    seen: set[bytes] = set()
    spelled = spelled_pattern(encoder.tokenizer.backend.get_added_tokens_decoder().values())

    def rendered(s: int, source: ConversationSource, path: Path) -> Iterator[RenderedChat]:
        for record in conversations.read(
            path, source=source.name, domain=source.domain, form=source.form, progress=progress
        ):
            counts[s]["read"] += 1
            try:
                if isinstance(record, Unusable):
                    counts[s][record.kind] += 1
                    buffer.add_unusable(source.name, record)
                    continue
                chat = encoder.template.render(record.messages)
            except NotRendered as error:
                counts[s]["unsupported"] += 1
                buffer.add_unusable(source.name, Unusable(record.place, "unsupported", str(error)))
                continue
            key = _first_question(record.messages)
            if key in seen:
                counts[s]["duplicates"] += 1
                continue
            seen.add(key)
            counts[s]["turns_cut"] += record.turns_cut
            counts[s]["special_tokens"] += sum(len(spelled.findall(m.content)) for m in record.messages)
            origins.append((s, DOMAINS.index(record.domain)))
            yield chat

    entries = [_entry(source) for source in sources]
    chats = (
        chat
        for s, source in enumerate(sources)
        for path in source.files
        for chat in rendered(s, source, path)
    )
    for ids, trained in encode_chats(chats, encoder.tokenizer.backend, settings.workers):
        s, domain = origins.popleft()
        keep = len(ids)
        if keep > settings.longest:
            keep = tokens_to_keep(trained, settings.longest) if settings.long == "cut" else 0
            counts[s]["cut_to_length" if keep else "too_long"] += 1
        if keep:
            counts[s]["usable"] += 1
            buffer.add(ids[:keep], trained[:keep], s, domain)
    return [{**entry, **count} for entry, count in zip(entries, counts, strict=True)]


def _entry(source: ConversationSource) -> dict[str, Any]:
    return {
        "name": source.name,
        "domain": source.domain,
        "form": source.form,
        "files": [_describe_file(path) for path in source.files],
        **dict.fromkeys(COUNTS, 0),
    }


def _describe_file(path: Path) -> dict[str, Any]:
    with input_files.opened(path) as file, input_files.readable(path):
        return {
            "path": str(path),
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            "bytes": file.tell(),
        }


def _first_question(messages: Sequence[conversations.Message]) -> bytes:
    """Hash the first question, ignoring case and white space."""
    first = next(message.content for message in messages if message.role == "user")
    return hashlib.blake2b(" ".join(first.split()).casefold().encode(), digest_size=16).digest()
