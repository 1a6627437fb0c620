"""A tokenizer of bytes and a model that is a function, for benchmarks whose questions come from files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_ultralong.evaluate.backends.protocol import Completion, GenerationRequest

CHAT = "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content | trim }}<|end|>{% endfor %}<|assistant|>"
SPECIAL = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"]


def byte_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, and four special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    made.add_special_tokens(SPECIAL)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|begin|>", eos_token="<|end|>")
    tokenizer.chat_template = CHAT if chat else None
    return tokenizer


class Answering:
    """A backend that answers a prompt by `answer`; stops the process after `dies_after` answers as a kill
    would (KeyboardInterrupt); refuses prompts that contain `refuses`, as an endpoint would."""

    def __init__(
        self,
        answer: Callable[[str], str],
        *,
        chat: bool = False,
        name: str = "one",
        max_position: int | None = None,
        dies_after: int | None = None,
        refuses: str | None = None,
    ) -> None:
        self.tokenizer, self.answer, self.name, self.max_position, self.dies_after = (
            byte_tokenizer(chat),
            answer,
            name,
            max_position,
            dies_after,
        )
        self.refuses = refuses
        self.prompts: list[str] = []
        self.sizes: list[int] = []

    chat = "auto"

    def check(self, length: int, batch: int) -> None:
        pass

    def close(self) -> None:
        pass

    def generate(self, requests: Sequence[GenerationRequest]) -> Iterator[tuple[int, Completion]]:
        for place, request in enumerate(requests):
            if self.dies_after is not None and len(self.prompts) >= self.dies_after:
                raise KeyboardInterrupt
            assert request.ids is not None
            prompt = self.tokenizer.decode(request.ids)
            self.prompts.append(prompt)
            self.sizes.append(len(request.ids) + request.max_tokens)
            if self.refuses is not None and self.refuses in prompt:
                yield (
                    place,
                    Completion(
                        text="",
                        tokens_in=0,
                        tokens_out=0,
                        finish=f"HTTP 400: {len(prompt)} tokens are too many",
                    ),
                )
                continue
            written = self.tokenizer.encode(self.answer(prompt))[: request.max_tokens]
            yield (
                place,
                Completion(
                    text=self.tokenizer.decode(written, skip_special_tokens=True),
                    tokens_in=len(request.ids),
                    tokens_out=len(written),
                    finish="stop",
                ),
            )

    def describe(self) -> dict:
        return {"path": self.name, "max_position": self.max_position}
