"""What `import torpor` offers: containers as objects.

Everything here may be called from any thread, next to `subprocess` and asyncio: no signal handler is touched, no
process that is not ours is waited for, and nothing of Python runs in a forked child. Calls that take long release the
interpreter, so in asyncio use `await asyncio.to_thread(container.wait)`.

A container on the host's files, without a bundle:

>>> import torpor
>>> with torpor.run(["sh", "-c", "exit 3"]) as container:
...     container.wait()
3
"""

from __future__ import annotations

import os

from . import create, plan, quick_json
from .config import Config
from .container import Checkpoint, Container, PendingCheckpoint, Process, load_all, stdio_of
from .errors import ImageError, InternalError, StateError, UsageError
from .state import check_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from .plan import Plan
    from .progress import Progress

__all__ = [
    "Checkpoint",
    "Container",
    "PendingCheckpoint",
    "Process",
    "check_id",
    "inspect",
    "list_containers",
    "restore",
    "run",
    "squash",
]


def run(
    args: Sequence[str],
    container_id: str | None = None,
    **options: Any,
) -> Container:
    """Run a command in a new container on the host's own files, read-only under a layer that is thrown away with it.

    Args:
        args: the command; it is looked up in PATH inside the container.
        container_id: made up when it is not given.
        **options: what `make` takes: `env`, `cwd`, `stdin`, `stdout`, `stderr`, `volumes`, `network`, `root`, ...

    Returns:
        The running container. As a context manager it is deleted when the block ends.

    Raises:
        StateError: `exists` or `bad-id`.
        KernelError: the overlay cannot be mounted.
        LauncherError: the command cannot be executed.

    >>> import os, torpor
    >>> read_end, write_end = os.pipe()
    >>> with torpor.run(["echo", "hello"], stdout=write_end) as container:
    ...     os.close(write_end)
    ...     container.wait()
    ...     os.read(read_end, 100)
    0
    b'hello\\n'
    >>> os.close(read_end)
    """
    return make(container_id or new_id(), args=args, start=True, **options)


def make(
    container_id: str,
    bundle: str | None = None,
    *,
    start: bool,
    args: Sequence[str] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str = "",
    volumes: Sequence[str] = (),
    stdin: object = None,
    stdout: object = None,
    stderr: object = None,
    console_socket: str = "",
    pid_file: str = "",
    root: str | None = None,
    network: str = "sandbox",
    systemd_cgroup: bool = False,
) -> Container:
    """Build a container from a bundle or, with `args`, on the host's files.

    Args:
        bundle: directory with config.json; the current one when neither it nor `args` is given.
        args, env, cwd, volumes: for a container on the host's files. `env` is the whole environment; None is our own.
        stdin, stdout, stderr: files, descriptors or subprocess.DEVNULL for the program; None is our own.
        console_socket: where the terminal is sent to, for a container that has one.
        root: directory for the state of containers.
        network: `host` shares the host's network with a container on the host's files; `none` gives an empty one to
        any.

    Raises:
        as `run`; SpecError: `bad-bundle` or `bad-spec`; UsageError: arguments that do not go together.
    """
    if bundle is not None and args is not None:
        raise UsageError("give either a bundle or a command, not both")
    config = Config(root=root, network=network, systemd_cgroup=systemd_cgroup)
    if args is None:
        what = plan.from_bundle(config, bundle or ".")
    else:
        what = plan.on_host_root(
            config, args, hostname=container_id, env=env, cwd=cwd, volumes=volumes, terminal=bool(console_socket)
        )
    check_console(what, console_socket, attached=False)
    build = create.run if start else create.create
    return build(
        config,
        container_id,
        what,
        create.Options(
            console_socket=console_socket, pid_file=pid_file, stdio=stdio_of(stdin, stdout, stderr), supervise=True
        ),
    )


def restore(
    image: str | Checkpoint,
    container_id: str | None = None,
    bundle: str | None = None,
    *,
    stdin: object = None,
    stdout: object = None,
    stderr: object = None,
    console_socket: str = "",
    pid_file: str = "",
    root: str | None = None,
    network: str = "sandbox",
    systemd_cgroup: bool = False,
    background: bool = False,
    record_working_set: bool = False,
    track: bool = False,
    tcp_close: bool = False,
    files: str = "size",
    on_progress: Callable[[Progress], object] | None = None,
) -> Container:
    """Wake up an image in a new container. The same image can be restored any number of times, also at once.

    Args:
        image: the directory that `checkpoint` wrote to, or what it returned.
        container_id: made up when it is not given.
        bundle: where the container's files are; not needed for one that was made without.
        background: let the program run at once and bring its memory while it runs; `Container.wait_restored` waits for
            the end of it.
        record_working_set: with `background`, note beside the image what the program touches first; the next
            restore in the background brings that first.
        track: note what it writes to from now on, so that a `Container.checkpoint` with this image as its parent finds
            what has changed without reading the rest; not with `background`.
        tcp_close: close the TCP connections that the image keeps (`Container.checkpoint` with `tcp_established`): the
            program reads ECONNRESET from them.
        files: what a file that was mapped or open for reading must still be: "strict" (not written to since), "size"
            (of the same size), or "ignore".
        on_progress: called while the image is read and memory is filled, at most twenty times a second; an error from
            it undoes the restore, as Ctrl-C does: if the program does not run by then.

    Raises:
        ImageError: the image is missing, damaged, of another version or another machine.
        UnsupportedError, RefusedError: it needs what this machine or the new container does not have.
        StateError, SpecError, KernelError, LauncherError, InterruptedCheckpoint: as everywhere; nothing is left of the
        container.

    >>> import torpor
    >>> first = torpor.run(["sleep", "1000"])                      # doctest: +SKIP
    >>> saved = first.checkpoint("/tmp/nap")                       # doctest: +SKIP
    >>> again = torpor.restore(saved)                              # doctest: +SKIP
    >>> again.status                                               # doctest: +SKIP
    'running'
    """
    directory = image.path if isinstance(image, Checkpoint) else image
    container_id = container_id or new_id()
    config = Config(root=root, network=network, systemd_cgroup=systemd_cgroup)
    what = plan_for_restore(config, directory, bundle or "", container_id)
    check_console(what, console_socket, attached=False)
    return create.restore(
        config,
        container_id,
        what,
        create.Options(
            console_socket=console_socket,
            pid_file=pid_file,
            stdio=stdio_of(stdin, stdout, stderr),
            supervise=True,
            filling=create.Filling(
                background=background,
                record_working_set=record_working_set,
                track=track,
                tcp_close=tcp_close,
                files=files,
                on_progress=on_progress,
            ),
        ),
        directory,
    )


