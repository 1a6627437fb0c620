"""The sources of instruction data, and which of their examples are selected: by domain, evenly over a
domain's sources.

A file of sources, in YAML (paths are relative to its folder; everything but `input` is optional):

    sources:
      slim_orca: {input: slim_orca/*.jsonl.zst, domain: general, form: sharegpt}
      orca_math: {input: [orca_math], domain: math}
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from megatron_ultralong.data import conversations
from megatron_ultralong.data.conversations import DOMAINS
from megatron_ultralong.data.permutation import permutation
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import yaml_file


@dataclass(frozen=True, kw_only=True)
class ConversationSource:
    """Files of conversations of one origin."""

    name: str
    files: tuple[Path, ...]
    domain: str | None = None
    """general, math or code; None = each record's own `domain`, general where it names none."""
    form: str = "auto"

    def __post_init__(self) -> None:
        if self.domain is not None and self.domain not in DOMAINS:
            raise UserError(f"{self.name}: unknown domain {self.domain}; known are {', '.join(DOMAINS)}")
        conversations.check_form(self.form)


def load_sources(path: Path) -> list[ConversationSource]:
    """Read the sources that a YAML file names. UserError for unknown entries."""
    values = yaml_file.read(path, "--sources")
    if (
        not isinstance(values, dict)
        or list(values) != ["sources"]
        or not isinstance(values["sources"], dict)
        or not values["sources"]
    ):
        raise UserError(
            f"--sources {path}: must contain `sources:` with at least one name and its input, and nothing else"
        )
    return [_source(path, str(name), entry) for name, entry in values["sources"].items()]


def _source(path: Path, name: str, entry: Any) -> ConversationSource:
    what = f"--sources {path}: {name}"
    if not isinstance(entry, dict) or not set(entry) <= {"input", "domain", "form"}:
        raise UserError(f"{what}: must contain input, and optionally domain and form, and nothing else")
    inputs = entry.get("input")
    inputs = [inputs] if isinstance(inputs, str) else inputs
    if not isinstance(inputs, list) or not inputs or not all(isinstance(text, str) for text in inputs):
        raise UserError(f"{what}: input must be a file, directory or glob, or a list of them")
    files = conversations.files(str(path.parent / Path(text).expanduser()) for text in inputs)
    return ConversationSource(
        name=name, files=tuple(files), domain=entry.get("domain"), form=str(entry.get("form", "auto"))
    )


def parse_mix(text: str) -> dict[str, Fraction]:
    """Parse `general=0.5,math=0.25,code=0.25`: shares of the domains, relative to each other. UserError for
    anything else."""
    shares: dict[str, Fraction] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        try:
            shares[name] = Fraction(number)
        except (ValueError, ZeroDivisionError):
            raise UserError(f"--mix {text}: expected shares like general=0.5,math=0.25,code=0.25") from None
        if name not in DOMAINS or shares[name] < 0:
            raise UserError(
                f"--mix {text}: {part.strip()} must be one of {', '.join(DOMAINS)} and a share of at least 0"
            )
    if not sum(shares.values()):
        raise UserError(f"--mix {text}: at least one share must be above 0")
    return shares


def domain_quotas(
    available: dict[str, int], examples: int | None, mix: dict[str, Fraction] | None
) -> dict[str, int]:
    """Return how many examples to select from each domain. Without `mix` the domains keep their proportions;
    without `examples` all are selected.

    The sum is exactly `examples` if that many are available: rounded by largest remainder.
    """
    if examples is None:
        return dict(available)
    if mix is None:
        examples = min(examples, sum(available.values()))
    shares = mix or {name: Fraction(count) for name, count in available.items()}
    exact = {name: examples * share / sum(shares.values()) for name, share in shares.items()}
    wanted = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (wanted[name] - exact[name], name))
    for name in by_remainder[: examples - sum(wanted.values())]:
        wanted[name] += 1
    return wanted


def split_evenly(available: list[int], wanted: int) -> list[int]:
    """Return how many of `wanted` examples to take from each source: equal numbers as far as available; the
    other sources make up for what one lacks."""
    given = [0] * len(available)
    left = min(wanted, sum(available))
    # Smallest first: what it cannot give is shared by those after it.
    by_size = sorted(range(len(available)), key=lambda k: (available[k], k))
    for done, k in enumerate(by_size):
        given[k] = min(available[k], left // (len(available) - done))
        left -= given[k]
    return given


def select_examples(
    names: list[str], source: NDArray[Any], domain: NDArray[Any], wanted: dict[str, int], seed: int
) -> NDArray[numpy.int64]:
    """Return the numbers of the selected examples, in order. names: of the sources. source: int [examples],
    into `names`. domain: int [examples], into DOMAINS.

    A source's examples come in an order that depends only on its name and the seed. All of a domain are
    selected if it has fewer than requested.
    """
    selected = []
    for name_of_domain, count in wanted.items():
        of_domain = domain == DOMAINS.index(name_of_domain)
        pools = [numpy.flatnonzero(of_domain & (source == s)) for s in range(len(names))]
        for name, pool, given in zip(
            names, pools, split_evenly([len(pool) for pool in pools], count), strict=True
        ):
            selected.append(pool[permutation(len(pool), [seed, zlib.crc32(name.encode())])[:given]])
    return numpy.sort(numpy.concatenate(selected)) if selected else numpy.empty(0, numpy.int64)
