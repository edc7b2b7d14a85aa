"""Stop and continue a container by its cgroup. The kernel side is the engine's, imported only when it is needed."""

from __future__ import annotations

from .errors import InternalError


def is_frozen(pid: int) -> bool | None:
    """Whether the cgroup of `pid` is frozen; None when nobody can say."""
    try:
        from . import _core
    except ImportError:
        return None
    from .errors import TorporError

    try:
        return _core.is_frozen(pid)
    except TorporError:
        return None


def set_frozen(pid: int, frozen: bool) -> None:
    """Freeze or thaw the container whose init is `pid`.

    Raises:
        KernelError: the kernel refused, or the container has no cgroup of its own.
        InterruptedCheckpoint: `freeze-timeout`.
    """
    try:
        from . import _core
    except ImportError as e:
        raise InternalError(f"torpor is installed without its engine: {e}") from None
    _core.set_frozen(pid, frozen)
