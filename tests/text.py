"""Small tokenizers of four families, trained here, and packed rows made by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LFS_POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
"""What a clone without Git LFS leaves in place of a large file."""
FAMILIES = ("llama3", "llama2", "unigram", "words")
WORDS = (
    "the sky is blue and a grey cat's tail has 3 rings of 12345 colours; Łódź naïve 北京 東京 😀👍🏽 \t x=y() [3.14] don't "
    "stop"
).split(" ")
# Llama-3's own split: contractions, words with one sign before, up to three digits, signs, line ends, white
# space.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def text(seed: int, words: int) -> str:
    """Words in random order, now and then with long white space or digits."""
    rng = random.Random(seed)
    odd = ("  ", "\n\n", "\r\n", " " * 7, "0123456789" * 3, "")
    return "".join(rng.choice(WORDS) + (rng.choice(odd) if rng.random() < 0.1 else " ") for _ in range(words))


def tokenizer(family: str) -> Tokenizer:
    """llama3: byte-level BPE. llama2: BPE over whole texts, a space put in front. unigram: sentencepiece's.
    words: no white space."""
    special = ["<|begin|>", "<|end|>"]
    corpus = [text(seed, 200) for seed in range(5)]
    if family == "llama3":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        made.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    elif family == "llama2":
        made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        # Trained on words, used on whole texts: as sentencepiece's merges are.
        made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", *special], show_progress=False)
    elif family == "unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=["<unk>", *special], unk_token="<unk>", show_progress=False
        )
    else:
        made = Tokenizer(models.WordLevel(unk_token="<unk>"))
        made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(
            vocab_size=60, special_tokens=["<unk>", *special], show_progress=False
        )
    made.train_from_iterator(corpus, trainer)
    if family == "llama2":
        made.pre_tokenizer = None
    return made


def save_tokenizer(folder: Path, family: str = "llama3", **settings: Any) -> Path:
    """A directory that AutoTokenizer loads."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(family), bos_token="<|begin|>", eos_token="<|end|>", **settings
    ).save_pretrained(folder)
    return folder


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_text(
        "".join(json.dumps({"id": i, key: t}) + "\n" for i, t in enumerate(texts)), encoding="utf-8"
    )
    return path


def write_rows(
    prefix: Path,
    rows: list[list[int]],
    masks: list[list[int]] | None = None,
    dtype: Any = numpy.int32,
    starts: list[list[int]] | None = None,
    **manifest: Any,
) -> str:
    """Packed rows by Megatron's own builder, not by the code under test."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    for suffix, lines, kind in (
        ("", rows, dtype),
        (".mask", masks, numpy.uint8),
        (".docs", starts, numpy.int32),
    ):
        if lines is None:
            continue
        builder = IndexedDatasetBuilder(f"{prefix}{suffix}.bin", dtype=kind)
        for line in lines:
            builder.add_document(torch.tensor(line), [len(line)])
        builder.finalize(f"{prefix}{suffix}.idx")
    largest = max((max(row) for row in rows), default=0)
    values = {
        "format": 1,
        "max_token_id": largest,
        "mask": masks is not None,
        "document_starts": starts is not None,
        "tokenizer": {"name": "by-hand"},
        **manifest,
    }
    Path(f"{prefix}.json").write_text(json.dumps(values), encoding="utf-8")
    return str(prefix)
