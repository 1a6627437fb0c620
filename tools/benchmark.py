#!/usr/bin/env python
"""`ultralong benchmark`, as a file."""

from megatron_ultralong.commands.benchmark.main import main
from megatron_ultralong.runtime import cli

if __name__ == "__main__":
    cli.main(main)
