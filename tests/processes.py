"""Python programs as processes that start in milliseconds, forked from a server with the libraries imported.

`Popen` and `run` take commands as subprocess does; `torchrun` runs one on several ranks; `on_path`
is for shell scripts. A process starts in the state of a new interpreter, except that modules are already
imported.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import inspect
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import DEVNULL, PIPE, CompletedProcess, TimeoutExpired
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
SERVER: Any = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.preload"])
# Processes that the library and Megatron-Core spawn come from the server as well.
_contexts: dict[str, Any] = multiprocessing.context._concrete_contexts
SPAWN = _contexts["spawn"]
_contexts["spawn"] = SERVER

__all__ = ["DEVNULL", "PIPE", "Popen", "kill_all", "on_path", "run", "spawn_by_interpreter", "torchrun"]


@contextmanager
def spawn_by_interpreter() -> Iterator[None]:
    """Spawn processes as outside of tests: by new interpreters that are children of this process."""
    _contexts["spawn"] = SPAWN
    yield
    _contexts["spawn"] = SERVER


class Popen(subprocess.Popen):
    """`subprocess.Popen` of `[sys.executable, SCRIPT or -c CODE or -m MODULE, ...]`; output is text.

    `own_children`: what it spawns are its children, for a test that kills or signals all of them.
    """

    def __init__(self, command: list[Any], *, own_children: bool = False, **settings: Any) -> None:
        assert command[0] == sys.executable, command
        self._own_children = own_children
        super().__init__([str(word) for word in command], **{"text": True, **settings})

    def _execute_child(self, *args: Any) -> None:
        given = inspect.signature(super()._execute_child).bind(*args).arguments
        streams = {number: given[name] for number, name in enumerate(("p2cread", "c2pwrite", "errwrite"))}
        self._process = SERVER.Process(
            target=_interpret,
            args=(
                given["args"][1:],
                {number: Connection(os.dup(fd)) for number, fd in streams.items() if fd != -1},
                given["cwd"] or os.getcwd(),
                dict(os.environ if given["env"] is None else given["env"]),
                given["start_new_session"],
                self._own_children,
            ),
        )
        self._process.start()
        self.pid, self._child_created = self._process.pid, True
        self._close_pipe_fds(
            *(given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"))
        )

    def _internal_poll(self, *unused: Any, **more: Any) -> int | None:
        if self.returncode is None:
            self.returncode = self._process.exitcode
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        self._process.join(timeout)
        code = self._internal_poll()
        if code is None:
            raise TimeoutExpired(self.args, timeout or 0.0)
        return code


def run(
    command: list[Any],
    *,
    capture_output: bool = False,
    check: bool = False,
    timeout: float | None = 300.0,
    **settings: Any,
) -> CompletedProcess[str]:
    """As `subprocess.run`."""
    if capture_output:
        settings |= {"stdout": PIPE, "stderr": PIPE}
    with Popen(command, **settings) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = CompletedProcess(command, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def torchrun(
    command: list[Any], ranks: int, *, timeout: float = 300.0, **settings: Any
) -> CompletedProcess[str]:
    """Run `command` on `ranks` ranks, which find each other as under torchrun; the first failure ends all.

    The return code is 0 or 1, as torchrun's; output and errors are those of all ranks.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {**(settings.pop("env", None) or os.environ)} | {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": f"{os.getpid()}-{store.port}",
    }
    end = time.monotonic() + timeout
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = [
            Popen(
                command,
                stdout=out,
                stderr=err,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                **settings,
            )
            for rank in range(ranks)
        ]
        try:
            while None in (codes := [process.poll() for process in started]) and not any(codes):
                if time.monotonic() > end:
                    raise TimeoutExpired(command, timeout)
                time.sleep(0.02)
        finally:
            for process in started:
                process.kill()
                process.wait()
        out.seek(0)
        err.seek(0)
        return CompletedProcess(command, int(any(codes)), out.read(), err.read())


@contextmanager
def on_path(folder: Path) -> Iterator[str]:
    """A PATH that begins with `folder`, where a program `python` starts such a process: for shell scripts."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("")  # a free abstract name
        server.listen()
        threading.Thread(target=_serve, args=(server,), daemon=True).start()
        program = folder / "python"
        program.write_text(CLIENT.format(python=sys.executable, address=server.getsockname()))
        program.chmod(0o755)
        yield f"{folder}:{os.environ['PATH']}"
        server.shutdown(socket.SHUT_RDWR)


CLIENT = """#!{python} -IS
import os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address})
    socket.send_fds(server, [b"."], [0, 1, 2])
    with server.makefile("rw") as stream:
        print(repr((sys.argv[1:], os.getcwd(), dict(os.environ))), file=stream, flush=True)
        sys.exit(int(stream.readline()))
"""


def _serve(server: socket.socket) -> None:
    while True:
        try:
            client, _ = server.accept()
        except OSError:  # the end of `on_path`
            return
        threading.Thread(target=_start_for, args=(client,), daemon=True).start()


def _start_for(client: socket.socket) -> None:
    with client, client.makefile("rw") as stream:
        fds = socket.recv_fds(client, 1, 3)[1]
        words, folder, environment = ast.literal_eval(stream.readline())
        streams = dict(zip(("stdin", "stdout", "stderr"), fds))
        process = Popen([sys.executable, *words], cwd=folder, env=environment, **streams)
        for fd in fds:
            os.close(fd)
        print(process.wait(), file=stream, flush=True)


def kill_all() -> None:
    """End the server's children, if a test left any."""
    server = multiprocessing.forkserver._forkserver._forkserver_pid
    if server is not None:
        import psutil

        for process in psutil.Process(server).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _interpret(
    words: list[str],
    streams: dict[int, Connection],
    folder: str,
    environment: dict[str, str],
    new_session: bool,
    own_children: bool,
) -> None:
    """Act as the interpreter: do what `python *words` does."""
    if new_session:
        os.setsid()
    for number, stream in streams.items():
        os.dup2(stream.fileno(), number)
        stream.close()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if own_children:
        _contexts["spawn"] = SPAWN
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        elif words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
