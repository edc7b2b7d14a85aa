"""Where messages go: --log, --debug-log, standard error.

--log is opened for appending and closed again each time, since Docker gives one file to many commands at once and
parses it: only whole JSON objects may ever be in it, one for each error (client-surface rule 12).
"""

from __future__ import annotations

import os
import sys
import time

from . import quick_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .config import Config


class Log:
    """The sinks of this process. The default has none: a library does not write to its user's terminal."""

    __slots__ = ("debug_file", "debugging", "json_file", "stderr")

    def __init__(self) -> None:
        self.json_file = ""
        self.debug_file = ""
        self.debugging = False
        self.stderr = False


_log = Log()


def setup(config: Config, verb: str) -> None:
    """Send this process's messages where the flags say. Called by the command line only."""
    _log.json_file = config.log
    _log.debugging = config.debug
    _log.debug_file = _debug_file(config.debug_log, verb)
    _log.stderr = True


def is_set_up() -> bool:
    return _log.stderr


def error(message: str) -> None:
    """One line on standard error and one object in --log."""
    line = one_line(message)
    if _log.stderr:
        print_error(line)
    if _log.json_file:
        _append_json("error", line)
    debug(f"error: {line}")


def warning(message: str) -> None:
    line = one_line(message)
    if _log.stderr:
        print_error(f"warning: {line}")
    if _log.json_file:
        _append_json("warning", line)


def debug(message: str) -> None:
    if not _log.debugging and not _log.debug_file:
        return
    if _log.debug_file:
        _append(_log.debug_file, f"{rfc3339()} {os.getpid()} {message}\n")
    elif _log.json_file:
        _append_json("debug", message)
    elif _log.stderr:
        print_error(f"debug: {message}")


def print_error(line: str) -> None:
    try:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        # A closed standard error must not turn one failure into another; --log still gets the message.
        pass


def one_line(message: str) -> str:
    """Clients show the first line only, and an object name from inside a container may hold anything."""
    return "".join(c if c.isprintable() else (" " if c in "\n\t\r" else "?") for c in message.strip())


def rfc3339(seconds: float | None = None) -> str:
    now = time.time_ns() if seconds is None else int(seconds * 1_000_000_000)
    whole, part = divmod(now, 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{part:09d}Z"


def _append_json(level: str, message: str) -> None:
    _append(_log.json_file, quick_json.dumps({"level": level, "msg": message, "time": rfc3339()}) + "\n")


def _append(path: str, text: str) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as e:
        if _log.stderr:
            print_error(f"warning: cannot write to log file {path}: {e.strerror}")
        return
    try:
        # One write, so that two commands appending at once cannot mix their objects.
        os.write(fd, text.encode("utf-8", "replace"))
    except OSError as e:
        if _log.stderr:
            print_error(f"warning: cannot write to log file {path}: {e.strerror}")
    finally:
        os.close(fd)


def _debug_file(path: str, verb: str) -> str:
    """runsc's rule: a trailing / names a directory, %TIMESTAMP% and %COMMAND% are filled in."""
    if not path:
        return ""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    if path.endswith("/"):
        path += "torpor.log.%TIMESTAMP%.%COMMAND%.txt"
    path = path.replace("%TIMESTAMP%", f"{stamp}.{time.time_ns() % 1_000_000_000 // 1000:06d}").replace(
        "%COMMAND%", verb
    )
    directory = os.path.dirname(path)
    if directory:
        try:
            os.makedirs(directory, exist_ok=True)
        except OSError as e:
            print_error(f"warning: cannot make the directory of --debug-log: {e.strerror}")
            return ""
    return path
