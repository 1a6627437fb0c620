"""What a generated program must not do, as a program: it tries everything, and raises an AssertionError
with what was not refused. With an argument it prints every attempt's result: outside the sandbox they
work."""

import ctypes
import errno
import fcntl
import json
import os
import platform
import resource
import signal
import socket
import struct
import subprocess
import sys

# Set by the test: a folder with `file`, `other` and `sub/`, and a process, all of the same user.
FOLDER, VICTIM = "", 0
FILE = f"{FOLDER}/file"
REFUSALS = "EPERM EACCES EROFS ENOSYS EXDEV".split()
ARM = platform.machine() == "aarch64"
libc = ctypes.CDLL(None, use_errno=True)


def call(on_x86, on_arm, *arguments):
    """A system call by number. OSError where it fails."""
    words = [
        ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_long(value) for value in arguments
    ]
    result = libc.syscall(ctypes.c_long(on_arm if ARM else on_x86), *words)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def fork_by_number():
    if call(56, 220, signal.SIGCHLD, 0, 0, 0, 0) == 0:
        os._exit(0)


def descriptor(function, *arguments, flags=os.O_RDONLY):
    number = os.open(FILE, flags)
    try:
        return function(number, *arguments)
    finally:
        os.close(number)


def more_memory():
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    try:
        resource.setrlimit(resource.RLIMIT_AS, (hard, resource.RLIM_INFINITY))
    except ValueError as error:
        raise PermissionError(errno.EPERM, str(error)) from None


def closed_folder():
    os.mkdir("closed", 0o300)
    os.rmdir("closed")


