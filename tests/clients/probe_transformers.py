"""Prints what transformers' LlamaRotaryEmbedding really uses for config.json files, as JSON; run by the
client's Python: probe_transformers.py requests.json.

requests.json: {"DIR": [[length of the prompt, length of prompt and new tokens], ...]}. For each request: the
frequencies that the keys of the prompt have at the end ("inv_freq", float.hex), and "attention_scaling".
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


def request(folder: str, prompt: int) -> dict:
    rotary = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder))
    rotary(
        torch.zeros(1), torch.tensor([[prompt - 1]])
    )  # the keys of the prompt stay in the cache as they are
    return {
        "inv_freq": [x.hex() for x in rotary.inv_freq.tolist()],
        "attention_scaling": rotary.attention_scaling,
    }


def main() -> None:
    requests = json.loads(Path(sys.argv[1]).read_text())
    results = {
        folder: [request(folder, prompt) for prompt, total in lengths] for folder, lengths in requests.items()
    }
    print(json.dumps({"version": transformers.__version__, "results": results}))


if __name__ == "__main__":
    main()
