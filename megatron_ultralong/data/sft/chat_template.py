"""Conversations as the text that a model's chat template makes of them, and which characters of it are
trained on.

Trained are the assistant's content and the token that ends its turn, nothing else. Two ways to know where
they are:

    llama3.1    the template of Llama-3.1-Instruct, put together here; the date is pinned
    tokenizer   the tokenizer's own template, rendered by transformers: by its {% generation %} blocks where it has them, else by rendering
                the conversation up to each answer, which must be the beginning of the whole
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_ultralong.data.conversations import Message
from megatron_ultralong.errors import UserError

TEMPLATES = ("auto", "llama3.1", "tokenizer")
DATE = "26 Jul 2024"
"""What Llama-3.1's own template says today is, where it is not told."""
LLAMA31_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_PROBE = (
    Message("user", "What is 2 + 2?"),
    Message("assistant", "It is 4."),
    Message("user", "And 3 + 3?"),
    Message("assistant", "It is 6."),
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Characters that are trained on: begin and end of each stretch, rising."""


class NotRendered(Exception):
    """A conversation that the template does not take; the message says why."""


@dataclass(frozen=True)
class Template:
    """How conversations become text."""

    name: str
    """llama3.1 or tokenizer."""
    spans: str
    """How the trained characters are found: segments, generation or prefix."""
    render: Callable[[Sequence[Message]], Rendered]
    """NotRendered where it cannot."""


def choose(tokenizer_dir: Path, name: str = "auto", date: str = DATE) -> Template:
    """The template of that name. auto = llama3.1 where the tokenizer's own template gives the same text, else
    that one.

    date: "Today Date" of Llama-3.1's system header. UserError where the tokenizer lacks what the template
    needs, and where its own template changes earlier turns as a conversation goes on.
    """
    import transformers

    found: Any = transformers.AutoTokenizer.from_pretrained(str(tokenizer_dir), local_files_only=True)
    specials = tuple(str(token) for token in found.added_tokens_decoder.values() if token.special)
    special = re.compile("|".join(map(re.escape, specials)) or r"(?!)")
    missing = [token for token in LLAMA31_TOKENS if token not in found.get_vocab()]
    ours = Template("llama3.1", "segments", partial(_checked, partial(llama31, date=date), special))
    if name == "llama3.1":
        if missing:
            raise UserError(
                f"--template llama3.1: the tokenizer {tokenizer_dir} has no token {missing[0]}; use --template tokenizer"
            )
        return ours
    if not found.chat_template:
        hint = (
            "give a tokenizer that has one"
            if missing
            else "give a tokenizer that has one, or --template llama3.1"
        )
        raise UserError(f"the tokenizer {tokenizer_dir} has no chat template; {hint}")
    if name == "auto" and not missing and _agrees(found, date):
        return ours
    template = found.get_chat_template()
    marked = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
    way = partial(_by_generation, found, date) if marked else partial(_by_prefix, found, date, specials)
    try:
        way(_PROBE)
    except NotRendered as error:
        raise UserError(
            f"the chat template of {tokenizer_dir} cannot be trained on turn by turn: {error}; mark its answers with "
            "{% generation %}, or use --template llama3.1 with a Llama-3.1 tokenizer"
        ) from None
    return Template("tokenizer", "generation" if marked else "prefix", partial(_checked, way, special))


def llama31(messages: Sequence[Message], date: str = DATE) -> Rendered:
    """Llama-3.1-Instruct's template: a system header with dates always, contents without white space around,
    no tools."""
    system = messages[0].content.strip() if messages[0].role == "system" else ""
    text = f"<|begin_of_text|>{_header('system')}Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n{system}<|eot_id|>"
    spans = []
    for message in messages:
        if message.role == "system":
            continue
        text += _header(message.role)
        begin = len(text)
        text += message.content.strip() + "<|eot_id|>"
        if message.role == "assistant":
            spans.append((begin, len(text)))
    return Rendered(text, tuple(spans))


def _header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def _checked(
    render: Callable[[Sequence[Message]], Rendered], special: re.Pattern[str], messages: Sequence[Message]
) -> Rendered:
    """A content that spells a special token would be encoded as one: a turn could end, or another begin, in
    the middle of it."""
    for message in messages:
        if spelled := special.search(message.content):
            raise NotRendered(f"the {message.role}'s content spells the special token {spelled[0]}")
    return render(messages)


# ---- the tokenizer's own template --------------------------------------------------------------


def _render(tokenizer: Any, date: str, messages: Sequence[Message], prompt: bool = False) -> str:
    import jinja2

    try:
        return tokenizer.apply_chat_template(
            _plain(messages), tokenize=False, add_generation_prompt=prompt, date_string=date
        )
    except jinja2.TemplateError as error:
        raise NotRendered(f"the chat template refuses it: {error}") from None


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _agrees(tokenizer: Any, date: str) -> bool:
    """Whether the tokenizer's template gives what `llama31` gives."""
    try:
        return all(
            _render(tokenizer, date, probe) == llama31(probe, date).text
            for probe in (_PROBE, (Message("system", " Be brief.\n"), *_PROBE))
        )
    except NotRendered:
        return False


def _by_generation(tokenizer: Any, date: str, messages: Sequence[Message]) -> Rendered:
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        # As apply_chat_template does it, which gives tokens and no characters.
        (text,), (spans,) = render_jinja_template(
            [_plain(messages)],
            chat_template=tokenizer.get_chat_template(),
            date_string=date,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except jinja2.TemplateError as error:
        raise NotRendered(f"the chat template refuses it: {error}") from None
    if not spans:
        raise NotRendered("its {% generation %} block marks nothing")
    return Rendered(text, tuple((begin, end) for begin, end in spans))


def _by_prefix(tokenizer: Any, date: str, specials: tuple[str, ...], messages: Sequence[Message]) -> Rendered:
    text = _render(tokenizer, date, messages)
    spans = []
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt, upto = (
            _render(tokenizer, date, messages[:i], prompt=True),
            _render(tokenizer, date, messages[: i + 1]),
        )
        if not (upto.startswith(prompt) and text.startswith(upto)):
            raise NotRendered(
                "the chat template writes earlier turns in another way as the conversation goes on"
            )
        spans.append(_content(upto, len(prompt), message.content, specials))
    return Rendered(text, tuple(spans))


def _content(text: str, begin: int, content: str, specials: tuple[str, ...]) -> tuple[int, int]:
    """The stretch of content and end of turn in what follows the prompt, text[begin:]."""
    if not text.startswith(content, begin):
        begin = text.find(content.strip(), begin)
        if begin < 0:
            raise NotRendered("the chat template changes the assistant's content")
        content = content.strip()
    after = begin + len(content)
    # White space after the token that ends the turn is the template's: the model stops before it. Without
    # such a token all is kept.
    ended = text[after:].rstrip()
    return begin, after + len(ended) if ended.endswith(specials) else len(text)
