"""Documents to tokens on disk: this project's stage beside Megatron-Core's IndexedDatasetBuilder and
datatrove, same files and tokenizer.

Each runs whole in a process of its own, its worker processes included: reading .jsonl, encoding, writing.
Ours goes on to packed rows, with hashes of files and documents, and the table of all documents; Megatron's
writes .bin/.idx of whole documents, fed by a pool of processes as Megatron-LM's preprocessing does it;
datatrove its own token files, unshuffled, a task for each file.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.measure.report import Column, Report, about

_CHUNK = 32  # documents handed to a process of Megatron's pool at a time


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured on."""

    inputs: tuple[Path, ...]
    """.jsonl files with `text`; at least as many as workers, so that datatrove can use all."""
    tokenizer: Path
    workers: int
    repeats: int
    methods: tuple[str, ...] = ()
    """Only these; empty = all."""
    seq_length: int = 1 << 17

    def __post_init__(self) -> None:
        if not self.inputs or any(path.suffix != ".jsonl" or not path.is_file() for path in self.inputs):
            raise UserError("--input: give .jsonl files that exist")
        if not (self.tokenizer / "tokenizer.json").is_file():
            raise UserError(f"--tokenizer {self.tokenizer}: no tokenizer.json in it")
        for name in self.methods:
            if name not in METHODS:
                raise UserError(f"--methods {name}: known are {', '.join(METHODS)}")


def run(
    settings: Settings, device: Any, command: str, say: Callable[[str], Any] = lambda name: None
) -> Report:
    """Median tokens a second of each, in turns, so that a slow minute of the machine meets all alike."""
    size = sum(path.stat().st_size for path in settings.inputs)
    report = Report(
        kind="data",
        bars=["tokens_per_second"],
        columns=[
            Column(key="tokens_per_second", title="tokens/s", show=lambda v: f"{v:,.0f}"),
            Column(key="megabytes_per_second", title="MB/s", show=lambda v: f"{v:.2f}", meaning="of input"),
            Column(
                key="seconds",
                title="seconds",
                show=lambda v: f"{v:.1f}",
                meaning="median of the runs, process start and imports included",
            ),
            Column(
                key="cpu_seconds",
                title="CPU s",
                show=lambda v: f"{v:.1f}",
                meaning="of all its processes: what other work on the machine leaves alone",
            ),
            Column(
                key="tokens",
                title="tokens",
                show=lambda v: f"{v:,}",
                meaning="of the documents, separators not counted",
            ),
            Column(
                key="peak_bytes",
                title="peak MB",
                show=lambda v: f"{v / 1e6:.0f}",
                meaning="largest resident size of one of its processes",
            ),
        ],
        about=about(device, command, workers=settings.workers, input_bytes=size, files=len(settings.inputs)),
    )
    methods = settings.methods or tuple(METHODS)
    times: dict[str, list[float]] = {name: [] for name in methods}
    last: dict[str, dict[str, Any]] = {}
    for turn in range(settings.repeats):
        for name in methods:
            say(f"{name}, {turn + 1} of {settings.repeats}")
            last[name] = _apart(name, settings)
            if "note" not in last[name]:
                times[name].append(last[name]["seconds"])
    for name in methods:
        row: dict[str, Any] = {"name": name, "ours": name == "ours"}
        if times[name]:
            seconds = statistics.median(times[name])
            row |= last[name] | {
                "seconds": seconds,
                "tokens_per_second": last[name]["tokens"] / seconds,
                "megabytes_per_second": size / seconds / 1e6,
            }
        else:
            row["note"] = last[name]["note"]
        report.rows.append(row)
    return report


def _apart(name: str, settings: Settings) -> dict[str, Any]:
    """One run in a new process: seconds, tokens, peak memory; or a note of why not."""
    context = multiprocessing.get_context("spawn")
    with TemporaryDirectory(prefix="benchmark-data-") as folder:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(name, settings, folder, theirs))
        started = time.perf_counter()
        process.start()
        theirs.close()
        try:
            found: dict[str, Any] = ours.recv()
        except EOFError:
            found = {"note": "ended suddenly"}
        process.join()
        return found if "note" in found else found | {"seconds": time.perf_counter() - started}


