"""Git LFS pointers: what a clone without Git LFS leaves in place of weights and data, three lines of text."""

from __future__ import annotations

from pathlib import Path

from megatron_ultralong.errors import UserError

_BEGIN = b"version https://git-lfs.github.com/spec/"
"""First bytes of every pointer (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md)."""


def refuse_pointer(path: Path) -> None:
    """UserError where `path` is a pointer; nothing where it is another file, or cannot be read. Of a pipe
    nothing is read."""
    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            begin = file.read(len(_BEGIN))
    except OSError:
        return
    if begin == _BEGIN:
        raise UserError(
            f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in that clone, or download the file again"
        )
