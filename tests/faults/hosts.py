"""Hosts as network namespaces of one machine, each with a host name and a link to a common switch, which can
be cut. Needs root and iproute2."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@functools.cache
def why_not() -> str | None:
    """Why this machine cannot have such hosts; None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "network namespaces need iproute2 and util-linux"
    try:
        with Hosts(1):
            return None
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"


def move(space: str, name: str) -> None:
    """Move this process, before it starts a thread, to a host."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{space}") as file:
        if libc.setns(file.fileno(), _NEW_NETWORK) or libc.unshare(_NEW_NAMES):
            raise OSError(ctypes.get_errno(), "cannot enter a network namespace")
    socket.sethostname(name)


_NEW_NETWORK, _NEW_NAMES = 0x40000000, 0x04000000  # CLONE_NEWNET, CLONE_NEWUTS


class Hosts:
    """`number` hosts: names host-0, host-1, ..., addresses 10.77.0.1, 10.77.0.2, ..."""

    def __init__(self, number: int) -> None:
        self._id = f"mu{os.getpid()}"
        self._number = number
        self._switch = f"{self._id}-switch"
        self._folder = tempfile.TemporaryDirectory(prefix=self._id)
        self._names = Path(self._folder.name) / "hosts"

    def __enter__(self) -> Hosts:
        try:
            _ip("netns", "add", self._switch)
            _ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "switch", "up")
            for host in range(self._number):
                space = self._space(host)
                _ip("netns", "add", space)
                _ip("-n", space, "link", "set", "lo", "up")
                port = ("type", "veth", "peer", "name", f"port{host}", "netns", self._switch)
                _ip("-n", space, "link", "add", "eth0", *port)
                _ip("-n", space, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
                _ip("-n", space, "link", "set", "eth0", "up")
                _ip("-n", self._switch, "link", "set", f"port{host}", "up")
                self.mend(host)
            names = [f"{self.address(host)} host-{host}" for host in range(self._number)]
            self._names.write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for space in (*map(self._space, range(self._number)), self._switch):
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)
        self._folder.cleanup()

    @staticmethod
    def address(host: int) -> str:
        """Its address on the network of all hosts."""
        return f"10.77.0.{host + 1}"

    def enter(self, host: int) -> str:
        """Python source by which a process, before it starts a thread, moves to a host."""
        return f"from tests.faults import hosts; hosts.move({self._space(host)!r}, 'host-{host}')"

    def on(self, host: int) -> list[str]:
        """The beginning of a command on a host."""
        enter = f'hostname host-{host} && mount --bind {self._names} /etc/hosts && exec "$@"'
        return ["ip", "netns", "exec", self._space(host), "unshare", "--uts", "sh", "-c", enter, "sh"]

    def cut(self, host: int) -> None:
        """Cut a host's link: its packets vanish."""
        _ip("-n", self._switch, "link", "set", f"port{host}", "nomaster")

    def mend(self, host: int) -> None:
        """Connect a host."""
        _ip("-n", self._switch, "link", "set", f"port{host}", "master", "switch")

    def _space(self, host: int) -> str:
        return f"{self._id}-{host}"
