"""The state of a container: `<root>/<id>/state.json`, replaced by rename, changed only under `<root>/<id>/lock`.

Reading needs no lock. The status on disk is what the last command left; `observe` compares it with the living process,
so a container that ended by itself is `stopped` for everyone without a daemon having to notice.
"""

from __future__ import annotations

import _thread
import fcntl
import os

from . import proc, quick_json
from .errors import StateError, not_found
from .log import rfc3339

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any

OCI_VERSION = "1.2.0"

# creating and restoring have an owner: the torpor process at work. When it is dead, what is there is a ruin and is
# cleared away.
TRANSIENT = ("creating", "restoring")
LIVING = ("created", "running", "paused")

MOVES: dict[str, frozenset[str]] = {
    "creating": frozenset({"created", "restoring", "running", "stopped"}),
    "created": frozenset({"running", "restoring", "stopped"}),
    "restoring": frozenset({"created", "running", "stopped"}),
    "running": frozenset({"paused", "stopped"}),
    "paused": frozenset({"running", "stopped"}),
    "stopped": frozenset(),
}

# In which status a command makes sense. What is not here may be called always.
MAY: dict[str, tuple[str, ...]] = {
    "start": ("created",),
    "restore": ("created",),
    "pause": ("running",),
    "resume": ("paused",),
    "checkpoint": ("running", "paused"),
    "exec": ("created", "running"),
    "kill": ("created", "running", "paused"),
    "ps": ("created", "running", "paused"),
    "update": ("created", "running", "paused"),
    "events": ("created", "running", "paused"),
    "delete": ("created", "stopped"),
}

_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+.-")


class State:
    """One state.json. Fields are documented in docs/internals.md and by name."""

    __slots__ = (
        "annotations", "bundle", "created", "exit_status", "flags", "id", "on_host_root", "overlay",
        "owner", "owner_process", "pid", "rootfs", "start_time", "status", "terminal",
    )  # fmt: skip

    def __init__(
        self,
        *,
        id: str,  # noqa: A002
        status: str = "creating",
        pid: int = 0,
        start_time: int = 0,
        bundle: str = "",
        rootfs: str = "",
        created: str = "",
        owner: str = "",
        annotations: dict[str, str] | None = None,
        flags: dict[str, Any] | None = None,
        owner_process: tuple[int, int] | list[int] | None = None,
        exit_status: int | None = None,
        terminal: bool = False,
        on_host_root: bool = False,
        overlay: bool = False,
    ) -> None:
        self.id = id
        self.status = status
        self.pid = pid
        self.start_time = start_time
        self.bundle = bundle
        self.rootfs = rootfs
        self.created = created or rfc3339()
        self.owner = owner
        self.annotations = annotations or {}
        self.flags = flags or {}
        self.owner_process = tuple(owner_process) if owner_process else None
        self.exit_status = exit_status
        self.terminal = terminal
        self.on_host_root = on_host_root
        self.overlay = overlay

    def move(self, status: str) -> None:
        """Go to another status, if the table has that move."""
        if status not in MOVES[self.status]:
            raise StateError(f"container {self.id!r} cannot go from {self.status} to {status}", code="bad-state")
        self.status = status
        if status not in TRANSIENT:
            self.owner_process = None

    def to_json(self) -> str:
        return quick_json.dumps({name: getattr(self, name) for name in self.__slots__ if hasattr(self, name)})

    @classmethod
    def from_json(cls, text: str) -> State:
        known = {name: value for name, value in quick_json.loads(text).items() if name in cls.__slots__}
        return cls(**known)


def may(verb: str, container_id: str, status: str) -> None:
    """Refuse a verb in the wrong status, in the words that runc's clients look for.

    Raises:
        StateError: `bad-state`.
    """
    allowed = MAY[verb]
    if status in allowed:
        return
    why = f"it is {status}"
    if status in ("stopped", *TRANSIENT) or (status == "created" and verb != "restore"):
        why = f"container not running ({why})"
    elif status == "paused":
        why = f"container paused ({why})"
    elif verb == "resume":
        why = f"container not paused ({why})"
    if verb == "delete":
        why = f"container still running (it is {status}): stop it first or give --force"
    raise StateError(f"cannot {verb} container {container_id!r}: {why}", code="bad-state", object=container_id)


def observe(state: State) -> str:
    """The status as it is now: the one on disk, corrected by whether the process lives and whether its cgroup is
    frozen.
    """
    if state.status not in LIVING:
        return state.status
    if not proc.is_alive(state.pid, state.start_time):
        return "stopped"
    if state.status == "created":
        return "created"
    from . import freezer

    frozen = freezer.is_frozen(state.pid)
    if frozen is None:
        return state.status
    return "paused" if frozen else "running"


