"""Figures that the UltraLong paper published ("From 128K to 4M", arXiv 2504.06214), for comparison with
results. Nothing here was measured by this project.

Percent. RULER and LV-Eval are averages over lengths up to the named one. A missing figure is unknown, not
zero.
"""

from __future__ import annotations

SOURCE = "arXiv 2504.06214"

LONG: dict[str, dict[str, float]] = {
    "Llama-3.1-8B-Instruct": {"RULER <1M": 61.3, "InfiniteBench": 24.66},
    "Gradient-1048k": {"RULER <1M": 77.8, "InfiniteBench": 28.60},
    "ProLong-512k": {"RULER <1M": 71.2, "InfiniteBench": 23.54},
    "UltraLong-1M": {"RULER <1M": 79.1, "InfiniteBench": 32.14},
    "UltraLong-2M": {"RULER <1M": 78.2, "InfiniteBench": 32.49},
    "UltraLong-4M": {"RULER <1M": 78.0, "InfiniteBench": 30.38},
    "ablation, 1M after pretraining: full recipe": {
        "RULER <128K": 85.63,
        "RULER <512K": 82.28,
        "RULER <1M": 80.17,
        "LV-Eval <128K": 27.60,
        "LV-Eval <256K": 26.40,
        "InfiniteBench": 26.25,
    },
    "ablation, 1M after pretraining: no separator": {
        "RULER <128K": 85.47,
        "RULER <512K": 81.63,
        "RULER <1M": 79.15,
        "LV-Eval <128K": 26.06,
        "LV-Eval <256K": 24.85,
        "InfiniteBench": 22.75,
    },
    "ablation, 1M after pretraining: NTK-aware": {
        "RULER <128K": 86.91,
        "RULER <512K": 80.27,
        "RULER <1M": 76.62,
        "LV-Eval <128K": 22.34,
        "LV-Eval <256K": 21.24,
        "InfiniteBench": 20.18,
    },
    "ablation, 1M after pretraining: 512K first, then 1M": {"RULER <1M": 77.52},
}
"""{model: {column: score}} of the table of long contexts."""

STANDARD: dict[str, dict[str, float]] = {
    "Llama-3.1-8B-Instruct": {"average": 61.45},
    "Gradient-1048k": {"average": 37.36},
    "ProLong-512k": {"average": 40.81},
    "UltraLong-1M": {"average": 62.47},
    "UltraLong-2M": {"average": 61.06},
    "UltraLong-4M": {"average": 60.95},
}
"""{model: {column: score}} of the table of standard benchmarks."""

PASSKEY = "UltraLong-1M, -2M and -4M: 100% at every length and depth (published)."
PASSKEY_UP_TO = {"UltraLong-1M": 2**20, "UltraLong-2M": 2**21, "UltraLong-4M": 2**22}
"""{model: tokens up to which it found every pass key}: its training length."""

SHOTS = {"MMLU": 5, "MMLU-Pro": 5, "MATH": 0, "GSM8K": 8, "HumanEval": 0}
"""Examples in a prompt of each standard benchmark."""

NOT_STATED = (
    "The paper states shots and metrics of the standard benchmarks, but no prompts, and not which lengths its "
    "averages of RULER contain: here 4K and its doublings up to and including the named one. A published figure "
    "that this program does not know is shown as -."
)

RELEASED = {
    "Llama-3.1-8B-Instruct": "Llama-3.1-8B-Instruct",
    "Meta-Llama-3.1-8B-Instruct": "Llama-3.1-8B-Instruct",
    "Llama-3-8B-Instruct-Gradient-1048k": "Gradient-1048k",
    "Llama-3-8B-ProLong-512k-Instruct": "ProLong-512k",
    **{f"Llama-3.1-8B-UltraLong-{size}-Instruct": f"UltraLong-{size}" for size in ("1M", "2M", "4M")},
    **{
        f"Llama-3.1-Nemotron-8B-UltraLong-{size}-Instruct": f"UltraLong-{size}" for size in ("1M", "2M", "4M")
    },
}
"""{name on the Hugging Face hub, without its organisation: name here}."""


def released(directory: str) -> str | None:
    """The name here of a released model, from the name of its directory; None for any other directory."""
    names = {name.lower(): model for name, model in RELEASED.items()}
    return names.get(directory.lower())
