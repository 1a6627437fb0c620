"""Confine where a process can write: by Landlock (Linux 5.13), or by a mount namespace of its own in which
everything else is read-only (user namespaces, or root).

Both also keep the memory, environment and open files of other processes from it (ptrace's access check). What
Landlock does not cover, such as modes and times of files, is refused by seccomp.py.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

LANDLOCK, MOUNTS = "Landlock", "read-only mounts"
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_WRITE_FILE, _TRUNCATE = 1 << 1, 1 << 14
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_NOSUID, _NODEV, _RDONLY, _REMOUNT, _BIND, _REC, _PRIVATE = 2, 4, 1, 32, 4096, 16384, 1 << 18
_KEPT = {
    "nosuid": _NOSUID,
    "nodev": _NODEV,
    "noexec": 8,
    "noatime": 1024,
    "nodiratime": 2048,
    "relatime": 1 << 21,
}
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def confine(libc: ctypes.CDLL, folder: str, mechanisms: tuple[str, ...]) -> str:
    """From now on this process can create, write and remove files only below `folder`, and write to
    /dev/null.

    mechanisms: which to try, in this order. Returns the one that holds, or "".
    """
    functions = {LANDLOCK: _landlock, MOUNTS: _read_only_mounts}
    return next((name for name in mechanisms if functions[name](libc, folder)), "")


def _landlock(libc: ctypes.CDLL, folder: str) -> bool:
    version = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    if version < 1:
        return False
    # Write (bit 1), remove (4, 5), create (6-12); from version 2 on also link and move between folders (13),
    # from version 3 on truncate (14).
    rights = _WRITE_FILE | sum(1 << bit for bit in range(4, 13))
    rights |= (1 << 13 if version >= 2 else 0) | (_TRUNCATE if version >= 3 else 0)
    rules = libc.syscall(_LANDLOCK_CREATE, struct.pack("=Q", rights), ctypes.c_size_t(8), ctypes.c_uint(0))
    if rules < 0:
        return False
    for path, allowed in ((folder, rights), ("/dev/null", rights & (_WRITE_FILE | _TRUNCATE))):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", allowed, place)
        added = libc.syscall(_LANDLOCK_ADD, ctypes.c_int(rules), ctypes.c_int(1), rule, ctypes.c_uint(0))
        os.close(place)
        if added != 0:
            return False
    no_new_privs = libc.prctl(38, 1, 0, 0, 0) == 0
    restricted = libc.syscall(_LANDLOCK_RESTRICT, ctypes.c_int(rules), ctypes.c_uint(0)) == 0
    os.close(rules)
    return no_new_privs and restricted


def _read_only_mounts(libc: ctypes.CDLL, folder: str) -> bool:
    """A mount namespace in which all but `folder` is read-only and only harmless devices can be opened.

    Named pipes of others can still be written to: a read-only mount does not cover them.
    """
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(_CLONE_NEWNS) != 0:
        if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS) != 0:
            return False
        for name, content in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            try:
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(content)
            except OSError:
                return False

    def mount(source: str | None, target: str, flags: int) -> int:
        path = None if source is None else os.fsencode(source)
        done = libc.mount(path, os.fsencode(target), None, ctypes.c_ulong(flags), None)
        return 0 if done == 0 else ctypes.get_errno()

    if mount("none", "/", _REC | _PRIVATE) != 0:  # mounts made here are not seen elsewhere, nor others' here
        return False
    folder = os.path.realpath(folder)
    writable = [folder, *(path for path in _DEVICES if os.path.exists(path))]
    if any(mount(path, path, _BIND) != 0 for path in writable):
        return False
    with open("/proc/self/mountinfo", "rb") as lines:
        mounts = [line.split()[4:6] for line in lines]
    for escaped, options in mounts:
        point = os.fsdecode(escaped.decode("unicode_escape").encode("latin-1"))
        kept = sum(_KEPT.get(option, 0) for option in options.decode().split(","))
        if point not in writable:
            failed = mount(None, point, _REMOUNT | _BIND | _RDONLY | _NODEV | _NOSUID | kept)
            # These cannot be reached: below a folder that is closed to this user, or under another mount.
            if failed not in (0, errno.EACCES, errno.ENOENT, errno.EINVAL, errno.ENOTDIR):
                return False
    os.chdir(folder)
    return True


def drop_capabilities(libc: ctypes.CDLL) -> bool:
    """Give up root's privileges but reading all files, without which packages in closed folders could not be
    imported. Other users have none. False where the kernel refuses it."""
    read_search = 1 << 2
    header = struct.pack("=Ii", 0x20080522, 0)
    sets = ctypes.create_string_buffer(24)  # effective, permitted, inheritable; lower 32 bits, then upper
    if libc.capget(header, sets) != 0:
        return False
    kept = struct.unpack("=6I", sets.raw)[1] & read_search
    return bool(libc.capset(header, struct.pack("=6I", kept, kept, 0, 0, 0, 0)) == 0)
