"""What tests/gpu needs beyond pytest, said in one line: on a rented GPU little else is installed."""

from __future__ import annotations

import importlib.util

import pytest

NEEDED = ("torch", "transformers", "megatron.core", "einops", "psutil")
"""Megatron-Core uses the last two without requiring them."""


def pytest_configure(config: pytest.Config) -> None:
    absent = missing()
    if absent:
        pytest.exit(f"tests/gpu needs {', '.join(absent)}; pip install --no-deps them", returncode=2)


def missing() -> list[str]:
    """Return the names of the packages that are not installed, as pip has them."""
    return [name.replace(".", "-") for name in NEEDED if not _found(name)]


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package that contains it
        return False
