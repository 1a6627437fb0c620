"""Special tokens that a text spells out: a web page about Llama contains `<|eot_id|>`.

By default they are text, and only what this library writes itself (a chat template, a separator) is a control
token. Concerns the tokens that the tokenizer marks as special; its other added tokens are vocabulary, and are
encoded as such.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy
from numpy.typing import NDArray

SpecialTokenMode = Literal["text", "control"]
"""What special tokens spelled out in a text become: the tokens of their characters, or the control tokens."""

NONCHARACTER = "\ufdd0"
"""Not for interchange of text (Unicode, 23.7)."""


def spelled_pattern(added_tokens: Iterable[Any]) -> re.Pattern[str]:
    """A pattern that matches what a tokenizer with these tokenizers.AddedToken takes for a special token in a
    text."""
    tokens = [token for token in added_tokens if token.special]
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
        [NONCHARACTER + piece if piece in special and score >= 0 else piece, score]
        for piece, score in values["model"]["vocab"]
    ]
    return json.dumps(values, ensure_ascii=False)


def report_lines(where: str, counted: dict[str, Any]) -> list[str]:
    """What a report says of the manifest's `special_tokens`: a line where a text spells any out."""
    if not counted["spelled_out"]:
        return []
    encoded = (
        "as text (--special-tokens control makes them control tokens)"
        if counted["encoded_as"] == "text"
        else "as control tokens"
    )
    return [f"{where}: special tokens spelled out in texts: {counted['spelled_out']:,}, encoded {encoded}"]


EncodedText = tuple[list[int], NDArray[numpy.int64]]
"""(ids [n]; the characters of each token, begin and end, int64 [n, 2])."""


class MixedEncoder:
    """Encodes texts that are partly written by a template, whose special tokens are control tokens, and
    partly by users, whose special tokens are text."""

    def __init__(self, backend: Any) -> None:
        """backend: a tokenizers.Tokenizer that encodes special tokens as control tokens."""
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._tokens = {token.content: (number, token) for number, token in added.items() if token.special}
        self._pattern = spelled_pattern(added.values())

    @cached_property
    def _with_aliases(self) -> tuple[Any, dict[str, str], dict[int, int]]:
        """(tokenizer that encodes special tokens as text and their aliases as control tokens, alias of each
        special token, id of the token of each alias's id)."""
        import tokenizers

        backend = load_backend(self._backend.to_str(), "text")
        backend.no_truncation()
        backend.no_padding()
        mark = NONCHARACTER + secrets.token_hex(8)  # no text can contain it
        aliases = {content: mark + content for content in self._tokens}
        for content, (_, token) in self._tokens.items():
            flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip")}
            backend.add_tokens([tokenizers.AddedToken(aliases[content], normalized=False, **flags)])
        ids = {backend.token_to_id(alias): self._tokens[content][0] for content, alias in aliases.items()}
        return backend, aliases, ids

    def encode(self, text: str, as_text: Sequence[tuple[int, int]]) -> EncodedText:
        """Encode a text as a whole.

        as_text: characters of `text` in which special tokens are text, begin and end of each range, in order.
        """
        backend, aliases, original = self._with_aliases
        parts, at, length = [], 0, 0
        ends: list[tuple[int, int]] = [(0, 0)]
        """(character of the text with aliases, of `text`) at both ends of each control token."""
        gaps = zip(
            [0, *(end for _, end in as_text)], [*(begin for begin, _ in as_text), len(text)], strict=True
        )
        for begin, end in gaps:
            for match in self._pattern.finditer(text, begin, end):
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

    def encode_batch(self, texts: Sequence[tuple[str, Sequence[tuple[int, int]]]]) -> list[EncodedText]:
        """Encode each (text, as_text) as `encode` does; those without such a range by all threads."""
        encodings = iter(
            self._backend.encode_batch(
                [text for text, as_text in texts if not as_text], add_special_tokens=False
            )
        )
        encoded = []
        for text, as_text in texts:
            if as_text:
                encoded.append(self.encode(text, as_text))
            else:
                encoding = next(encodings)
                encoded.append((encoding.ids, numpy.array(encoding.offsets, numpy.int64).reshape(-1, 2)))
        return encoded
