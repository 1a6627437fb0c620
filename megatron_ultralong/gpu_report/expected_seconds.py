"""How long a row is expected to take, from the estimates of planning/: what fits into the remaining time."""

from __future__ import annotations

from megatron_ultralong.errors import UserError
from megatron_ultralong.gpu_report import extension, predictions
from megatron_ultralong.gpu_report.sizes import Work
from megatron_ultralong.planning.hardware import GPUS, Gpu

START_GPU, START_CPU = 20.0, 4.0
"""Of a process until it measures."""
TEST_FILE = 60.0
EXTENSION = 90.0
"""Of its programs, without the iterations."""
CPU_ROW, CPU_EXTENSION = 1.0, 30.0
"""At the sizes for a CPU."""


def start(on_gpu: bool) -> float:
    """Return the seconds until a process measures its first row."""
    return START_GPU if on_gpu else START_CPU


def row(work: Work, name: str, on_gpu: bool, gpu: Gpu | None) -> float:
    """Return the seconds of one row, without the start of its process.

    gpu: the data sheet; None = not known, taken as an A100.
    """
    if not on_gpu:
        return CPU_EXTENSION if work.group == "extension" else CPU_ROW
    gpu, x = gpu or GPUS["a100"], work.settings
    if work.group == "tests":
        return TEST_FILE
    if work.group == "extension":
        try:
            run, model = extension.planned_run(x)
        except UserError:  # the row will fail with it
            return EXTENSION
        return (
            EXTENSION
            + 1.5 * x.iterations * predictions.training(run, model, "cudnn", gpu)["iteration_seconds"]
        )
    if work.group == "attention":
        method, _, cp = name.partition(", CP ")
        # Other methods do the work of a ring.
        pseudo = {"method": "ring" if cp else method, "cp": int(cp or 1), "documents": x.documents}
        both = predictions.attention(x, pseudo, "cudnn", gpu)["both_ms"] / 1e3
        return 3 + 1.3 * both * (2 + 2 * (x.warm_up + x.repeats))
    if work.group == "loss":
        return 1 + 3 * predictions.loss(x, {"name": name}, gpu)["ms"] / 1e3 * (x.repeats + 5)
    if work.group == "generation":
        predicted = predictions.generation(x, {"tokens": x.lengths[0]}, gpu)
        decode = predicted["decode_seconds"] * x.written * (x.repeats + 1)
        return 5 + 1.5 * predicted["prefill_seconds"] * x.repeats + 3 * decode
    # A step, or the search for the longest one: each doubling takes half of the next, then come bisections.
    setting = {"setting": "none" if name == "save-on-cpu" else name}
    # With offloading the first step allocates host memory and is repeated.
    steps = x.repeats + 0.2 + (x.repeats > 1 or "offload" in name)
    if x.longest:
        tokens = max(x.granularity, int(predictions.step(x, setting, "cudnn", gpu)["tokens"]))
        steps = 2.0 + max(0, (tokens // x.granularity).bit_length() - 1)
    else:
        tokens = x.lengths[0]
    seconds = predictions.step(x, setting | {"tokens": tokens}, "cudnn", gpu)["seconds"]
    return 5 + 1.3 * steps * seconds
