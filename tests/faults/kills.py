"""Kill and stop training runs at random moments, start them again, and compare every loss with a run that
nothing happened to.

    python -m tests.faults.kills --faults 40 --seed 1

Each run uses one of the layouts CP 2, TP 2, PP 2 and DP 2 and is disturbed up to twice: at start-up, in a
step, while a checkpoint is written, or in an evaluation, by SIGKILL of one rank, of torchrun or of all of
them, SIGTERM of torchrun, or SIGSTOP of one rank for a few seconds or for good. Needs no GPU.
"""

from __future__ import annotations

import argparse
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.train_tool import Tool, saved, write_inputs

LAYOUTS = {
    "cp2": ("parallel.cp=2",),
    "tp2": ("parallel.tp=2",),
    "pp2": ("parallel.pp=2",),
    "dp2": (),
}
ITERATIONS, SAVE_EVERY, EVAL_EVERY = 24, 3, 5
FAULTS = ("kill a rank", "kill torchrun", "kill all", "terminate", "halt a rank", "stop a rank")
MOMENTS = ("start-up", "step", "save", "evaluation")
HALT = 3.0
"""Seconds for which a rank is halted."""
TIMEOUT_MINUTES = 2
"""A rank that is stopped before its first sign of life ends the run after this."""
ENDED_WITHIN = 60 * TIMEOUT_MINUTES + 30
"""Seconds after a fault in which all processes of a run end."""


@dataclass
class Disturbed:
    """What happened to one run."""

    layout: str
    faults: list[str] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)
    lost: list[int] = field(default_factory=list)
    """Iterations that each restart trained again."""
    saved: int = 0
    """The newest checkpoint that a log has called saved."""
    ended_after: list[float] = field(default_factory=list)
    """Seconds from a fault to the end of all processes; not of a halt, which the run survives."""


def undisturbed(inputs: Path, folder: Path, layout: str) -> dict[int, float]:
    """Losses by iteration of a run that nothing happens to."""
    with _tool(inputs, folder / layout, layout) as tool:
        if tool.finish() != 0:
            raise RuntimeError(tool.errors())
        return _losses(tool)


def disturb(inputs: Path, save: Path, layout: str, seed: int) -> Disturbed:
    """Run until the end, with a fault at a random moment of the first starts. RuntimeError where a start ends
    with an error of its own."""
    choose, told = random.Random(seed), Disturbed(layout)
    for start in range(10):
        with _tool(inputs, save, layout) as tool:
            fault = moment = None
            if start < 2 and (not saved(save) or saved(save)[-1] < ITERATIONS - 4):
                fault, moment = choose.choice(FAULTS), choose.choice(MOMENTS)
                _reach(tool, save, moment, choose)
            if fault is not None and tool.process.poll() is None:
                told.faults.append(f"{fault}, {moment}")
                began = time.monotonic()
                everything = _processes(tool)
                _apply(fault, tool, choose)
                if fault != "halt a rank":
                    tool.finish()
                    _, left = psutil.wait_procs(everything, timeout=90)
                    if left:
                        raise RuntimeError(f"{told.faults[-1]}: {left} still run after 90 s")
                    told.ended_after.append(time.monotonic() - began)
            code = tool.finish()
            _merge(told, _losses(tool))
            told.saved = max([told.saved, *_saved(tool)])
            if saved(save) and saved(save)[-1] == ITERATIONS and code == 0:
                return told
            if fault is None or (fault == "halt a rank" and code != 0):
                raise RuntimeError(f"ended with {code} by itself: {tool.errors()}")
    raise RuntimeError("did not come to its end")


def _tool(inputs: Path, save: Path, layout: str) -> Tool:
    settings = (
        *LAYOUTS[layout],
        f"train.iterations={ITERATIONS}",
        f"train.save_every={SAVE_EVERY}",
        f"train.eval_every={EVAL_EVERY}",
        "train.deterministic=false",
        "runtime.hang_minutes=0.5",
        f"runtime.timeout_minutes={TIMEOUT_MINUTES}",
    )
    return Tool(inputs, save, *settings, more=("--valid", str(inputs / "valid")), ranks=2, timeout=600)


