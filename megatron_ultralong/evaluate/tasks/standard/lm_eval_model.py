"""A backend as a model of lm-evaluation-harness, for any task of the harness.

Texts are tokenised as by the harness's own `hf` model, so that both give the same answers
(tests/unit/test_standard.py). A backend is one of protocol.py; tasks that compare likelihoods need a
LikelihoodBackend.

Once this module is imported, the harness also knows the model by name; its arguments are the options of
`ultralong evaluate`:

    lm_eval.simple_evaluate(model="megatron_ultralong", model_args={"load": "runs/1m"}, tasks=["arc_easy"])
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import itertools
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM, hash_args
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import simple_parse_args_string

from megatron_ultralong import command_line
from megatron_ultralong.command_settings import parse_count
from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends import options
from megatron_ultralong.evaluate.backends.protocol import GenerationRequest
from megatron_ultralong.evaluate.prompts.encode import render_chat
from megatron_ultralong.io.progress import progress_bar

DEFAULT_MAX_TOKENS = 256
"""Tokens to generate where a task does not define them: the harness's own default."""
SLICE = 64
"""Pairs per call of the backend; answered ones are kept if the run is killed."""
CUT, REFUSED = "cut ", "refused "
"""Prefixes of the notes that are stored among the harness's kept answers; the hash of a request follows."""


