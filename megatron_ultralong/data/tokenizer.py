"""A directory's tokenizer, as transformers' AutoTokenizer would load it.

Importing transformers takes seconds. For a Llama whose tokenizer class is PreTrainedTokenizerFast or
TokenizersBackend, like Llama 3, tokenizer.json is complete and is read here. Where anything in the directory
could make transformers change what tokenizer.json says, transformers loads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from megatron_ultralong.errors import UserError
from megatron_ultralong.io.git_lfs import refuse_pointer

BATCH = 1 << 20
"""Characters encoded at a time."""
SPECIAL = ("bos", "eos", "pad")
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_ADDED = "added_tokens_decoder"
_IRRELEVANT = {
    _ADDED,
    "backend",
    "chat_template",
    "clean_up_tokenization_spaces",
    "is_local",
    "local_files_only",
    "model_input_names",
    "model_max_length",
    "tokenizer_class",
}
_TOKEN_SETTINGS = {
    "additional_special_tokens",
    "bos_token",
    "eos_token",
    "extra_special_tokens",
    "pad_token",
    "unk_token",
}
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")


@dataclass(frozen=True)
class Tokenizer:
    """A fast Hugging Face tokenizer from a directory. It adds no special tokens to a text; those that a text
    spells out are control tokens."""

    path: Path
    backend: Any
    """tokenizers.Tokenizer."""
    vocab_size: int
    """One more than its largest id, added tokens included."""
    special: dict[str, int | None]
    """Ids of bos, eos and pad."""
    sha256: str
    """Of tokenizer.json, or of tokenizer.model without it."""
    encoding_sha256: str
    """Of what decides how text is encoded (`encoding_hash`)."""

    def ids(self, text: str) -> list[int]:
        return list(self.backend.encode(text, add_special_tokens=False).ids)


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer of a directory. Nothing is downloaded, and no code of the directory is run.
    UserError where that fails."""
    if not path.is_dir():
        raise UserError(
            f"tokenizer {path}: no such directory; give a Hugging Face directory with tokenizer.json"
        )
    files = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
    for file in files[:1]:
        refuse_pointer(file)
    backend, special = load_plain(path) or _by_transformers(path)
    backend.encode_special_tokens = (
        False  # what they become in a text is for who encodes it: special_tokens.py
    )
    backend.no_truncation()
    backend.no_padding()
    size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    data = files[0].read_bytes()
    return Tokenizer(path, backend, size, special, hashlib.sha256(data).hexdigest(), encoding_hash(data))


