"""Stand in front of a container: pass signals on to it, carry its terminal, and leave with its exit code.

One loop over everything that can happen. Signal handlers are set here and nowhere else: a command may, a library not.
"""

from __future__ import annotations

import os
import select
import signal

from torpor.cli import Interrupted
from torpor.errors import KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType, TracebackType

    from torpor.console import Listener
    from torpor.exits import Child, Exit

# What a terminal, an init system or a user sends to a command to reach the program behind it.
FORWARDED = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGVTALRM,
    signal.SIGPROF,
    signal.SIGIO,
    signal.SIGPWR,
    *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
)
# Those that end a command while it is still building the container.
_ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)


class Signals:
    """Signals as readable numbers in a pipe, from before the container is built, so that none is lost.

    Until there is a program to pass them on to, those that end a command raise Interrupted, once: the second ctrl-C of
    an impatient user must not cut the clearing up short. With `patient` none raises; they wait in the pipe.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self._target = 0
        self._raises = not patient
        self._before: dict[int, object] = {}
        self.fd, self._write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def __enter__(self) -> Signals:
        for number in (*FORWARDED, signal.SIGWINCH):
            if signal.getsignal(number) is not signal.SIG_IGN or number == signal.SIGWINCH:
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._raises and number in _ENDING:
            self._raises = False
            raise Interrupted(number)
        try:
            os.write(self._write_end, bytes((number,)))
        except BlockingIOError:
            pass  # 64 KiB of signals nobody looked at

    def aim_at(self, pid: int) -> None:
        """From now on signals are for this process."""
        self._raises = False
        self._target = pid

    def pending(self) -> bytes:
        try:
            return os.read(self.fd, 4096)
        except BlockingIOError:
            return b""

    def forward(self, number: int) -> None:
        try:
            os.kill(self._target, number)
        except ProcessLookupError:
            pass

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        os.close(self.fd)
        os.close(self._write_end)


def follow(end: Child | Exit, pid: int, signals: Signals, master: int = -1) -> None:
    """Until `end` has ended: forward signals to `pid` and, with a pty `master`, relay the terminal."""
    signals.aim_at(pid)
    if master < 0:
        _loop(end.fileno(), signals, None)
        return
    from torpor.console import RawMode

    with RawMode(0):
        relay = Relay(master)
        _loop(end.fileno(), signals, relay)
        relay.drain()


def exit_code(status: int | None) -> int:
    """The program's exit code as our own.

    Raises:
        KernelError: nobody knows it.
    """
    if status is None:
        raise KernelError("the container has ended, but this kernel does not say how: that needs Linux 6.15")
    return status


def _loop(end: int, signals: Signals, relay: Relay | None) -> None:
    while end >= 0:
        poller = select.poll()
        poller.register(end, select.POLLIN)
        poller.register(signals.fd, select.POLLIN)
        if relay is not None:
            relay.register(poller)
        for fd, _ in poller.poll():
            if fd == signals.fd:
                _pass_on(signals, relay)
            elif fd == end:
                return
            elif relay is not None:
                relay.ready(fd)


def _pass_on(signals: Signals, relay: Relay | None) -> None:
    for number in signals.pending():
        if number != signal.SIGWINCH:
            signals.forward(number)
        elif relay is not None:
            relay.resize()


class Terminal:
    """Where the container's terminal arrives: nowhere when it has none."""

    def __init__(self, directory: str, wanted: bool) -> None:
        self.socket = ""
        self._listener: Listener | None = None
        self._master = -1
        if wanted:
            from torpor.console import Listener

            self._listener = Listener(directory)
            self.socket = self._listener.path

    def receive(self) -> int:
        """The pty master, -1 when there is no terminal."""
        if self._listener is not None:
            self._master = self._listener.receive()
            self._listener.close()
        return self._master

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._listener is not None:
            self._listener.close()
        if self._master >= 0:
            os.close(self._master)


class Relay:
    """Bytes between our standard input and output and the pty master of the container."""

    MOST_WAITING = 65536

    def __init__(self, master: int) -> None:
        self._master = master
        self._to_master = bytearray()
        self._input_open = self._output_open = True
        os.set_blocking(master, False)
        self.resize()

    def resize(self) -> None:
        from torpor.console import copy_window_size

        copy_window_size(0, self._master)

    def register(self, poller: select.poll) -> None:
        """Say what is worth waking up for: nothing that cannot be handed on, or a program that does not read would make
        us spin.
        """
        if self._input_open and len(self._to_master) < self.MOST_WAITING:
            poller.register(0, select.POLLIN)
        if self._output_open:
            poller.register(self._master, select.POLLIN | (select.POLLOUT if self._to_master else 0))

    def ready(self, fd: int) -> None:
        if fd == 0:
            data = _read(0)
            self._to_master += data or b""
            self._input_open = data != b""
        else:
            self._output_open = self._copy_out()
        self._send()

    def _copy_out(self) -> bool:
        """False when every process of the container has closed the terminal."""
        data = _read(self._master)
        if data:
            _write_all(1, data)
        return data is None or bool(data)

    def _send(self) -> None:
        while self._to_master:
            try:
                del self._to_master[: os.write(self._master, self._to_master)]
            except BlockingIOError:
                return
            except OSError:
                self._to_master.clear()

    def drain(self) -> None:
        """What the program wrote just before it ended."""
        while _write_all(1, _read(self._master) or b""):
            pass


def _read(fd: int) -> bytes | None:
    """None when there is nothing now, b"" at the end. A pty whose other side is closed answers EIO."""
    try:
        return os.read(fd, 65536)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _write_all(fd: int, data: bytes) -> int:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            select.select([], [fd], [])
        except OSError:
            break  # nobody looks at it any more; the program goes on all the same
    return len(data)
