"""Git LFS pointers in place of weights, tokenizers, documents, conversations and official files: one line,
whatever the kind of file."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ultralong.checkpoint.hf import weight_files
from megatron_ultralong.data import conversations, documents
from megatron_ultralong.data import tokenizer as data_tokenizer
from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends import model_files
from megatron_ultralong.evaluate.backends.transformers_model import TransformersModel
from megatron_ultralong.evaluate.tasks.ruler import filler_text
from megatron_ultralong.official_files.records import read_jsonl, read_zip
from tests.text import LFS_POINTER

BASE = Path(__file__).parents[2] / "examples" / "demo" / "base"


def refused(path: Path, read: Callable[[], object]) -> None:
    path.write_text(LFS_POINTER)
    with pytest.raises(
        UserError, match="is a Git LFS pointer, not the file itself; run `git lfs pull`"
    ) as error:
        read()
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize("ending", ["txt", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_documents(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    refused(path, lambda: list(documents.read(documents.FileRange(path, 0, len(LFS_POINTER)))))


@pytest.mark.parametrize("ending", conversations.KINDS)
def test_conversations(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    refused(path, lambda: list(conversations.read(path, source="chat")))


def test_official_files_and_haystacks(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.jsonl.gz"):
        refused(tmp_path / name, lambda name=name: list(read_jsonl(tmp_path / name)))
    refused(tmp_path / "a.zip", lambda: list(read_zip(tmp_path / "a.zip")))
    refused(tmp_path / "a.json", lambda: filler_text.read_haystack((tmp_path / "a.json",)))


def test_weights_and_tokenizers(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(BASE, model)
    weights, tokenizer = model / "model.safetensors", model / "tokenizer.json"
    refused(weights, lambda: TransformersModel(model, device="cpu"))
    refused(weights, lambda: weight_files.tensor_files(model, {}))
    refused(tokenizer, lambda: model_files.load_tokenizer(model))
    refused(tokenizer, lambda: data_tokenizer.load_tokenizer(model))


def test_only_the_tokenizer_file_that_is_used_counts(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(BASE, model)
    (model / "tokenizer.model").write_text(LFS_POINTER)
    ids = [data_tokenizer.load_tokenizer(folder).backend.encode("a text").ids for folder in (model, BASE)]
    assert ids[0] == ids[1]


def test_a_pipe_is_read_whole(tmp_path: Path) -> None:
    """Looking for a pointer must not take a pipe's first bytes."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    text = "A sentence here. " * 2000
    writer = threading.Thread(target=pipe.write_text, args=(text,))
    writer.start()
    assert " ".join(filler_text.read_haystack((pipe,))) == text.strip()
    writer.join()


def test_a_damaged_weight_file_is_named_in_plain_transformers(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(BASE, model)
    (model / "model.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(UserError, match="model.safetensors is damaged or not a safetensors file") as error:
        TransformersModel(model, device="cpu")
    assert "\n" not in str(error.value)
