"""Files and folders that appear whole or not at all, and locks: every writer of the library goes through here.

What is being written has a hidden name beside the final one (`.NAME.partial`, `.NAME.partial-XXXX` for folders),
is synced to the disk, and is renamed once it is complete. A killed process leaves at most such a hidden name.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_ultralong.errors import UserError


@contextlib.contextmanager
def whole_file(path: Path, *, what: str | None = None) -> Iterator[IO[bytes]]:
    """A binary file to write to, which gets the name `path` when the block ends without an exception.

    The folder must exist. what: how messages name the file; its path if None. UserError where it cannot be
    written; the file that was at `path` before then stays as it was.
    """
    partial = path.with_name(
        f".{path.name}.partial"
    )  # one name: the next run overwrites what a killed one left
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise cannot_write(what or str(path), error) from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, what: str | None = None) -> None:
    """Write `text` as UTF-8, whole or not at all. UserError where it cannot be written.

    A lone surrogate, which a model's text may contain, is written as its backslash escape.
    """
    with whole_file(path, what=what) as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))


def write_json(path: Path, values: Any, *, indent: int | None = 1, what: str | None = None) -> None:
    """Write `values` as JSON, whole or not at all. UserError where it cannot be written."""
    write_text(path, json.dumps(values, indent=indent, ensure_ascii=False) + "\n", what=what)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. UserError that names the file where it is missing, unreadable or not an object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} cannot be read: it is not a JSON object")
    return values


def staging_folder(final: Path) -> Path:
    """A new hidden folder beside `final`, with the permissions of any new folder. OSError where it cannot be
    made."""
    folder = Path(tempfile.mkdtemp(prefix=f".{final.name}.partial-", dir=final.parent))
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)  # mkdtemp makes it private
    return folder


@contextlib.contextmanager
def whole_folder(final: Path, *, what: str | None = None) -> Iterator[Path]:
    """A hidden folder to fill, which is renamed to `final` when the block ends without an exception and is
    removed otherwise. `final` must not exist. UserError where it cannot be written."""
    folder: Path | None = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        folder = staging_folder(final)
        yield folder
        publish(folder, final)
    except OSError as error:
        raise cannot_write(what or str(final), error) from None
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, final: Path) -> None:
    """Sync a complete staging folder to the disk and rename it to `final`. OSError where that fails."""
    for path in (*folder.rglob("*"), folder):
        sync(path)
    folder.rename(final)
    sync(final.parent)


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(folder: Path, what: str) -> None:
    """Create `folder` where it is missing. UserError where files cannot be written in it; called before the
    work, not after it. what: how the message names it, like "--out DIR"."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise cannot_write(what, error) from None


def lock(file: IO[Any], busy: str) -> None:
    """Take the exclusive lock of an open file, until it is closed. UserError with the line `busy` where another
    process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(busy) from None


def cannot_write(what: str, error: OSError) -> UserError:
    """The error of everything that cannot be written: one wording for all."""
    return UserError(f"{what} cannot be written: {error.strerror or error}")
