"""The system calls that a generated program is refused, as a seccomp filter: a BPF program that the kernel
runs at each system call of the process. It cannot be removed, needs no privilege, and is the same for root.

The filter sees numbers and register arguments, not what pointers point to, so paths are Landlock's part
(writes.py). Layout of the data and of an instruction: linux/seccomp.h, linux/filter.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

# name, number on x86_64 (asm/unistd_64.h), number on aarch64 (asm-generic/unistd.h); - where it does not
# exist.
_NUMBERS = """
    accept 43 202  accept4 288 242  acct 163 89  add_key 248 217  adjtimex 159 171  bind 49 200  bpf 321 280
    chmod 90 -  chown 92 -  chroot 161 51  clock_adjtime 305 266  clock_settime 227 112  clone 56 220  clone3 435 435
    connect 42 203  delete_module 176 106  execve 59 221  execveat 322 281  fanotify_init 300 262  fchmod 91 52
    fchmodat 268 53  fchown 93 55  fchownat 260 54  fcntl 72 25  finit_module 313 273  fork 57 -
    fremovexattr 199 16  fsconfig 431 431  fsetxattr 190 7  fsmount 432 432  fsopen 430 430  fspick 433 433
    futimesat 261 -  init_module 175 105  io_uring_enter 426 426  io_uring_register 427 427  io_uring_setup 425 425
    ioctl 16 29  ioperm 173 -  iopl 172 -  ioprio_set 251 30  kcmp 312 272  kexec_file_load 320 294
    kexec_load 246 104  keyctl 250 219  kill 62 129  lchown 94 -  listen 50 201  lremovexattr 198 15
    lsetxattr 189 6  migrate_pages 256 238  mkdir 83 -  mkdirat 258 34  mount 165 40  mount_setattr 442 442
    move_mount 429 429  move_pages 279 239  mq_getsetattr 245 185  mq_notify 244 184  mq_open 240 180
    mq_timedreceive 243 183  mq_timedsend 242 182  mq_unlink 241 181  msgctl 71 187  msgget 68 186  msgrcv 70 188
    msgsnd 69 189  open 2 -  open_by_handle_at 304 265  open_tree 428 428  openat 257 56  openat2 437 437
    perf_event_open 298 241  personality 135 92  pidfd_getfd 438 438  pidfd_open 434 434  pidfd_send_signal 424 424
    pivot_root 155 41  prctl 157 167  prlimit64 302 261  process_madvise 440 440  process_mrelease 448 448
    process_vm_readv 310 270  process_vm_writev 311 271  ptrace 101 117  quotactl 179 60  quotactl_fd 443 443
    reboot 169 142  removexattr 197 14  request_key 249 218  rt_sigqueueinfo 129 138  rt_tgsigqueueinfo 297 240
    sched_setaffinity 203 122  sched_setattr 314 274  sched_setparam 142 118  sched_setscheduler 144 119
    semctl 66 191  semget 64 190  semop 65 193  semtimedop 220 192  setdomainname 171 162  sethostname 170 161
    setns 308 268  setpriority 141 140  settimeofday 164 170  setxattr 188 5  shmat 30 196  shmctl 31 195
    shmdt 67 197  shmget 29 194  socket 41 198  socketpair 53 199  swapoff 168 225  swapon 167 224  syslog 103 116
    tgkill 234 131  tkill 200 130  truncate 76 45  umask 95 166  umount2 166 39  unshare 272 97  userfaultfd 323 282
    utime 132 -  utimensat 280 88  utimes 235 -  vfork 58 -  vhangup 153 58
