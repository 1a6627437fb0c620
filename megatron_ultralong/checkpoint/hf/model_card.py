"""The model card of an export: base, recipe, RoPE, length and tokens, and what the base's licence requires.

Meta's Llama licences (3 to 3.3) require whoever distributes a derived model to include the agreement and a
notice file, to display "Built with Llama" and to begin the model's name with "Llama".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ultralong.config import Model, Run
from megatron_ultralong.rope.base import Rope

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_LEGAL = re.compile(r"licen[sc]e|notice|copying|use_policy", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class License:
    """What is known about the base model's licence."""

    header: tuple[tuple[str, str], ...] = ()
    """license, license_name, license_link from the YAML header of the base model's card, if present."""
    files: tuple[str, ...] = ()
    """Licence, notice and policy files, which are copied."""
    llama: str = ""
    """Version of Meta's Llama licence ("3.1"), empty where the base has another licence."""


def base_license(folder: Path | None, base: str = "") -> License:
    """Determine the licence of the base model whose small files are in `folder`.

    base: its name on the hub, if known; it decides only where the folder contains no licence.
    """
    metas = _llama_version(base) if re.match(r"(meta-llama/)?(meta-)?llama-?\d", base.lower()) else ""
    if folder is None or not folder.is_dir():
        return License(llama=metas)
    files = tuple(sorted(p.name for p in folder.iterdir() if p.is_file() and _LEGAL.match(p.name)))
    header: dict[str, str] = {}
    card = folder / "README.md"
    if card.is_file():
        front = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        for key in ("license", "license_name", "license_link"):
            value = re.search(rf"^{key}:[ \t]*(\S.*)$", front[1], re.MULTILINE) if front else None
            if value:
                header[key] = value[1].strip().strip("\"'")
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
    """File name -> text of the notice file that Meta's licence requires; empty where the base model has
    one."""
    if not license.llama or any(name.lower().startswith("notice") for name in license.files):
        return {}
    return {
        "NOTICE": f"Llama {license.llama} is licensed under the Llama {license.llama} Community License, "
        "Copyright © Meta Platforms, Inc. All Rights Reserved.\n"
    }


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What the README.md of an export says."""

    name: str
    base: str
    """Name of the base model; empty where it is not recorded."""
    license: License
    run: Run | None
    """The training run; None for a model that was only converted."""
    model: Model
    rope: Rope
    max_position: int
    """max_position_embeddings, tokens."""
    iterations: int
    tokens: int
    """Tokens trained on."""
    dtype: torch.dtype

    def text(self) -> str:
        license = self.license
        is_named = not license.llama or self.name.lower().startswith("llama")
        title = self.name if is_named else f"Llama-{self.name}"
        lines = ["---", *self._header(), "---", "", f"# {title}", ""]
        if license.llama:
            lines += ["**Built with Llama**", ""]
        lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in self._table().items()), ""]
        if self.run is not None:
            lines += [f"Every setting of the run is in `training_run.json`. {self.run.notes}".rstrip(), ""]
        lines += ["## Licence", "", _license_text(license, self.base), ""]
        return "\n".join(lines)

    def _header(self) -> list[str]:
        """Lines of the YAML header."""
        lines = [f"base_model: {self.base}"] if _HUB_NAME.fullmatch(self.base) else []
        lines += [f"{key}: {value}" for key, value in self.license.header]
        if self.license.llama and not self.license.header:
            lines.append(f"license: llama{self.license.llama}")
        return [
            *lines,
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags:",
            "- long-context",
            "- megatron-ultralong",
        ]

    def _table(self) -> dict[str, str]:
        run, trained = self.run, self.run is not None and bool(self.tokens)
        table = {
            "base model": self.base or "not recorded",
            "recipe": run.name if run else "none (converted, not trained)",
            "RoPE": self.rope.describe(),
        }
        if run is not None and trained:
            table["sequence length trained at"] = f"{run.train.seq_length:,} tokens"
        table["max_position_embeddings"] = f"{self.max_position:,} tokens"
        table["tokens trained on"] = f"{self.tokens:,}"
        if run is not None and trained:
            train = run.train
            table["iterations x global batch"] = f"{self.iterations:,} x {train.global_batch:,}"
            table["learning rate"] = f"{train.lr:g}, {train.schedule}, {train.warmup} warm-up iterations"
        dtype = str(self.dtype).removeprefix("torch.")
        table["weights"] = f"{dtype}, {self.model.layers} layers, hidden size {self.model.hidden_size:,}"
        return table


def _license_text(license: License, base: str) -> str:
    files = ", ".join(f"`{name}`" for name in license.files)
    if not base and license == License():
        return (
            "No base model is recorded. Where there is one, its licence holds; a model from scratch has the "
            "licence that its makers give it."
        )
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
    version = re.search(r"llama-?(\d(?:\.\d)?)", name.lower())
    return version[1] if version else "3"
