"""The terminal of an attached container: our terminal in raw mode on one side, the container's pty on the other.

Raw mode means that ctrl-C, ctrl-Z and ctrl-D travel as bytes and the container's own terminal makes signals of them.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import termios

from .errors import LauncherError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any

_LONGEST_SOCKET_PATH = 107  # sun_path without its final NUL


class Listener:
    """The socket the launcher sends the pty master to (runc's console socket protocol: one message with one
    descriptor).
    """

    def __init__(self, directory: str) -> None:
        os.makedirs(directory, mode=0o711, exist_ok=True)
        self._file = os.path.join(directory, f".console-{os.urandom(6).hex()}")
        self._directory = -1
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.path = self._file
        try:
            bind_to = self._file
            if len(os.fsencode(self._file)) > _LONGEST_SOCKET_PATH:
                self._directory = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                name = os.path.basename(self._file)
                bind_to = f"/proc/self/fd/{self._directory}/{name}"
                self.path = f"/proc/{os.getpid()}/fd/{self._directory}/{name}"
            self._socket.bind(bind_to)
            self._socket.listen(1)
        except BaseException:
            self.close()
            raise

    def receive(self, timeout: float = 10) -> int:
        """The pty master, ours to close.

        Raises:
            LauncherError: nobody sent one.
        """
        self._socket.settimeout(timeout)
        try:
            connection, _ = self._socket.accept()
            with connection:
                connection.settimeout(timeout)
                _, fds, _, _ = socket.recv_fds(connection, 4096, 1)
        except OSError as e:
            raise LauncherError(f"the container's terminal did not arrive: {e}") from None
        if not fds:
            raise LauncherError("the container's terminal did not arrive")
        os.set_inheritable(fds[0], False)
        return fds[0]

    def close(self) -> None:
        self._socket.close()
        try:
            os.unlink(self._file)
        except FileNotFoundError:
            pass
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RawMode:
    """Our terminal without line editing and signals, until the block ends. Does nothing when `fd` is no terminal."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._before: list[Any] | None = None

    def __enter__(self) -> RawMode:
        try:
            self._before = termios.tcgetattr(self._fd)
        except termios.error:
            return self
        raw = list(self._before)
        raw[0] &= ~(
            termios.BRKINT
            | termios.ICRNL
            | termios.INPCK
            | termios.ISTRIP
            | termios.IXON
            | termios.INLCR
            | termios.IGNCR
        )
        raw[1] &= ~termios.OPOST
        raw[2] = (raw[2] & ~(termios.CSIZE | termios.PARENB)) | termios.CS8
        raw[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN | termios.ISIG)
        control = list(raw[6])
        control[termios.VMIN], control[termios.VTIME] = 1, 0
        raw[6] = control
        termios.tcsetattr(self._fd, termios.TCSANOW, raw)
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if self._before is not None:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)


def copy_window_size(source: int, target: int) -> None:
    """Give `target` the rows and columns of `source`, if that is a terminal. The container gets SIGWINCH from the
    kernel.
    """
    size = array.array("H", [0, 0, 0, 0])
    try:
        fcntl.ioctl(source, termios.TIOCGWINSZ, size)
        if size[0] or size[1]:
            fcntl.ioctl(target, termios.TIOCSWINSZ, size)
    except OSError:
        pass