def _child(name: str, settings: Settings, folder: str, answer: Any) -> None:
    import resource

    sys.argv = sys.argv[:1]
    try:
        tokens = METHODS[name](settings, Path(folder))
    except ImportError as error:
        answer.send({"note": f"not installed: {error.name or error}"})
        return
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(one.ru_utime + one.ru_stime for one in usage)
    answer.send(
        {"tokens": tokens, "cpu_seconds": cpu, "peak_bytes": max(one.ru_maxrss for one in usage) * 1024}
    )


def _ours(settings: Settings, folder: Path) -> int:
    from megatron_ultralong.data.pretrain import pack, sources

    made = pack.pack(
        sources.from_inputs(list(settings.inputs)),
        settings.tokenizer,
        pack.Packing(seq_length=settings.seq_length),
        str(folder / "rows"),
        workers=settings.workers,
        show_progress=False,
    )
    return int(made["sources"][0]["tokens"])


_tokenizer: Any = None


def _load(path: str) -> None:
    import tokenizers

    global _tokenizer
    _tokenizer = tokenizers.Tokenizer.from_file(path)


def _encode(line: bytes) -> list[int]:
    return list(_tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids)


def _megatron(settings: Settings, folder: Path) -> int:
    import numpy
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    path = str(settings.tokenizer / "tokenizer.json")
    _load(path)
    builder = IndexedDatasetBuilder(
        str(folder / "megatron.bin"), dtype=DType.optimal_dtype(_tokenizer.get_vocab_size())
    )
    tokens = 0
    with multiprocessing.get_context("spawn").Pool(settings.workers, _load, (path,)) as pool:
        for ids in pool.imap(_encode, _lines(settings.inputs), _CHUNK):
            import torch

            builder.add_document(torch.from_numpy(numpy.array(ids, dtype=numpy.int64)), [len(ids)])
            tokens += len(ids)
    builder.finalize(str(folder / "megatron.idx"))
    return tokens


def _lines(paths: tuple[Path, ...]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as file:
            yield from file


def _datatrove(settings: Settings, folder: Path) -> int:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from loguru import logger

    logger.remove()
    source = folder / "input"
    source.mkdir()
    for k, path in enumerate(settings.inputs):
        (source / f"{k:05d}.jsonl").symlink_to(path.resolve())
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(source)),
            DocumentTokenizer(
                str(folder / "tokens"), str(settings.tokenizer / "tokenizer.json"), shuffle_documents=False
            ),
        ],
        tasks=len(settings.inputs),
        workers=settings.workers,
        logging_dir=str(folder / "logs"),
        start_method="spawn",
    ).run()
    sizes = [int(path.read_text().splitlines()[1]) for path in (folder / "tokens").glob("*.metadata")]
    return sum(sizes)


METHODS: dict[str, Callable[[Settings, Path], int]] = {
    "ours": _ours,
    "megatron": _megatron,
    "datatrove": _datatrove,
}


def made_input(folder: Path, files: int, megabytes: int, seed: int = 0) -> tuple[Path, ...]:
    """.jsonl files of about so many MB together: cuts of Python's own source files, of 2 to 200 KB, no two
    equal. Made once in a folder."""
    import random
    import sysconfig

    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(f"{files} {megabytes} {seed} {sys.version}".encode()).hexdigest()[:8]
    paths = tuple(folder / f"{key}-{k:03d}.jsonl" for k in range(files))
    if all(path.exists() for path in paths):
        return paths
    rng = random.Random(seed)
    sources = sorted(
        p
        for p in Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")
        if "site-packages" not in p.parts and p.stat().st_size > 2000
    )
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in sources]
    for path in paths:
        partial = path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            written = 0
            while written < megabytes * 1_000_000 // files:
                text = rng.choice(texts)
                at = rng.randrange(len(text))
                line = (
                    json.dumps(
                        {"text": text[at : at + rng.choice((2_000, 20_000, 200_000))]}, ensure_ascii=False
                    )
                    + "\n"
                )
                written += file.write(line)
        partial.rename(path)
    return paths
