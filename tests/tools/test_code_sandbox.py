"""Programs that must be held, by every mechanism, whoever runs them."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_ultralong.evaluate.code_sandbox import sandbox, seccomp, writes

ROOT = Path(__file__).parents[2]
NOBODY = 65534
ATTACKS = (Path(__file__).parent / "sandbox_attacks.py").read_text()
LEGITIMATE = """
import asyncio, concurrent.futures, contextlib, dataclasses, importlib.util, os, pickle, shutil, sys, tempfile, threading, typing
with concurrent.futures.ThreadPoolExecutor(32) as pool:
    assert list(pool.map(abs, range(100))) == list(range(100))
threads = [threading.Thread(target=sum, args=((1, 2),)) for _ in range(100)]
for thread in threads: thread.start()
for thread in threads: thread.join()
async def later(x):
    await asyncio.sleep(0.01)
    return x
async def both():
    return await asyncio.gather(later(1), asyncio.to_thread(len, "ab"))
assert asyncio.run(both()) == [1, 2]
@dataclasses.dataclass
class Point:
    x: "int"
assert pickle.loads(pickle.dumps(Point(3))) == Point(3) and typing.get_type_hints(Point) == {"x": int}
def depth(n): return n and 1 + depth(n - 1)
sys.setrecursionlimit(10000)
assert depth(5000) == 5000
with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile("w+") as file:
    os.makedirs(folder + "/a/b")
    open(folder + "/a/b/c", "w").write("text")
    os.rename(folder + "/a/b/c", folder + "/a/b/d")
    shutil.copyfile(folder + "/a/b/d", folder + "/e")
    os.symlink("e", folder + "/f")
    assert open(folder + "/f").read() == "text"
    file.write("1234"), file.truncate(2)
with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
    print("x" * 10**7)
print("x" * 10**7)
assert "def makedirs" in open(os.__file__).read()
assert len(os.listdir("/")) > 3 and os.urandom(4) and open("/dev/urandom", "rb").read(4) and os.cpu_count()
os.kill(os.getpid(), 0), os.nice(0), os.sched_setaffinity(0, os.sched_getaffinity(0)), os.isatty(0)
if importlib.util.find_spec("numpy"):
    import numpy
    assert (numpy.ones((99, 99)) @ numpy.ones((99, 99)))[0, 0] == 99 and numpy.random.default_rng(0).random() < 1
"""
RUN = """
import json, sys
from megatron_ultralong.evaluate.code_sandbox import sandbox
mechanisms, programs = json.load(sys.stdin)
for mechanism in mechanisms:
    sandbox.MECHANISMS = (mechanism,)
    outcomes = [sandbox.run(program) for program in programs]
    print(json.dumps([[one.passed, one.reason, *one.held_by] for one in outcomes]))
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux holds the rules")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can reach; pytest's is closed."""
    path = Path(tempfile.mkdtemp(prefix="sandbox-test-"))
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


