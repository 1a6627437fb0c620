#!/usr/bin/env python
"""`ultralong evaluate`, as a file."""

from megatron_ultralong.commands.evaluate import main
from megatron_ultralong.runtime import cli

if __name__ == "__main__":
    cli.main(main)
