"""Special tokens that a text spells out: a web page about Llama contains `<|eot_id|>`.

By default they are text, and only what this library writes itself (a chat template, a separator) is a control
token. Concerns the tokens that the tokenizer marks as special; its other added tokens are vocabulary, and are
encoded as such.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy
from numpy.typing import NDArray

SpecialTokenMode = Literal["text", "control"]
"""What special tokens spelled out in a text become: the tokens of their characters, or the control tokens."""

_NONCHARACTER = "\ufdd0"
"""Not for interchange of text (Unicode, 23.7)."""


def spelled_pattern(backend: Any) -> re.Pattern[str]:
    """A pattern that matches what a tokenizers.Tokenizer takes for a special token in a text."""
    tokens = [token for token in backend.get_added_tokens_decoder().values() if token.special]
    words = [
        rf"(?<!\w){re.escape(token.content)}(?!\w)" if token.single_word else re.escape(token.content)
        for token in sorted(tokens, key=lambda token: len(token.content), reverse=True)  # the longest match
    ]
    return re.compile("|".join(words) or r"(?!)")


def load_backend(tokenizer_json: str, mode: SpecialTokenMode) -> Any:
    """A tokenizers.Tokenizer that encodes special tokens spelled out in a text as `mode` says."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(tokenizer_json)
    if mode == "text":
        if isinstance(backend.model, tokenizers.models.Unigram):
            backend = tokenizers.Tokenizer.from_str(_without_control_pieces(tokenizer_json))
        backend.encode_special_tokens = True  # is not stored in the JSON
    return backend


def _without_control_pieces(tokenizer_json: str) -> str:
    """A Unigram tokenizer whose special tokens are no pieces of text. Control pieces have a score of 0,
    better than that of any other, and the model would find them in a text."""
    values = json.loads(tokenizer_json)
    special = {token["content"] for token in values["added_tokens"] if token["special"]}
    values["model"]["vocab"] = [
        [_NONCHARACTER + piece if piece in special and score >= 0 else piece, score]
        for piece, score in values["model"]["vocab"]
    ]
    return json.dumps(values, ensure_ascii=False)


class MixedEncoder:
    """Encodes texts that are partly written by a template, whose special tokens are control tokens, and
    partly by users, whose special tokens are text."""

    def __init__(self, backend: Any) -> None:
        """backend: a tokenizers.Tokenizer."""
        self._json = backend.to_str
        self._tokens = {t.content: (number, t) for number, t in backend.get_added_tokens_decoder().items()}
        self.pattern = spelled_pattern(backend)
        """Matches a special token."""

    @cached_property
    def _with_aliases(self) -> tuple[Any, dict[str, str], dict[int, int]]:
        """(tokenizer that encodes special tokens as text and their aliases as control tokens, alias of each
        special token, id of the token of each alias's id)."""
        import tokenizers

        backend = load_backend(self._json(), "text")
        backend.no_truncation()
        backend.no_padding()
        mark = _NONCHARACTER + secrets.token_hex(8)  # no text can contain it
        aliases = {
            content: f"{mark}{content}" for content, (_, token) in self._tokens.items() if token.special
        }
        backend.add_tokens(
            [
                tokenizers.AddedToken(
                    alias,
                    single_word=self._tokens[content][1].single_word,
                    lstrip=self._tokens[content][1].lstrip,
                    rstrip=self._tokens[content][1].rstrip,
                    normalized=False,
                )
                for content, alias in aliases.items()
            ]
        )
        ids = {backend.token_to_id(alias): self._tokens[content][0] for content, alias in aliases.items()}
        return backend, aliases, ids

    def encode(self, text: str, as_text: Sequence[tuple[int, int]]) -> tuple[list[int], NDArray[numpy.int64]]:
        """Return ids [n], and the characters of each token, begin and end, int64 [n, 2].

        as_text: characters of `text` in which special tokens are text, begin and end of each range, in order.
        The tokens are those of the complete text, as if it had been encoded at once.
        """
        backend, aliases, original = self._with_aliases
        parts, at, length = [], 0, 0
        ends: list[tuple[int, int]] = [(0, 0)]
        """(character of the text with aliases, of `text`) at both ends of each control token."""
        gaps = zip(
            [0, *(end for _, end in as_text)], [*(begin for begin, _ in as_text), len(text)], strict=True
        )
        for begin, end in gaps:
            for match in self.pattern.finditer(text, begin, end):
                parts += [text[at : match.start()], aliases[match[0]]]
                length += match.start() - at
                ends.append((length, match.start()))
                length += len(aliases[match[0]])
                ends.append((length, match.end()))
                at = match.end()
        ends.append((length + len(text) - at, len(text)))
        encoding = backend.encode("".join([*parts, text[at:]]), add_special_tokens=False)
        offsets = numpy.array(encoding.offsets, numpy.int64).reshape(-1, 2)
        marked, unmarked = zip(*ends, strict=True)
        offsets = numpy.interp(offsets, marked, unmarked).astype(numpy.int64)
        return [original.get(i, i) for i in encoding.ids], offsets
