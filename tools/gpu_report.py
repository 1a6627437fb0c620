#!/usr/bin/env python
"""`ultralong gpu-report`, as a file."""

import sys
from pathlib import Path

# The package need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_ultralong.commands.gpu_report import main
from megatron_ultralong.runtime import cli

if __name__ == "__main__":
    cli.main(main)
