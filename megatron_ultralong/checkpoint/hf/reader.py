"""Reading the weights of a Hugging Face Llama directory in place: safetensors, slice by slice.

Names, shapes and dtypes of all tensors are checked from the files' headers before any weight is read.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from megatron_ultralong.checkpoint.hf import assets, dtypes, weight_files
from megatron_ultralong.config import Model
from megatron_ultralong.errors import UserError
from megatron_ultralong.io.progress import counted
from megatron_ultralong.model import weight_mapping
from megatron_ultralong.model.weight_mapping import HF_EMBEDDING, HF_OUTPUT
from megatron_ultralong.runtime import agreement

_IGNORED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")  # old transformers' buffer; config.json counts

_LAYER = re.compile(r"\.\d+(?=\.)")


def load_parameters(
    folder: Path | str,
    model: Model,
    parameters: Mapping[str, Tensor],
    tp_rank: int,
    tp_size: int,
    group: Any = None,
) -> None:
    """Fill Megatron `parameters` (name with global layer number -> this rank's shard, any float dtype and
    device) in place.

    Only the slices these shards need are read. With `group`, a torch process group of ranks that hold the
    same shards (those of data and context parallelism), its first rank reads and broadcasts; all of them must
    pass the same names in the same order. UserError for weights that do not fit `model`, on all ranks of the
    group where the headers show it.
    """
    if group is not None and torch.distributed.get_world_size(group) == 1:
        group = None
    reader: HFReader | None
    if group is None:
        reader, source = HFReader(folder, model), None
    else:
        reads = torch.distributed.get_rank(group) == 0
        reader = agreement.on_every_rank(lambda: HFReader(folder, model) if reads else None, group)
        source = torch.distributed.get_global_rank(group, 0)
    is_main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if reader is not None and is_main:
        for line in reader.notes():
            print(f"note: {line}", file=sys.stderr, flush=True)
    for name, parameter in counted(parameters.items(), "reading weights", "tensor", hidden=not is_main):
        with torch.no_grad():
            if reader is not None:
                parameter.copy_(reader.shard(name, tp_rank, tp_size, parameter.dtype))
            if group is not None:
                torch.distributed.broadcast(parameter.detach(), src=source, group=group)
    if reader is not None:
        reader.close()


class HFReader:
    """The safetensors files of an HF Llama directory, checked against a model's shape and open for reading
    slices.

    UserError names the tensor or file: a shard that is missing or damaged, a tensor that is missing, extra,
    of a wrong shape or quantised. Ignored are `rotary_emb.inv_freq` and, in a tied model, an `lm_head.weight`
    equal to the embedding.
    """

    def __init__(self, folder: Path | str, model: Model) -> None:
        self.folder, self.model = Path(folder), model
        self._open: dict[Path, Any] = {}
        self._files = weight_files.tensor_files(self.folder, self._open)  # tensor name -> file
        self._check()

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        """Read one HF tensor, or the block `index` of it: CPU, dtype as stored; it may share the file's
        memory map."""
        try:
            stored = self._slice(name)
            return stored[index or tuple(slice(0, size) for size in stored.get_shape())]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._files[name]}: {name} cannot be read: {error}") from None

    def shard(
        self, name: str, tp_rank: int, tp_size: int, dtype: torch.dtype, vocab_rows: int | None = None
    ) -> Tensor:
        """Read Megatron parameter `name` on `tp_rank` of `tp_size`: CPU, in `dtype`. vocab_rows: as in
        `weight_mapping.shard_shape`."""
        shape = weight_mapping.shard_shape(name, self.model, tp_size, vocab_rows)
        shard = torch.zeros(shape, dtype=dtype, device="cpu")
        for piece in weight_mapping.pieces(name, self.model, tp_rank, tp_size, vocab_rows):
            block = self.read(piece.hf, piece.source)
            if self.model.tied_embeddings and piece.hf == HF_EMBEDDING and HF_OUTPUT in self._files:
                self._check_tied(block, piece.source)
            shard[piece.target] = dtypes.converted(block, dtype, piece.hf)
        return shard

    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtype of every Megatron parameter of the model: that of the tensors it is made of, over all layers;
        where they differ, the one that represents all of their values exactly."""
        stored: dict[str, list[torch.dtype]] = {}  # Megatron has one tensor for all layers
        names = {name: _LAYER.sub("", name) for name in weight_mapping.megatron_names(self.model)}
        for name, stacked in names.items():
            for hf in weight_mapping.hf_names(name, self.model):
                stored.setdefault(stacked, []).append(dtypes.SAFETENSORS[self._slice(hf).get_dtype()])
        return {name: dtypes.common(stored[stacked]) for name, stacked in names.items()}

    def notes(self) -> list[str]:
        """What a user should know about the directory, in lines."""
        tokenizer = assets.tokenizer_note(self.folder, self.model.vocab_size)
        return [*weight_files.notes(self.folder), *tokenizer]

    def close(self) -> None:
        """Close the files; tensors already read stay valid."""
        self._open.clear()

    def _slice(self, name: str) -> Any:
        return self._open[self._files[name]].get_slice(name)

    def _check(self) -> None:
        expected = weight_mapping.hf_shapes(self.model)
        missing = [name for name in expected if name not in self._files]
        if missing:
            hint = (
                "; if the embeddings are tied, config.json lacks tie_word_embeddings"
                if missing == [HF_OUTPUT]
                else weight_files.hint(expected, self._files)
            )
            raise UserError(f"{self.folder}: tensor {missing[0]} is missing{_more(missing)}{hint}")
        if self.model.tied_embeddings and HF_OUTPUT in self._files:
            expected[HF_OUTPUT] = expected[HF_EMBEDDING]
        extra = [name for name in self._files if name not in expected and not _IGNORED.fullmatch(name)]
        if extra:
            raise UserError(
                f"{self._files[extra[0]]}: unexpected tensor {extra[0]}{_more(extra)}; "
                f"the Llama of config.json does not have it{weight_files.hint(expected, self._files)}"
            )
        for name, shape in expected.items():
            file, stored = self._files[name], self._slice(name)
            if tuple(stored.get_shape()) != shape:
                raise UserError(
                    f"{file}: {name} has shape {list(stored.get_shape())}, but config.json implies {list(shape)}"
                )
            if stored.get_dtype() not in dtypes.SAFETENSORS:
                raise UserError(
                    f"{file}: {name} is stored as {stored.get_dtype()}; "
                    f"only float weights ({', '.join(dtypes.SAFETENSORS)}) are supported"
                )

    def _check_tied(self, embedding: Tensor, index: tuple[slice, ...]) -> None:
        if not torch.equal(embedding, self.read(HF_OUTPUT, index)):
            raise UserError(
                f"{self._files[HF_OUTPUT]}: {HF_OUTPUT} differs from {HF_EMBEDDING}, but config.json says "
                "tie_word_embeddings; set that to false, or remove the tensor"
            )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
