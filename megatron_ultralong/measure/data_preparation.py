"""Speed and memory of tokenising documents: this project, Megatron-Core's IndexedDatasetBuilder and
datatrove.

All use the same files and tokenizer. Each runs completely in a process of its own, including its worker
processes: reading .jsonl, encoding, writing. This project also packs rows, hashes files and documents, and
writes the table of all documents. Megatron's builder writes .bin/.idx of whole documents, fed by a process
pool as in Megatron-LM's preprocessing. datatrove writes its own token files, unshuffled, with one task per
file.
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
from megatron_ultralong.measure.number_format import integer
from megatron_ultralong.measure.report import ReportColumn, SpeedReport, about

DOCUMENTS_PER_TASK = 32
"""Documents that a worker of Megatron's pool gets at a time."""


COLUMNS = (
    ReportColumn("tokens_per_second", "tokens/s", integer, higher_is_better=True),
    ReportColumn("megabytes_per_second", "MB/s", lambda value: f"{value:.2f}", "of input"),
    ReportColumn(
        "seconds",
        "seconds",
        lambda value: f"{value:.1f}",
        "median of the runs, including process start and imports",
    ),
    ReportColumn(
        "cpu_seconds",
        "CPU s",
        lambda value: f"{value:.1f}",
        "of all its processes; hardly affected by other work on the machine",
    ),
    ReportColumn("tokens", "tokens", integer, "of the documents, separators not counted"),
    ReportColumn(
        "peak_bytes",
        "peak MB",
        lambda value: f"{value / 1e6:.0f}",
        "largest resident size of one of its processes",
    ),
)


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What is measured."""

    inputs: tuple[Path, ...]
    """.jsonl files with `text`; at least as many as workers, so that datatrove can use all."""
    tokenizer: Path
    workers: int
    repeats: int
    methods: tuple[str, ...] = ()
    """Names in `METHODS`; empty = all."""
    seq_length: int = 1 << 17

    def __post_init__(self) -> None:
        if not self.inputs or any(path.suffix != ".jsonl" or not path.is_file() for path in self.inputs):
            raise UserError("--input: expected existing .jsonl files")
        if not (self.tokenizer / "tokenizer.json").is_file():
            raise UserError(f"--tokenizer {self.tokenizer}: contains no tokenizer.json")
        for name in self.methods:
            if name not in METHODS:
                raise UserError(f"--methods {name}: choose from {', '.join(METHODS)}")


def run(
    settings: DataSettings, device: Any, command: str, progress: Callable[[str], None] = lambda line: None
) -> SpeedReport:
    """Measure the methods alternately, so that a slow phase of the machine affects all of them, and report
    medians."""
    size = sum(path.stat().st_size for path in settings.inputs)
    report = SpeedReport(
        kind="data",
        bars=["tokens_per_second"],
        columns=COLUMNS,
        about=about(device, command, workers=settings.workers, input_bytes=size, files=len(settings.inputs)),
    )
    methods = settings.methods or tuple(METHODS)
    times: dict[str, list[float]] = {name: [] for name in methods}
    last: dict[str, dict[str, Any]] = {}
    for turn in range(settings.repeats):
        for name in methods:
            progress(f"{name}, {turn + 1} of {settings.repeats}")
            last[name] = measure_in_process(name, settings)
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


def measure_in_process(name: str, settings: DataSettings) -> dict[str, Any]:
    """Run one method in a new process; return seconds, tokens and peak memory, or a note why it failed."""
    context = multiprocessing.get_context("spawn")
    with TemporaryDirectory(prefix="benchmark-data-") as folder:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(name, settings, folder, theirs))
        started = time.perf_counter()
        process.start()
        theirs.close()
        try:
            figures: dict[str, Any] = ours.recv()
        except EOFError:
            figures = {"note": "the process died"}
        process.join()
        return figures if "note" in figures else figures | {"seconds": time.perf_counter() - started}


def _child(name: str, settings: DataSettings, folder: str, answer: Any) -> None:
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


def _ours(settings: DataSettings, folder: Path) -> int:
    from megatron_ultralong.data.pretrain import pack, sources

    manifest = pack.pack(
        sources.from_inputs(list(settings.inputs)),
        settings.tokenizer,
        pack.Packing(seq_length=settings.seq_length),
        str(folder / "rows"),
        workers=settings.workers,
        show_progress=False,
    )
    return int(manifest["sources"][0]["tokens"])


_tokenizer: Any = None


def _load(path: str) -> None:
    import tokenizers

    global _tokenizer
    _tokenizer = tokenizers.Tokenizer.from_file(path)


def _encode(line: bytes) -> list[int]:
    return list(_tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids)


def _megatron(settings: DataSettings, folder: Path) -> int:
    import numpy
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    path = str(settings.tokenizer / "tokenizer.json")
    _load(path)
    builder = IndexedDatasetBuilder(
        str(folder / "megatron.bin"), dtype=DType.optimal_dtype(_tokenizer.get_vocab_size())
    )
    tokens = 0
    with multiprocessing.get_context("spawn").Pool(settings.workers, _load, (path,)) as pool:
        for ids in pool.imap(_encode, _lines(settings.inputs), DOCUMENTS_PER_TASK):
            import torch

            builder.add_document(torch.from_numpy(numpy.array(ids, dtype=numpy.int64)), [len(ids)])
            tokens += len(ids)
    builder.finalize(str(folder / "megatron.idx"))
    return tokens


def _lines(paths: tuple[Path, ...]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as file:
            yield from file


def _datatrove(settings: DataSettings, folder: Path) -> int:
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


METHODS: dict[str, Callable[[DataSettings, Path], int]] = {
    "ours": _ours,
    "megatron": _megatron,
    "datatrove": _datatrove,
}


def write_sample_input(folder: Path, files: int, megabytes: int, seed: int = 0) -> tuple[Path, ...]:
    """Write `files` .jsonl files of about `megabytes` MB together, unless `folder` contains them; return
    their paths.

    Documents are random pieces of Python's own source files, 2 to 200 KB each.
    """
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
