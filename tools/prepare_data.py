#!/usr/bin/env python
"""`ultralong prepare`, as a file."""

from megatron_ultralong.commands.prepare_data.main import main
from megatron_ultralong.runtime import cli

if __name__ == "__main__":
    cli.main(main)