def check_id(container_id: str) -> str:
    """An id becomes a directory name and goes into command lines.

    Raises:
        StateError: `bad-id`. runsc's rule is ^[\\w+\\.-]+$, which would let `.` and `..` through.
    """
    if not container_id:
        raise StateError("container id cannot be empty", code="bad-id")
    if not _ID_CHARACTERS.issuperset(container_id) or container_id in (".", ".."):
        raise StateError(
            f"invalid container id {container_id!r}: use letters, digits and _ + - . only",
            code="bad-id",
            object=container_id,
        )
    if len(container_id) > 255:
        raise StateError("invalid container id: longer than 255 characters", code="bad-id")
    return container_id


def find_id(root: str, text: str) -> str:
    """The id that `text` names: itself, or the only one that begins with it.

    Raises:
        StateError: `not-found`, or `bad-id` when several begin with it.
    """
    check_id(text)
    if os.path.isdir(os.path.join(root, text)):
        return text
    matches = [name for name in ids(root) if name.startswith(text)]
    if not matches:
        raise not_found(text)
    if len(matches) > 1:
        raise StateError(
            f"container id {text!r} is ambiguous: {', '.join(matches[:4])}{' ...' if len(matches) > 4 else ''}",
            code="bad-id",
        )
    return matches[0]


def ids(root: str) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []


class Home:
    """The directory of one container, and the lock in it.

    As a context manager it holds the lock, against other processes and against other threads that use the same object.
    """

    __slots__ = ("_depth", "_lock", "_thread", "id", "path")

    def __init__(self, root: str, container_id: str) -> None:
        self.id = container_id
        self.path = os.path.join(root, container_id)
        self._thread = _thread.RLock()
        self._lock = -1
        self._depth = 0

    def file(self, name: str) -> str:
        return os.path.join(self.path, name)

    def read(self) -> State | None:
        """The state on disk, None when there is none (yet)."""
        try:
            with open(self.file("state.json"), encoding="utf-8") as f:
                text = f.read()
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return State.from_json(text)
        except (ValueError, TypeError, AttributeError) as e:
            raise StateError(
                f"state of container {self.id!r} is damaged ({e}): remove it with delete --force",
                code="bad-state",
                object="damaged",
            ) from None

    @property
    def lock_fd(self) -> int:
        """The descriptor that holds the lock, for who is to hold it on; -1 when it is not held."""
        return self._lock

    def write(self, state: State) -> None:
        """Replace state.json in one step: a reader sees the old one or the new one."""
        replace_file(self.file("state.json"), state.to_json().encode(), 0o640)

    def write_text(self, name: str, text: str) -> str:
        path = self.file(name)
        replace_file(path, text.encode("utf-8", "surrogateescape"), 0o600)
        return path

    def make(self) -> None:
        """Claim the id and hold its lock, until `release`.

        Raises:
            StateError: `exists`.
        """
        os.makedirs(os.path.dirname(self.path), mode=0o711, exist_ok=True)
        self._acquire(self._claim)

    def _claim(self) -> None:
        # A torpor killed between mkdir and its first state left an empty claim: that is nobody's. So a claim is the
        # lock on a directory without state, whoever made the directory.
        while True:
            try:
                os.mkdir(self.path, 0o700)
                made = True
            except FileExistsError:
                made = False
            if self._try_lock():
                if not os.path.exists(self.file("state.json")):
                    return
                self._unlock()
            elif made:
                continue  # somebody cleared it away again, taking it for such a leftover
            raise StateError(
                f"container with id {self.id!r} already exists: choose another id or delete it", code="exists"
            )

    def __enter__(self) -> Home:
        self._acquire(self._wait_for_lock)
        return self

    def _wait_for_lock(self) -> None:
        if self._depth == 0 and not self._try_lock(wait=True):
            raise not_found(self.id)

    def _acquire(self, how: Callable[[], None]) -> None:
        self._thread.acquire()
        try:
            how()
        except BaseException:
            self._thread.release()
            raise
        self._depth += 1

    def release(self) -> None:
        """Let go of the lock."""
        self._depth -= 1
        if self._depth == 0:
            self._unlock()
        self._thread.release()

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def is_busy(self) -> bool:
        """Whether some torpor is at work on it right now."""
        if self._depth:
            return True
        if self._try_lock():
            self._unlock()
            return False
        return os.path.isdir(self.path)

    def _try_lock(self, wait: bool = False) -> bool:
        """False when it is taken (only without `wait`) or when the directory is gone."""
        while True:
            try:
                fd = os.open(self.file("lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except (FileNotFoundError, NotADirectoryError):
                return False
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                # The one who held it before may have deleted the container, and this file with it.
                if _same_file(fd, self.file("lock")):
                    self._lock = fd
                    return True
            except BlockingIOError:
                os.close(fd)
                return False
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def _unlock(self) -> None:
        os.close(self._lock)
        self._lock = -1


def _same_file(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def replace_file(path: str, data: bytes, mode: int) -> None:
    """Write a file so that it is never seen half written."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        try:
            with open(fd, "wb", closefd=False) as f:
                f.write(data)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except BaseException:
        try:
            os.unlink(temporary)
        except FileNotFoundError:
            pass
        raise
