"""Prints what vLLM's rotary classes really use for config.json files, as JSON; run by the client's Python:
probe_vllm.py requests.json.

requests.json as for probe_transformers.py; the server's max_model_len is the largest length of a directory's
requests. For each request: "inv_freq" as `_compute_inv_freq` returned them, divided by the factor of a linear
scaling; "rows": {position: the row of the table of cos and sin that this position uses}, float32;
"max_model_len": the limit of a server that is started without one.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import vllm
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope, phi3_long_rope_scaled_rope
from vllm.transformers_utils.config import get_config


def rotary_of(folder: str, max_model_len: int):
    """The module as LlamaAttention builds it, on a server for `max_model_len` tokens, and its head
    dimension."""
    config = get_config(folder, trust_remote_code=False)
    server = SimpleNamespace(model_config=SimpleNamespace(max_model_len=max_model_len))
    phi3_long_rope_scaled_rope.get_current_vllm_config = lambda: server
    rotary = get_rope(
        config.head_dim,
        max_position=config.max_position_embeddings,
        rope_parameters=config.rope_parameters,
        is_neox_style=True,
        dtype=torch.float32,
    )
    return rotary, config.head_dim


def frequencies(rotary) -> torch.Tensor:
    if hasattr(rotary, "long_factor"):
        return rotary._compute_inv_freq(rotary.long_factor if rotary.use_long_rope else rotary.short_factor)
    if hasattr(rotary, "scaling_factors"):
        return rotary._compute_inv_freq(rotary.base) / rotary.scaling_factors[0]
    if hasattr(rotary, "max_trained_positions"):
        growth = rotary.scaling_factor * rotary.max_position_embeddings / rotary.max_trained_positions
        growth -= rotary.scaling_factor - 1
        return rotary._compute_inv_freq(rotary.base * growth ** (rotary.rotary_dim / (rotary.rotary_dim - 2)))
    yarn = hasattr(rotary, "truncate")
    return rotary._compute_inv_freq(rotary.scaling_factor if yarn else rotary.base)


def rows(rotary, length: int) -> dict[str, list[float]]:
    """The rows of the positions 1, length / 2 and length - 1, where the table has them."""
    offset, cache = 0, getattr(rotary, "cos_sin_cache", None)
    if cache is None:
        cache = rotary.long_short_cos_sin_cache
        offset = rotary.original_max_position_embeddings if rotary.use_long_rope else 0
    positions = [p for p in (1, length // 2, length - 1) if p + offset < len(cache)]
    return {str(p): cache[p + offset].tolist() for p in positions}


def main() -> None:
    results = {}
    with set_current_vllm_config(VllmConfig()):
        for folder, lengths in json.loads(Path(sys.argv[1]).read_text()).items():
            rotary, _ = rotary_of(folder, max(total for _, total in lengths))
            inv_freq = [x.hex() for x in frequencies(rotary).tolist()]
            limit = ModelConfig(
                folder, tokenizer=folder, skip_tokenizer_init=True, dtype="float32"
            ).max_model_len
            results[folder] = [
                {"inv_freq": inv_freq, "rows": rows(rotary, total), "max_model_len": limit}
                for _, total in lengths
            ]
    print(json.dumps({"version": vllm.__version__, "results": results}))


if __name__ == "__main__":
    main()
