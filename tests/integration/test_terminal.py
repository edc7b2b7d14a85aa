"""Terminals: attached with a pty of ours, and handed over by --console-socket; across checkpoint and restore too."""

import array
import fcntl
import os
import signal
import socket
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import procs
from support.cli import Torpor, new_id

pytestmark = [pytest.mark.requires("root")]


class Pty:
    """The user's terminal: a pty with a command on its slave side, as a session leader that has it as controlling terminal."""

    def __init__(self, argv: list[str], rows: int = 31, columns: int = 97) -> None:
        self.master, slave = os.openpty()
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        with procs.claiming:
            self.process = subprocess.Popen(
                ["setsid", "-c", *argv], stdin=slave, stdout=slave, stderr=slave, close_fds=True
            )
            procs.claimed.add(self.process.pid)
        self.slave = slave
        self.text = ""
        os.set_blocking(self.master, False)

    def read(self) -> str:
        try:
            while data := os.read(self.master, 65536):
                self.text += data.decode(errors="replace")
        except (BlockingIOError, OSError):
            pass
        return self.text

    def expect(self, what: str, timeout: float = 20) -> None:
        try:
            procs.wait_until(f"{what!r} on the terminal", lambda: what in self.read(), timeout)
        except AssertionError as e:
            raise AssertionError(f"{e}; it shows {self.text!r}") from None
        self.text = self.text[self.text.index(what) + len(what) :]

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def local_flags(self) -> int:
        return int(termios.tcgetattr(self.slave)[3])

    def wait(self, timeout: float = 20) -> int:
        deadline = time.monotonic() + timeout
        while self.process.poll() is None:
            self.read()  # what is not read would hold the command up
            assert time.monotonic() < deadline, f"the command does not end; terminal: {self.text!r}"
            time.sleep(0.01)
        procs.claimed.discard(self.process.pid)
        self.read()
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        procs.claimed.discard(self.process.pid)
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal(torpor: Torpor) -> Iterator[Callable[..., Pty]]:
    made: list[Pty] = []

    def make(*words: str | Path, **more: int) -> Pty:
        made.append(Pty(torpor.argv(*words), **more))
        return made[-1]

    yield make
    for pty in made:
        pty.close()


SHELL = ["sh", "-c", "echo UP; exec sh -i"]


def test_attached_terminal(terminal: Callable[..., Pty], busybox: Callable[..., Path]) -> None:
    pty = terminal("run", "--bundle", busybox(SHELL, terminal=True), new_id())
    pty.expect("UP\r\n")
    # raw mode on our side: what is typed is echoed once, by the container's terminal
    assert not pty.local_flags() & (termios.ECHO | termios.ICANON | termios.ISIG)
    pty.type("tty; test -t 0 && test -t 1 && test -t 2 && echo all-$((40+2))\n")
    pty.expect("/dev/pts/0\r\n")
    pty.expect("all-42\r\n")
    pty.type("stty size\n")
    pty.expect("31 97\r\n")
    pty.type("exit 17\n")
    assert pty.wait() == 17
    assert pty.local_flags() & termios.ECHO and pty.local_flags() & termios.ICANON, "the terminal is left raw"


def test_window_size_follows(terminal: Callable[..., Pty], busybox: Callable[..., Path]) -> None:
    pty = terminal("run", "--bundle", busybox(SHELL, terminal=True), new_id())
    pty.expect("UP\r\n")
    pty.type("trap 'echo winch-$((40+3))' WINCH\n")
    pty.type("echo set-$((40+4))\n")
    pty.expect("set-44")
    pty.resize(50, 120)
    time.sleep(0.2)
    pty.type("stty size\n")
    pty.expect("50 120\r\n")
    pty.type("exit\n")
    assert pty.wait() == 0


def test_ctrl_c_reaches_the_foreground_process_only(terminal: Callable[..., Pty], busybox: Callable[..., Path]) -> None:
    pty = terminal("run", "--bundle", busybox(SHELL, terminal=True), new_id())
    pty.expect("UP\r\n")
    pty.type("sleep 1000; echo status-$?\n")
    pty.expect("sleep 1000")
    time.sleep(0.3)
    pty.type("\x03")
    pty.type("echo alive-$((40+5))\n")
    pty.expect("alive-45")
    pty.type("exit 3\n")
    assert pty.wait() == 3


def test_terminal_is_put_back_when_the_container_is_killed(torpor: Torpor, terminal: Callable[..., Pty], busybox: Callable[..., Path]) -> None:  # fmt: skip
    name = new_id()
    pty = terminal("run", "--bundle", busybox(SHELL, terminal=True), name)
    pty.expect("UP\r\n")
    torpor("kill", name, "KILL")
    assert pty.wait() == 137
    assert pty.local_flags() & termios.ECHO


def test_end_of_a_big_output_is_not_lost(terminal: Callable[..., Pty], busybox: Callable[..., Path]) -> None:
    pty = terminal("run", "--bundle", busybox(["sh", "-c", "seq 1 30000; echo the-very-end"], terminal=True), new_id())
    assert pty.wait() == 0
    assert "29999\r\n30000\r\nthe-very-end\r\n" in pty.text


def test_exec_with_a_terminal(torpor: Torpor, terminal: Callable[..., Pty], waiter: Callable[..., object]) -> None:
    c = waiter()
    pty = terminal("exec", "--tty", c.id, "sh", "-c", "tty && echo done; exit 8")  # type: ignore[attr-defined]
    pty.expect("/dev/pts/")
    pty.expect("done\r\n")
    assert pty.wait() == 8


