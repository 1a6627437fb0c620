"""From the text of a prompt to token ids: the one place where evaluation applies a chat template.

A prompt is the user message inside the tokenizer's chat template, followed by the first words of the answer
(the prefix). It is encoded as one text (`encode`), or assembled from parts that were encoded alone
(`assemble`) where the exact number of tokens of each part matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

from megatron_ultralong.data.sft.chat_template import apply_template
from megatron_ultralong.errors import UserError

ChatMode = Literal["auto", "yes", "no"]
"""Whether to use the tokenizer's chat template; auto = where it has one."""
_MARKER = "<<<TEXT>>>"


def render_chat(tokenizer: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
    """Render a conversation with the tokenizer's chat template and a pinned date; without the generation
    prompt its last turn stays open."""
    return apply_template(
        tokenizer,
        messages,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=not add_generation_prompt,
    )


def use_chat(tokenizer: Any, mode: ChatMode) -> bool:
    """Whether to use the tokenizer's chat template. UserError for yes where it has none."""
    available = bool(getattr(tokenizer, "chat_template", None))
    if mode == "yes" and not available:
        raise UserError("--chat yes: this model's tokenizer has no chat template; use --chat no")
    return available and mode != "no"


class PromptEncoder:
    """Encodes prompts with one tokenizer and chat mode."""

    def __init__(self, tokenizer: Any, mode: ChatMode) -> None:
        """UserError where `mode` is yes and the tokenizer has no chat template, or where the template does
        not contain the user message once and unchanged."""
        self.tokenizer = tokenizer
        self.chat = use_chat(tokenizer, mode)
        self.head, self.tail = "", ""
        """The template's text before and after the user message."""
        self.bos: list[int] = []
        """Tokens before a prompt without a chat template."""
        if self.chat:
            text = render_chat(tokenizer, [{"role": "user", "content": _MARKER}])
            if text.count(_MARKER) != 1:
                raise UserError(
                    "--chat: the chat template does not contain the user message once and unchanged; use --chat no"
                )
            self.head, self.tail = text.split(_MARKER)
        elif tokenizer.bos_token_id is not None:
            adds_bos = list(tokenizer.encode("a"))[:1] == [tokenizer.bos_token_id]
            self.bos = [tokenizer.bos_token_id] if adds_bos else []

    def ids(self, text: str) -> list[int]:
        """Token ids of `text` alone, without special tokens around it."""
        # verbose: otherwise the tokenizer warns of texts longer than the model
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def counts(self, texts: list[str]) -> list[int]:
        """Number of tokens of each text alone."""
        sizes: list[int] = []
        for start in range(0, len(texts), 4096):  # the tokenizer keeps far more per text than its ids
            batch = self.tokenizer(texts[start : start + 4096], add_special_tokens=False, verbose=False)
            sizes += [len(ids) for ids in batch.input_ids]
        return sizes

    def encode(self, text: str, prefix: str) -> list[int]:
        """Token ids of the complete prompt, encoded as one text. A text that starts with a special token
        contains its own template; no other is applied."""
        if text.startswith(tuple(token for token in self.tokenizer.all_special_tokens if token)):
            return self.ids(text + prefix)
        return [*self.bos, *self.ids(self.head + text + self.tail + prefix)]

    def size(self, text: str, prefix: str) -> int:
        """Number of tokens of the complete prompt."""
        return len(self.encode(text, prefix))

    @cached_property
    def head_ids(self) -> list[int]:
        return [*self.bos, *self.ids(self.head)]

    @cached_property
    def tail_ids(self) -> list[int]:
        return self.ids(self.tail)

    def assemble(
        self, message: Sequence[int], prefix: Sequence[int], *, head: list[int] | None = None
    ) -> list[int]:
        """Token ids of the complete prompt from a message and a prefix that were encoded alone.

        head: the ids to use for the template before the message; None = `head_ids`.
        """
        return [*(self.head_ids if head is None else head), *message, *self.tail_ids, *prefix]