def plan_for_restore(config: Config, image: str, bundle: str, container_id: str) -> Plan:
    """The bundle that was named; else, for a container made without one, what the image says; else the bundle we stand
    in.

    Raises:
        ImageError: `image-missing`, ...
        SpecError: `bad-bundle` or `bad-spec`.
    """
    check_image(image)
    if bundle:
        return plan.from_bundle(config, bundle)
    peeked = quick_json.loads(engine().peek(os.path.abspath(image)))
    if plan.is_without_bundle(peeked):
        return plan.from_image(config, image, peeked, hostname=container_id)
    return plan.from_bundle(config, ".")


def inspect(image: str | Checkpoint) -> dict[str, Any]:
    """What is in an image: processes, memory, open files, sizes.

    Raises:
        ImageError: it is missing or damaged.
    """
    directory = image.path if isinstance(image, Checkpoint) else image
    check_image(directory)
    return quick_json.loads(engine().inspect(os.path.abspath(directory)))  # type: ignore[no-any-return]


def squash(image: str | Checkpoint, new: str, *, compression: str = "none") -> Checkpoint:
    """Fold an image and all that it goes on from into one, in the directory `new`, which needs no other image.

    The state is the same, the uuid is new. Every byte that is read is checked; the old images stay as they are.

    Args:
        image: the directory that `checkpoint` wrote to, or what it returned.
        new: directory for the new image, made when it is missing.
        compression: as for `Container.checkpoint`.

    Raises:
        UsageError: `bad-flag`, there is no such compression.
        ImageError: an image is missing, damaged or not the one that was gone on from (`image-parent`), or `new` holds
            one (`image-exists`).
        KernelError: `no-space`, `permission` or `kernel`.
    """
    import json

    from .compression import check

    directory = image.path if isinstance(image, Checkpoint) else image
    check_image(directory)
    request = {
        "image_path": os.path.abspath(directory),
        "new_path": os.path.abspath(new),
        "compression": check(compression, "compression"),
    }
    return Checkpoint(new, json.loads(engine().squash(json.dumps(request))))


def list_containers(*, root: str | None = None) -> list[Container]:
    """All containers, sorted by id."""
    return load_all(Config(root=root).root)


def find(container_id: str, *, root: str) -> Container | None:
    """The container with exactly this id, None when there is none.

    Raises:
        StateError: `bad-id`.
    """
    check_id(container_id)
    if not os.path.isdir(os.path.join(root, container_id)):
        return None
    try:
        return Container.load(container_id, root=root)
    except StateError as e:
        if e.code == "not-found":
            return None
        raise


def new_id() -> str:
    return f"torpor-{os.urandom(4).hex()}"


def check_image(path: str) -> None:
    """Raises UsageError when no path is given, ImageError `image-missing` when no image is there."""
    if not path:
        raise UsageError("--image-path is required: give the directory that holds the image", code="bad-flag")
    file = path if os.path.isfile(path) else os.path.join(path, "checkpoint.img")
    if not os.path.exists(file):
        what = "holds no checkpoint.img" if os.path.isdir(path) else "does not exist"
        raise ImageError(f"image directory {path} {what}", code="image-missing", object=path)


def check_console(what: Plan, console_socket: str, *, attached: bool) -> None:
    """A terminal needs somebody at its other end, and only a terminal needs a console socket.

    Raises:
        UsageError: `usage`.
    """
    if what.terminal and not attached and not console_socket:
        raise UsageError(
            "process.terminal is true and nothing is attached: give --console-socket, stay attached, or set it to false"
        )
    if console_socket and not what.terminal:
        raise UsageError("--console-socket needs a container with process.terminal true")
    if console_socket and attached:
        raise UsageError("--console-socket needs --detach: attached, the terminal is the one of this command")
    check_console_socket(console_socket)


def check_console_socket(path: str) -> None:
    """Raises UsageError `bad-flag` when there is a path and no socket."""
    import stat

    try:
        good = not path or stat.S_ISSOCK(os.stat(path).st_mode)
        why = "it is not a socket"
    except OSError as e:
        good, why = False, e.strerror or "unknown error"
    if not good:
        raise UsageError(f"cannot use --console-socket {path}: {why}", code="bad-flag", object=path)


def engine() -> Any:
    """The compiled engine, imported when it is needed.

    Raises:
        InternalError: it is not installed.
    """
    try:
        from . import _core
    except ImportError as e:
        raise InternalError(f"torpor is installed without its engine: {e}") from None
    return _core
