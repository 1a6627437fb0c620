"""Ask a chat model a question in plain transformers, without importing megatron_ultralong.

python examples/smollm2/ask.py --model runs/smollm2/12x2K/hf "What is the capital of France?"
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def answer(folder: Path, question: str, tokens: int = 48) -> str:
    """Return the greedy answer of the model in `folder`, at most `tokens` tokens, in float32 on the CPU."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    written = model.generate(
        **prompt, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    return tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question")
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="Hugging Face directory with a chat template"
    )
    args = parser.parse_args()
    logging.disable_progress_bar()
    print(f"{args.question}\n  {answer(args.model, args.question)}")


if __name__ == "__main__":
    main()
