#!/usr/bin/env python
"""`ultralong train`, as a file."""

from megatron_ultralong.commands.train import main
from megatron_ultralong.runtime import cli

if __name__ == "__main__":
    cli.main(main)
