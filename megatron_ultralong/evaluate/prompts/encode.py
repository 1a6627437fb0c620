"""From the text of a prompt to token ids: the one place where evaluation applies a chat template.

A prompt is the user message inside the tokenizer's chat template, followed by the first words of the answer
(the prefix). It is encoded as one text (`encode`), or assembled from parts that were encoded alone
(`assemble`) where the exact number of tokens of each part matters. Special tokens that the message or the
prefix spells out are text; those of the template are control tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

from megatron_ultralong.data.sft.chat_template import apply_template
from megatron_ultralong.data.special_tokens import MixedEncoder, SpecialTokenMode, spelled_pattern
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
        self._spelled = spelled_pattern(tokenizer.added_tokens_decoder.values())
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

    @cached_property
    def _mixed(self) -> MixedEncoder:
        return MixedEncoder(self.tokenizer.backend_tokenizer)

    def _batch(self, texts: list[str], special_tokens: SpecialTokenMode) -> list[list[int]]:
        # verbose: otherwise the tokenizer warns of texts longer than the model. split_special_tokens: also
        # where tokenizer_config.json says otherwise, because templates consist of them.
        ids = self.tokenizer(
            texts, add_special_tokens=False, verbose=False, split_special_tokens=False
        ).input_ids
        for i, text in enumerate(texts if special_tokens == "text" else ()):
            if self._spelled.search(text):
                ids[i] = self._ids_of_text(text)
        return ids

    def _ids_of_text(self, text: str) -> list[int]:
        if self.tokenizer.is_fast:
            return self._mixed.encode(text, [(0, len(text))])[0]
        return self.tokenizer.convert_tokens_to_ids(self.tokenizer.tokenize(text, split_special_tokens=True))

    def ids(self, text: str, special_tokens: SpecialTokenMode = "text") -> list[int]:
        """Token ids of `text` alone, without special tokens around it. special_tokens: what those that it
        spells out become; control for the template's own text."""
        return list(self._batch([text], special_tokens)[0])

    def counts(self, texts: list[str]) -> list[int]:
        """Number of tokens of each text alone."""
        sizes: list[int] = []
        for start in range(0, len(texts), 4096):  # the tokenizer keeps far more per text than its ids
            sizes += [len(ids) for ids in self._batch(texts[start : start + 4096], "text")]
        return sizes

    def encode(self, text: str, prefix: str) -> list[int]:
        """Token ids of the complete prompt, encoded as one text. A text that starts with a special token
        contains its own template: no other is applied, and all its special tokens are control tokens."""
        if self._spelled.match(text):
            return self.ids(text + prefix, "control")
        complete = self.head + text + self.tail + prefix
        if not (self._spelled.search(text) or self._spelled.search(prefix)):
            return [*self.bos, *self.ids(complete, "control")]
        if not self.tokenizer.is_fast:
            return self.assemble(self.ids(text), self.ids(prefix))
        begin, end = len(self.head), len(complete) - len(prefix)
        as_text = [(begin, begin + len(text)), (end, len(complete))]
        return [*self.bos, *self._mixed.encode(complete, as_text)[0]]

    def size(self, text: str, prefix: str) -> int:
        """Number of tokens of the complete prompt."""
        return len(self.encode(text, prefix))

    @cached_property
    def head_ids(self) -> list[int]:
        return [*self.bos, *self.ids(self.head, "control")]

    @cached_property
    def tail_ids(self) -> list[int]:
        return self.ids(self.tail, "control")

    def assemble(
        self, message: Sequence[int], prefix: Sequence[int], *, head: list[int] | None = None
    ) -> list[int]:
        """Token ids of the complete prompt from a message and a prefix that were encoded alone.

        head: the ids to use for the template before the message; None = `head_ids`.
        """
        return [*(self.head_ids if head is None else head), *message, *self.tail_ids, *prefix]
