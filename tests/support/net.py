"""Network namespaces and a cable between them: a container with an address that can move, and a peer that must not notice."""

import ctypes
import os
import socket
import subprocess
import threading
from typing import Any


class Net:
    """Two network namespaces, joined by a cable that can be plugged into another one with the same address."""

    def __init__(self, name: str) -> None:
        self.peer = f"{name}p"
        self.names = [f"{name}a", f"{name}b"]
        run = self._ip
        run("netns", "add", self.peer)
        run("-n", self.peer, "link", "add", "br0", "type", "bridge")
        run("-n", self.peer, "link", "set", "br0", "up")
        run("-n", self.peer, "addr", "add", "10.99.7.1/24", "dev", "br0")
        for n in self.names:
            run("netns", "add", n)

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def join_by(self, spec: dict[str, Any], which: int) -> None:
        """A container with this spec is in one of the two namespaces."""
        for namespace in spec["linux"]["namespaces"]:
            if namespace["type"] == "network":
                namespace["path"] = f"/run/netns/{self.names[which]}"

    def plug(self, which: int) -> None:
        """The address is here from now on, and the peer reaches it."""
        self.place(which)
        self.join()

    def join(self) -> None:
        self._ip("-n", self.peer, "link", "set", "port", "master", "br0")

    def place(self, which: int) -> None:
        """The address is here from now on. Until the cable is in the bridge, nothing that comes for a connection that
        is not there yet is answered with a reset."""
        name = self.names[which]
        self._ip("-n", self.peer, "link", "add", "port", "type", "veth", "peer", "name", "eth0", "netns", name)
        self._ip("-n", self.peer, "link", "set", "port", "up")
        self._ip("-n", name, "link", "set", "lo", "up")
        self._ip("-n", name, "link", "set", "eth0", "address", "02:00:00:00:07:02", "up")
        self._ip("-n", name, "addr", "add", "10.99.7.2/24", "dev", "eth0")

    def unplug(self) -> None:
        self._ip("-n", self.peer, "link", "del", "port")

    def connect(self) -> socket.socket:
        """A socket of the peer's namespace, connected to port 7777 of the address."""
        made: list[socket.socket] = []

        def inside() -> None:
            fd = os.open(f"/run/netns/{self.peer}", os.O_RDONLY)
            assert ctypes.CDLL(None).setns(fd, 0) == 0
            os.close(fd)
            made.append(socket.create_connection(("10.99.7.2", 7777), timeout=10))

        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
        return made[0]

    def listens(self, which: int) -> bool:
        """Whether somebody listens there."""
        command = ["ip", "netns", "exec", self.names[which], "cat", "/proc/net/tcp"]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[1:]
        return any(line.split()[3] == "0A" for line in lines)

    def close(self) -> None:
        for n in (*self.names, self.peer):
            subprocess.run(["ip", "netns", "del", n], check=False, capture_output=True)
