"""What can go wrong, as one tree of exceptions.

`.code` is a slug for programs and never changes its meaning; the text is for people and may change. The slugs are
listed in docs/internals.md §5.
"""

from __future__ import annotations


class TorporError(Exception):
    """Base of every error torpor raises.

    Attributes:
        code: slug, for example `not-found` or `image-corrupt`.
        stage: the stage of checkpoint or restore that failed (`freeze`, `collect`, ... `resume`), else None.
        pid: the process it is about, as the host numbers it, else None.
        object: the thing it is about (a file, a socket, a flag), else None.
    """

    code: str = "internal"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        stage: str | None = None,
        pid: int | None = None,
        object: str | None = None,  # noqa: A002  (the name the contract gives it)
    ) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code
        self.stage = stage
        self.pid = pid
        self.object = object

    def __reduce__(self) -> tuple[object, ...]:
        # Exception pickles positional arguments only, and ours are keywords.
        return _rebuild, (type(self), str(self), self.code, self.stage, self.pid, self.object)


class UsageError(TorporError):
    """The command or call itself is wrong: an unknown flag, a missing argument (`usage`, `bad-flag`)."""

    code = "usage"


class StateError(TorporError):
    """The container is not there, is there already, or is in the wrong state (`not-found`, `exists`, `bad-id`,
    `bad-state`).
    """

    code = "bad-state"


class SpecError(TorporError):
    """The bundle or its config.json cannot be used (`bad-bundle`, `bad-spec`)."""

    code = "bad-spec"


class ImageError(TorporError):
    """The checkpoint image is missing, damaged, foreign, or in the way (`image-*`)."""

    code = "image-corrupt"


class UnsupportedError(TorporError):
    """The container holds something torpor cannot carry; `.object` names it, `.pid` holds it (`unsupported`)."""

    code = "unsupported"


class RefusedError(TorporError):
    """The image asks for power that the container it goes into does not have (`refused-power`)."""

    code = "refused-power"


class KernelError(TorporError):
    """The kernel said no (`kernel`, `no-space`, `permission`)."""

    code = "kernel"


class InterruptedCheckpoint(TorporError):  # noqa: N818  (the name the contract gives it)
    """A checkpoint or restore was cut short (`freeze-timeout`, `task-died`, `tracer-died`, `cancelled`,
    `failpoint`).
    """

    code = "cancelled"


class LauncherError(TorporError):
    """The process that builds containers failed (`launcher`)."""

    code = "launcher"


class InternalError(TorporError):
    """A bug in torpor (`internal`)."""

    code = "internal"


_BY_CODE: dict[str, type[TorporError]] = {
    "usage": UsageError,
    "bad-flag": UsageError,
    "not-found": StateError,
    "exists": StateError,
    "bad-id": StateError,
    "bad-state": StateError,
    "bad-bundle": SpecError,
    "bad-spec": SpecError,
    "unsupported": UnsupportedError,
    "refused-power": RefusedError,
    "kernel": KernelError,
    "no-space": KernelError,
    "permission": KernelError,
    "freeze-timeout": InterruptedCheckpoint,
    "task-died": InterruptedCheckpoint,
    "tracer-died": InterruptedCheckpoint,
    "cancelled": InterruptedCheckpoint,
    "failpoint": InterruptedCheckpoint,
    "launcher": LauncherError,
    "internal": InternalError,
}


def from_engine(
    code: str,
    stage: str | None,
    pid: int | None,
    object: str | None,  # noqa: A002
    message: str,
) -> TorporError:
    """Make the exception for a failure that the engine or the launcher reports. An unknown code is still a
    TorporError.
    """
    kind = _BY_CODE.get(code) or (ImageError if code.startswith("image-") else TorporError)
    return kind(message, code=code, stage=stage, pid=pid, object=object)


def _rebuild(
    kind: type[TorporError], message: str, code: str, stage: str | None, pid: int | None, about: str | None
) -> TorporError:
    return kind(message, code=code, stage=stage, pid=pid, object=about)


def not_found(container_id: str) -> StateError:
    """The error for an unknown id. containerd and Docker look for the words `does not exist`."""
    return StateError(f"container {container_id!r} does not exist", code="not-found", object=container_id)
