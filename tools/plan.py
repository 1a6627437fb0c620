#!/usr/bin/env python
"""`ultralong plan`, as a file."""

from megatron_ultralong.commands.plan import main
from megatron_ultralong.runtime import cli

if __name__ == "__main__":
    cli.main(main)
