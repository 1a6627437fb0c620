"""What programs that read an export compute in place of the RoPE that was trained.

`make test-clients` runs the programs and checks these lines.
"""

from __future__ import annotations

from megatron_ultralong.rope.base import Rope
from megatron_ultralong.rope.linear import Linear
from megatron_ultralong.rope.longrope import LongRoPE
from megatron_ultralong.rope.ntk import DynamicNTK
from megatron_ultralong.rope.yarn import Ramp, YaRN, mscale

VLLM = "vLLM (0.32.0 tested)"
LLAMA_CPP = "llama.cpp (that of llama-cpp-python 0.3.36 tested)"
LLAMA_CPP_RAMP = {"alpha": 1.0, "beta": 32.0}
"""The ramp of YaRN over dimensions in llama.cpp, whatever a file states."""


def client_notes(rope: Rope, family: str = "llama") -> list[str]:
    """One line for each program that computes something else from an export of `rope` than was trained, or
    serves another length: program, versions, what to do.

    family: `model.family`.
    """
    return [*_transformers(rope), *_vllm(rope), *_llama_cpp(rope, family)]


def _transformers(rope: Rope) -> list[str]:
    lines = []
    if isinstance(rope, YaRN) and rope.ramp == "dimension":
        if not rope.truncate:
            lines.append(
                "transformers below 4.55 ignores rope.truncate=false and computes other frequencies; serve with 4.55 or later"
            )
        if rope.scale() * rope.original() != rope.covered_length():
            lines.append(
                "transformers 4.51 to 4.55 takes max_position_embeddings / original length as the factor, which differs from "
                f"{rope.scale():g} x {rope.original()}; serve with 4.56 or later"
            )
    if rope.depends_on_length():
        safe = f"at most {rope.original()} tokens in all"
        if not isinstance(rope, DynamicNTK):
            safe += ", or prompts longer than that"
        lines.append(
            "transformers (4.51 to 5.23 tested) keeps cached keys with the frequencies of a shorter sequence while one grows "
            f"past {rope.original()} tokens; generate {safe}"
        )
    return lines


def _vllm(rope: Rope) -> list[str]:
    if isinstance(rope, DynamicNTK):
        return [
            f"{VLLM} applies no scaling to rope_type=dynamic; serve with transformers, or start it with "
            f"--max-model-len {rope.original()}"
        ]
    lines = []
    if isinstance(rope, Linear):
        lines.append(
            f"{VLLM} multiplies max_position_embeddings by the factor once more; start it with "
            f"--max-model-len {rope.covered_length()}"
        )
    if isinstance(rope, LongRoPE):
        lines.append(
            f"{VLLM} serves the original length of a longrope model; start it with --max-model-len {rope.covered_length()}"
        )
    if rope.depends_on_length():
        lines.append(
            f"{VLLM} then uses the long factors for sequences of every length; for short sequences start a second server with "
            f"--max-model-len {rope.original()}"
        )
    return lines


def _llama_cpp(rope: Rope, family: str) -> list[str]:
    if isinstance(rope, DynamicNTK | LongRoPE):
        others = "transformers or vLLM" if isinstance(rope, LongRoPE) else "transformers"
        return [f"{LLAMA_CPP} applies no scaling to rope_type={rope.hf_type}; serve with {others}"]
    if not isinstance(rope, Ramp):
        return []
    if not isinstance(rope, YaRN) or rope.ramp == "rotation":
        # A ramp over rotations is exported as llama3, which becomes a tensor that only a Llama's graph reads.
        if family in ("llama", "mistral"):
            return []
        return [
            f"{LLAMA_CPP} applies no scaling to rope_type=llama3 on a {family}; serve with transformers or vLLM"
        ]
    lines = []
    if not rope.truncate:
        lines.append(
            f"{LLAMA_CPP} ignores rope.truncate=false and computes other frequencies; serve with transformers or vLLM"
        )
    if {"alpha": rope.alpha, "beta": rope.beta} != LLAMA_CPP_RAMP:
        lines.append(
            f"{LLAMA_CPP} ignores the ramp of the file and takes 32 and 1; start it with "
            f"--yarn-beta-fast {rope.beta:g} --yarn-beta-slow {rope.alpha:g}"
        )
    own = mscale(rope.scale())
    if rope.multiplier() != own:
        architecture = "llama" if family == "mistral" else family
        lines.append(
            f"{LLAMA_CPP} ignores attention_factor={rope.multiplier():g} and takes {own:.7g}; start it with "
            f"--override-kv {architecture}.rope.scaling.attn_factor=float:{rope.multiplier() / own:.9g}"
        )
    return lines
