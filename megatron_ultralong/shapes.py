"""Shapes of published models by their Hugging Face names, to plan a run before its weights are
downloaded."""

from __future__ import annotations

from megatron_ultralong.config import Model


def _llama_3(hidden_size: int, ffn_size: int, layers: int, heads: int, tied: bool = False) -> Model:
    """A Llama 3, 3.1, 3.2 or 3.3: 8 KV heads of 64 or 128."""
    return Model(
        hidden_size=hidden_size,
        ffn_size=ffn_size,
        layers=layers,
        heads=heads,
        kv_heads=8,
        head_dim=hidden_size // heads,
        vocab_size=128256,
        tied_embeddings=tied,
    )


LLAMA_3_1_8B = _llama_3(4096, 14336, layers=32, heads=32)
LLAMA_3_1_70B = _llama_3(8192, 28672, layers=80, heads=64)
SMOLLM2_135M = Model(
    hidden_size=576,
    ffn_size=1536,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    tied_embeddings=True,
)
MISTRAL_7B = Model(
    hidden_size=4096,
    ffn_size=14336,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocab_size=32768,
    family="mistral",
)
QWEN2_5_7B = Model(
    hidden_size=3584,
    ffn_size=18944,
    layers=28,
    heads=28,
    kv_heads=4,
    head_dim=128,
    vocab_size=152064,
    norm_eps=1e-6,
    family="qwen2",
    qkv_bias=True,
)
QWEN3_8B = Model(
    hidden_size=4096,
    ffn_size=12288,
    layers=36,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocab_size=151936,
    norm_eps=1e-6,
    family="qwen3",
    qk_norm=True,
)
QWEN3_0_6B = Model(
    hidden_size=1024,
    ffn_size=3072,
    layers=28,
    heads=16,
    kv_heads=8,
    head_dim=128,
    vocab_size=151936,
    norm_eps=1e-6,
    tied_embeddings=True,
    family="qwen3",
    qk_norm=True,
)

SHAPES = {
    "meta-llama/Meta-Llama-3-8B-Instruct": LLAMA_3_1_8B,  # Llama-3 has the same shape
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_3_1_8B,
    "meta-llama/Llama-3.1-70B-Instruct": LLAMA_3_1_70B,
    "meta-llama/Llama-3.1-405B-Instruct": _llama_3(16384, 53248, layers=126, heads=128),
    "meta-llama/Llama-3.2-1B-Instruct": _llama_3(2048, 8192, layers=16, heads=32, tied=True),
    "meta-llama/Llama-3.2-3B-Instruct": _llama_3(3072, 8192, layers=28, heads=24, tied=True),
    "meta-llama/Llama-3.3-70B-Instruct": LLAMA_3_1_70B,
    "HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM2_135M,
    "mistralai/Mistral-7B-Instruct-v0.3": MISTRAL_7B,
    "Qwen/Qwen2.5-7B-Instruct": QWEN2_5_7B,
    "Qwen/Qwen3-0.6B": QWEN3_0_6B,
    "Qwen/Qwen3-8B": QWEN3_8B,
}
