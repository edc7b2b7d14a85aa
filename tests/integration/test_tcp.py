"""TCP connections that lead out of the container: kept, closed, and never harmed."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import bundles, procs
from support.cli import Container, Torpor, new_id
from support.net import Net

pytestmark = [pytest.mark.requires("root", "command:ip", "command:python3.11"), pytest.mark.timeout(120)]

# Answers each line with its number, in order; on an error writes what it is.
SERVER = """
import socket, sys
l = socket.create_server(("10.99.7.2", 7777)); print("READY", flush=True)
s, _ = l.accept(); f = s.makefile("rwb"); n = 0
try:
    for line in f:
        assert int(line) == n, (line, n)
        f.write(line); f.flush(); n += 1
except OSError as e:
    print("GOT", type(e).__name__, flush=True)
import time; time.sleep(1000)
"""


class Talk:
    """Streams numbered lines and checks the answers, without a pause."""

    def __init__(self, s: socket.socket) -> None:
        self.count = 0
        self.error = ""
        self._socket = s
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._socket.settimeout(60)
        f = self._socket.makefile("rwb")
        try:
            while True:
                f.write(b"%d\n" % self.count)
                f.flush()
                answer = f.readline()
                assert answer == b"%d\n" % self.count, f"{answer!r} instead of {self.count}"
                self.count += 1
        except (OSError, AssertionError) as e:
            self.error = f"{type(e).__name__}: {e}"

    def goes_on(self) -> None:
        before = self.count
        procs.wait_until("the peer to be answered", lambda: self.error or self.count > before + 50, 30)
        assert not self.error, self.error

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._socket.close()


@pytest.fixture
def serve(torpor: Torpor, host_root: Callable[..., bundles.HostRoot], tmp: Path) -> Callable[[Net, int], Container]:
    root = host_root()

    def make(net: Net, which: int) -> Container:
        bundle = tmp / f"bundle{which}"

        spec = bundles.spec(["/usr/bin/python3.11", "-c", SERVER], rootfs=root.path)
        net.join_by(spec, which)
        bundles.write(bundle, spec)
        return Container(torpor, bundle, new_id())

    return make


def test_a_peer_outside_does_not_notice_a_migration(
    net: Net, serve: Callable[[Net, int], Container], tmp: Path
) -> None:
    net.plug(0)
    c = serve(net, 0).run()
    assert c.next_line() == "READY"
    talk = Talk(net.connect())
    talk.goes_on()
    c.checkpoint(tmp / "running", "--tcp-established", "--leave-running")
    talk.goes_on()
    net.unplug()
    c.checkpoint(tmp / "image", "--tcp-established")
    at = talk.count
    c.delete()
    time.sleep(0.3)
    net.place(1)
    assert not talk.error and talk.count == at
    again = serve(net, 1)
    again.restore_from(tmp / "image")
    net.join()
    talk.goes_on()
    talk.end()


def test_a_checkpoint_that_fails_lets_the_peer_go_on(
    net: Net, serve: Callable[[Net, int], Container], tmp: Path
) -> None:
    net.plug(0)
    c = serve(net, 0).run()
    assert c.next_line() == "READY"
    talk = Talk(net.connect())
    talk.goes_on()
    for point in ("collect", "capture:kill", "finish:error", "finish:kill"):
        failed = c.checkpoint(tmp / "image", "--tcp-established", check=False, env={"TORPOR_FAILPOINT": point})
        assert failed.code != 0
        talk.goes_on()
    talk.end()


@pytest.mark.parametrize("when", ["checkpoint", "restore"])
def test_a_connection_that_is_closed_is_reset(
    net: Net, serve: Callable[[Net, int], Container], tmp: Path, when: str
) -> None:
    net.plug(0)
    c = serve(net, 0).run()
    assert c.next_line() == "READY"
    talk = Talk(net.connect())
    talk.goes_on()
    done = c.checkpoint(tmp / "image", *(["--tcp-established"] if when == "restore" else []))
    assert when == "restore" or "ECONNRESET" in done.err
    c.delete()
    net.unplug()
    net.plug(1)
    again = serve(net, 1)
    woken = again.restore_from(tmp / "image", *(["--tcp-close"] if when == "restore" else []))
    assert when == "checkpoint" or "(--tcp-close), the program will read ECONNRESET" in woken.err
    assert again.next_line() == "GOT ConnectionResetError"
    talk.end()
