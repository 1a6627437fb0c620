"""Prompts that fit a token limit: the middle of a text that is too long is cut out.

LV-Eval and InfiniteBench both keep the two ends of a prompt and cut its middle. Their code decodes the
remaining tokens to text and encodes it again, which may give more tokens; here the tokens stay, and prompt
and answer together never exceed the limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends.protocol import GenerationRequest
from megatron_ultralong.evaluate.prompts.encode import ChatMode, PromptEncoder


@dataclass(frozen=True, kw_only=True)
class TruncatedPrompt:
    """A prompt that fits the limit."""

    request: GenerationRequest
    """Its `text` is the user message without what was cut; without a chat template, `text` includes the
    answer's first words and `prefix` is empty."""
    cut: int
    """Number of tokens cut from the middle."""


class PromptTruncator:
    """Makes prompts for one tokenizer and limit."""

    def __init__(self, tokenizer: Any, *, chat: ChatMode, max_length: int | None) -> None:
        """max_length: tokens of prompt and answer together; None = no limit. UserError as in
        `PromptEncoder`."""
        self.encoder, self.max_length = PromptEncoder(tokenizer, chat), max_length

    @property
    def chat(self) -> bool:
        return self.encoder.chat

    def check(self, task: str, max_tokens: int) -> None:
        """UserError where answers of `max_tokens` tokens leave no room for a prompt of `task`."""
        template = len(self.encoder.head_ids) + len(self.encoder.tail_ids)
        if self.max_length is not None and self.max_length - max_tokens - template < 2:
            raise UserError(
                f"--max-length {self.max_length}: answers of {task} may have {max_tokens:,} tokens, which leaves none for "
                "the prompt; raise "
                f"it, or leave {task} out"
            )

    def prompt(self, id: str, text: str, max_tokens: int, start: str = "") -> TruncatedPrompt:
        """Make the prompt `text`, leaving room for an answer of `max_tokens` tokens.

        start: the end of `text` that begins the answer ("The pass key is"); in a chat it goes to the
        assistant's turn. UserError where not even one token of each end of the text fits.
        """
        assert text.endswith(start)
        encoder = self.encoder
        prefix = start if encoder.chat else ""
        message = text[: len(text) - len(prefix)].rstrip() if prefix else text
        prefix = prefix.rstrip()
        ids, prefix_ids = encoder.ids(message), encoder.ids(prefix) if prefix else []
        fixed = max_tokens + len(encoder.assemble((), prefix_ids))
        room = len(ids) if self.max_length is None else self.max_length - fixed
        half, cut = room // 2, 0
        if len(ids) > room:
            if half < 1:
                raise UserError(
                    f"--max-length {self.max_length}: {id} needs {fixed} tokens without its text; raise it"
                )
            cut = len(ids) - 2 * half
            message = encoder.tokenizer.decode(ids[:half]) + encoder.tokenizer.decode(ids[-half:])
            ids = ids[:half] + ids[-half:]
        request = GenerationRequest(
            id=id, text=message, prefix=prefix, ids=encoder.assemble(ids, prefix_ids), max_tokens=max_tokens
        )
        return TruncatedPrompt(request=request, cut=cut)
