"""How the figures of speed reports are printed."""

from __future__ import annotations


def three_digits(value: float) -> str:
    """0.0123 -> 0.0123, 12.345 -> 12.3, 1234.5 -> 1,234."""
    return f"{value:,.3g}" if value < 100 else f"{value:,.0f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def ratio(value: float) -> str:
    return f"{value:.2f}x"


def scientific(value: float) -> str:
    return f"{value:.2e}"


def integer(value: float) -> str:
    return f"{value:,.0f}"


def byte_count(value: float) -> str:
    """1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def token_count(count: int) -> str:
    """131072 -> 128K."""
    for size, letter in ((1024**2, "M"), (1024, "K")):
        if count >= size and count % size == 0:
            return f"{count // size}{letter}"
    return f"{count}"
