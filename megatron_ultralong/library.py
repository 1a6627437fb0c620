"""What `import megatron_ultralong` offers in a script or notebook, in one process and without torchrun.

Paths are strings or Paths; lengths are whole numbers of tokens or text like "128K" and "1M" (1024-based). A
mistake of the caller raises UserError, in one line that says what to change.

Shapes: S tokens of the complete sequence, s = S/CP of one context-parallel rank, b sequences, h query heads,
g KV heads, D head dimension.
"""

from __future__ import annotations

import functools
import operator
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_ultralong.command_settings import parse_count
from megatron_ultralong.config import Model
from megatron_ultralong.errors import UserError
from megatron_ultralong.rope.base import Rope

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_ultralong.context_parallel.api import ContextGroups
    from megatron_ultralong.context_parallel.comm import Group
    from megatron_ultralong.context_parallel.placement import Placement
    from megatron_ultralong.evaluate.tasks.niah.prompts import NiahPrompt
    from megatron_ultralong.planning.report import PlanReport

Length = int | str
"""Tokens: 4096, "128K", "1M"."""


# ---- attention ---------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group | ContextGroups = None,
    documents: Sequence[int] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute causal attention of q [b, h, s, D] over k, v [b, g, s, D] of all ranks of `group`; returns [b,
    h, s, D] and is differentiable.

    Ring attention with exact results (Liu et al., arXiv 2310.01889), in the zigzag order, on any device with
    any floating dtype; h is a multiple of g. A rank passes the tokens of `token_positions`, and all ranks
    call it.

    group: a torch ProcessGroup; the group of a virtual rank (`run_virtual`); groups of `split_group`, which
    also exchange heads (Ulysses) or gather keys; None = this process has the whole sequence. documents:
    positions in the sequence at which documents start, the first 0, where attention stays inside documents (b
    = 1). scale: of the logits; None = D ** -0.5.

    Raises ValueError for shapes that do not fit, UserError for heads or documents that do not.
    """
    from megatron_ultralong.context_parallel import api
    from megatron_ultralong.context_parallel.attention_spec import AttentionSpec

    groups = _groups(group)
    placement = None if documents is None else _placement(documents, q.shape[2] * groups.size, groups)
    return api.attention(q, k, v, groups, AttentionSpec(scale=scale, placement=placement))


def token_positions(
    seq_length: Length, group: Group | ContextGroups = None, documents: Sequence[int] | None = None
) -> Tensor:
    """Return the positions of the tokens that this rank of `group` holds in `attention`: int64 [s],
    ascending, on the CPU.

    The sequence is cut into 2 x CP equal chunks, and rank r holds chunks r and 2 x CP - 1 - r (zigzag), so
    that each has the same work; packed documents are placed on ranks by their work. Queries, keys, values,
    labels and RoPE all follow these positions. Arguments as in `attention`. Raises UserError where the
    sequence cannot be divided.
    """
    from megatron_ultralong.context_parallel import zigzag

    groups, length = _groups(group), _tokens(seq_length, "seq_length")
    if documents is None:
        return zigzag.positions(length, groups.rank, groups.size)
    return _placement(documents, length, groups).positions(groups.rank, _ulysses(groups))


def join_shards(
    shards: Sequence[Tensor], dim: int = -2, documents: Sequence[int] | None = None, ulysses: int = 1
) -> Tensor:
    """Return the complete sequence (S along `dim`) from what every rank holds (s along `dim`), in rank order:
    the inverse of indexing with `token_positions`.

    documents as in `attention`; ulysses: ranks that exchange heads, where groups of `split_group` do. Raises
    ValueError where the shards do not fit together.
    """
    import torch

    from megatron_ultralong.context_parallel import zigzag

    if documents is None:
        return zigzag.unshard(shards, dim)
    shapes = [tuple(shard.shape) for shard in shards]
    if len(set(shapes)) != 1 or ulysses < 1 or len(shards) % ulysses:
        raise ValueError(f"shards of shapes {shapes} are not those of one tensor, with ulysses={ulysses}")
    length = sum(shard.shape[dim] for shard in shards)
    placement = _place(_starts(documents), length, len(shards) // ulysses)
    order = torch.cat([placement.positions(rank, ulysses) for rank in range(len(shards))])
    return torch.cat(list(shards), dim).index_select(dim, order.argsort().to(shards[0].device))


def _groups(group: Group | ContextGroups) -> ContextGroups:
    from megatron_ultralong.context_parallel.api import ContextGroups

    return group if isinstance(group, ContextGroups) else ContextGroups(ring=group)


def _ulysses(groups: ContextGroups) -> int:
    from megatron_ultralong.context_parallel.comm import rank_and_size

    return rank_and_size(groups.ulysses)[1]


def _placement(documents: Sequence[int], length: int, groups: ContextGroups) -> Placement:
    return _place(_starts(documents), length, groups.size // _ulysses(groups))


def _starts(documents: Sequence[int]) -> tuple[int, ...]:
    """Plain numbers, by which `_place` finds what it has placed: tensors are equal only to themselves."""
    try:
        return tuple(operator.index(start) for start in documents)
    except TypeError:
        raise UserError(f"documents={documents!r}: expected whole numbers, the positions of starts") from None


@functools.lru_cache(maxsize=16)
def _place(documents: tuple[int, ...], length: int, ranks: int) -> Placement:
    """The layers of a rank share the placement of a row."""
    from megatron_ultralong.context_parallel.placement import place

    return place(documents, length, ranks)


# ---- RoPE --------------------------------------------------------------------------------------


def rope_table(
    source: str | Path | Mapping[str, Any] | Rope,
    positions: Length | Tensor,
    *,
    head_dim: int | None = None,
    length: Length | None = None,
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the rotary embedding: float32 [s, D/2] each, with the attention factor applied,
    on the positions' device.

    Exact at millions of positions: angles are products in float64. Pair i of a head is (x[i], x[i + D/2]), as
    Hugging Face stores q and k; `apply_rope` rotates.

    source: a Hugging Face directory or its config.json, a checkpoint of this project or of Megatron,
    Megatron's arguments or a GGUF file; the contents of a config.json; a transformers config; or a RoPE of
    megatron_ultralong.rope (`YaRN(factor=128.0)`). positions: int64 or float64 [s] in any order, like
    `token_positions`; a length stands for 0 to length - 1. head_dim: D, where the source does not state it.
    length: tokens of the sequence, for methods whose frequencies depend on it (dynamic NTK, LongRoPE); None =
    the original length.

    Raises UserError where the source cannot be read, is not supported, or states no head dimension.
    """
    import torch

    from megatron_ultralong.model.rotary_embedding import cos_sin

    rope, stated = _rope(source)
    size = head_dim or stated
    if size is None:
        raise UserError(f"{type(source).__name__}: the head dimension is not stated; give head_dim")
    tokens = None if length is None else _tokens(length, "length")
    frequencies, attention_factor = rope.inverse_frequencies(size, tokens)
    if not hasattr(positions, "dim"):
        positions = torch.arange(_tokens(positions, "positions"))
    return cos_sin(positions, frequencies, attention_factor)


