"""One clear line and exit code 2 for mistakes a user can make."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable

from megatron_ultralong.config import UserError


def main(function: Callable[[], int | None]) -> None:
    """Run a tool's `function`; a `UserError` becomes `error: ...` on stderr and exit code 2.

    Under torchrun the first rank of a node that meets a given error prints it, and every rank leaves at once: the others raised
    the same one, or wait in a collective that would otherwise hold the exit up until its timeout.
    """
    try:
        code = function() or 0
    except UserError as error:
        if _first_to_say(str(error)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        os._exit(130)
    sys.exit(code)


def _first_to_say(line: str) -> bool:
    """Whether no other rank under the same torchrun on this node has printed `line`: decided by who creates a marker file."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    if run is None:
        return True
    key = hashlib.sha256(f"{run} {os.getppid()} {os.environ.get('TORCHELASTIC_RESTART_COUNT')} {line}".encode()).hexdigest()[:32]
    try:
        os.close(os.open(os.path.join(tempfile.gettempdir(), f"megatron_ultralong-error-{key}"), os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False
    except OSError:
        return True
