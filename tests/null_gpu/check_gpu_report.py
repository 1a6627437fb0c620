"""tools/gpu_report.py on the null GPU: the machine's facts, CUDA's branches of the measurements, a limit on
device memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.null_gpu.machine import ROOT


def test_report(tmp_path: Path) -> None:
    command = ["tools/gpu_report.py", "--scale", "tiny", "--only", "loss,longest", "--output", str(tmp_path)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    values = json.loads((tmp_path / "gpu_report.json").read_text())
    assert values["missing"] == []
    machine = values["machine"]
    assert machine["device"] == "null GPU" and machine["cudnn"] and machine["kernel"] == "cudnn"
    assert machine["memory_bytes"] != machine["host_memory_bytes"]
    rows = {row["row"]: row for row in values["rows"]}
    assert not [row for row in rows.values() if (row["note"] or "").startswith("failed")], rows
    for name in ("all-but-attention", "offload-all", "query-chunks-offload"):
        row = rows[f"longest, in 256 MiB: {name}"]
        assert row["note"].endswith("out of memory") and row["figures"]["tokens"] > 0, row
        assert abs(row["relative_error"]["peak_bytes"]) < 0.15, row
