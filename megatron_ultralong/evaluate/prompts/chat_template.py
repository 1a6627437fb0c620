"""A prompt as the model gets it: the user's text inside the tokenizer's chat template, then the first words
of the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_ultralong.data.sft.chat_template import DATE
from megatron_ultralong.errors import UserError

Mode = Literal["auto", "yes", "no"]
_MARK = "<<<TEXT>>>"


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What stands around the user's text."""

    tokenizer: Any
    head: str
    tail: str
    """Both empty where there is no chat template in use."""
    bos: tuple[int, ...]
    """Tokens in front of a text without chat template."""

    @property
    def chat(self) -> bool:
        return bool(self.head or self.tail)

    def encode(self, text: str, prefix: str) -> list[int]:
        """Tokens of the whole prompt. A text that brings its own template (it starts with a special token)
        gets no other one."""
        ready = text.startswith(tuple(token for token in self.tokenizer.all_special_tokens if token))
        whole = text + prefix if ready else self.head + text + self.tail + prefix
        # verbose: the tokenizer would warn of texts longer than the model.
        ids = list(self.tokenizer(whole, add_special_tokens=False, verbose=False).input_ids)
        return ids if ready or self.chat else [*self.bos, *ids]

    def size(self, text: str, prefix: str) -> int:
        """Tokens of the whole prompt."""
        return len(self.encode(text, prefix))

    def counts(self, pieces: list[str]) -> list[int]:
        """Tokens of each piece alone."""
        found: list[int] = []
        for start in range(0, len(pieces), 4096):  # A tokenizer keeps much more of each text than its tokens.
            found += [
                len(ids)
                for ids in self.tokenizer(
                    pieces[start : start + 4096], add_special_tokens=False, verbose=False
                ).input_ids
            ]
        return found


def frame(tokenizer: Any, mode: Mode) -> Frame:
    """The frame of a tokenizer; auto = its chat template where it has one. UserError where `mode` is yes and
    it has none, or where the template does not carry the user's text once and unchanged."""
    template = bool(getattr(tokenizer, "chat_template", None))
    if mode == "yes" and not template:
        raise UserError("--chat yes: this model's tokenizer has no chat template; use --chat no")
    if mode == "no" or not template:
        bos = tokenizer.bos_token_id
        begins = bos is not None and list(tokenizer.encode("a"))[:1] == [bos]
        return Frame(tokenizer=tokenizer, head="", tail="", bos=(bos,) if begins else ())
    # Llama-3.1's template writes today's date, where none is given: prompts must not change with the day.
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True, date_string=DATE
    )
    if text.count(_MARK) != 1:
        raise UserError(
            "--chat: the chat template does not carry the user's text once and unchanged; use --chat no"
        )
    head, tail = text.split(_MARK)
    return Frame(tokenizer=tokenizer, head=head, tail=tail, bos=())
