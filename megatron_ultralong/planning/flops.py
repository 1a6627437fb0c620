"""FLOPs of a training step, and the peak FLOP/s of GPUs: the two sides of causal MFU."""

from __future__ import annotations

import torch

from megatron_ultralong.config import Model

FORMULA = (
    "causal training FLOPs per token = 6 x (weights of all matrix products) + "
    "6 x layers x heads x head_dim x S; no recompute counted"
)

# Dense bf16 peak of one GPU in FLOP/s, from the vendors' data sheets, without sparsity. The keys are
# substrings of the device name that torch reports; the first match counts.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "GB200": 2500e12,
    "B200": 2250e12,
}


def flops_per_token(model: Model, seq_length: float, *, frozen: bool = False) -> float:
    """Return the forward and backward FLOPs per token of a causal sequence of `seq_length` tokens.

    Attention counts only the lower triangle of the score matrix. frozen: the weights are not trained (LoRA),
    so that their gradients, a third of the matrix products, are not computed; adapters are not counted.
    """
    h, d = model.hidden_size, model.head_dim
    attention = h * d * (model.heads + 2 * model.kv_heads) + model.heads * d * h
    matrices = model.layers * (attention + 3 * h * model.ffn_size) + h * model.vocab_size
    return (4.0 if frozen else 6.0) * matrices + 6.0 * model.layers * model.heads * d * seq_length


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 peak of this GPU in FLOP/s, or None if it is unknown (e.g. a CPU): no MFU is
    printed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)