def _reach(tool: Tool, save: Path, moment: str, choose: random.Random) -> None:
    """Wait for a moment of the run."""
    if moment == "start-up":
        time.sleep(choose.uniform(0, 12))
        return
    if moment == "save":
        before = set(save.glob(".iter_*"))
        wanted = choose.randint(1, 3)
        seen: set[Path] = set()
        while tool.process.poll() is None and len(seen) < wanted:
            seen |= set(save.glob(".iter_*.partial*")) - before
            time.sleep(0.001)
        time.sleep(choose.uniform(0, 0.05))
        return
    text, count = {
        "step": ("] iteration ", choose.randint(1, ITERATIONS - 6)),
        "evaluation": (f" {EVAL_EVERY * choose.randint(1, 3)}/{ITERATIONS}", 1),
    }[moment]
    for line in tool.output():
        count -= text in line
        if count <= 0:
            break
    time.sleep(choose.uniform(0, 0.05))


def _apply(fault: str, tool: Tool, choose: random.Random) -> None:
    ranks = _ranks(tool)
    if fault == "terminate":
        tool.send(signal.SIGTERM)
    elif fault == "kill torchrun" or not ranks:
        tool.send(signal.SIGKILL)
    elif fault == "kill all":
        tool.kill()
    elif fault == "kill a rank":
        choose.choice(ranks).kill()
    else:
        rank = choose.choice(ranks)
        rank.suspend()
        if fault == "stop a rank":
            return
        threading.Timer(HALT, rank.resume).start()


def _ranks(tool: Tool) -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process(tool.process.pid).children()
        if "train.py" in " ".join(process.cmdline())
    ]


def _processes(tool: Tool) -> list[psutil.Process]:
    main = psutil.Process(tool.process.pid)
    return main.children(recursive=True)


def _losses(tool: Tool) -> dict[int, float]:
    found = [re.search(r"\] iteration +(\d+)/.*lm loss: (\S+) ", line) for line in tool.lines]
    return {int(m[1]): float(m[2]) for m in found if m}


def _saved(tool: Tool) -> list[int]:
    found = [re.match(r" saved checkpoint of iteration (\d+) ", line) for line in tool.lines]
    return [int(m[1]) for m in found if m]


def _merge(told: Disturbed, losses: dict[int, float]) -> None:
    """Add the losses of a start. ValueError where an iteration that was trained before has another one."""
    again = [n for n in losses if n in told.losses]
    for n in again:
        if losses[n] != told.losses[n]:
            raise ValueError(
                f"iteration {n}: loss {losses[n]} instead of {told.losses[n]}, after {told.faults}"
            )
    if told.losses and losses:
        told.lost.append(len(again))
        if min(losses) <= told.saved:
            raise ValueError(f"checkpoint {told.saved} was saved, but is not used, after {told.faults}")
    told.losses |= losses


def check(told: Disturbed, expected: dict[int, float]) -> None:
    """ValueError where a loss is not that of the undisturbed run, more was lost than came after a checkpoint
    that was being written, or processes went on for too long after a fault."""
    if told.losses != expected:
        different = [n for n in expected if told.losses.get(n) != expected[n]]
        raise ValueError(f"{told.layout}, {told.faults}: other losses at iterations {different}")
    # A checkpoint is complete before the next one begins.
    if max(told.lost, default=0) > 2 * SAVE_EVERY:
        raise ValueError(f"{told.layout}, {told.faults}: {max(told.lost)} iterations lost")
    if max(told.ended_after, default=0) > ENDED_WITHIN:
        raise ValueError(f"{told.layout}, {told.faults}: ended only after {max(told.ended_after):.0f} s")


def run(faults: int, seed: int, say: Callable[[str], None], layouts: tuple[str, ...] = tuple(LAYOUTS)) -> int:
    """Disturb runs until at least `faults` faults have happened; return how many did. RuntimeError or
    ValueError for the first run that is not as it should be."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = write_inputs(folder)
        expected = {layout: undisturbed(inputs, folder / "undisturbed", layout) for layout in layouts}
        happened = number = 0
        while happened < faults:
            layout = layouts[number % len(layouts)]
            told = disturb(inputs, folder / f"run{number}", layout, seed * 1000 + number)
            check(told, expected[layout])
            happened, number = happened + len(told.faults), number + 1
            ended = ", ".join(f"{seconds:.1f}" for seconds in told.ended_after) or "-"
            say(
                f"{number}: {layout}: {'; '.join(told.faults)}: same losses; {told.lost} iterations again; ended after {ended} s"
            )
        return happened


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=40, help="how many, over all runs")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    happened = run(args.faults, args.seed, lambda line: print(line, flush=True))
    print(f"{happened} of {happened} faults survived with equal losses")


if __name__ == "__main__":
    sys.exit(main())
