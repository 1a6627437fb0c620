"""Print pip constraints for an install into a container: what it brings stays as it is, everything else gets
the version of constraints.txt.

    python docker/constraints.py constraints.txt > /tmp/constraints.txt

A container brings the packages that are installed, and those that files of PIP_CONSTRAINT name: NVIDIA's
images pin packages there that are not installed yet.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping, Set
from importlib.metadata import distributions
from pathlib import Path

try:
    from packaging.version import InvalidVersion, Version
except ImportError:  # pip, which reads the result, has a copy
    from pip._vendor.packaging.version import InvalidVersion, Version

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def canonical(name: str) -> str:
    """A package's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Version of each installed package whose version pip can compare."""
    found = {}
    for one in distributions():
        name, version = one.metadata["Name"], one.version
        try:
            Version(version)
        except (InvalidVersion, TypeError):
            continue
        found.setdefault(canonical(name), version)  # the first on sys.path is the one that is imported
    return found


def names(lines: Iterable[str]) -> set[str]:
    """The packages that lines of a constraints file name."""
    return {canonical(match[0]) for line in lines if (match := _NAME.match(line.strip()))}


def combine(
    pins: Iterable[str], brought: Mapping[str, str], pinned_elsewhere: Set[str] = frozenset()
) -> list[str]:
    """The lines of the result.

    pins: lines of constraints.txt, whose markers pip evaluates. brought: version of each package in the
    container. pinned_elsewhere: packages that its own constraints name.
    """
    lines = [f"{name}=={version}" for name, version in sorted(brought.items())]
    for pin in pins:
        text = pin.partition("#")[0].strip()
        if text and not names([text]) & (brought.keys() | pinned_elsewhere):
            lines.append(text)
    return lines


def main() -> None:
    elsewhere: set[str] = set()
    for path in os.environ.get("PIP_CONSTRAINT", "").split():
        elsewhere |= names(Path(path).read_text().splitlines())
    pins = [line for path in sys.argv[1:] for line in Path(path).read_text().splitlines()]
    print("\n".join(combine(pins, installed(), elsewhere)))


if __name__ == "__main__":
    main()
