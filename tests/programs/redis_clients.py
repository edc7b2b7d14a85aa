"""redis-server with fifty clients that stay connected, half over TCP, half over a unix socket, and a subscriber beside each ten."""

import os
import socket
import subprocess
import time
from typing import Any

import protocol

SOCKET = "/wl/redis.sock"
protocol.block()
server = subprocess.Popen(
    ["redis-server", "--port", "6379", "--bind", "127.0.0.1", "--save", "", "--dir", "/wl", "--unixsocket", SOCKET, "--logfile", "/wl/redis.log"],
    preexec_fn=protocol.unblocked,
)  # fmt: skip


class Client:
    def __init__(self, number: int) -> None:
        self.number, self.count = number, 0
        if number % 2:
            self.socket = socket.create_connection(("127.0.0.1", 6379))
        else:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(SOCKET)
        self.socket.settimeout(20)
        self.stream = self.socket.makefile("rb")

    def send(self, *words: object) -> None:
        parts = [str(w).encode() for w in words]
        self.socket.sendall(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(p), p) for p in parts))

    def read(self) -> Any:
        line = self.stream.readline().rstrip()
        kind, rest = line[:1], line[1:]
        if kind == b"-":
            raise RuntimeError(f"redis: {rest.decode()}")
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return self.stream.read(int(rest) + 2)[:-2].decode()
        if kind == b"*":
            return [self.read() for _ in range(int(rest))]
        return rest.decode()

    def ask(self, *words: object) -> Any:
        self.send(*words)
        return self.read()


deadline = time.monotonic() + 30
while not os.path.exists(SOCKET):
    assert time.monotonic() < deadline
    time.sleep(0.05)
clients = [Client(n) for n in range(50)]
subscribers = [Client(n) for n in range(5)]
for s in subscribers:
    assert s.ask("SUBSCRIBE", "news") == ["subscribe", "news", 1]
# an answer that nobody has read yet is on its way all the time
for c in clients:
    c.send("INCR", f"k{c.number}")
rounds = 0


def verify() -> int:
    global rounds
    rounds += 1
    for c in clients:
        c.count += 1
        found = c.read()
        assert found == c.count, f"client {c.number}: {found} instead of {c.count}"
    heard = clients[0].ask("PUBLISH", "news", f"round {rounds}")
    assert heard == len(subscribers), f"{heard} subscribers"
    for s in subscribers:
        news = s.read()
        assert news == ["message", "news", f"round {rounds}"], news
    for c in clients:
        c.send("INCR", f"k{c.number}")
    time.sleep(0.05)
    return rounds


protocol.serve(verify)