def read_rope(source: str | Path | Mapping[str, Any]) -> Rope:
    """Return the RoPE settings that `source` states, as in `rope_table`: a frozen dataclass, whose
    `inverse_frequencies(head_dim, length)` are radians per position, and whose `describe()` is one line.
    """
    return _rope(source)[0]


def _rope(source: str | Path | Mapping[str, Any] | Rope) -> tuple[Rope, int | None]:
    """(RoPE, head dimension where it is stated)."""
    from megatron_ultralong.checkpoint.rope_sources import read

    if isinstance(source, Rope):
        return source, None
    if isinstance(source, str | Path):
        first = read.read_source(Path(source))[0]
        return first.rope, first.head_dim
    values = source.to_dict() if hasattr(source, "to_dict") else dict(source)
    first = read.from_config(values, "config")
    return first.rope, first.head_dim


# ---- checkpoints -------------------------------------------------------------------------------


def import_hf(
    hf: str | Path, out: str | Path, *, dtype: Literal["bf16", "fp16", "fp32"] | None = None
) -> Path:
    """Write the Hugging Face directory `hf` as a sharded checkpoint in the new run directory `out`, and
    return the latter. Training also reads the directory in place, without this step.

    dtype: of the weights; None = each tensor's own. Works in a process of its own, on the CPU, a few tensors
    at a time. Raises UserError where `hf` is no complete model of a supported family, or `out` is in use.
    """
    return _convert("import", "--load-hf", hf, out, dtype)


def export_hf(
    checkpoint: str | Path, out: str | Path, *, dtype: Literal["bf16", "fp16", "fp32"] | None = None
) -> Path:
    """Write a checkpoint (a run directory, of which the newest iteration counts, or one iteration) as the new
    Hugging Face directory `out`, which transformers and vLLM load, and return it.

    dtype and process as in `import_hf`. Raises UserError where the checkpoint is damaged or contains adapters
    only, config.json cannot express its RoPE, or `out` is in use; `out` then does not exist.
    """
    return _convert("export", "--load", checkpoint, out, dtype)


