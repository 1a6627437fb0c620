"""Synthetic text for the demo: a tokenizer, documents with many questions about the pass keys of names, and
conversations that ask for them.

    python examples/demo/corpus.py tokenizer --output DIR
    python examples/demo/corpus.py documents --tokenizer DIR --length 4096 --rows 240 --output FILE.jsonl
    python examples/demo/corpus.py conversations --tokenizer DIR --length 400 --rows 1000 --output FILE.jsonl

Everything is generated from a seed, so there is no data to download. There are two kinds of documents:

    keys    filler sentences with "The pass key of Mira is 48213." at random places, and many questions about
            them; in ordinary text few tokens depend on retrieval, so that a model of this size would take far
            longer to learn it
    list    names with their pass keys, repeated in new order

A document for packed rows of length S has exactly S tokens: with one separator token it fills a row of S + 1.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_ultralong.command_settings import parse_count
from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.tasks.niah import prompts as niah
from megatron_ultralong.runtime import cli

DIGITS = 5
"""Digits of a pass key, as in the passkey test."""
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
SHORTEST = 64
"""Tokens of the shortest document."""

Piece = tuple[str, int]
"""A text and its number of tokens."""


# ---- tokenizer ---------------------------------------------------------------------------------


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on documents of this file: it encodes any text, and each word of the demo is one
    token.

    Numbers are split into groups of two digits (Llama-3 has three): a pass key of five digits is three
    tokens. "Mira is" is one token (superwords: Liu et al., arXiv 2503.13423), so that a key directly follows
    the token that names it, and retrieval is one-step copying, which a model of this size learns in minutes.
    """
    bpe = Tokenizer(models.BPE())
    words = Regex(r" \p{Lu}\p{Ll}+ is\b| ?\p{N}{1,2}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    texts = [niah.INTRODUCTION, " " + niah.INTRODUCTION] * 100
    for name in niah.NAMES * 100:
        value = niah.pass_key(rng, DIGITS)
        texts += [" " + rng.choice(niah.FILLER) + niah.needle(name, value) + _asked(name, value)]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1024,
            special_tokens=[BEGIN, END],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BEGIN, eos_token=END, clean_up_tokenization_spaces=False
    )


# ---- documents ---------------------------------------------------------------------------------


