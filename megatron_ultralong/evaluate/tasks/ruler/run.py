"""RULER (arXiv 2404.06654): prompts, predictions, scores. Each stage reads and writes files, goes on where it
was stopped, and can run alone.

    OUT/data/TASK/LENGTH.jsonl           prepare: index, input, outputs, length, answer_prefix (RULER's names) and meta
    OUT/predictions/TASK/LENGTH.jsonl    predict: index, pred, outputs, once all are there; before that LENGTH.journal.jsonl, answer by answer
    OUT/ruler.json                       score

Data made by NVIDIA/RULER itself (LENGTH/data/TASK/validation.jsonl) is read as it is: `Settings.data`.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends.protocol import Backend, Request, identity
from megatron_ultralong.evaluate.pipeline import predictions, results
from megatron_ultralong.evaluate.prompts import chat_template
from megatron_ultralong.evaluate.report.heat_map import tokens as name_of
from megatron_ultralong.evaluate.scorers import ruler as ruler_scores
from megatron_ultralong.evaluate.tasks.ruler import filler_text, wording
from megatron_ultralong.evaluate.tasks.ruler import qa as ruler_qa
from megatron_ultralong.evaluate.tasks.ruler.tasks import TASKS, Kit, sample
from megatron_ultralong.io import jsonl

FORMAT = 1
"""Version of the results JSON."""
FIRST = 4096
BOUNDS = (2**17, 2**19, 2**20)
"""The UltraLong paper (arXiv 2504.06214) gives RULER as averages up to 128K, 512K and 1M tokens. It does not
say which lengths they hold; here these are 4K and its doublings up to the bound, the bound among them."""
OFFICIAL_SAMPLES = 500

MADE = ("seed", "wording", "tokenizer", "chat", "haystack", "words", "source")
"""What a prompt's meta says of its making; the results say it of each task."""
Progress = Callable[[int], Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked."""

    out: Path
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    """All tokens: chat template, prompt, first words of the answer, tokens to generate."""
    samples: int = OFFICIAL_SAMPLES
    """Prompts a task and length."""
    seed: int = 0
    chat: chat_template.Mode = "auto"
    haystack: tuple[Path, ...] = ()
    """Text for the tasks with an essay; none = own sentences."""
    squad: Path | None = None
    hotpotqa: Path | None = None
    official: Path | None = None
    """Checkout of NVIDIA/RULER whose wording is used; None = see `own_words`."""
    own_words: bool = False
    """Own wording, even where the official one is installed (lm-evaluation-harness)."""
    data: Path | None = None
    """Where prompts are read from; None = those made here, in `out`/data."""

    def __post_init__(self) -> None:
        for option, values in (("tasks", self.tasks), ("lengths", self.lengths)):
            if not values or len(set(values)) != len(values):
                raise UserError(f"--{option}: give at least one value, and each only once")
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown:
            raise UserError(f"--tasks {unknown[0]}: no such task; there are all, {', '.join(TASKS)}")
        if self.samples < 1 or min(self.lengths) < 1:
            raise UserError("--samples and --lengths must be at least 1")

    def runnable(self) -> tuple[str, ...]:
        """The tasks whose files are given, or were: questions and answers need SQuAD and HotpotQA, or prompts
        or predictions made of them."""
        given = {"": True, "squad": self.squad is not None, "hotpotqa": self.hotpotqa is not None}
        return tuple(
            task
            for task in self.tasks
            if self.data is not None
            or given[TASKS[task].data]
            or all(
                (self.out / "data" / task / f"{length}.jsonl").is_file()
                or prediction_file(self, task, length).is_file()
                for length in self.lengths
            )
        )


# ---- prepare -----------------------------------------------------------------------------------


def prepare(settings: Settings, tokenizer: Any, progress: Progress = lambda n: None) -> None:
    """Write the prompts of all tasks and lengths. UserError where a file that is there was made with other
    settings."""
    words = wording.choose(settings.official, settings.own_words)
    readers = (
        ("squad", settings.squad, ruler_qa.read_squad),
        ("hotpotqa", settings.hotpotqa, ruler_qa.read_hotpotqa),
    )
    wanted = {TASKS[task].data for task in settings.tasks}
    data: dict[str, ruler_qa.Data] = {
        name: read(path) for name, path, read in readers if path is not None and name in wanted
    }
    frame = chat_template.frame(tokenizer, settings.chat)
    kit = Kit(
        frame,
        words,
        seed=settings.seed,
        data=data,
        haystack=filler_text.read_haystack(settings.haystack) if settings.haystack else None,
    )
    common = {
        "seed": settings.seed,
        "wording": words.name,
        "tokenizer": f"{len(tokenizer)} tokens",
        "chat": frame.chat,
    }
    for length in settings.lengths:
        for task in settings.runnable():
            if TASKS[task].data and TASKS[task].data not in data:  # what an earlier run made of it is there
                progress(settings.samples)
                continue
            made = {**common, **_text_of(settings, task)}
            count = (
                min(settings.samples, len(data[TASKS[task].data].questions))
                if TASKS[task].data
                else settings.samples
            )
            path = settings.out / "data" / task / f"{length}.jsonl"
            if path.exists() and _has(path, count, made):
                progress(settings.samples)
                continue
            with jsonl.ResumableFile(path, keep=("index", "meta")) as writer:
                for number, line in enumerate(writer.done):
                    _same(writer.part, line, number, made)
                progress(len(writer.done) + settings.samples - count)
                for index in range(len(writer.done), count):
                    row = sample(kit, task, length, index)
                    writer.add({**row, "meta": {**row["meta"], **made}})
                    progress(1)


def _text_of(settings: Settings, task: str) -> dict[str, Any]:
    if TASKS[task].data:
        path = settings.squad if TASKS[task].data == "squad" else settings.hotpotqa
        return {"source": path.name if path else ""}
    words = (
        {"words": "own"}
        if TASKS[task].kind == "cwe" or (TASKS[task].kind == "niah" and TASKS[task].key == "words")
        else {}
    )
    return words | (
        {"haystack": [path.name for path in settings.haystack] or "own sentences"}
        if TASKS[task].haystack == "essay"
        else {}
    )


def _has(path: Path, count: int, made: dict[str, Any]) -> bool:
    number = -1
    for number, line in enumerate(jsonl.read(path)):
        _same(path, line, number, made)
    return number + 1 >= count


def _same(path: Path, line: dict[str, Any], number: int, made: dict[str, Any]) -> None:
    """UserError where a line of `path` is not the one with that number, or says that it was made with
    something else than `made`."""
    if line.get("index") != number:
        raise UserError(
            f"{path}, line {number + 1}: is prompt {line.get('index')}, not {number}; remove the file, it is made anew"
        )
    for name, value in made.items():
        if (before := line.get("meta", {}).get(name)) != value:
            raise UserError(
                f"{path} was made with {name} {json.dumps(before)}, not {json.dumps(value)}; give another --out, or remove it"
            )


# ---- predict -----------------------------------------------------------------------------------


def data_file(settings: Settings, task: str, length: int) -> Path:
    """The prompts of a task and length, in this project's places or in NVIDIA/RULER's. UserError where there
    are none."""
    root = settings.data or settings.out / "data"
    places = [
        root / task / f"{length}.jsonl",
        *(root / str(length) / "data" / task / f"{name}.jsonl" for name in ("validation", "test")),
    ]
    for place in places:
        if place.is_file():
            return place
    other = (
        f"leave {task} out with --tasks"
        if settings.data
        else "run --stage prepare first, or give its folder as --data"
    )
    raise UserError(f"{places[0]}: no such file (nor {places[1].relative_to(root)}); {other}")


def predict(
    settings: Settings, backend: Backend, *, batch: int | None = None, progress: Progress = lambda n: None
) -> None:
    """Write the model's answers to all prompts. UserError where answers that are there are another model's or
    to other prompts.

    batch: prompts asked at a time; None = as many as make 16K tokens.
    """
    frame, model = (
        chat_template.frame(backend.tokenizer, settings.chat),
        json.loads(json.dumps(identity(backend))),
    )
    sources = {
        (task, length): data_file(settings, task, length)
        for length in settings.lengths
        for task in settings.runnable()
    }
    longest = max(settings.lengths)
    backend.check(longest, batch or max(1, predictions.TOKENS_AT_A_TIME // longest))
    for (task, length), source in sources.items():
        path, beside = prediction_file(settings, task, length), deque[dict[str, Any]]()
        results.make_folder(path.parent)
        if _answered(settings, path, source, task, model, frame.chat):
            progress(settings.samples)
            continue

        def requests(
            task: str = task,
            length: int = length,
            source: Path = source,
            beside: deque[dict[str, Any]] = beside,
        ) -> Iterator[Request]:
            # RULER's own `index` is not the line's number in every task.
            for position, row in enumerate(islice(jsonl.read(source), settings.samples)):
                text, prefix, outputs = _fields(source, row)
                request = Request(
                    id=str(position),
                    text=text,
                    prefix=prefix,
                    ids=frame.encode(text, prefix),
                    tokens=TASKS[task].tokens,
                )
                beside.append(
                    {
                        "index": position,
                        "outputs": outputs,
                        "length": row.get("length"),
                        "model": model,
                        "max_position": backend.max_position,
                        "over": len(request.ids or ()) + request.tokens > length,
                        "text_sha256": _hash(text, prefix, task, frame.chat),
                        "made": {name: value for name, value in row.get("meta", {}).items() if name in MADE},
                    }
                )
                yield request

        answers = predictions.run(
            backend,
            requests(),
            path.with_suffix(".journal.jsonl"),
            progress=progress,
            batch=batch or max(1, predictions.TOKENS_AT_A_TIME // max(length, 1)),
        )
        results.write_lines(
            path,
            [
                {"pred": one.text, **({} if one.answered else {"refused": one.finish}), **beside.popleft()}
                for one in answers
            ],
        )


def _answered(settings: Settings, path: Path, source: Path, task: str, model: Any, framed: bool) -> bool:
    """Whether `path` holds this model's answers to all of the prompts: they are not even made into tokens
    again, which takes hours at 1M.

    UserError where it holds others that no journal would bring back.
    """
    if not path.is_file():
        return False
    rows, count = list(jsonl.read(path)), 0
    same = all(row.get("model") == model for row in rows)
    for count, row in enumerate(islice(jsonl.read(source), settings.samples), 1):
        text, prefix, _ = _fields(source, row)
        same = same and (
            count > len(rows) or rows[count - 1].get("text_sha256") == _hash(text, prefix, task, framed)
        )
    if not same and not path.with_suffix(".journal.jsonl").exists():
        raise UserError(
            f"{path} holds predictions of another model, or to other prompts; score them with --stage score, or give another --out"
        )
    return same and len(rows) == count and not any("refused" in row for row in rows)


def _hash(text: str, prefix: str, task: str, framed: bool) -> str:
    """Of a prompt before it is made into tokens, which at 1M takes long; the journal has that of the tokens
    (predictions.prompt_hash)."""
    return hashlib.sha256(json.dumps([text, prefix, TASKS[task].tokens, framed]).encode()).hexdigest()


def prediction_file(settings: Settings, task: str, length: int) -> Path:
    return settings.out / "predictions" / task / f"{length}.jsonl"


def _fields(path: Path, row: dict[str, Any]) -> tuple[str, str, list[str]]:
    text, prefix, outputs = row.get("input"), row.get("answer_prefix", ""), row.get("outputs")
    if (
        not isinstance(text, str)
        or not isinstance(prefix, str)
        or not isinstance(outputs, list)
        or not outputs
    ):
        raise UserError(
            f"{path}: a line without `input` (text) and `outputs` (list of texts); RULER's data has them"
        )
    return text, prefix, [str(output) for output in outputs]


# ---- score -------------------------------------------------------------------------------------


def score(settings: Settings) -> dict[str, Any]:
    """The results JSON's values, of the predictions on disk. UserError where some are missing."""
    table: dict[str, dict[str, Any]] = {}
    found: dict[str, Any] = {}
    data: dict[str, dict[str, Any]] = {}
    for length in settings.lengths:
        for task in settings.runnable():
            rows = _answers(settings, task, length)
            made = rows[0].get("made") or {"wording": "as in the data"}
            _one(found, "models", rows, "model", settings)
            _one(data, task, [row | {"made": row.get("made") or made} for row in rows], "made", settings)
            texts = [ruler_scores.printable(row["pred"]) for row in rows]
            scorer = ruler_scores.string_match_part if TASKS[task].part else ruler_scores.string_match_all
            table.setdefault(task, {})[str(length)] = {
                "score": scorer(texts, [list(map(str, row["outputs"])) for row in rows]),
                "samples": len(rows),
                "empty": sum(not text for text in texts),
                "over": sum(bool(row.get("over")) for row in rows),
                "refused": sum("refused" in row for row in rows),
            }
            found["max_position"] = rows[0].get("max_position", found.get("max_position"))
    model = found.get("models")
    wordings = sorted({made.get("wording", "as in the data") for made in data.values()})
    return {
        "format": FORMAT,
        "task": "ruler",
        "model": model and {**model, "max_position": found.get("max_position")},
        "wording": " and ".join(wordings),
        "official_samples": OFFICIAL_SAMPLES,
        "data": data,
        "scores": table,
        **averages(table),
    }


def _answers(settings: Settings, task: str, length: int) -> list[dict[str, Any]]:
    """The prediction file's lines. UserError where it is not there, or one is no prediction."""
    path = prediction_file(settings, task, length)
    if not path.is_file():
        stopped = " (it was stopped before its end)" if path.with_suffix(".journal.jsonl").exists() else ""
        raise UserError(f"{path}: no such file; run --stage predict first{stopped}")
    rows = list(islice(jsonl.read(path), settings.samples))
    for number, row in enumerate(rows, 1):
        outputs = row.get("outputs")
        if (
            not isinstance(row.get("pred"), str)
            or not isinstance(outputs, list)
            or not outputs
            or not isinstance(row.get("made", {}), dict)
        ):
            raise UserError(f"{path}, line {number}: needs `pred` (text) and `outputs` (list of texts)")
    if not rows:
        raise UserError(f"{path}: holds no prediction; remove it and run --stage predict")
    return rows


def _one(found: dict[str, Any], name: str, rows: list[dict[str, Any]], key: str, settings: Settings) -> None:
    """Note what all `rows` say of `key`; UserError where they, or rows before, say another thing: figures of
    two would stand in one table."""
    for row in rows:
        if (value := row.get(key)) is not None and found.setdefault(name, value) != value:
            what = "two models" if key == "model" else f"{name} prompts made in two ways"
            other = next(
                part for part in {**value, **found[name]} if value.get(part) != found[name].get(part)
            )
            raise UserError(
                f"{settings.out / 'predictions'} holds answers of {what} ({other} {json.dumps(found[name].get(other))} and "
                f"{json.dumps(value.get(other))}); score the --lengths and --tasks of one, or give each another --out"
            )


def averages(table: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of scores by task and length: the mean over tasks at each length, and the mean of those up to each of
    `BOUNDS`.

    `complete` says whether all 13 tasks, and for a bound all of its lengths, are in it.
    """
    lengths = sorted({int(length) for of_task in table.values() for length in of_task})
    by_length: dict[str, Any] = {}
    for length in lengths:
        found = {
            task: of_task[str(length)]["score"] for task, of_task in table.items() if str(length) in of_task
        }
        by_length[str(length)] = {
            "average": round(sum(found.values()) / len(found), 2),
            "tasks": len(found),
            "complete": len(found) == len(TASKS),
        }
    up_to = {}
    for bound in BOUNDS:
        wanted = [FIRST * 2**i for i in range((bound // FIRST).bit_length())]
        used = [length for length in wanted if length in lengths]
        if used and bound in lengths:
            up_to[name_of(bound)] = {
                "average": round(sum(by_length[str(length)]["average"] for length in used) / len(used), 2),
                "lengths": used,
                "complete": used == wanted and all(by_length[str(length)]["complete"] for length in used),
            }
    return {"by_length": by_length, "up_to": up_to}


def report(result: dict[str, Any]) -> str:
    """Tasks down, lengths across, as plain text."""
    lengths = list(result["by_length"])
    limit = (result["model"] or {}).get("max_position") or max(map(int, lengths))
    names = [name_of(int(length)) + "*" * (int(length) > limit) for length in lengths]
    width = max(9, *(len(name) + 2 for name in names))
    out = ["task".ljust(16) + "".join(name.rjust(width) for name in names)]
    out += [
        task.ljust(16)
        + "".join(
            f"{found[length]['score']:.2f}".rjust(width) if length in found else "-".rjust(width)
            for length in lengths
        )
        for task, found in result["scores"].items()
    ]
    count = len(result["scores"])
    mean = f"mean of {count}" if count == len(TASKS) else f"mean of {count}/{len(TASKS)}"
    out.append(
        mean.ljust(16)
        + "".join(f"{result['by_length'][length]['average']:.2f}".rjust(width) for length in lengths)
    )
    for bound, found in result["up_to"].items():
        missing = "" if found["complete"] else " - not all tasks and lengths: no figure to compare with"
        out.append(
            f"up to {bound}: {found['average']:.2f} (mean of {', '.join(name_of(length) for length in found['lengths'])}){missing}"
        )
    if any(name.endswith("*") for name in names):
        out.append(f"* beyond the {limit:,} positions of the model's config")
    cells = [cell for of_task in result["scores"].values() for cell in of_task.values()]
    for key, words in (
        ("refused", "prompts were refused by the endpoint and count as 0"),
        ("over", "prompts are longer than the length they stand for"),
    ):
        if count := sum(cell.get(key, 0) for cell in cells):
            out.append(f"{count} of {sum(cell['samples'] for cell in cells)} {words}")
    return "\n".join([*out, f"wording: {result['wording']}"])
