"""Conversations rendered by a chat template, and which characters of the text are trained on.

Trained on are the assistant's content and the token that ends its turn, nothing else, but for answers that
the data mark as context only. Two templates:

    llama3.1    Llama-3.1-Instruct's, rendered here segment by segment; the date is pinned
    tokenizer   the tokenizer's own, rendered by transformers. The spans are those of its {% generation %}
                blocks; without them, the conversation is rendered up to each answer, and each rendering must
                be a prefix of the complete one

Special tokens that a content spells out do not end its turn: while the conversation is rendered, placeholders
stand for them, and the rendered text says where they are.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_ultralong.data.conversations import Message
from megatron_ultralong.data.special_tokens import NONCHARACTER, SpecialTokenMode, spelled_pattern
from megatron_ultralong.errors import UserError

DATE = "26 Jul 2024"
"""Today's date in Llama-3.1's own template, when none is given."""
LLAMA31_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_PROBE = (
    Message("user", "What is 2 + 2?"),
    Message("assistant", "It is 4."),
    Message("user", "And 3 + 3?"),
    Message("assistant", "It is 6."),
)


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A conversation as text."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Characters that are trained on: begin and end of each span, in order."""
    as_text: tuple[tuple[int, int], ...] = ()
    """Characters of special tokens that contents spell out and that are encoded as text, in order."""


class NotRendered(Exception):
    """The template cannot render a conversation; the message says why."""


@dataclass(frozen=True)
class ChatTemplate:
    """How conversations become text."""

    name: str
    """llama3.1 or tokenizer."""
    spans: str
    """How the trained characters are found: segments, generation or prefix."""
    render: Callable[[Sequence[Message]], RenderedChat]
    """Raises NotRendered."""


def select_template(
    tokenizer_dir: Path, name: str = "auto", date: str = DATE, special_tokens: SpecialTokenMode = "text"
) -> ChatTemplate:
    """Return the template of that name. auto = llama3.1 if the tokenizer's own template renders the same
    text, otherwise the tokenizer's own.

    date: "Today Date" of Llama-3.1's system header. special_tokens: what those that contents spell out
    become. UserError if the tokenizer lacks what the template requires, or if its own template changes
    earlier turns as a conversation continues.
    """
    import transformers

    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(tokenizer_dir), local_files_only=True)
    ending = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    spelled = spelled_pattern(tokenizer.added_tokens_decoder.values()) if special_tokens == "text" else None
    missing = [token for token in LLAMA31_TOKENS if token not in tokenizer.get_vocab()]
    llama31 = ChatTemplate(
        "llama3.1", "segments", partial(_render_contents, partial(render_llama31, date=date), spelled)
    )
    if name == "llama3.1":
        if missing:
            raise UserError(
                f"--template llama3.1: the tokenizer {tokenizer_dir} has no token {missing[0]}; use --template tokenizer"
            )
        return llama31
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer {tokenizer_dir} has no chat template; give a tokenizer that has one"
            f"{'' if missing else ', or --template llama3.1'}"
        )
    if name == "auto" and not missing and _renders_like_llama31(tokenizer, date):
        return llama31
    marked = re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()) is not None
    render = (
        partial(_render_by_generation, tokenizer, date)
        if marked
        else partial(_render_by_prefix, tokenizer, date, ending)
    )
    try:
        render(_PROBE)
    except NotRendered as error:
        raise UserError(
            f"the chat template of {tokenizer_dir} cannot be trained on turn by turn: {error}; mark its answers with "
            "{% generation %}, or use --template llama3.1 with a Llama-3.1 tokenizer"
        ) from None
    return ChatTemplate(
        "tokenizer", "generation" if marked else "prefix", partial(_render_contents, render, spelled)
    )


def apply_template(
    tokenizer: Any, messages: Sequence[dict[str, str]], *, date: str = DATE, **options: Any
) -> str:
    """Render messages by the tokenizer's own template. Templates like Llama-3.1's write today's date when
    none is given: it is pinned, so that prompts do not change with the day. options: of transformers'
    apply_chat_template, like add_generation_prompt."""
    return tokenizer.apply_chat_template(list(messages), tokenize=False, date_string=date, **options)


def render_llama31(messages: Sequence[Message], date: str = DATE) -> RenderedChat:
    """Render as Llama-3.1-Instruct's template does: always a system header with dates, contents stripped of
    surrounding white space, no tools."""
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
    return RenderedChat(text, tuple(spans))