def user(name: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """An interpreter that the user can run, with this sandbox; and the arguments of its process."""
    if name == "caller":
        return sys.executable, {"env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    package = Path(sandbox.__file__).parent
    target = folder / "code" / package.relative_to(ROOT)
    shutil.copytree(package, target, ignore=shutil.ignore_patterns("__pycache__"))
    for parent in (target.parent, target.parent.parent):
        (parent / "__init__.py").touch()
    arguments: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    arguments["env"] = {"PYTHONPATH": str(folder / "code"), "PATH": os.defpath}
    for interpreter in (sys.executable, "/usr/bin/python3"):
        try:
            subprocess.run(
                [interpreter, "-c", "import ctypes, sys; assert sys.version_info >= (3, 9)"],
                check=True,
                **arguments,
            )
            return interpreter, arguments
        except (OSError, subprocess.CalledProcessError):
            continue
    pytest.skip("no Python that another user can run")


def state(folder: Path) -> dict[str, tuple[int, ...]]:
    """What a change would change, the inodes' own time among it."""
    stats = {path.name: path.lstat() for path in (folder, *folder.iterdir())}
    return {
        name: (one.st_mode, one.st_uid, one.st_nlink, one.st_size, one.st_ctime_ns)
        for name, one in stats.items()
    }


@pytest.mark.parametrize("name", ["caller", "nobody"])
def test_everything_outside_is_refused_and_what_answers_need_works(folder: Path, name: str) -> None:
    interpreter, arguments = user(name, folder)
    target, scratch = folder / "outside", folder / "scratch"
    (target / "sub").mkdir(parents=True)
    scratch.mkdir()
    for file in (target / "file", target / "other"):
        file.write_text("kept")
    os.setxattr(target / "file", "user.kept", b"")
    if name == "nobody":
        for path in (target, scratch, *target.iterdir()):
            os.chown(path, NOBODY, NOBODY)
    before = state(target)
    victim = subprocess.Popen(["sleep", "100"], **arguments)
    try:
        set_up = f"FOLDER, VICTIM = {str(target)!r}, {victim.pid}"
        attacks, count = re.subn(r"^FOLDER, VICTIM = .*$", set_up, ATTACKS, flags=re.MULTILINE)
        assert count == 1
        programs = [attacks, LEGITIMATE]
        outcomes = subprocess.run(
            [interpreter, "-c", RUN],
            input=json.dumps([sandbox.MECHANISMS, programs]),
            capture_output=True,
            text=True,
            check=False,
            **arguments,
        )
        assert outcomes.returncode == 0, outcomes.stderr
        for mechanism, line in zip(sandbox.MECHANISMS, outcomes.stdout.splitlines(), strict=True):
            results = json.loads(line)
            if results[0][1] == "not confined":  # this machine does not support it
                continue
            assert results == [[True, "", "seccomp", mechanism]] * 2
        assert state(target) == before
        # Without the sandbox the same attempts succeed; those that a kernel may lack aside.
        control = subprocess.run(
            [interpreter, "-c", attacks, "print"],
            cwd=scratch,
            capture_output=True,
            text=True,
            check=False,
            **arguments,
        )
        done = json.loads(control.stdout)
        optional = {
            "fchmodat2",
            "keyctl",
            "mq_open",
            "io_uring",
            "userfaultfd",
            "tcp6",
            "attributes by ioctl",
        }
        failed = {attempt: result for attempt, result in done.items() if result != "done"}
        others = {"exec": "ENOENT", "clone3": "EINVAL", "priority of nobody": "ESRCH"}
        assert {attempt: result for attempt, result in failed.items() if attempt not in optional} == others, (
            control.stderr
        )
    finally:
        victim.kill()
        victim.wait()


OLDER_KERNEL = """
import ctypes, json, os
from megatron_ultralong.evaluate.code_sandbox import sandbox, seccomp
def refuse(*numbers):
    answer = seccomp._instruction(6, 0x50000 | 38)  # ENOSYS
    tests = [seccomp._instruction(0x15, number, skip_if_not=1) + answer for number in numbers]
    program = seccomp._instruction(0x20, 0) + b"".join(tests) + seccomp._instruction(6, 0x7FFF0000)
    filter = ctypes.byref(seccomp._Program(len(program) // 8, program))
    libc = ctypes.CDLL(None)
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, filter, 0, 0) == 0
outcomes = [sandbox.probe()]
refuse(444, 445, 446)
outcomes += [sandbox.probe(), sandbox.run("pass")]
refuse(seccomp.numbers(os.uname().machine)["unshare"])
outcomes += [sandbox.probe(), sandbox.run("pass"), sandbox.run("pass", unconfined=True)]
refuse(seccomp.numbers(os.uname().machine)["prctl"])
outcomes += [sandbox.probe()]
print(json.dumps([[one.reason, *one.held_by] for one in outcomes]))
"""


def test_where_nothing_holds_nothing_is_run() -> None:
    """As on kernels without Landlock, and in containers that allow no namespaces and no filters."""
    if not (writes_by(writes.LANDLOCK) and writes_by(writes.MOUNTS)):
        pytest.skip("this machine does not support both mechanisms")
    done = subprocess.run(
        [sys.executable, "-c", OLDER_KERNEL],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *outcomes, nothing = json.loads(done.stdout)
    assert outcomes == [
        ["", "seccomp", writes.LANDLOCK],
        ["", "seccomp", writes.MOUNTS],
        ["", "seccomp", writes.MOUNTS],
        ["AssertionError: writes outside", "seccomp"],
        ["not confined", "seccomp"],
        ["", "seccomp"],
    ]
    assert nothing[1:] == [] and {"other processes", "network and local sockets", "writes outside"} < set(
        nothing[0].removeprefix("AssertionError: ").split(", ")
    )


def writes_by(mechanism: str) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "MECHANISMS", (mechanism,))
        return mechanism in sandbox.run("pass").held_by


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert sum(range(4)) == 6", ""),
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(: pass", "SyntaxError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("raise ValueError('a\\npassed b')", "ValueError: a passed b"),
        ("raise ValueError('\\udc80')", "ValueError"),
        ("import os; os._exit(0)", "ended early"),
        ("import os; os.closerange(0, 64); os._exit(0)", "ended early"),
        ("import os, time; os.closerange(0, 64); time.sleep(60)", "out of time"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended early"),
        ("while True: pass", "out of time"),
        ("import time; time.sleep(60)", "out of time"),
        ("x = bytearray(1 << 36)", "MemoryError"),
        ("open('big', 'wb').write(bytes(1 << 22))", "OSError"),
        ("while True: print('x' * 10**6)", "out of time"),
        (
            "import os\nwhile True:\n  for i in range(3, 20):\n    try: os.write(i, bytes(9999))\n    except OSError: pass",
            "out of time",
        ),
        ("files = [open('/dev/null') for _ in range(100)]", "OSError"),
        ("input()", "EOFError"),
        (
            "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
            "too many threads",
        ),
        ("import os\nfor i in range(10**7): os.mkdir('x'), os.chdir('x')", "too many files|OSError"),
        ("import os\nwhile True: os.mkdir('x' * 250), os.chdir('x' * 250)", "too many files|OSError"),
        (
            "import itertools, time\nfor i in itertools.count(): open(str(i), 'wb').write(bytes(1 << 20)), time.sleep(0.001)",
            "too many files",
        ),
    ],
)
def test_a_program_is_judged(
    program: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    began = time.monotonic()
    outcome = sandbox.run(program, seconds=1 if reason == "out of time" else 10)
    assert outcome.passed == (not reason) and re.match(reason, outcome.reason), outcome
    assert time.monotonic() - began < 20 and not list(tmp_path.iterdir())


def test_a_program_ends_with_its_caller_and_has_an_environment_of_its_own(folder: Path) -> None:
    seen = "import os, time\nassert set(os.environ) <= set('PATH HOME TMPDIR LANG OMP_NUM_THREADS OPENBLAS_NUM_THREADS'.split())\n"
    assert sandbox.run(seen).reason == ""
    started = "open('started', 'w').close()\ntime.sleep(90)"
    call = f"from megatron_ultralong.evaluate.code_sandbox import sandbox; sandbox.run({seen + started!r}, seconds=90)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SECRET_TOKEN": "xyz", "TMPDIR": str(folder)}
    caller = subprocess.Popen([sys.executable, "-c", call], env=environment)
    try:
        end = time.monotonic() + 30
        while not list(folder.glob("answer-*/started")):
            assert time.monotonic() < end and caller.poll() is None
            time.sleep(0.05)
        programs = psutil.Process(caller.pid).children()
    finally:
        caller.kill()
        caller.wait()
    gone, alive = psutil.wait_procs(programs, timeout=5)
    assert len(gone) == 1 and not alive


# ---- the filter --------------------------------------------------------------------------------


def decide(filter_program: bytes, machine: str, number: int, *arguments: int) -> str:
    """What the kernel would answer: interprets the BPF program."""
    data = struct.pack(
        "=iIQ6Q", number, seccomp.MACHINES[machine][1], 0, *arguments, *[0] * (6 - len(arguments))
    )
    at = accumulator = 0
    while True:
        code, skip_if, skip_if_not, value = struct.unpack_from("=HBBI", filter_program, 8 * at)
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif code == 0x54:
            accumulator &= value
        elif code in (0x15, 0x25):
            at += skip_if if (accumulator == value if code == 0x15 else accumulator > value) else skip_if_not
        else:
            assert code == 0x06
            return {0x7FFF0000: "allow", 0x80000000: "kill"}.get(value) or errno.errorcode[value - 0x50000]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_on_both_machines(machine: str) -> None:
    number, program = seccomp.numbers(machine), seccomp.build(machine, 77)
    names = {name for words in seccomp.REFUSED.values() for name in words.split()}
    for name in names & set(number):
        assert decide(program, machine, number[name]) == "EPERM", name
    assert not names & (set(seccomp.conditions(0)) | set(seccomp.MISSING.split()))
    create = {"x86_64": 0o100, "aarch64": 0o100}[machine]
    for name, arguments, answer in (
        ("clone", (0x3D0F00,), "allow"),
        ("clone", (signal.SIGCHLD,), "EPERM"),
        ("clone", (0x3D0F00 | 0x10000000,), "EPERM"),
        ("clone", (0x4111,), "EPERM"),  # vfork
        ("clone3", (), "ENOSYS"),
        ("openat", (0, 0, 0), "allow"),
        ("openat", (0, 0, 0o1001 | create), "allow"),
        ("openat", (0, 0, 0o1000), "EPERM"),
        ("openat", (0, 0, 0o1003), "EPERM"),
        ("socketpair", (1, 1 | 0o2000000), "allow"),
        ("socketpair", (1, 2), "EPERM"),
        ("socketpair", (2, 1), "EPERM"),
        ("kill", (77, 9), "allow"),
        ("kill", (0, 9), "allow"),
        ("kill", (78, 9), "EPERM"),
        ("kill", ((1 << 64) - 1, 9), "EPERM"),
        ("setpriority", (0, 77), "allow"),
        ("setpriority", (2, 0), "EPERM"),
        ("prlimit64", (0, 7), "allow"),
        ("prlimit64", (78, 7), "EPERM"),
        ("ioctl", (0, 0x5401), "allow"),
        ("ioctl", (0, 0x5412), "EPERM"),  # TIOCSTI
        ("fcntl", (0, 1030), "allow"),
        ("fcntl", (0, 8), "EPERM"),
        ("mkdirat", (0, 0, 0o777), "allow"),
        ("mkdirat", (0, 0, 0o077), "EPERM"),
    ):
        assert decide(program, machine, number[name], *arguments) == answer, (name, arguments)
    for unknown in (seccomp.LAST_KNOWN + 1, 469, 0x40000000 + 41):
        assert decide(program, machine, unknown) == "ENOSYS"
    other = next(one for one in seccomp.MACHINES if one != machine)
    assert decide(program, other, 0) == "kill"
    read = {"x86_64": 0, "aarch64": 63}[machine]
    assert decide(program, machine, read) == "allow"


@pytest.mark.parametrize(
    ("machine", "header"), [("x86_64", "asm/unistd_64.h"), ("aarch64", "asm-generic/unistd.h")]
)
def test_numbers_are_the_kernel_s(machine: str, header: str) -> None:
    folders = Path("/usr/include"), *Path("/usr/include").glob("*-linux-gnu")
    path = next((folder / header for folder in folders if (folder / header).exists()), None)
    if path is None:
        pytest.skip(f"no {header} in /usr/include")
    defined = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text())
    assert len(defined) > 250
    number = seccomp.numbers(machine)
    theirs = {name: int(value) for name, value in defined}
    assert {name: theirs.get(name) for name in number} == number
    every = {word for words in seccomp.REFUSED.values() for word in words.split()}
    every |= {*seccomp.conditions(0), *seccomp.MISSING.split()}
    assert every == set(seccomp.numbers("x86_64")) and not (every - set(number)) & set(theirs)
