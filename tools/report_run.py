#!/usr/bin/env python
"""`ultralong report-run`, as a file."""

from megatron_ultralong.commands.report_run import main
from megatron_ultralong.runtime import cli

if __name__ == "__main__":
    cli.main(main)