class Writer:
    """Writes documents of exact size for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.tokenizer, self.rng = tokenizer, random.Random(seed)
        self.known: dict[str, int] = {}
        self.filler = [self.piece(" " + text) for text in niah.FILLER]

    def piece(self, text: str) -> Piece:
        if text not in self.known:
            self.known[text] = len(self.tokenizer.encode(text, add_special_tokens=False))
        return text, self.known[text]

    def row(self, length: int, *, listed: float, whole: float) -> str:
        """Text of exactly `length` tokens: with probability `whole` one document, otherwise several of mixed
        lengths.

        listed: share of the documents that are lists; the rest are `keys`.
        """
        parts: list[str] = []
        left = length
        while left:
            size = (
                left
                if self.rng.random() < whole
                else int(math.exp(self.rng.uniform(math.log(SHORTEST), math.log(length))))
            )
            size = left if left - size < SHORTEST else size
            if self.rng.random() < listed:
                parts.append(self.listed(size))
            else:
                parts.append(self.keys(size, max(1, length // 32 * size // length), "" if not parts else " "))
            left -= size
        return "".join(parts)

    def keys(self, length: int, most: int, start: str = "") -> str:
        """Keys hidden in filler sentences, queried in one to three blocks of questions, the last at the end.

        The number of keys is log-uniform up to `most`: the passkey test's single key as well as many.
        """
        rng, introduction = self.rng, self.piece(start + niah.INTRODUCTION)
        needle_size = self.piece(niah.needle("Ada", "0" * DIGITS))[1]
        question_size = self.piece(_asked("Ada", "0" * DIGITS))[1]
        room = length - introduction[1]
        count = int(math.exp(rng.uniform(0, math.log(most + 1))))
        count = max(1, min(count, len(niah.NAMES), (room - 2 * question_size) // (2 * needle_size)))
        values = {name: niah.pass_key(rng, DIGITS) for name in rng.sample(niah.NAMES, count)}
        room -= count * needle_size
        questions = max(1, min(2 * count, int(room * rng.uniform(0.3, 0.9)) // question_size))
        filler = self._filler(room - questions * question_size)

        # Positions of keys and blocks of questions: before filler sentence i, or after the last.
        needles: dict[int, list[str]] = {}
        for name in values:
            kind = rng.random()
            needles.setdefault(
                len(filler) if kind < 0.15 else 0 if kind < 0.3 else rng.randint(0, len(filler)), []
            ).append(name)
        blocks = rng.choice((1, 1, 2, 3)) if length >= 256 and count > 1 else 1
        breaks = [rng.randint(0, len(filler)) for _ in range(blocks - 1)]
        text, known, left = [introduction[0]], [], questions
        for i in range(len(filler) + 1):
            text += [niah.needle(name, values[name]) for name in needles.get(i, [])]
            known += needles.get(i, [])
            for _ in range(breaks.count(i) if known else 0):
                asked = min(left - 1, max(1, questions // blocks))
                text += self._questions(known, values, asked)
                left -= asked
            text += filler[i : i + 1]
        return "".join(text + self._questions(known, values, left))

    def _questions(self, known: list[str], values: dict[str, str], count: int) -> list[str]:
        """`count` questions with their answers, each of `known` once in random order before any is
        repeated."""
        order: list[str] = []
        while len(order) < count:
            order += self.rng.sample(known, len(known))
        return [_asked(name, values[name]) for name in order[:count]]

    def _filler(self, room: int) -> list[str]:
        """Filler sentences of exactly `room` tokens, in their order from a random one on; the last one may be
        cut."""
        out: list[str] = []
        i = self.rng.randrange(len(self.filler))
        while room > 0:
            text, size = self.filler[i]
            out.append(text if size <= room else self._cut(text, room))
            room -= size
            i = (i + 1) % len(self.filler)
        return out

    def listed(self, length: int) -> str:
        """Names and their pass keys, repeated in new order."""
        names = self.rng.sample(niah.NAMES, self.rng.randint(1, max(1, min(len(niah.NAMES), length // 20))))
        values = {name: niah.pass_key(self.rng, DIGITS) for name in names}
        form = self.rng.choice((" {} {}.", " {} is {}.", " The pass key of {} is {}."))
        text, size = "", 0
        while size < length:
            for name in self.rng.sample(names, len(names)):
                piece, count = self.piece(form.format(name, values[name]))
                text, size = text + piece, size + count
        return self._cut(text, length)

    def conversation(self, most: int) -> list[dict[str, str]]:
        """A text of up to `most` tokens with one to four pass keys, each asked for in a turn of its own."""
        names = self.rng.sample(niah.NAMES, self.rng.randint(1, 4))
        values = {name: niah.pass_key(self.rng, DIGITS) for name in names}
        parts = self._filler(self.rng.randint(most // 8, most))
        for name in names:
            parts.insert(self.rng.randint(0, len(parts)), niah.needle(name, values[name]))
        asked = [niah.question(name) for name in self.rng.sample(names, len(names))]
        asked[0] = niah.INTRODUCTION + "".join(parts) + asked[0]
        messages = []
        for text in asked:
            name = text.rsplit(" ", 1)[1].rstrip("?")
            answer = niah.answer_start(name) + niah.answer(values[name])
            messages += [
                {"role": "user", "content": text.strip()},
                {"role": "assistant", "content": answer.strip()},
            ]
        return messages

    def _cut(self, text: str, length: int) -> str:
        """Return the first `length` tokens of `text`."""
        return self.tokenizer.decode(self.tokenizer.encode(text, add_special_tokens=False)[:length])


def _asked(name: str, value: str) -> str:
    return niah.question(name) + niah.answer_start(name) + niah.answer(value)


def write_documents(
    tokenizer_dir: Path,
    output: Path,
    *,
    length: int,
    rows: int,
    seed: int,
    listed: float = 0.1,
    whole: float = 1.0,
) -> None:
    """Write `rows` texts of exactly `length` tokens each as JSON lines."""
    if length < SHORTEST or rows < 1:
        raise UserError(f"--length must be at least {SHORTEST} tokens and --rows at least 1")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    writer = Writer(tokenizer, seed)
    texts = [writer.row(length, listed=listed, whole=whole) for _ in range(rows)]
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        assert len(ids) == length, f"a document has {len(ids)} tokens instead of {length}"
    _write_records(output, [{"text": text} for text in texts])


def write_conversations(tokenizer_dir: Path, output: Path, *, length: int, rows: int, seed: int) -> None:
    """Write `rows` conversations about texts of up to `length` tokens as JSON lines."""
    if length < SHORTEST or rows < 1:
        raise UserError(f"--length must be at least {SHORTEST} tokens and --rows at least 1")
    writer = Writer(AutoTokenizer.from_pretrained(tokenizer_dir), seed)
    _write_records(output, [{"messages": writer.conversation(length)} for _ in range(rows)])


def _write_records(output: Path, records: list[dict[str, Any]]) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("".join(json.dumps(record) + "\n" for record in records))
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror or error}") from None


# ---- command -----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("tokenizer", help="train the tokenizer")
    one.add_argument("--output", type=Path, required=True, metavar="DIR")
    one = commands.add_parser("documents", help="write documents as JSON lines")
    one.add_argument("--tokenizer", type=Path, required=True, metavar="DIR")
    one.add_argument("--output", type=Path, required=True, metavar="FILE")
    one.add_argument("--length", required=True, help="tokens per text: the sequence length of training")
    one.add_argument("--rows", type=int, required=True, help="texts to write")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument(
        "--list",
        type=float,
        default=0.1,
        help="fraction of documents of the kind list (default: %(default)s)",
    )
    one.add_argument(
        "--whole",
        type=float,
        default=1.0,
        help="fraction of texts that are a single document (default: %(default)s)",
    )
    one = commands.add_parser("conversations", help="write conversations as JSON lines")
    one.add_argument("--tokenizer", type=Path, required=True, metavar="DIR")
    one.add_argument("--output", type=Path, required=True, metavar="FILE")
    one.add_argument("--length", required=True, help="tokens of the longest text that is asked about")
    one.add_argument("--rows", type=int, required=True, help="conversations to write")
    one.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.command == "tokenizer":
        make_tokenizer().save_pretrained(args.output)
    elif args.command == "conversations":
        write_conversations(
            args.tokenizer,
            args.output,
            length=parse_count(args.length, "--length"),
            rows=args.rows,
            seed=args.seed,
        )
    else:
        write_documents(
            args.tokenizer,
            args.output,
            length=parse_count(args.length, "--length"),
            rows=args.rows,
            seed=args.seed,
            listed=args.list,
            whole=args.whole,
        )


if __name__ == "__main__":
    cli.main(main)
