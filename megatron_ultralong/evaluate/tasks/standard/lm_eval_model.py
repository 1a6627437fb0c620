"""A backend as a model of lm-evaluation-harness: whatever task the harness has can be asked of it.

Texts become tokens as the harness's own `hf` model makes them, so the two give the same answers (tests/unit/test_standard.py).
A backend is one of protocol.py; for tasks that compare likelihoods its weights have to be at hand (backends.Weights).

Once this module is imported, the harness knows the model by name too; its arguments are the options of tools/evaluate.py:

    lm_eval.simple_evaluate(model="megatron_ultralong", model_args={"ckpt": "runs/1m", "tp": 8}, tasks=["arc_easy"])
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
from tqdm import tqdm

from megatron_ultralong.config import parse_count
from megatron_ultralong.data.sft.chat_template import DATE
from megatron_ultralong.errors import UserError
from megatron_ultralong.evaluate.backends import options
from megatron_ultralong.evaluate.backends.protocol import Request

GENERATED = 256
"""Tokens written where a task does not say: the harness's own figure."""
SLICE = 64
"""Questions asked of the backend at a time; those answered are kept, should the run be killed."""
CUT, REFUSED = "cut ", "refused "
"""What the notes begin with that stand between the harness's kept answers, before the hash of a request."""


