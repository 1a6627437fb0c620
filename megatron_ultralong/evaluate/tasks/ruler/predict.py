"""Second stage of RULER: answer the prompts of all tasks and lengths."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends.protocol import Backend, GenerationRequest, identity
from megatron_ultralong.evaluate.pipeline.kept_answers import BATCH_TOKENS, answer_all
from megatron_ultralong.evaluate.pipeline.results import write_json_lines
from megatron_ultralong.evaluate.prompts.encode import PromptEncoder
from megatron_ultralong.evaluate.tasks.ruler.settings import RulerSettings, prompt_fields
from megatron_ultralong.evaluate.tasks.ruler.tasks import TASKS
from megatron_ultralong.io import atomic_files, jsonl

MADE_WITH = ("seed", "wording", "tokenizer", "chat", "haystack", "words", "source")
"""Fields of a prompt's meta that describe how it was made; the results record them for each task."""


def predict(
    settings: RulerSettings,
    backend: Backend,
    *,
    batch: int | None = None,
    progress: Callable[[int], Any] = lambda n: None,
) -> None:
    """Write the model's answers to all prompts. UserError where existing answers belong to another model or
    to other prompts.

    batch: prompts per batch; None = as many as make 16K tokens.
    """
    encoder = PromptEncoder(backend.tokenizer, settings.chat)
    model = json.loads(json.dumps(identity(backend)))
    sources = {
        (task, length): settings.find_prompt_file(task, length)
        for length in settings.lengths
        for task in settings.runnable()
    }
    longest = max(settings.lengths)
    backend.check(longest, batch or max(1, BATCH_TOKENS // longest))
    for (task, length), source in sources.items():
        path = settings.prediction_file(task, length)
        atomic_files.check_writable(path.parent, f"--output {path.parent}")
        prompts = _Prompts(source, task, encoder, settings.samples)
        if _is_complete(path, prompts, model):
            progress(settings.samples)
            continue
        records: deque[dict[str, Any]] = deque()

        def requests(
            prompts: _Prompts = prompts, length: int = length, records: deque[dict[str, Any]] = records
        ) -> Iterator[GenerationRequest]:
            for request, outputs, line in prompts.requests():
                records.append(
                    {
                        "index": int(request.id),
                        "outputs": outputs,
                        "length": line.get("length"),
                        "model": model,
                        "max_position": backend.max_position,
                        "over": len(request.ids or ()) + request.max_tokens > length,
                        "text_sha256": prompts.text_hash(request.text, request.prefix),
                        "made": {
                            name: value for name, value in line.get("meta", {}).items() if name in MADE_WITH
                        },
                    }
                )
                yield request

        answers = answer_all(
            backend,
            requests(),
            path.with_suffix(".journal.jsonl"),
            progress=progress,
            batch=batch or max(1, BATCH_TOKENS // max(length, 1)),
        )
        lines = [
            {"pred": one.text, **({} if one.answered else {"refused": one.finish}), **records.popleft()}
            for one in answers
        ]
        write_json_lines(path, lines)


class _Prompts:
    """The prompts of one task and length."""

    def __init__(self, source: Path, task: str, encoder: PromptEncoder, samples: int) -> None:
        self.source, self.encoder, self.samples = source, encoder, samples
        self.max_tokens = TASKS[task].answer_tokens

    def lines(self) -> Iterator[tuple[dict[str, Any], str, str, list[str]]]:
        """Yield (line, user message, first words of the answer, expected answers)."""
        for line in islice(jsonl.read(self.source), self.samples):
            yield line, *prompt_fields(self.source, line)

    def requests(self) -> Iterator[tuple[GenerationRequest, list[str], dict[str, Any]]]:
        """Yield (request, expected answers, line)."""
        # The id is the position: RULER's own `index` is not the line's number in every task.
        for position, (line, text, prefix, outputs) in enumerate(self.lines()):
            ids = self.encoder.encode(text, prefix)
            request = GenerationRequest(
                id=str(position), text=text, prefix=prefix, ids=ids, max_tokens=self.max_tokens
            )
            yield request, outputs, line

    def text_hash(self, text: str, prefix: str) -> str:
        """Hash a prompt before it is tokenised, which takes long at 1M tokens; the kept answers contain the
        hash of its tokens (kept_answers.prompt_hash)."""
        values = [text, prefix, self.max_tokens, self.encoder.chat]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _is_complete(path: Path, prompts: _Prompts, model: Any) -> bool:
    """Whether `path` contains this model's answers to all prompts: then they are not tokenised again, which
    takes hours at 1M tokens.

    UserError where it contains other answers that could not be restored from kept answers.
    """
    if not path.is_file():
        return False
    answers, count = list(jsonl.read(path)), 0
    same = all(line.get("model") == model for line in answers)
    for count, (_, text, prefix, _) in enumerate(prompts.lines(), 1):
        text_hash = prompts.text_hash(text, prefix)
        same = same and (count > len(answers) or answers[count - 1].get("text_sha256") == text_hash)
    if not same and not path.with_suffix(".journal.jsonl").exists():
        raise UserError(
            f"{path} contains predictions of another model, or to other prompts; score them with --stage score, or give "
            "another --output"
        )
    return same and len(answers) == count and not any("refused" in line for line in answers)
