#!/usr/bin/env python
"""`ultralong ablate`, as a file."""

from megatron_ultralong.commands.ablate import main
from megatron_ultralong.runtime import cli

if __name__ == "__main__":
    cli.main(main)
