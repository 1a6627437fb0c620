"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megatron_ultralong.data.pretrain import token_cache
from megatron_ultralong.errors import UserError
from megatron_ultralong.io import atomic_files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    path = tmp_path / "a.json"
    atomic_files.write_json(path, {"text": "é \ud800"})
    assert path.read_text(encoding="utf-8") == '{\n "text": "é \\ud800"\n}\n' and atomic_files.read_json(
        path
    ) == {"text": "é \ud800"}
    with pytest.raises(RuntimeError), atomic_files.whole_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert atomic_files.read_json(path) == {"text": "é \ud800"} and names(tmp_path) == ["a.json"]
    (tmp_path / ".a.json.partial").write_text("left by a killed run")
    atomic_files.write_json(path, {})
    assert atomic_files.read_json(path) == {} and names(tmp_path) == ["a.json"]


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=r"a cannot be written: Is a directory"):
        atomic_files.write_text(tmp_path / "a", "x")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output file cannot be written: "):
        atomic_files.check_writable(tmp_path / "file" / "below", "--output file")
    with (
        pytest.raises(UserError, match="cannot be written"),
        atomic_files.whole_folder(tmp_path / "file" / "below"),
    ):
        pass
    assert names(tmp_path) == ["a", "file"]


def test_a_folder_is_whole_or_absent(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_files.whole_folder(tmp_path / "below" / "out") as folder:
            assert not (tmp_path / "below" / "out").exists()
            (folder / "x").write_text("1")
    finally:
        os.umask(old)
    out = tmp_path / "below" / "out"
    assert (out / "x").read_text() == "1" and stat.S_IMODE(out.stat().st_mode) == 0o750
    with pytest.raises(KeyboardInterrupt), atomic_files.whole_folder(tmp_path / "below" / "other") as folder:
        (folder / "x").write_text("1")
        raise KeyboardInterrupt
    assert names(tmp_path / "below") == ["out"]


def test_json_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="none is missing"):
        atomic_files.read_json(tmp_path / "none")
    for text in ("[]", "{", "\x00"):
        (tmp_path / "broken").write_text(text)
        with pytest.raises(UserError, match="broken cannot be read"):
            atomic_files.read_json(tmp_path / "broken")


def test_kill_while_writing_leaves_the_old_file(tmp_path):
    atomic_files.write_text(tmp_path / "a", "old")
    code = """
        import os, signal
        from pathlib import Path
        from megatron_ultralong.io import atomic_files
        with atomic_files.whole_file(Path("a")) as file:
            file.write(b"half of the new")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path).returncode == -9
    assert (tmp_path / "a").read_text() == "old"
    atomic_files.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new" and names(tmp_path) == ["a"]


def test_a_symbolic_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "a")  # the file does not exist at first
    for text in ("one", "two"):
        atomic_files.check_file_writable(tmp_path / "link", "--json link")
        atomic_files.write_text(tmp_path / "link", text)
        assert (tmp_path / "real" / "a").read_text() == text and (tmp_path / "link").is_symlink()
    assert names(tmp_path) == ["link", "real"] and names(tmp_path / "real") == ["a"]


def test_pipes_and_devices_are_written_directly(tmp_path):
    atomic_files.check_file_writable(Path(os.devnull), "--json /dev/null")
    atomic_files.write_text(Path(os.devnull), "x")
    assert not Path(os.devnull).is_file()
    read, write = os.pipe()
    try:
        path = Path(f"/dev/fd/{write}")
        atomic_files.check_file_writable(path, f"--json {path}")
        atomic_files.write_json(path, {"a": 1}, indent=None)
        assert os.read(read, 100) == b'{"a": 1}\n'
    finally:
        os.close(read)
        os.close(write)
    with pytest.raises(UserError, match="--json x cannot be written: Is a directory"):
        atomic_files.check_file_writable(tmp_path, "--json x")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_folder_that_cannot_be_synced(number, tmp_path, monkeypatch):
    fsync, failing = os.fsync, [stat.S_ISDIR]

    def refuse(handle):
        if any(is_kind(os.fstat(handle).st_mode) for is_kind in failing):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(number)):
            atomic_files.sync(tmp_path)
        return
    with atomic_files.whole_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
    assert names(tmp_path / "out") == ["x"]
    failing.append(stat.S_ISREG)  # a file that cannot be synced is an error
    with pytest.raises(OSError, match=os.strerror(number)):
        atomic_files.sync(tmp_path / "out" / "x")


def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    says = "cannot be locked: No locks available; its file system must support locks"
    with (tmp_path / "lock").open("a") as file, pytest.raises(UserError, match=f"lock {says}"):
        atomic_files.lock(file, "unused")
    with (
        pytest.raises(UserError, match=says),
        atomic_files.whole_file(tmp_path / "a", busy="unused"),
    ):
        pass
    with pytest.raises(UserError, match=says), token_cache.locked(tmp_path / "tokens"):
        pass


def test_lock_is_held_once(tmp_path):
    with (tmp_path / "lock").open("a") as one, (tmp_path / "lock").open("a") as other:
        atomic_files.lock(one, "unused")
        with pytest.raises(UserError, match="another run is writing"):
            atomic_files.lock(other, "another run is writing")
    with (tmp_path / "lock").open("a") as other:
        atomic_files.lock(other, "free again")
