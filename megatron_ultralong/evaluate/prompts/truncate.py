"""A prompt as tokens that fit: chat template around it, the middle of a text that is too long left out.

LV-Eval and InfiniteBench both keep the two ends of a prompt and cut its middle. Their code then turns the
rest into text and into tokens again, which may be more of them; here the tokens stay, and prompt and answer
together are never over the limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.prompts.chat_template import Mode, frame


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model is asked."""

    id: str
    text: str
    """The user's message, without what was cut; without a chat template the prompt itself."""
    prefix: str
    """The answer's first words, given to the model; empty without a chat template, where `text` ends with
    them."""
    ids: list[int]
    """All of it as tokens, template included."""
    tokens: int
    """Written at most; len(ids) + tokens is within the limit."""
    cut: int
    """Tokens left out."""


class Fitter:
    """Makes prompts for one tokenizer."""

    def __init__(self, tokenizer: Any, *, chat: Mode, max_length: int | None) -> None:
        """tokenizer: a transformers tokenizer. max_length: prompt and answer together, tokens; None = no
        limit. UserError where a chat template is asked for and there is none, or where it does not carry the
        user's text."""
        around = frame(tokenizer, chat)
        self.tokenizer, self.max_length, self.chat = tokenizer, max_length, around.chat
        self.head, self.tail = [*around.bos, *self._encode(around.head)], self._encode(around.tail)

    def check(self, what: str, tokens: int) -> None:
        """UserError where answers of so many tokens leave no room for a prompt. what: the task, for the
        message."""
        if self.max_length is not None and self.max_length - tokens - len(self.head) - len(self.tail) < 2:
            raise UserError(
                f"--max-length {self.max_length}: {what} may write {tokens:,} tokens, which leaves none for the prompt; raise it, or leave "
                f"{what} out"
            )

    def prompt(self, id: str, text: str, tokens: int, start: str = "") -> Prompt:
        """The prompt `text`, with room for `tokens` to be written.

        start: what of the end of `text` begins the answer ("The pass key is"); in a chat it goes where the
        answer stands. UserError where not even the two ends of the text have room.
        """
        assert text.endswith(start)
        prefix = start if self.chat else ""
        message = text[: len(text) - len(prefix)].rstrip() if prefix else text
        prefix = prefix.rstrip()
        ids, end = self._encode(message), [*self.tail, *(self._encode(prefix) if prefix else [])]
        room = len(ids) if self.max_length is None else self.max_length - tokens - len(self.head) - len(end)
        half, cut = room // 2, 0
        if len(ids) > room:
            if half < 1:
                raise UserError(
                    f"--max-length {self.max_length}: {id} needs {tokens + len(self.head) + len(end)} tokens without its text; raise it"
                )
            cut = len(ids) - 2 * half
            message = self.tokenizer.decode(ids[:half]) + self.tokenizer.decode(ids[-half:])
            ids = ids[:half] + ids[-half:]
        return Prompt(
            id=id, text=message, prefix=prefix, ids=[*self.head, *ids, *end], tokens=tokens, cut=cut
        )

    def _encode(self, text: str) -> list[int]:
        # verbose: the tokenizer would warn of texts longer than the model.
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
