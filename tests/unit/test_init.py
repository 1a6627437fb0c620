"""First weights: a function of the seed and the tensor's name alone, whatever the layout."""

from __future__ import annotations

import math

import torch

from megatron_ultralong.config import Model
from megatron_ultralong.model import init, weight_mapping

MODEL = Model(hidden_size=64, ffn_size=96, layers=2, heads=4, kv_heads=2, head_dim=16, vocab_size=97)


def weights(seed: int, tp_rank: int = 0, tp: int = 1) -> dict[str, torch.Tensor]:
    found = {
        name: torch.nn.Parameter(torch.full(weight_mapping.shard_shape(name, MODEL, tp), torch.nan))
        for name in weight_mapping.megatron_names(MODEL)
    }
    init.initialise(found, MODEL, seed, tp_rank, tp)
    return {name: parameter.detach() for name, parameter in found.items()}


def test_seed_and_name_decide() -> None:
    one, again, other = weights(1), weights(1), weights(2)
    matrices = [name for name, tensor in one.items() if tensor.dim() > 1]
    assert len(matrices) > 8 and all(torch.equal(one[name], again[name]) for name in one)
    for name in matrices:
        assert abs(torch.corrcoef(torch.stack([one[name].flatten(), other[name].flatten()]))[0, 1]) < 0.1, (
            "another seed, other weights"
        )
    same_shape = [one[name].flatten()[:900] for name in matrices]
    assert (torch.corrcoef(torch.stack(same_shape)) - torch.eye(len(matrices))).abs().max() < 0.2, (
        "another name, other weights"
    )


def test_sizes_of_first_weights() -> None:
    found = weights(3)
    for name, tensor in found.items():
        if tensor.dim() == 1:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
            continue
        back = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        want = MODEL.init_std / math.sqrt(2 * MODEL.layers) if back else MODEL.init_std
        rows = (
            tensor[: MODEL.vocab_size] if "embedding" in name or "output_layer" in name else tensor
        )  # what follows is padding
        assert abs(float(rows.std()) / want - 1) < 0.1 and abs(float(rows.mean())) < 0.1 * want, name


def test_every_layout_has_the_same_weights() -> None:
    whole, halves = weights(5), [weights(5, rank, 2) for rank in range(2)]
    for name, tensor in whole.items():
        tensors = [part[name] for part in halves]
        if tensor.dim() == 1:
            assert all(torch.equal(part, tensor) for part in tensors)
        elif "proj" in name or "linear_fc2" in name:
            assert torch.equal(torch.cat(tensors, dim=1), tensor), name
        elif "linear_fc1" in name:  # gate and up, each cut
            gates, ups = zip(*(part.chunk(2) for part in tensors), strict=True)
            assert torch.equal(torch.cat([*gates, *ups]), tensor), name
        elif "linear_qkv" in name:
            assert torch.equal(torch.cat(tensors), tensor), name
        else:
            assert torch.equal(torch.cat(tensors)[: MODEL.vocab_size], tensor[: MODEL.vocab_size]), name