@register_model("megatron_ultralong")
class Harness(TemplateLM):
    """What `lm_eval.simple_evaluate(model=...)` takes."""

    def __init__(self, backend: Any, *, max_length: int | None = None, batch_tokens: int = 16384) -> None:
        """max_length: prompt and answer together, tokens; None = the model's own positions, and where they
        are not known nothing is cut. batch_tokens: tokens of the prompts that are generated for at a time."""
        super().__init__()
        self.backend_, self.tokenizer, self.batch_tokens = backend, backend.tokenizer, batch_tokens
        self.max_length: int | None = max_length if max_length is not None else backend.max_position
        self._notes: MutableMapping[str, Any] = {}
        self.unanswered = 0
        """Prompts that an endpoint did not answer (refused, too long for it): they count as answered by
        nothing."""

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> Harness:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> Harness:
        """The model of a call by name. arg_dict: options of tools/evaluate.py that say the model, like
        {"model": DIR, "engine": "hf"} or {"ckpt": CKPT, "tp": 8}, and max_length; of additional_config only
        the device counts. UserError for options that are none or do not fit."""
        given = {"device": (additional_config or {}).get("device"), **arg_dict}
        parser = argparse.ArgumentParser(exit_on_error=False, add_help=False, allow_abbrev=False)
        options.add_model_arguments(parser)
        parser.add_argument("--max-length")
        words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
        try:
            args, unknown = parser.parse_known_args(words)
        except argparse.ArgumentError as error:
            raise UserError(f"model_args: {error}") from None
        if unknown:
            raise UserError(
                f"model_args: {unknown[0].partition('=')[0].removeprefix('--')} is no option of tools/evaluate.py's models"
            )
        options.check_greedy(args)
        max_length = parse_count(args.max_length, "max_length") if args.max_length else None
        stack = contextlib.ExitStack()
        atexit.register(stack.close)  # the harness does not say when it is done; other ranks wait until then
        return cls(
            stack.enter_context(options.open_backend(argparse.Namespace(**vars(args), seed=0))),
            max_length=max_length,
        )

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """The harness's file of kept answers, which takes our notes too. It keeps a refused prompt as
        answered by nothing: that is forgotten."""
        super().set_cache_hook(cache_hook)
        if cache_hook.dbdict is not None:
            self._notes = cache_hook.dbdict
            for note in [key for key in self._notes if key.startswith(REFUSED)]:
                self._notes.pop(note.removeprefix(REFUSED), None)
                del self._notes[note]

    def cut_among(self, requests: Iterable[tuple[Any, ...]]) -> int:
        """How many of these requests' arguments were longer than `max_length` and lost their beginning, in
        this run or one before it."""
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
        """With the tokenizer's special tokens, but never with a second beginning of text."""
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
        """The conversation as text. Not `add_generation_prompt`: its last turn stays open. The date that
        Llama-3.1's header tells is pinned."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            date_string=DATE,
        )

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """requests: ((context, continuation) or None, their tokens, their tokens)."""
        answers: list[Any] = [None] * len(requests)
        # Neighbours share their context where they can: the backend reads it once then. The longest first:
        # what does not fit is told at once.
        order = sorted(
            range(len(requests)), key=lambda i: (-len(requests[i][1]) - len(requests[i][2]), requests[i][1])
        )
        with tqdm(total=len(order), desc="likelihoods", unit="request", disable=disable_tqdm or None) as bar:
            for places in _slices(order, SLICE):
                found = self.backend_.loglikelihood([self._fit(*requests[i]) for i in places])
                for i, answer in zip(places, found, strict=True):
                    answers[i] = answer
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
                bar.update(len(places))
        return answers

    def _fit(
        self, args: tuple[str, str] | None, context: list[int], continuation: list[int]
    ) -> tuple[list[int], list[int]]:
        """The last tokens that there is room for; the very last one is never read, only foretold."""
        if self.max_length is None or (over := len(context) + len(continuation) - (self.max_length + 1)) <= 0:
            return context, continuation
        if args is not None:
            self._notes[CUT + hash_args("", args)] = True
        if over >= len(context):
            raise UserError(
                f"a task asks about {len(continuation)} tokens at once, more than the {self.max_length} there is room for"
            )
        return context[over:], continuation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, window after window, each token with as much before it as there is room for."""
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            tokens = self.tok_encode(text)
            found = (
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
            windows += [(None, context, continuation) for context, continuation in found]
            counts.append(len(found))
        answers = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        sums = [sum(value for value, _ in itertools.islice(answers, count)) for count in counts]
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each prompt, greedy, up to the task's stop texts."""
        asked = [self._asked(*request.args) for request in requests]
        written = [""] * len(asked)
        order = sorted(
            range(len(asked)), key=lambda i: (-len(asked[i].ids or ()), asked[i].tokens, asked[i].stop)
        )
        with tqdm(total=len(order), desc="answers", unit="request", disable=disable_tqdm or None) as bar:
            for places in _filled(
                order, [len(one.ids or ()) + one.tokens for one in asked], self.batch_tokens
            ):
                for place, done in self.backend_.generate([asked[i] for i in places]):
                    i = places[place]
                    written[i] = postprocess_generated_text(done.text, list(asked[i].stop), None)
                    if done.answered:
                        self.cache_hook.add_partial("generate_until", requests[i].args, written[i])
                    else:
                        self._notes[REFUSED + hash_args("generate_until", requests[i].args)] = done.finish
                        self.unanswered += 1
                    bar.update(1)
        return written

    def _asked(self, prompt: str, settings: dict[str, Any]) -> Request:
        kwargs = normalize_gen_kwargs(settings, GENERATED)
        if kwargs.get("do_sample") or kwargs.get("temperature"):
            raise UserError(
                "a task asks for sampled answers (do_sample, temperature); only greedy ones are written here"
            )
        stop = handle_stop_sequences(
            kwargs.get("until"), eos=self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        )
        tokens = self.tok_encode(prompt)
        if self.max_length is not None:
            room = self.max_length - kwargs["max_gen_toks"]
            if room < 1:
                raise UserError(
                    f"a task asks for {kwargs['max_gen_toks']} tokens of answer, but prompt and answer together may have {self.max_length}: "
                    "the model's positions, or --max-length"
                )
            if len(tokens) > room:
                tokens = tokens[-room:]
                self._notes[CUT + hash_args("", (prompt, settings))] = True
        return Request(
            id="", ids=tokens, tokens=kwargs["max_gen_toks"], stop=tuple(text for text in stop if text)
        )


def _slices(places: list[int], size: int) -> Iterator[list[int]]:
    for first in range(0, len(places), size):
        yield places[first : first + size]


def _filled(places: list[int], sizes: list[int], most: int) -> Iterator[list[int]]:
    """`places` in groups of at most so many tokens together; at least one a group."""
    group: list[int] = []
    for place in places:
        if group and sum(sizes[i] for i in group) + sizes[place] > most:
            yield group
            group = []
        group.append(place)
    if group:
        yield group
