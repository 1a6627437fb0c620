#!/usr/bin/env python
"""`ultralong convert`, as a file."""

from megatron_ultralong.commands.convert_hf import main
from megatron_ultralong.runtime import cli

if __name__ == "__main__":
    cli.main(main)