def _convert(command: str, option: str, source: str | Path, out: str | Path, dtype: str | None) -> Path:
    """Run the command `convert` as a process: a conversion makes the CPU Megatron's device for the rest of
    its process."""
    # In one word each: a path may begin with a hyphen.
    arguments = [command, f"{option}={os.fspath(source)}", f"--output={os.fspath(out)}"]
    arguments += [f"--dtype={dtype}"] if dtype else []
    environment = {
        name: value
        for name, value in os.environ.items()
        # It is one rank, also where its caller is one of several.
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        and not name.startswith("TORCHELASTIC")
    }
    # From where this package is, also if only sys.path of this process says so.
    code = f"import sys; sys.path.append({str(Path(__file__).parents[1])!r}); "
    code += "from megatron_ultralong.commands.main import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", code, "convert", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    if ended.returncode == 2:
        line = ended.stderr.strip().splitlines()[-1]
        raise UserError(re.sub(r"^(ultralong convert \w+: )?error: ", "", line))
    if ended.returncode:
        raise RuntimeError(f"converting {source} failed:\n{ended.stderr}")
    print(ended.stdout, end="")
    return Path(out)


# ---- planning ----------------------------------------------------------------------------------


def plan(
    what: str | Path | Model,
    *,
    gpus: int,
    gpu: str = "h100",
    seq_length: Length | None = None,
    settings: Sequence[str] = (),
) -> PlanReport:
    """Estimate memory and time of a run before it is launched, and find the fastest layouts that fit.

    what: a recipe (name, or a FILE.py of one's own), a model by name ("llama-3.1-8b"), a Hugging Face
    directory, or a `Model`, whose layers, heads and sizes are given. gpus: on all nodes, eight per node; gpu:
    h100, h200, a100 or b200. seq_length: tokens; needed without a recipe. settings: as of --set, like
    "parallel.tp=8"; the search keeps them.

    All figures are estimates from formulas (docs/plan.md). The result prints as a report; `values` has it as
    plain values, in bytes, FLOPs and seconds; `fits` says whether any layout fits. Raises UserError for what
    is unknown or cannot be divided.
    """
    from megatron_ultralong import recipes
    from megatron_ultralong.planning import report

    settings = (settings,) if isinstance(settings, str) else tuple(settings)
    name = what if isinstance(what, Model) else os.fspath(what)
    is_recipe = isinstance(name, str) and recipes.is_recipe(name)
    if not is_recipe and seq_length is None and not any("train.seq_length" in one for one in settings):
        raise UserError("a plan without a recipe needs the length of a sequence: give seq_length, like '1M'")
    return report.report(
        report.PlanRequest(
            gpus=gpus,
            gpu=gpu,
            model=None if is_recipe else name,
            recipe=str(name) if is_recipe else None,
            settings=settings,
            seq_length=None if seq_length is None else str(seq_length),
        )
    )


# ---- prompts -----------------------------------------------------------------------------------


def passkey_prompt(
    tokenizer: Any,
    length: Length,
    depth: float = 50.0,
    *,
    trial: int = 0,
    haystack: str | None = None,
    chat: Literal["auto", "yes", "no"] = "auto",
) -> NiahPrompt:
    """Return a passkey prompt of exact length: a fact hidden in a long text, and the question for it.

    tokenizer: of transformers, or the directory of a model. length: tokens of prompt and answer together.
    depth: position of the fact, percent of the text. trial: another number is another prompt; the same
    arguments always are the same prompt. haystack: the text that the fact is hidden in, repeated where it is
    short; None = this project's filler sentences. chat: use the tokenizer's chat template; auto = where it
    has one.

    `tokens` is the complete prompt, `text` the user message, `answer` the key, `needle_at` the index of the
    fact's first token and `answer_tokens` how many to generate: len(tokens) + answer_tokens = length. Raises
    UserError where `length` is too short, or the tokenizer has no chat template and `chat` is yes.
    """
    from megatron_ultralong.evaluate.backends import model_files
    from megatron_ultralong.evaluate.tasks.niah.prompts import NiahPromptBuilder, NiahSettings

    tokens = _tokens(length, "length")
    if isinstance(tokenizer, str | Path):
        tokenizer = model_files.load_tokenizer(Path(tokenizer))
    settings = NiahSettings(lengths=(tokens,), depths=(depth,), chat=chat)
    return NiahPromptBuilder(tokenizer, settings, haystack).prompt(tokens, depth, trial)


def _tokens(value: Length, name: str) -> int:
    try:
        tokens = parse_count(value, name) if isinstance(value, str) else operator.index(value)
    except TypeError:
        raise UserError(f"{name}={value!r}: expected a whole number, like 4096 or '128K'") from None
    if tokens < 1:
        raise UserError(f"{name}={tokens}: must be at least 1")
    return tokens
