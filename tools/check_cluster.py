#!/usr/bin/env python
"""`ultralong check-cluster`, as a file."""

from megatron_ultralong.commands.check_cluster import main
from megatron_ultralong.runtime import cli

if __name__ == "__main__":
    cli.main(main)