def _header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def _render_contents(
    render: Callable[[Sequence[Message]], RenderedChat],
    spelled: re.Pattern[str] | None,
    messages: Sequence[Message],
) -> RenderedChat:
    """Render a conversation. spelled: matches special tokens that stay text; None = they are control tokens.
    Answers that are context only are rendered, but not trained on."""
    tokens: list[str] = []
    if spelled is not None and any(spelled.search(message.content) for message in messages):
        messages = [_with_placeholders(message, spelled, tokens) for message in messages]
    rendered = render(messages)
    answers = [message for message in messages if message.role == "assistant"]
    if not all(answer.trained for answer in answers):
        if len(rendered.spans) != len(answers):
            raise NotRendered(
                "the chat template does not mark every answer, and some are not to be trained on"
            )
        spans = zip(rendered.spans, answers, strict=True)
        rendered = RenderedChat(rendered.text, tuple(span for span, answer in spans if answer.trained))
    return _without_placeholders(rendered, tokens) if tokens else rendered


def _with_placeholders(message: Message, spelled: re.Pattern[str], tokens: list[str]) -> Message:
    """Replace each special token of a content by its number in `tokens`, between noncharacters."""
    if NONCHARACTER in message.content:
        raise NotRendered(
            f"the {message.role}'s content has U+{ord(NONCHARACTER):X}, which is not a character"
        )

    def placeholder(match: re.Match[str]) -> str:
        tokens.append(match[0])
        return f"{NONCHARACTER}{len(tokens) - 1}{NONCHARACTER}"

    return replace(message, content=spelled.sub(placeholder, message.content))


def _without_placeholders(rendered: RenderedChat, tokens: Sequence[str]) -> RenderedChat:
    """Put the special tokens in place of their placeholders."""
    parts, at, shift = [], 0, 0
    as_text: list[tuple[int, int]] = []
    begins, shifts = [0], [0]
    for match in re.finditer(rf"{NONCHARACTER}(\d+){NONCHARACTER}", rendered.text):
        token = tokens[int(match[1])]
        parts += [rendered.text[at : match.start()], token]
        as_text.append((match.start() + shift, match.start() + shift + len(token)))
        at, shift = match.end(), shift + len(token) - len(match[0])
        begins.append(at)
        shifts.append(shift)
    spans = tuple(
        (begin + shifts[bisect_right(begins, begin) - 1], end + shifts[bisect_right(begins, end) - 1])
        for begin, end in rendered.spans
    )
    return RenderedChat("".join([*parts, rendered.text[at:]]), spans, tuple(as_text))


# ---- the tokenizer's own template --------------------------------------------------------------


def _render(tokenizer: Any, date: str, messages: Sequence[Message], prompt: bool = False) -> str:
    import jinja2

    try:
        return apply_template(tokenizer, _as_dicts(messages), date=date, add_generation_prompt=prompt)
    except jinja2.TemplateError as error:
        raise NotRendered(f"the chat template refuses it: {error}") from None


def _as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _renders_like_llama31(tokenizer: Any, date: str) -> bool:
    try:
        return all(
            _render(tokenizer, date, probe) == render_llama31(probe, date).text
            for probe in (_PROBE, (Message("system", " Be brief.\n"), *_PROBE))
        )
    except NotRendered:
        return False


def _render_by_generation(tokenizer: Any, date: str, messages: Sequence[Message]) -> RenderedChat:
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        # What apply_chat_template does; it returns tokens, but not which characters are marked.
        (text,), (spans,) = render_jinja_template(
            [_as_dicts(messages)],
            chat_template=tokenizer.get_chat_template(),
            date_string=date,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except jinja2.TemplateError as error:
        raise NotRendered(f"the chat template refuses it: {error}") from None
    if not spans:
        raise NotRendered("its {% generation %} block marks nothing")
    return RenderedChat(text, tuple((begin, end) for begin, end in spans))


def _render_by_prefix(
    tokenizer: Any, date: str, special_tokens: tuple[str, ...], messages: Sequence[Message]
) -> RenderedChat:
    text = _render(tokenizer, date, messages)
    spans = []
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt = _render(tokenizer, date, messages[:i], prompt=True)
        answered = _render(tokenizer, date, messages[: i + 1])
        if not (answered.startswith(prompt) and text.startswith(answered)):
            raise NotRendered("the chat template changes earlier turns as the conversation continues")
        spans.append(_answer_span(answered, len(prompt), message.content, special_tokens))
    return RenderedChat(text, tuple(spans))


def _answer_span(text: str, begin: int, content: str, special_tokens: tuple[str, ...]) -> tuple[int, int]:
    """Return the span of the content and the end of the turn in text[begin:], which follows the prompt."""
    if not text.startswith(content, begin):
        content = content.strip()
        begin = text.find(content, begin)
        if begin < 0:
            raise NotRendered("the chat template changes the assistant's content")
    after = begin + len(content)
    # White space after the token that ends the turn belongs to the template: the model stops before it.
    # Without such a token everything is trained on.
    ended = text[after:].rstrip()
    return begin, after + len(ended) if ended.endswith(special_tokens) else len(text)
