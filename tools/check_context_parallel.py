#!/usr/bin/env python
"""`ultralong check-context-parallel`, as a file."""

from megatron_ultralong.commands.check_context_parallel import main
from megatron_ultralong.runtime import cli

if __name__ == "__main__":
    cli.main(main)