"""
LAST_KNOWN = 450
"""Largest number in the headers that the table was compared with (Linux 6.1; equal on both machines). A newer
system call fails as on an older kernel, where libraries use an older one; so do those of x86_64's x32."""
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the table, and AUDIT_ARCH_* of linux/audit.h."""

REFUSED = {
    "other processes": "fork vfork execve execveat unshare setns",
    "attributes of files": "chmod fchmod fchmodat chown lchown fchown fchownat utime utimes futimesat utimensat "
    "setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr",
    # Landlock before Linux 6.2 does not see truncation.
    "files by other ways than open": "truncate open_by_handle_at",
    "sockets": "socket connect bind listen accept accept4",
    "shared memory, semaphores and message queues": "shmget shmat shmctl shmdt semget semop semctl semtimedop "
    "msgget msgsnd msgrcv msgctl mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr",
    "memory and signals of other processes": "tkill pidfd_open pidfd_getfd pidfd_send_signal ptrace process_vm_readv "
    "process_vm_writev process_madvise process_mrelease kcmp migrate_pages move_pages ioprio_set",
    "ways around this filter": "io_uring_setup io_uring_enter io_uring_register",
    "the kernel": "add_key request_key keyctl perf_event_open bpf userfaultfd fanotify_init personality mount umount2 "
    "pivot_root move_mount open_tree fsopen fsconfig fsmount fspick mount_setattr chroot quotactl quotactl_fd acct "
    "swapon swapoff reboot init_module finit_module delete_module kexec_load kexec_file_load settimeofday "
    "clock_settime adjtimex clock_adjtime sethostname setdomainname syslog vhangup iopl ioperm",
}
MISSING = "clone3 openat2"
"""Their arguments are in memory. They fail as on an older kernel, so that clone and openat are used."""

_THREAD, _NAMESPACES = 0x00010000, 0x7E020000  # CLONE_THREAD; CLONE_NEW*
_TRUNC, _ACCESS = 0o1000, 0o3
_OPEN_FLAGS = (
    _ACCESS | _TRUNC,
    (0, 1, 2, 1 | _TRUNC, 2 | _TRUNC),
)  # truncation only where it is opened to write
_OWNER_MAY_USE = (0o700, (0o700,))

Condition = tuple[int, int, tuple[int, ...]]
"""Which argument, mask, values: argument & mask is one of the values."""


def conditions(pid: int) -> dict[str, list[Condition]]:
    """The system calls that process `pid` may make only if all conditions hold. Arguments are compared in
    their lower 32 bits, which are all that the kernel reads of these."""
    every = 0xFFFFFFFF
    itself: Condition = (0, every, (0, pid))
    return {
        "clone": [(0, _THREAD | _NAMESPACES, (_THREAD,))],
        "open": [(1, *_OPEN_FLAGS)],
        "openat": [(2, *_OPEN_FLAGS)],
        # Folders that the caller can measure and remove, whoever runs it.
        "mkdir": [(1, *_OWNER_MAY_USE)],
        "mkdirat": [(2, *_OWNER_MAY_USE)],
        "umask": [(0, 0o700, (0,))],
        # asyncio needs one: AF_UNIX and SOCK_STREAM, which cannot send to another address.
        "socketpair": [(0, every, (1,)), (1, 0xF, (1,))],
        # Questions to files and terminals: TCGETS, TIOCGPGRP, TIOCGWINSZ, FIONREAD, FIONBIO, FIO(N)CLEX.
        # Others change attributes of files, or type into a terminal.
        "ioctl": [(1, every, (0x5401, 0x540F, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451))],
        # Duplicates, flags, locks, pipe sizes, seals; not F_SETOWN, F_SETSIG and F_SETLEASE, which signal
        # or block other processes.
        "fcntl": [(1, every, (*range(8), 9, 36, 37, 38, *range(1030, 1035)))],
        # Names of threads and of memory; not the signal at the caller's death.
        "prctl": [(0, every, (15, 16, 0x53564D41))],
        "kill": [itself],
        "tgkill": [itself],
        "rt_sigqueueinfo": [itself],
        "rt_tgsigqueueinfo": [itself],
        "sched_setaffinity": [itself],
        "sched_setattr": [itself],
        "sched_setparam": [itself],
        "sched_setscheduler": [itself],
        "prlimit64": [itself],
        "setpriority": [(0, every, (0,)), (1, every, (0, pid))],  # PRIO_PROCESS
    }


def numbers(machine: str) -> dict[str, int]:
    """System call numbers by name. machine: a key of MACHINES."""
    words = _NUMBERS.split()
    column = 1 + MACHINES[machine][0]
    return {words[i]: int(words[i + column]) for i in range(0, len(words), 3) if words[i + column] != "-"}


# ---- the BPF program ---------------------------------------------------------------------------

_LOAD, _AND, _RETURN = 0x20, 0x54, 0x06
_IF_EQUAL, _IF_GREATER = 0x15, 0x25
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def _instruction(code: int, value: int, skip_if: int = 0, skip_if_not: int = 0) -> bytes:
    return struct.pack("=HBBI", code, skip_if, skip_if_not, value)


def build(machine: str, pid: int) -> bytes:
    """The filter of process `pid`: instructions of 8 bytes."""
    refuse = _instruction(_RETURN, _ERRNO | errno.EPERM)
    missing = _instruction(_RETURN, _ERRNO | errno.ENOSYS)
    allow = _instruction(_RETURN, _ALLOW)
    number = numbers(machine)
    program = [
        _instruction(_LOAD, 4),
        _instruction(_IF_EQUAL, MACHINES[machine][1], skip_if=1),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, 0),
        _instruction(_IF_GREATER, LAST_KNOWN, skip_if_not=1),
        missing,
    ]
    always = {name: refuse for names in REFUSED.values() for name in names.split()}
    for name, answer in (always | dict.fromkeys(MISSING.split(), missing)).items():
        if name in number:
            program += [_instruction(_IF_EQUAL, number[name], skip_if_not=1), answer]
    for name, required in conditions(pid).items():
        if name not in number:
            continue
        block = []
        for argument, mask, values in required:
            block += [_instruction(_LOAD, 16 + 8 * argument), _instruction(_AND, mask)]
            block += [
                _instruction(_IF_EQUAL, value, skip_if=len(values) - i) for i, value in enumerate(values)
            ]
            block.append(refuse)
        block.append(allow)
        program += [_instruction(_IF_EQUAL, number[name], skip_if_not=len(block)), *block]
    return b"".join([*program, allow])


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def install(libc: ctypes.CDLL, pid: int) -> bool:
    """From now on this process, and threads that it starts, may make only the system calls above. False where
    the kernel or this machine's numbers do not support it."""
    machine = os.uname().machine
    if machine not in MACHINES:
        return False
    program = build(machine, pid)
    pointer = ctypes.byref(_Program(len(program) // 8, program))
    set_no_new_privs, set_seccomp, mode_filter = 38, 22, 2
    return (
        libc.prctl(set_no_new_privs, 1, 0, 0, 0) == 0
        and libc.prctl(set_seccomp, mode_filter, pointer, 0, 0) == 0
    )
