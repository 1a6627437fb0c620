"""tools/ablate.py on the demo's base model: a small grid, its table, and the same command again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import processes

ROOT = Path(__file__).parents[2]
BASE = "examples/demo/base"
GRID = {
    "base": BASE,
    "files": {
        "text.jsonl": f"examples/demo/corpus.py documents --tokenizer {BASE} --length 1025 --rows 4 --seed 1"
    },
    "recipe": "tiny_extend",
    "set": [
        *("runtime.device=cpu", "parallel.cp=1", "train.seq_length=1K", "train.warmup=0"),
        *("train.iterations=1", "train.global_batch=1"),
    ],
    "data": {"input": "text.jsonl", "separator-token": "eos", "workers": 1},
    "axes": {
        "method": {
            "untrained": {"train": False, "set": ["rope.type=linear"]},
            "yarn": {"stages": [{"set": ["train.lr=1e-4"]}, {}]},
        }
    },
    "seeds": [1],
    "evaluate": {
        "niah": {"lengths": ["512"], "depths": [0, 100], "trials": 1, "device": "cpu"},
        "perplexity": {"data": "text.jsonl", "lengths": ["512", "1K"], "rows": 1, "device": "cpu"},
    },
}


@pytest.mark.slow
def test_grid(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(GRID))
    out = tmp_path / "out"

    def run(*arguments: object) -> Any:
        command = [sys.executable, ROOT / "tools" / "ablate.py", "--grid", tmp_path / "grid.yaml"]
        return processes.run([*command, "--output", out, *arguments], capture_output=True, cwd=ROOT)

    done = run()
    assert done.returncode == 0, (done.stdout, done.stderr)
    rows = json.loads((out / "ablation.json").read_text())["rows"]
    assert [(row["values"]["method"], row["tokens"]) for row in rows] == [("untrained", 0), ("yarn", 2048)]
    perplexity = [row["scores"][-1]["mean"] for row in rows]
    assert rows[0]["scores"][-1]["length"] == 1024
    assert perplexity[1] < perplexity[0], "linear scaling without training is worse than trained YaRN"
    config = json.loads((out / "cells" / "method=untrained,untrained" / "hf" / "config.json").read_text())
    assert config["rope_scaling"]["factor"] == 2.0 and config["max_position_embeddings"] == 1024
    cell = out / "cells" / "method=yarn,seed=1"
    assert not list(cell.glob("stage*")), "checkpoints of finished cells are removed"
    assert (out / "passkey.png").is_file() and "| yarn | 1 | 2,048 |" in (out / "ablation.md").read_text()

    again = run("--only", "method=yarn")
    assert again.returncode == 0 and "1 of 1 finished before" in again.stdout
    assert again.stdout.splitlines()[-4:] == done.stdout.splitlines()[-4:]
    assert "method=yarn,seed=1: finished, 2,048 tokens" in run("--list").stdout

    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({**GRID, "recipe": "tinny"}))
    wrong = run()
    assert wrong.returncode == 2 and "--recipe tinny: no such recipe" in wrong.stderr
