"""The model card of an export: base, recipe, RoPE, length and tokens, and what the base's licence asks for.

Meta's Llama licences (3 to 3.3) ask whoever passes a derived model on to include the agreement and a notice
file, to display "Built with Llama" and to begin the model's name with "Llama".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ultralong.config import Model, Rope, Run

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_LEGAL = re.compile(r"licen[sc]e|notice|copying|use_policy", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class License:
    """What is known of the base model's licence."""

    header: tuple[tuple[str, str], ...] = ()
    """license, license_name, license_link of the base card's YAML header, those that are there."""
    files: tuple[str, ...] = ()
    """Licence, notice and policy files carried along."""
    llama: str = ""
    """Version of Meta's Llama licence ("3.1"), empty where the base has another licence."""


def base_license(folder: Path | None, base: str = "") -> License:
    """The licence of the base model whose small files lie in `folder`; `base` is its name on the hub, if
    known."""
    # The name decides only where the directory says nothing.
    metas = _llama_version(base) if re.match(r"(meta-llama/)?(meta-)?llama-?\d", base.lower()) else ""
    if folder is None or not folder.is_dir():
        return License(llama=metas)
    files = tuple(sorted(p.name for p in folder.iterdir() if p.is_file() and _LEGAL.match(p.name)))
    header: dict[str, str] = {}
    card = folder / "README.md"
    if card.is_file():
        front = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        for key in ("license", "license_name", "license_link"):
            found = re.search(rf"^{key}:[ \t]*(\S.*)$", front[1], re.MULTILINE) if front else None
            if found:
                header[key] = found[1].strip().strip("\"'")
    texts = [(folder / name).read_text(encoding="utf-8", errors="replace")[:2000] for name in files]
    name = header.get("license_name") or header.get("license", "")
    agreement = re.search(r"llama\s*([\d.]+)\s+community\s+licen[sc]e", "\n".join(texts), re.IGNORECASE)
    if agreement:
        llama = agreement[1]
    elif name:
        llama = _llama_version(name) if re.match(r"llama-?\d", name.lower()) else ""
    else:
        llama = "" if files else metas
    return License(header=tuple(header.items()), files=files, llama=llama)


def notice(license: License) -> dict[str, str]:
    """File name -> text of the notice file that Meta's licence asks for, where the base does not bring one."""
    if not license.llama or any(name.lower().startswith("notice") for name in license.files):
        return {}
    return {
        "NOTICE": f"Llama {license.llama} is licensed under the Llama {license.llama} Community License, "
        "Copyright © Meta Platforms, Inc. All Rights Reserved.\n"
    }


def model_card(
    name: str,
    *,
    base: str,
    license: License,
    run: Run | None,
    model: Model,
    rope: Rope,
    max_position: int,
    iterations: int,
    tokens: int,
    dtype: torch.dtype,
) -> str:
    """README.md of an export called `name`; `base` is the base model's name ("" = not recorded), `run` its
    training, if any."""
    title = f"Llama-{name}" if license.llama and not name.lower().startswith("llama") else name
    header = [f"base_model: {base}"] if _HUB_NAME.fullmatch(base) else []
    header += [f"{key}: {value}" for key, value in license.header]
    if license.llama and not license.header:
        header.append(f"license: llama{license.llama}")
    header += [
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- long-context",
        "- megatron-ultralong",
    ]
    recipe = run.name if run else "none (converted, not trained)"
    rows = {"base model": base or "not recorded", "recipe": recipe, "RoPE": rope_text(rope)}
    if run is not None and tokens:
        rows["sequence length trained at"] = f"{run.train.seq_length:,} tokens"
    rows["max_position_embeddings"] = f"{max_position:,} tokens"
    rows["tokens trained on"] = f"{tokens:,}"
    if run is not None and tokens:
        rows["iterations x global batch"] = f"{iterations:,} x {run.train.global_batch:,}"
        rows["learning rate"] = (
            f"{run.train.lr:g}, {run.train.schedule}, {run.train.warmup} warm-up iterations"
        )
    rows["weights"] = (
        f"{str(dtype).removeprefix('torch.')}, {model.layers} layers, hidden size {model.hidden_size:,}"
    )
    parts = ["---", *header, "---", "", f"# {title}", ""]
    if license.llama:
        parts += ["**Built with Llama**", ""]
    parts += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), ""]
    if run is not None:
        parts += [f"Every setting of the run is in `training_run.json`. {run.notes}".rstrip(), ""]
    parts += ["## Licence", "", _license_text(license, base), ""]
    return "\n".join(parts)


def rope_text(rope: Rope) -> str:
    """A RoPE setting in one line for people."""
    text = f"{rope.type}, theta {rope.theta:,.10g}"
    if rope.type == "none":
        return f"unscaled, theta {rope.theta:,.10g}"
    text += f", factor {rope.factor:g} over {rope.original_length:,} positions, alpha {rope.alpha:g}, beta {rope.beta:g}"
    if rope.type == "yarn":
        text += f", ramp over {rope.ramp}s, {'with' if rope.temperature else 'without'} attention temperature"
    return text


def _license_text(license: License, base: str) -> str:
    files = ", ".join(f"`{name}`" for name in license.files)
    if not base and license == License():
        return "No base model is recorded. Where there is one, its licence holds; a model from scratch has the licence that its makers give it."
    if not license.llama:
        return "This model comes under the licence of its base model" + (
            f": see {files}." if files else "; its directory held no licence file to carry along."
        )
    agreement = files or "add the agreement's text beside this file, it was not in the base model's directory"
    return (
        f"Derived from Llama {license.llama}, under the Llama {license.llama} Community License ({agreement}). "
        'Whoever passes it on includes the agreement and the notice file, displays "Built with Llama", and lets the '
        'model\'s name begin with "Llama".'
    )


def _llama_version(name: str) -> str:
    found = re.search(r"llama-?(\d(?:\.\d)?)", name.lower())
    return found[1] if found else "3"
