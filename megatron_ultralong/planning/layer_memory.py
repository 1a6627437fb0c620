"""Bytes that the layer being computed holds on a GPU, beyond what is saved for the backward.

Each figure is the sum of the tensors that exist at the same time, at the points where that sum is largest
(docs/plan.md). For memory.recompute=all_but_attention, tests/distributed/test_planned_memory.py checks them
against counted tensors, and tests/null_gpu/check_memory.py everything, kernels included, against PyTorch's
allocator.

Letters as in planning/memory.py, on one rank: n tokens (b s), c of them per chunk; `hidden`, `q`, `kv` are
elements per token of the hidden states, the queries, and the keys (or values), divided by TP. All-to-all runs
over U ranks, a ring or all-gather over R = CP/U.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_ultralong import lora
from megatron_ultralong.config import KEY_BLOCK, Model, Run
from megatron_ultralong.context_parallel.attention_spec import Backend
from megatron_ultralong.context_parallel.kernels.varlen import TOKENS_PER_DOCUMENT


class LayerShape(NamedTuple):
    """Sizes of a layer on one rank."""

    tokens: int
    chunk: int
    e: int
    hidden: int
    q: int
    kv: int
    kv_inside: int
    """Like `kv`, after an all-to-all that sends KV heads to more than one rank."""
    heads: int
    mlp: int
    ring: int
    """R."""
    backend: Backend
    """The kernel that computes the backward."""
    deterministic: bool
    documents: bool
    """Many documents in one call."""

    @classmethod
    def of(cls, run: Run, model: Model, backend: Backend = "cudnn") -> LayerShape:
        p, m = run.parallel, run.memory
        tokens = run.train.micro_batch * run.train.seq_length // p.cp
        kv_heads = model.kv_heads // p.tp
        return cls(
            tokens=tokens,
            chunk=min(m.layer_chunk or tokens, tokens) if m.recompute == "all_but_attention" else tokens,
            e=2 if run.train.precision == "bf16" else 4,
            hidden=model.hidden_size // p.tp,
            q=model.heads // p.tp * model.head_dim,
            kv=kv_heads * model.head_dim,
            kv_inside=max(kv_heads, p.ulysses) * model.head_dim,
            heads=model.heads // p.tp,
            mlp=model.ffn_size // p.tp,
            ring=p.cp // p.ulysses,
            backend=backend_of(run, model, backend),
            deterministic=run.train.deterministic,
            documents=run.data.documents == "masked",
        )


def backend_of(run: Run, model: Model, backend: Backend) -> Backend:
    """Return the backend that a run uses where `backend` is the GPU's: FlashAttention-2 in place of cuDNN for
    what context_parallel/kernels/select.py does not give to cuDNN. A run that names its kernel uses that."""
    asked = run.runtime.attention_backend
    if asked in ("flash", "flash3", "flash4"):
        return asked
    masked, wide = run.data.documents == "masked", model.head_dim > 128
    return "flash" if backend == "cudnn" and (run.train.deterministic or masked or wide) else backend


def peak_bytes(run: Run, model: Model, backend: Backend) -> int:
    """Return the bytes that the layer being computed holds at its peak, weight gradients of a chunk
    included."""
    if run.memory.recompute != "all_but_attention":
        return max(_autograd_phase_bytes(run, model, backend).values())
    return max(phase_bytes(run, model, backend).values()) + weight_gradient_bytes(run, model)


def weight_gradient_bytes(run: Run, model: Model) -> int:
    """Return the bytes of a layer's weight gradients of one chunk and, if there are several chunks, their
    sums."""
    x = LayerShape.of(run, model)
    weights = x.hidden * (2 * x.q + 2 * x.kv + 3 * x.mlp) * run.parallel.tp
    if run.lora.rank:
        weights = lora.parameters(model, run.lora, run.parallel.tp)
    return weights * (x.e + (4 if x.chunk < x.tokens else 0))


def phase_bytes(run: Run, model: Model, backend: Backend) -> dict[str, int]:
    """Return the bytes held in each phase of a layer with memory.recompute=all_but_attention.

    Weight gradients are not included.
    """
    assert run.memory.offload != "auto", "settle_offload comes first"
    x, p = LayerShape.of(run, model, backend), run.parallel
    hidden, qkv = x.tokens * x.hidden * x.e, x.tokens * (x.q + 2 * x.kv) * x.e
    # A gradient that a pipeline stage received exists alongside that of the layer's input; any other is
    # overwritten by it in place.
    gradients = hidden * (2 if p.pp > 1 else 1)
    # Gate and up, the gradient of their product, and those of gate and up; norms and residuals. Gathered over
    # TP: a linear's input, and its gradient before it is scattered.
    # The input of an adapter of the MLP's second linear is kept for its gradient.
    widths = 6 if run.lora.rank and "down_proj" in run.lora.targets else 5
    mlp = x.chunk * (widths * x.mlp + 6 * x.hidden + (2 * model.hidden_size if p.tp > 1 else 0)) * x.e
    # Gate and up and their product, or gate and up without and with their biases, or what adapters add.
    adapted = run.lora.rank and {"gate_proj", "up_proj"} & set(run.lora.targets)
    widths = 4 if model.mlp_bias or adapted else 3
    mlp_forward = x.chunk * (widths * x.mlp + 3 * x.hidden + (model.hidden_size if p.tp > 1 else 0)) * x.e
    if run.memory.query_chunks:
        kv = x.tokens * 2 * x.kv
        # Two buffers of keys and values for the ring, and a second one for the sums of their gradients. Where
        # documents are placed one more of each: what is sent, and gradients that come back.
        placed = x.documents and x.ring > 1
        ring = kv * (3 if placed else 2) * x.e if x.ring > 1 else 0
        forward = kv * x.e + hidden * (1 if run.memory.offload == "off" else 2)
        backward = kv * (x.e + 4) + gradients
        # Of one chunk: queries and the keys and values projected with them, output, its gradient, the
        # queries' gradient twice in e and once in float32; the layer input, and what is copied from or to the
        # host.
        chunk_tensors = x.chunk * (3 * x.hidden * x.e + (5 * x.q + 2 * x.kv) * x.e + 4 * x.q)
        kv_gradients = 2 * x.kv * (x.tokens if x.ring > 1 else min(KEY_BLOCK, x.tokens)) * x.e
        mlp_input = x.chunk * (2 * x.hidden + x.q) * x.e
        return {
            "forward, attention": forward + ring + chunk_tensors,
            "forward, MLP": forward + mlp_input + mlp_forward,
            "backward, MLP": backward + mlp_input + mlp,
            "backward, attention": backward
            + chunk_tensors
            + kv_gradients
            + ring
            + (kv * (8 if placed else 4) if ring else 0)
            + _kernel_workspace(x, x.chunk, min(KEY_BLOCK, x.tokens)),
        }
    # In the forward, this layer's own input, output and logsumexp: the two offloaded layers counted under
    # "saved activations" are other layers.
    own = {"off": 0, "layer_inputs": hidden, "all": hidden + x.tokens * (x.q * x.e + 4 * x.heads)}[
        run.memory.offload
    ]
    out = x.tokens * x.q * x.e
    return {
        "forward, attention": own + qkv + _attention_forward_bytes(run, model, x),
        "forward, MLP": own + hidden + mlp_forward,
        "backward, MLP": gradients + out + mlp,
        "backward, attention": gradients + out + qkv + _attention_backward_bytes(run, model, x),
    }


def attention_workspace_bytes(run: Run, model: Model, backend: Backend) -> int:
    """Return the bytes of one layer's attention in the backward beyond its inputs and the gradients it
    returns."""
    x = LayerShape.of(run, model, backend)
    return _attention_backward_bytes(run, model, x) - x.tokens * (x.q + 2 * x.kv) * x.e


def _kernel_workspace(x: LayerShape, queries: int, keys: int, share: int = 1) -> int:
    """Bytes that a backward kernel allocates beyond the gradients it returns, for one of `share` equal parts
    of the heads.

    The gradient of the queries in float32, in FlashAttention-2 and in cuDNN, and what is added here. Not
    counted is what cuDNN's engines allocate themselves.
    """
    workspace = queries * x.q * 4
    if x.backend in ("flash3", "flash4"):
        # The logsumexp and the row sums of dO O; with fewer KV heads dK and dV in float32.
        workspace += queries * 2 * x.heads * 4
        if x.q != x.kv_inside:
            workspace += keys * 2 * x.kv_inside * 4
        if x.documents:
            # Padding, as below, and a counter for every 64 queries of the longest document, in each document.
            documents = max(queries // TOKENS_PER_DOCUMENT, 1)
            workspace += workspace // 8 + queries // 64 * documents * x.heads * 4
    elif x.backend == "flash":
        if x.documents and not x.deterministic:
            workspace += workspace // 8  # padding of documents: kernels/varlen.py
        if x.q != x.kv_inside:
            workspace += keys * 2 * x.q * x.e  # gradients of keys and values for every query head
        if x.deterministic:
            # By blocks of queries: the sums of the gradients of keys and values (kernels/deterministic.py).
            workspace += keys * 2 * x.kv_inside * 4
    return workspace // share


def _attention_forward_bytes(run: Run, model: Model, x: LayerShape) -> int:
    """Bytes of attention in the forward beyond q, k and v, and beyond its output where that is saved."""
    inside, received = x.tokens * (x.q + 2 * x.kv_inside) * x.e, x.tokens * x.q * x.e
    if x.ring == 1:
        partial = 0
    elif run.parallel.cp_comm_type == "all_gather":
        # The output in float32 and a partial output; one KV head of the whole sequence, twice.
        partial = x.tokens * x.q * (4 + x.e) + 2 * _kv_head_bytes(run, model, x.e)
    else:
        # The same outputs, and two KV buffers; where documents are placed one more, of what is sent.
        partial = x.tokens * (x.q * (4 + x.e) + (6 if x.documents else 4) * x.kv_inside * x.e)
    if run.parallel.ulysses == 1:
        return partial
    # Sent, received and reordered; then attention on the received heads, its output, and that sent and
    # received.
    return max(
        3 * inside,
        inside + max(partial + (received if x.ring > 1 else 0), received),
        inside + 3 * received,
    )


def _attention_backward_bytes(run: Run, model: Model, x: LayerShape) -> int:
    """Bytes of attention in the backward beyond q, k, v, the output and its gradient."""
    gradients = x.tokens * (x.q + 2 * x.kv_inside) * x.e
    own_keys = _kernel_workspace(x, x.tokens, x.tokens)
    if x.documents and x.deterministic:
        # Documents one by one, whose gradients are copied to the row's. Lengths are not known here; an
        # average of none and almost all of the row keeps plans of both within 10%.
        own_keys += gradients // 5
    if x.ring == 1:
        attention = gradients + own_keys
    else:
        # The gradients of this rank's own block in e, then summed in float32.
        float32_gradients = x.tokens * (x.q + 2 * x.kv_inside) * 4
        if run.parallel.cp_comm_type == "all_gather":
            heads = x.kv_inside // model.head_dim
            kv_head, float32_kv_head = (_kv_head_bytes(run, model, size) for size in (x.e, 4))
            attention = max(
                gradients + 2 * kv_head + own_keys,
                float32_gradients + gradients + 2 * max(kv_head, float32_kv_head),
                # Keys and values of one head, their float32 gradients twice, and those of a block in e.
                float32_gradients
                + x.tokens * x.q // heads * x.e
                + 3 * kv_head
                + 2 * float32_kv_head
                + _kernel_workspace(x, x.tokens, x.tokens * x.ring, heads),
            )
        else:
            # Two buffers of keys and values, a second one of their gradients, and one hop's gradients; where
            # documents are placed one more of each.
            buffers = 3 if x.documents else 2
            attention = (
                gradients
                + float32_gradients
                + x.tokens * (buffers * 2 * x.kv_inside * x.e + (buffers - 1) * 2 * x.kv_inside * 4)
                + own_keys
            )
        if x.backend == "flash" and run.train.micro_batch > 1:
            attention += x.tokens * 2 * x.q * x.e  # the output and its gradient in the kernel's own layout
    if run.parallel.ulysses == 1:
        return attention
    inside = x.tokens * (3 * x.q + 2 * x.kv_inside) * x.e
    return max(3 * inside, inside + attention, inside + 3 * gradients)


def _kv_head_bytes(run: Run, model: Model, size: int) -> int:
    """Bytes of one KV head (keys and values) of the whole sequence, `size` bytes per element."""
    return 2 * run.train.micro_batch * run.train.seq_length * model.head_dim * size


def _autograd_phase_bytes(run: Run, model: Model, backend: Backend) -> dict[str, int]:
    """Bytes of the recompute (if any) and the backward of a layer through autograd, all tokens at once."""
    x = LayerShape.of(run, model, backend)
    # What autograd saved of attention: the projection, q and k rotated, the output and its logsumexp. Before
    # it the first norm's output.
    attention = (x.hidden + 3 * x.q + 3 * x.kv) * x.e + 4 * x.heads
    if model.qk_norm:
        attention += 4 * (x.q + x.kv) // model.head_dim  # 1 / rms of each head
    # After it the second norm's input and output, gate and up, the gradient of their product, which itself
    # has been freed, and those of gate and up.
    mlp = (2 * x.hidden + 5 * x.mlp) * x.e
    # The gradient of the layer's output; where the layer is computed again, its output, otherwise its input.
    ends = 2 * x.hidden * x.e
    # With sequence parallelism a linear's input is gathered over TP, and so is its gradient before it is
    # scattered.
    gathered = 2 * model.hidden_size * x.e if run.parallel.tp > 1 else 0
    in_attention = (attention + ends + gathered + (x.hidden + x.q) * x.e) * x.tokens
    return {
        "backward, MLP": (attention + mlp + ends + gathered) * x.tokens,
        "backward, attention": in_attention + _attention_backward_bytes(run, model, x),
    }
