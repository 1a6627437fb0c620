#!/usr/bin/env python
"""`ultralong search-rope`, as a file."""

from megatron_ultralong.commands.search_rope import main
from megatron_ultralong.runtime import cli

if __name__ == "__main__":
    cli.main(main)
