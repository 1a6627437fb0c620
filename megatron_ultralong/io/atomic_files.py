"""Files and folders that appear complete or not at all, and locks: every writer of the library uses this
module.

What is being written has a hidden name next to the final one (`.NAME.partial`, `.NAME.partial-XXXX` for
folders), is synced to the disk, and is renamed once it is complete. A killed process leaves at most such a
hidden name. Where the final name is a symbolic link, the file that it names is replaced, and the link stays.
Devices and pipes, like /dev/stdout, cannot be replaced and are written directly."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from megatron_ultralong.errors import UserError


@contextlib.contextmanager
def whole_file(path: Path, *, what: str | None = None, busy: str | None = None) -> Iterator[IO[bytes]]:
    """Yield a binary file to write to, which is renamed to `path` when the block ends without an exception.

    The folder must exist. what: how messages name the file; its path if None. busy: the message where another
    process is writing the same file; None = do not lock. UserError where it cannot be written; an earlier
    file at `path` then stays as it was."""
    try:
        if _is_special(path):
            with path.open("wb") as file:
                yield file
            return
        final = Path(os.path.realpath(path))
        # One name: the next run overwrites a killed run's file.
        partial = final.with_name(f".{final.name}.partial")
        with partial.open("wb") if busy is None else open_locked(partial, busy) as file:
            try:
                file.truncate(0)
                yield file
                file.flush()
                os.fsync(file.fileno())
                partial.replace(final)
            except BaseException:
                with contextlib.suppress(OSError):
                    partial.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise cannot_write(what or str(path), error) from None


def write_text(path: Path, text: str, *, what: str | None = None) -> None:
    """Write `text` as UTF-8, completely or not at all. UserError where it cannot be written.

    A lone surrogate, which a model's text may contain, is written as its backslash escape.
    """
    with whole_file(path, what=what) as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))


def write_json(path: Path, values: Any, *, indent: int | None = 1, what: str | None = None) -> None:
    """Write `values` as JSON, completely or not at all. UserError where it cannot be written."""
    write_text(path, json.dumps(values, indent=indent, ensure_ascii=False) + "\n", what=what)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. UserError names the file where it is missing, unreadable or not an object."""
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
    """Create a hidden folder next to `final`, with a new folder's usual permissions. OSError where that
    fails."""
    folder = Path(tempfile.mkdtemp(prefix=f".{final.name}.partial-", dir=final.parent))
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)  # mkdtemp makes it private
    return folder


def staging_pattern(final: Path) -> str:
    """Pattern for `glob` of the folders that `staging_folder` creates for `final`."""
    return f".{glob.escape(final.name)}.partial-*"


def remove_abandoned(parent: Path, pattern: str, what: str) -> list[str]:
    """Remove the staging folders in `parent` that match `pattern` and whose lock (`lock_folder`) is free,
    which interrupted processes have left. Returns a line about them; none where there are none.

    what: what was interrupted, like "export to DIR"."""
    size = count = 0
    for folder in sorted(parent.glob(pattern)):
        with contextlib.suppress(OSError):  # in use by another process, or just gone
            handle = lock_folder(folder)
            try:
                size += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                shutil.rmtree(folder, ignore_errors=True)
                count += 1
            finally:
                os.close(handle)
    return [f"removed what an interrupted {what} had left ({size / 1e9:.3g} GB)"] if count else []


def lock_folder(folder: Path) -> int:
    """Take the exclusive lock of a folder, until the descriptor that is returned is closed; where the file
    system has no locks, nothing is locked. BlockingIOError where another process has it, and other OSErrors
    where it cannot be opened."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        pass
    return handle


@contextlib.contextmanager
def under_final_name(staging: Path, final: Path) -> Iterator[None]:
    """UserErrors of the block name `final` in place of the folder `staging`, which no user has heard of."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(str(staging), str(final))) from None


@contextlib.contextmanager
def whole_folder(final: Path, *, what: str | None = None) -> Iterator[Path]:
    """Yield a hidden folder to fill, which is renamed to `final` when the block ends without an exception and
    is removed otherwise. `final` must not exist. UserError where it cannot be written."""
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
    """Flush a file or a folder's entries to the disk. A folder that its file system cannot sync is left to
    it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network and FUSE file systems sync files only.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def check_writable(folder: Path, what: str) -> None:
    """Create `folder` if missing. UserError where files cannot be written in it; call it before the work.

    what: how the message names it, like "--output DIR".
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise cannot_write(what, error) from None


def check_file_writable(path: Path, what: str) -> None:
    """Create the folder of `path` if missing. UserError where `whole_file` could not write `path`; call it
    before the work. what: as in `check_writable`."""
    try:
        if not _is_special(path):
            check_writable(Path(os.path.realpath(path)).parent, what)
        elif path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        elif not os.access(path, os.W_OK):  # not opened: a pipe would wait for its reader
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise cannot_write(what, error) from None


def _is_special(path: Path) -> bool:
    """Whether `path` exists and is not a file, like a device, a pipe, or a directory, which fails when it is
    opened. It is not resolved first: the pipe behind a /dev/stdout has no path."""
    return path.exists() and not path.is_file()


def open_locked(path: Path, busy: str) -> BinaryIO:
    """Open `path` to read and append, created if missing, with its exclusive lock. UserError with the line
    `busy` where another process has it, or where it cannot be locked; OSError where it cannot be opened."""
    while True:
        file = path.open("a+b")
        try:
            lock(file, busy)
            # The last owner may have renamed or removed it between our opening and our lock.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def lock(file: IO[Any], busy: str) -> None:
    """Take the exclusive lock of an open file, until it is closed. UserError with the line `busy` where
    another process has it, and where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(busy) from None
    except OSError as error:
        raise UserError(
            f"{file.name} cannot be locked: {error.strerror or error}; its file system must support locks"
        ) from None


def cannot_write(what: str, error: OSError) -> UserError:
    """The error of anything that cannot be written: one wording for all."""
    return UserError(f"{what} cannot be written: {error.strerror or error}")