def test_do_with_a_terminal(terminal: Callable[..., Pty]) -> None:
    pty = terminal("do", "sh", "-c", "tty && stty size; exit 6")
    pty.expect("/dev/pts/0")
    pty.expect("31 97")
    assert pty.wait() == 6


# ---- console socket -------------------------------------------------------------------------------------------------------------------


class Console:
    """What containerd does: listen on a socket, get the pty master by SCM_RIGHTS."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(1)
        self.listener.settimeout(30)
        self.master = -1
        self.text = ""

    def receive(self) -> None:
        connection, _ = self.listener.accept()
        with connection:
            connection.settimeout(30)
            _, ancillary, _, _ = connection.recvmsg(4096, socket.CMSG_SPACE(4))
        [(level, kind, data)] = ancillary
        assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        [self.master] = array.array("i", data)
        os.set_blocking(self.master, False)

    def expect(self, what: str, timeout: float = 20) -> None:
        def look() -> bool:
            try:
                while data := os.read(self.master, 65536):
                    self.text += data.decode(errors="replace")
            except OSError:
                pass
            return what in self.text

        procs.wait_until(f"{what!r} on the console, which shows {self.text!r}", look, timeout)
        self.text = self.text[self.text.index(what) + len(what) :]

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> None:
        self.listener.close()
        if self.master >= 0:
            os.close(self.master)


@pytest.fixture
def console(tmp: Path) -> Iterator[Callable[[], Console]]:
    made: list[Console] = []

    def make() -> Console:
        made.append(Console(tmp / f"console{len(made)}"))
        return made[-1]

    yield make
    for c in made:
        c.close()


def test_console_socket(torpor: Torpor, busybox: Callable[..., Path], console: Callable[[], Console]) -> None:
    name, bundle = new_id(), busybox(SHELL, terminal=True)
    c = console()
    torpor("run", "--detach", "--bundle", bundle, "--console-socket", c.path, name)
    c.receive()
    c.expect("UP\r\n")
    c.type("tty; echo it-is-$((40+2))\n")
    c.expect("/dev/pts/0\r\n")
    c.expect("it-is-42")
    fcntl.ioctl(c.master, termios.TIOCSWINSZ, struct.pack("HHHH", 17, 71, 0, 0))
    c.type("stty size\n")
    c.expect("17 71")


def test_console_socket_that_is_not_there(torpor: Torpor, busybox: Callable[..., Path], tmp: Path) -> None:
    bundle = busybox(SHELL, terminal=True)
    torpor.fails("run", "--detach", "--bundle", bundle, "--console-socket", tmp / "nobody", new_id(), says="nobody")
    torpor.fails("run", "--detach", "--bundle", bundle, new_id(), says="--console-socket")
    assert torpor.ids() == []


def test_a_terminal_goes_to_sleep_and_wakes_up_on_a_new_console(torpor: Torpor, busybox: Callable[..., Path], console: Callable[[], Console], tmp: Path) -> None:  # fmt: skip
    name, bundle = new_id(), busybox(SHELL, terminal=True)
    c = console()
    torpor("run", "--detach", "--bundle", bundle, "--console-socket", c.path, name)
    c.receive()
    c.expect("UP\r\n")
    c.type("remembered=yes; stty -echo; echo ready-$((40+2))\n")
    c.expect("ready-42")
    torpor("checkpoint", "--image-path", tmp / "one", "--leave-running", name)
    c.type("echo still-$remembered\n")
    c.expect("still-yes")
    torpor("checkpoint", "--image-path", tmp / "two", name)
    torpor("delete", name)
    d, name = console(), new_id()
    torpor("restore", "--detach", "--image-path", tmp / "two", "--bundle", bundle, "--console-socket", d.path, name)
    d.receive()
    d.type("echo back-$remembered; tty; test -t 2 && stty -a\n")
    d.expect("back-yes")
    d.expect("/dev/pts/0")
    d.expect("-echo ")
    d.type("sleep 1000\n")
    time.sleep(0.3)
    d.type("\x03")
    d.type("echo after-$((40+6))\n")
    d.expect("after-46")
    d.type("exit\n")
    torpor.wait_status(name, "stopped")


def test_attached_restore_with_a_terminal(torpor: Torpor, busybox: Callable[..., Path], terminal: Callable[..., Pty], tmp: Path) -> None:  # fmt: skip
    name, bundle = new_id(), busybox(SHELL, terminal=True)
    pty = terminal("run", "--bundle", bundle, name)
    pty.expect("UP\r\n")
    pty.type("remembered=yes; echo ready-$((40+2))\n")
    pty.expect("ready-42")
    torpor("checkpoint", "--image-path", tmp / "image", name)
    assert pty.wait() in (0, 137)
    again = terminal("restore", "--image-path", tmp / "image", "--bundle", bundle, new_id(), rows=40, columns=90)
    time.sleep(0.3)
    again.type("echo back-$remembered; stty size\n")
    again.expect("back-yes")
    again.expect("40 90")
    again.type("exit 21\n")
    assert again.wait() == 21


def test_a_signal_to_the_command_is_not_typed(
    torpor: Torpor, terminal: Callable[..., Pty], busybox: Callable[..., Path]
) -> None:
    """SIGTERM to the torpor in front goes on to init as a signal."""
    program = ["sh", "-c", "trap 'exit 12' TERM; echo UP; while :; do sleep 0.05; done"]
    pty = terminal("run", "--bundle", busybox(program, terminal=True), new_id())
    pty.expect("UP\r\n")
    pty.process.send_signal(signal.SIGTERM)
    assert pty.wait() == 12
