"""Prints what transformers' AutoTokenizer makes of texts and chats, as JSON; run by the client's Python:
probe_tokenizer.py DIR requests.json.

requests.json: {"texts": [...], "chats": [[{"role": ..., "content": ...}, ...], ...]}.
"""

import json
import sys
from pathlib import Path

import transformers
from transformers import AutoTokenizer


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    requests = json.loads(Path(sys.argv[2]).read_text())
    results = {
        "ids": [list(tokenizer(text)["input_ids"]) for text in requests["texts"]],
        "decoded": [tokenizer.decode(tokenizer(text)["input_ids"]) for text in requests["texts"]],
        "chats": [tokenizer.apply_chat_template(chat, tokenize=False) for chat in requests["chats"]],
        "special": [
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.convert_tokens_to_ids("<extra>"),
        ],
        "model_max_length": tokenizer.model_max_length,
    }
    print(json.dumps({"version": transformers.__version__, "results": results}))


if __name__ == "__main__":
    main()