def encoding_hash(data: bytes) -> str:
    """SHA-256 of what decides how text is encoded, out of a tokenizer.json: model, added tokens,
    normalisation and splitting. Equal for files that another release of tokenizers wrote in another form. Of
    another file, of all of it."""
    import tokenizers

    try:
        # In the form of the installed release.
        values = json.loads(tokenizers.Tokenizer.from_str(data.decode("utf-8")).to_str())
    except Exception:  # tokenizers raises bare Exceptions
        return hashlib.sha256(data).hexdigest()
    parts = {name: values.get(name) for name in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def check_same(folder: Path, rows: str, manifest: dict[str, Any]) -> str | None:
    """UserError where packed rows were made with another tokenizer than that of `folder`; a line to print
    where that cannot be told. rows: their prefix."""
    made_with = manifest.get("tokenizer", {})
    files = [folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()]
    if not files or "sha256" not in made_with:
        return None
    data, name = files[0].read_bytes(), made_with.get("name", "another model")
    if hashlib.sha256(data).hexdigest() == made_with["sha256"]:
        return None
    if "encoding_sha256" not in made_with:
        return (
            f"note: {rows} was made with a tokenizer of {name} whose file differs from {files[0]}; an earlier release "
            "did not record more, so check that it is the same tokenizer"
        )
    if made_with["encoding_sha256"] != encoding_hash(data):
        raise UserError(
            f"{rows} was made with the tokenizer of {name}, which encodes text differently than that of the model "
            f"({files[0]}); prepare the data again, or --set data.allow_other_tokenizer=true"
        )
    return None


def encode_all(texts: Iterable[str], backend: Any) -> Iterator[NDArray[numpy.int32]]:
    """Yield the token ids of each text, int32 [n], in order. backend: a tokenizers.Tokenizer, which uses its
    own threads.

    Each text is encoded as a whole: what encoding pieces of it gives is not always the same. That takes about
    110 bytes of memory per byte of the longest text with Llama 3's tokenizer (2 GB for 16 MB), and up to 180
    with a Unigram model.
    """
    batch: list[str] = []
    size = 0

    def encoded() -> Iterator[NDArray[numpy.int32]]:
        for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
            yield numpy.array(encoding.ids, dtype=numpy.int32)

    for text in texts:
        batch.append(text)
        size += len(text) + 100  # short ones have a cost too
        if size >= BATCH:
            yield from encoded()
            batch, size = [], 0
    yield from encoded()


def load_plain(path: Path) -> tuple[Any, dict[str, int | None]] | None:
    """(tokenizers.Tokenizer, ids of bos, eos and pad) where transformers would use tokenizer.json unchanged;
    None where it might not."""
    import tokenizers

    if any((path / name).exists() for name in ("added_tokens.json", "tokenizer.model")):
        return None
    try:
        settings, model, named = (
            json.loads((path / name).read_text(encoding="utf-8")) if (path / name).exists() else {}
            for name in ("tokenizer_config.json", "config.json", "special_tokens_map.json")
        )
        if (
            settings.get("tokenizer_class") not in _PLAIN_CLASSES
            or settings.keys() - _IRRELEVANT - _TOKEN_SETTINGS
            or model.get("model_type", "llama") != "llama"
        ):
            return None
        backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        known = backend.get_added_tokens_decoder()
        ids = {token.content: number for number, token in known.items() if token.special}
        for number, stated in settings.get(_ADDED, {}).items():
            token = known.get(int(number))
            if (
                token is None
                or token.content != stated["content"]
                or any(getattr(token, flag) != stated[flag] for flag in _FLAGS)
            ):
                return None
        if backend.padding is not None or named.keys() - _TOKEN_SETTINGS:
            return None
        if any(
            isinstance(value, dict) and value["__type"] != "AddedToken"
            for value in settings.values()
            if value is not settings.get(_ADDED)
        ):
            return None
        if any(
            text not in ids
            for part in (settings, named)
            for key in _TOKEN_SETTINGS & part.keys()
            for text in _texts(key, part[key])
        ):
            return None
        if any(
            _texts(key, named[key]) != _texts(key, settings.get(key))
            for key in _TOKEN_SETTINGS - {"additional_special_tokens"} & named.keys()
        ):
            return None
    except Exception:  # whatever is wrong or unusual: transformers decides, and reports it
        return None
    return backend, {
        name: next((ids[text] for text in _texts(f"{name}_token", settings.get(f"{name}_token"))), None)
        for name in SPECIAL
    }


def _texts(key: str, value: Any) -> list[str]:
    """The tokens that a setting names: a text, {"content": text} or null, or a list of these for a key of
    several tokens. Anything else raises."""
    if value is None:
        return []
    if key.endswith("_tokens"):
        if not isinstance(value, list):
            raise TypeError(f"{key} is not a list")
        return [text for one in value for text in _texts("", one)]
    return [value if isinstance(value, str) else value["content"]]


def _by_transformers(path: Path) -> tuple[Any, dict[str, int | None]]:
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # transformers raises almost anything here
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"tokenizer {path}: cannot be loaded: {reason[0]}") from None
    if not getattr(tokenizer, "is_fast", False) or not any(
        (path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")
    ):
        raise UserError(
            f"tokenizer {path}: a fast tokenizer is required; the directory has no tokenizer.json"
        )
    return tokenizer.backend_tokenizer, {name: getattr(tokenizer, f"{name}_token_id") for name in SPECIAL}
