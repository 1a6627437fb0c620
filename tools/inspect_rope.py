#!/usr/bin/env python
"""`ultralong inspect-rope`, as a file."""

from megatron_ultralong.commands.inspect_rope import main
from megatron_ultralong.runtime import cli

if __name__ == "__main__":
    cli.main(main)
