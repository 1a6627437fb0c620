"""Memory of a run before it is launched: bytes on one GPU, part by part, from formulas.

Plain sums of what the run's tensors must hold; the allocator's fragmentation and NCCL's buffers come on top, for which `fits`
leaves a tenth of the GPU free.

Letters: S tokens a sequence, s = S/CP, b micro-batch, H hidden size, F MLP width, V vocabulary padded to TP, h query heads,
g KV heads, d head dimension, e bytes of a bf16 or float32 element.
"""

from __future__ import annotations

from megatron_ultralong.checkpoint.mapping import padded_vocab_size
from megatron_ultralong.config import Model, Run, check_model_layout


def memory(run: Run, model: Model, world_size: int) -> dict[str, int]:
    """Bytes by part on a GPU of the fullest pipeline stage, of `run` with `model`'s shape on `world_size` ranks.

    Raises UserError where model, batch or ranks cannot be split as `run.parallel` says.
    """
    check_model_layout(model, run.parallel)
    dp = run.parallel.data_parallel(world_size)
    micro_batches = run.micro_batches(dp)
    stages = [_stage(run, model, dp, micro_batches, stage) for stage in sorted({0, run.parallel.pp - 1})]
    return max(stages, key=total)


def total(parts: dict[str, int]) -> int:
    """Bytes of all parts together."""
    return sum(parts.values())


def fits(parts: dict[str, int], gpu_bytes: int) -> bool:
    """Whether `parts` fit a GPU of `gpu_bytes`, a tenth of it left for fragmentation and communication buffers."""
    return total(parts) <= 0.9 * gpu_bytes


def stage_parameters(model: Model, tp: int, pp: int, stage: int) -> int:
    """Parameters on one rank of pipeline stage `stage` (0 is the first)."""
    h, f, v = model.hidden_size, model.ffn_size, padded_vocab_size(model.vocab_size, tp)
    attention = h * model.head_dim * (model.heads + 2 * model.kv_heads) + model.heads * model.head_dim * h
    count = model.layers // pp * ((attention + 3 * h * f) // tp + 2 * h)
    first, last = stage == 0, stage == pp - 1
    # A tied embedding lies on the first and the last stage: once where those are one.
    embeddings = first + last - (1 if first and last and model.tied_embeddings else 0)
    return count + embeddings * v * h // tp + (h if last else 0)


def _stage(run: Run, model: Model, dp: int, micro_batches: int, stage: int) -> dict[str, int]:
    p, b = run.parallel, run.train.micro_batch
    e = 2 if run.train.precision == "bf16" else 4
    tokens = b * run.train.seq_length // p.cp  # of this context parallel rank, b * s
    parameters = stage_parameters(model, p.tp, p.pp, stage)
    layers = model.layers // p.pp
    layer = _layer(model, p.tp, p.cp, tokens, e)
    parts = {
        "weights": parameters * e,
        "gradients (fp32)": parameters * 4,
        # AdamW's two moments, and in bf16 runs the fp32 master weights, spread over data and context parallel ranks.
        "optimizer (fp32)": parameters * (12 if e == 2 else 8) // (dp * p.cp),
        "layer checkpoints": 0,
        "one layer at work": sum(layer.values()),
        "RoPE tables": tokens // b * model.head_dim * 4,  # cos and sin, float32 [s, d/2] each
    }
    in_flight = _micro_batches_in_flight(p.pp, p.vpp, micro_batches, stage)
    if run.memory.checkpoint != "none":
        kept = model.hidden_size * e  # a layer's input, of a token
        if run.memory.checkpoint == "attention":
            kept += model.heads * (model.head_dim * e + 4)  # attention output and logsumexp
        parts["layer checkpoints"] = layers * tokens // p.tp * kept * in_flight // p.vpp
    else:
        parts["one layer at work"] += (layers * in_flight // p.vpp - 1) * (layer["attention"] + layer["mlp"] + layer["residual"])
    if stage == p.pp - 1:
        rows = padded_vocab_size(model.vocab_size, p.tp) // p.tp
        chunk = min(run.memory.loss_chunk or tokens, tokens)
        # Logits in e and in float32 and their gradient in e; the output weight's gradient in float32; the hidden states' gradient.
        parts["loss"] = chunk * rows * (2 * e + 4) + rows * model.hidden_size * 4 + tokens // p.tp * model.hidden_size * e
    return parts


def _layer(model: Model, tp: int, cp: int, tokens: int, e: int) -> dict[str, int]:
    """Bytes that recompute and backward of one layer hold at once, for `tokens` tokens of a context parallel rank."""
    q, kv = model.heads * model.head_dim // tp, model.kv_heads * model.head_dim // tp  # elements a token
    attention = (q + 2 * kv) * e           # q, k, v out of the projection
    attention += (q + kv) * e + 2 * q * e  # q and k rotated; the output and its gradient
    attention += (q + 2 * kv) * 4          # dq, dk, dv, float32
    ring = 2 * 2 * kv * (e + 4) if cp > 1 else 0  # two buffers each of k, v in e and of dk, dv in float32
    mlp = 3 * model.ffn_size // tp * e + 2 * model.ffn_size // tp * e  # gate, up and their product; the gradients of gate and up
    # With sequence parallelism a linear's input is gathered over TP, and so is its gradient before it is scattered.
    gathered = 2 * model.hidden_size * e if tp > 1 else 0
    residual = 4 * model.hidden_size // tp * e  # the layer's input, both norms' outputs, the gradient
    return {name: size * tokens for name, size in
            {"attention": attention, "ring": ring, "mlp": mlp, "gathered": gathered, "residual": residual}.items()}


def _micro_batches_in_flight(pp: int, vpp: int, micro_batches: int, stage: int) -> int:
    """Forward passes (of a model chunk) whose backward is still to come, at most, in 1F1B and interleaved 1F1B."""
    if vpp == 1:
        return min(pp - stage, micro_batches)
    return min(2 * (pp - stage - 1) + (vpp - 1) * pp + 1, micro_batches * vpp)