@register_model("megatron_ultralong")
class HarnessModel(TemplateLM):
    """A model for `lm_eval.simple_evaluate(model=...)`."""

    def __init__(self, backend: Any, *, max_length: int | None = None, batch_tokens: int = 16384) -> None:
        """max_length: tokens of prompt and answer together; None = the model's positions, and where they are
        not known nothing is cut. batch_tokens: tokens of the prompts and answers of a batch."""
        super().__init__()
        self.backend_, self.tokenizer, self.batch_tokens = backend, backend.tokenizer, batch_tokens
        self.max_length: int | None = max_length if max_length is not None else backend.max_position
        self._notes: MutableMapping[str, Any] = {}
        self.refused: list[str] = []
        """Why an endpoint refused prompts (filtered, too long): their answers are empty."""

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> HarnessModel:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> HarnessModel:
        """Create the model of a call by name. arg_dict: the model options of `ultralong evaluate`, like
        {"model": DIR, "engine": "hf"} or {"load": CKPT, "tp": 8}, and max_length; of additional_config only
        the device is used. UserError for options that do not exist or do not fit together."""
        given = {"device": (additional_config or {}).get("device"), **arg_dict}
        parser = argparse.ArgumentParser(exit_on_error=False, add_help=False, allow_abbrev=False)
        options.add_model_arguments(parser)
        parser.add_argument("--max-length")
        command_line.accept_old(parser)
        words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
        try:
            args, unknown = parser.parse_known_args(words)
        except argparse.ArgumentError as error:
            raise UserError(f"model_args: {error}") from None
        if unknown:
            raise UserError(
                f"model_args: {unknown[0].partition('=')[0].removeprefix('--')} is not a model option of `ultralong evaluate`"
            )
        options.check_greedy(args)
        max_length = parse_count(args.max_length, "max_length") if args.max_length else None
        stack = contextlib.ExitStack()
        atexit.register(stack.close)  # the harness does not report its end; other ranks wait until then
        return cls(
            stack.enter_context(options.open_backend(argparse.Namespace(**vars(args), seed=0))),
            max_length=max_length,
        )

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Use the harness's cache of answers, which also stores our notes. It contains an empty answer for a
        refused prompt: that is removed."""
        super().set_cache_hook(cache_hook)
        if cache_hook.dbdict is not None:
            self._notes = cache_hook.dbdict
            for note in [key for key in self._notes if key.startswith(REFUSED)]:
                self._notes.pop(note.removeprefix(REFUSED), None)
                del self._notes[note]

    def count_cut(self, requests: Iterable[tuple[Any, ...]]) -> int:
        """The number of requests that were longer than `max_length` and were truncated at the beginning, in
        this run or an earlier one."""
        cut = {key for key in self._notes if key.startswith(CUT)}
        return sum(CUT + hash_args("", args) in cut for args in requests)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return (
            self.tokenizer.bos_token_id
            if self.tokenizer.bos_token_id is not None
            else self.tokenizer.eos_token_id
        )

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encode with the tokenizer's special tokens, but never with a second beginning-of-text token."""
        if (
            add_special_tokens is None
            and self.prefix_token_id is not None
            and string.startswith(self.tokenizer.decode(self.prefix_token_id))
        ):
            add_special_tokens = False
        return list(
            self.tokenizer.encode(
                string, **({} if add_special_tokens is None else {"add_special_tokens": add_special_tokens})
            )
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render the conversation; see `render_chat`."""
        return render_chat(self.tokenizer, chat_history, add_generation_prompt=add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """requests: ((context, continuation) or None, tokens of the context, tokens of the continuation)."""
        answers: list[Any] = [None] * len(requests)
        # Neighbours share their context where possible, so that the backend reads it once. The longest come
        # first, so that what does not fit is reported at once.
        order = sorted(
            range(len(requests)), key=lambda i: (-len(requests[i][1]) - len(requests[i][2]), requests[i][1])
        )
        with progress_bar("likelihoods", len(order), "request", hidden=disable_tqdm) as bar:
            for places in _slices(order, SLICE):
                scored = self.backend_.loglikelihood([self._truncate(*requests[i]) for i in places])
                for i, answer in zip(places, scored, strict=True):
                    answers[i] = answer
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
                bar.update(len(places))
        return answers

    def _truncate(
        self, args: tuple[str, str] | None, context: list[int], continuation: list[int]
    ) -> tuple[list[int], list[int]]:
        """Keep the last tokens that fit; the very last one is only predicted, never read."""
        if self.max_length is None or (over := len(context) + len(continuation) - (self.max_length + 1)) <= 0:
            return context, continuation
        if args is not None:
            self._notes[CUT + hash_args("", args)] = True
        if over >= len(context):
            raise UserError(
                f"a task scores {len(continuation)} tokens at once, more than the maximum length of {self.max_length}"
            )
        return context[over:], continuation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of complete texts, window by window, each token with as much context as fits."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            tokens = self.tok_encode(text)
            text_windows = (
                [
                    utils.make_disjoint_window(window)
                    for window in utils.get_rolling_token_windows(
                        token_list=tokens,
                        prefix_token=self.prefix_token_id,
                        max_seq_len=self.max_length or len(tokens),
                        context_len=1,
                    )
                ]
                if tokens
                else []
            )
            windows += [(None, context, continuation) for context, continuation in text_windows]
            counts.append(len(text_windows))
        answers = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        sums = [sum(value for value, _ in itertools.islice(answers, count)) for count in counts]
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate greedily after each prompt, up to the task's stop strings."""
        asked = [self._request(*request.args) for request in requests]
        generated = [""] * len(asked)
        order = sorted(
            range(len(asked)), key=lambda i: (-len(asked[i].ids or ()), asked[i].max_tokens, asked[i].stop)
        )
        with progress_bar("answers", len(order), "request", hidden=disable_tqdm) as bar:
            for places in _batches(
                order, [len(one.ids or ()) + one.max_tokens for one in asked], self.batch_tokens
            ):
                for place, done in self.backend_.generate([asked[i] for i in places]):
                    i = places[place]
                    generated[i] = postprocess_generated_text(done.text, list(asked[i].stop), None)
                    if done.answered:
                        self.cache_hook.add_partial("generate_until", requests[i].args, generated[i])
                    else:
                        self._notes[REFUSED + hash_args("generate_until", requests[i].args)] = done.finish
                        self.refused.append(done.finish)
                    bar.update(1)
        return generated

    def _request(self, prompt: str, settings: dict[str, Any]) -> GenerationRequest:
        kwargs = normalize_gen_kwargs(settings, DEFAULT_MAX_TOKENS)
        if kwargs.get("do_sample") or kwargs.get("temperature"):
            raise UserError(
                "a task requests sampled answers (do_sample, temperature); only greedy ones are supported"
            )
        stop = handle_stop_sequences(
            kwargs.get("until"), eos=self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        )
        tokens = self.tok_encode(prompt)
        if self.max_length is not None:
            room = self.max_length - kwargs["max_gen_toks"]
            if room < 1:
                raise UserError(
                    f"a task requests {kwargs['max_gen_toks']} tokens of answer, but prompt and answer together may have "
                    f"{self.max_length}: "
                    "the model's positions, or --max-length"
                )
            if len(tokens) > room:
                tokens = tokens[-room:]
                self._notes[CUT + hash_args("", (prompt, settings))] = True
        return GenerationRequest(
            id="", ids=tokens, max_tokens=kwargs["max_gen_toks"], stop=tuple(text for text in stop if text)
        )


def _slices(places: list[int], size: int) -> Iterator[list[int]]:
    for first in range(0, len(places), size):
        yield places[first : first + size]


def _batches(places: list[int], sizes: list[int], most: int) -> Iterator[list[int]]:
    """Group `places` into batches of at most `most` tokens, or a single one."""
    group: list[int] = []
    for place in places:
        if group and sum(sizes[i] for i in group) + sizes[place] > most:
            yield group
            group = []
        group.append(place)
    if group:
        yield group