ATTEMPTS = {
    "write": lambda: open(FILE, "w").close(),
    "append": lambda: open(FILE, "a").close(),
    "open to read and truncate": lambda: os.close(os.open(FILE, os.O_RDONLY | os.O_TRUNC)),
    "truncate": lambda: os.truncate(FILE, 0),
    "create": lambda: open(f"{FOLDER}/new", "x").close(),
    "unnamed file": lambda: os.close(os.open(FOLDER, os.O_TMPFILE | os.O_RDWR)),
    "remove": lambda: os.remove(f"{FOLDER}/other"),
    "move in": lambda: (os.rename(FILE, "mine"), os.rename("mine", FILE)),
    "move out": lambda: (open("own", "w").close(), os.rename("own", f"{FOLDER}/moved")),
    "link": lambda: os.link(FILE, "linked"),
    "symlink": lambda: os.symlink("x", f"{FOLDER}/symlink"),
    "through a symlink": lambda: (os.symlink(FILE, "there"), open("there", "a").close()),
    "mkdir": lambda: os.mkdir(f"{FOLDER}/made"),
    "rmdir": lambda: os.rmdir(f"{FOLDER}/sub"),
    "mkfifo": lambda: os.mkfifo(f"{FOLDER}/fifo"),
    "shared memory file": lambda: (
        open("/dev/shm/answer-test", "w").close(),
        os.remove("/dev/shm/answer-test"),
    ),
    "own oom score": lambda: open("/proc/self/oom_score_adj", "w").close(),
    "chmod": lambda: os.chmod(FILE, 0o640),
    "fchmod": lambda: descriptor(os.fchmod, 0o640),
    "chmod by folder": lambda: descriptor(lambda _: os.chmod("file", 0o640, dir_fd=os.open(FOLDER, 0))),
    "fchmodat2": lambda: call(452, 452, -100, FILE.encode(), 0o640, 0),
    "chown": lambda: os.chown(FILE, os.getuid(), os.getgid()),
    "fchown": lambda: descriptor(os.fchown, os.getuid(), os.getgid()),
    "lchown": lambda: os.lchown(FILE, os.getuid(), os.getgid()),
    "utime": lambda: os.utime(FILE, (1, 1)),
    "utime of a descriptor": lambda: descriptor(os.utime, (1, 1)),
    "xattr": lambda: os.setxattr(FILE, "user.a", b"b"),
    "xattr of a descriptor": lambda: descriptor(os.setxattr, "user.a", b"b"),
    "remove xattr": lambda: os.removexattr(FILE, "user.kept"),
    "attributes by ioctl": lambda: descriptor(fcntl.ioctl, 0x40086602, struct.pack("l", 0x80)),  # no atime
    "closed folder": closed_folder,
    "umask": lambda: os.umask(os.umask(0o777)),
    "tcp": lambda: socket.socket().close(),
    "tcp6": lambda: socket.socket(socket.AF_INET6).close(),
    "udp": lambda: socket.socket(type=socket.SOCK_DGRAM).close(),
    "unix": lambda: socket.socket(socket.AF_UNIX).close(),
    "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close(),
    "unix datagram pair": lambda: [end.close() for end in socket.socketpair(type=socket.SOCK_DGRAM)],
    "shmget": lambda: call(31, 195, call(29, 194, 0, 4096, 0o1600), 0, 0),
    "semget": lambda: call(66, 191, call(64, 190, 0, 1, 0o1600), 0, 0),
    "msgget": lambda: call(71, 187, call(68, 186, 0, 0o1600), 0, 0),
    "mq_open": lambda: (call(240, 180, b"answer-test", 0o102, 0o600, 0), call(241, 181, b"answer-test")),
    "fork": lambda: os.fork() or os._exit(0),
    "fork by number": fork_by_number,
    "clone3": lambda: call(435, 435, 0, 0),
    "posix_spawn": lambda: os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0),
    "subprocess": lambda: subprocess.run(["true"]),
    "exec": lambda: os.execv("/nothing", ["x"]),
    "new namespace": lambda: call(272, 97, 0),
    "signal": lambda: os.kill(VICTIM, 0),
    "signal to all": lambda: os.kill(-1, 0),
    "signal to its group": lambda: os.killpg(os.getpgid(VICTIM), 0),
    "signal to a thread": lambda: call(234, 131, VICTIM, VICTIM, 0),
    "queued signal": lambda: call(129, 138, VICTIM, 0, b"\xff" * 128),
    "pidfd": lambda: os.close(os.pidfd_open(VICTIM)),
    "signal by file": lambda: descriptor(fcntl.fcntl, fcntl.F_SETOWN, VICTIM),
    "lease": lambda: descriptor(fcntl.fcntl, fcntl.F_SETLEASE, fcntl.F_RDLCK),
    "survive": lambda: call(157, 167, 1, 0, 0, 0, 0),
    "environment": lambda: open(f"/proc/{VICTIM}/environ").close(),
    "memory": lambda: open(f"/proc/{VICTIM}/mem").close(),
    "its root": lambda: os.stat(f"/proc/{VICTIM}/root{FILE}"),
    "process_vm_readv": lambda: call(310, 270, VICTIM, 0, 0, 0, 0, 0),
    "priority": lambda: os.setpriority(os.PRIO_PROCESS, VICTIM, 19),
    "priority of nobody": lambda: os.setpriority(os.PRIO_USER, 1 << 30, 0),
    "affinity": lambda: os.sched_setaffinity(VICTIM, os.sched_getaffinity(VICTIM)),
    "limits": lambda: resource.prlimit(VICTIM, resource.RLIMIT_CORE, (0, 0)),
    "io_uring": lambda: os.close(call(425, 425, 1, b"\0" * 120)),
    "keyctl": lambda: call(250, 219, 0, -3, 1),
    "userfaultfd": lambda: os.close(call(323, 282, 1)),
    "personality": lambda: call(135, 92, 0),
    "more memory": more_memory,
}


def results():
    """Per attempt "done" or the error's name."""
    results = {}
    for name, attempt in ATTEMPTS.items():
        try:
            attempt()
            results[name] = "done"
        except OSError as error:
            results[name] = errno.errorcode[error.errno]
    return results


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(results()))
    else:
        failed = {name: result for name, result in results().items() if result not in REFUSALS}
        assert not failed, failed
