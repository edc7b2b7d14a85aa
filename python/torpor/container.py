"""A container that exists, and what can be done with it."""

from __future__ import annotations

import os

from . import exits, launcher, log, proc, quick_json, ruins
from . import state as states
from .config import Config
from .errors import ImageError, StateError, TorporError, UsageError, not_found
from .state import Home, State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any

    from .launcher import Stdio
    from .progress import Progress


class Container:
    """One container, known by the directory its state is in. Methods may be called from any thread.

    Use `torpor.run`, `torpor.restore`, `Container.create` or `Container.load` to get one. As a context manager it is
    deleted, by force, when the block ends.
    """

    def __init__(self, home: Home, state: State, *, supervisor: exits.Child | None = None) -> None:
        self.home = home
        self.id = home.id
        self._state = state
        # The launcher that stayed as parent of the container: our child, so its exit status is ours to have on every
        # kernel.
        self._supervisor = supervisor
        self._exit: exits.Exit | None = None
        self._exit_status = state.exit_status

    def __repr__(self) -> str:
        return f"<torpor.Container {self.id!r} {self._state.status}>"

    # ---- getting one
    # --------------------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, container_id: str, *, root: str | None = None) -> Container:
        """The container with this id, or the only one whose id begins so.

        Raises:
            StateError: `not-found`; `bad-id` when it is not an id or not a unique beginning of one.
        """
        root = Config(root=root).root
        home = Home(root, states.find_id(root, container_id))
        if ruins.clear_if_ruin(home):
            raise not_found(container_id)
        state = home.read()
        if state is None:
            raise not_found(container_id)
        return cls(home, state)

    @classmethod
    def create(cls, container_id: str, bundle: str | None = None, **options: Any) -> Container:
        """Build a container that waits for `start` (or for a restore). Takes what `torpor.run` takes, the command as
        `args=`.

        Raises:
            StateError: `exists` or `bad-id`.
            SpecError: the bundle cannot be used.
            LauncherError, KernelError: it could not be built; nothing is left of it.
        """
        from . import api

        return api.make(container_id, bundle, start=False, **options)

    @classmethod
    def run(cls, container_id: str, bundle: str | None = None, **options: Any) -> Container:
        """Build a container and start its program. Errors as `create`."""
        from . import api

        return api.make(container_id, bundle, start=True, **options)

    # ---- looking at it
    # ------------------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """The host's pid of the container's init."""
        return self._state.pid

    @property
    def status(self) -> str:
        """`creating`, `created`, `running`, `paused`, `restoring` or `stopped`, as it is right now.

        Raises:
            StateError: `not-found`, it has been deleted.
        """
        return self.refresh().status

    def refresh(self) -> State:
        """Read the state again, corrected by what the process really does."""
        state = self.home.read()
        if state is None:
            raise not_found(self.id)
        state.status = states.observe(state)
        self._state = state
        return state

    def state(self) -> dict[str, Any]:
        """The state as `torpor state` prints it (OCI runtime spec, and runc's rootfs, created, owner).

        Raises:
            StateError: `not-found`.
        """
        return as_oci(self.refresh())

    def spec(self) -> dict[str, Any]:
        """The config.json the container was made from."""
        with open(self.home.file("config.json"), encoding="utf-8", errors="surrogateescape") as f:
            return quick_json.loads(f.read())  # type: ignore[no-any-return]

    def processes(self) -> list[int]:
        """The host's pids of all processes in it.

        Raises:
            StateError: `not-found`, or `bad-state` when it does not run.
        """
        return proc.cgroup_processes(self.running("ps").pid)

    def running(self, verb: str) -> State:
        """The state of a container that `verb` makes sense for.

        Raises:
            StateError: `not-found`, or `bad-state`.
        """
        state = self.refresh()
        states.may(verb, self.id, state.status)
        return state

    def stats(self) -> dict[str, Any]:
        """What it uses of processors, memory, processes and network, as `torpor events --stats` prints it.

        Raises:
            StateError: `not-found`, or `bad-state` when it does not run.
        """
        from . import cgroups

        return cgroups.stats(self.running("events").pid)

    # ---- changing it
    # --------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the program of a created container; or wake up the image that its spec asks for (torpor.warm).

        Raises:
            StateError: `not-found`, or `bad-state` when it is not in status created.
            LauncherError: the program cannot be executed.
            and what `restore` raises, when there is an image.
        """
        with self.home as home:
            state = self.refresh()
            states.may("start", self.id, state.status)
            if state.flags.get("image"):
                from . import create

                create.restore_into(self, state.flags["image"])
                return
            launcher.run("start", "--root", home.file("oci"), "--id", self.id)
            state.move("running")
            home.write(state)

    def exec(
        self,
        args: list[str] | tuple[str, ...],
        *,
        env: dict[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        stdin: object = None,
        stdout: object = None,
        stderr: object = None,
    ) -> Process:
        """Start another program in the container.

        `stdin`, `stdout` and `stderr` are files, descriptors or subprocess.DEVNULL; None means our own.

        Raises:
            StateError: `not-found`, or `bad-state` when it does not run.
            LauncherError: the program cannot be executed.
        """
        from . import spec as specs

        process = specs.process_for_exec(
            self.spec(), args, cwd=cwd, user=user, env=[f"{name}={value}" for name, value in (env or {}).items()]
        )
        return self.exec_process(process, stdio=stdio_of(stdin, stdout, stderr), supervise=True)

    def exec_process(
        self,
        process: dict[str, Any],
        *,
        stdio: Stdio | None = None,
        supervise: bool,
        console_socket: str = "",
        preserve_fds: int = 0,
        cgroup: str = "",
        even_if_paused: bool = False,
    ) -> Process:
        """`exec` with a whole OCI process object. Without `supervise` the process is left to whoever adopts orphans
        here.
        """
        state = self.refresh()
        if not (even_if_paused and state.status == "paused"):
            states.may("exec", self.id, state.status)
        path = self.home.write_text(f"exec-{os.urandom(6).hex()}.json", quick_json.dumps(process))
        try:
            flags = ["--root", self.home.file("oci"), "--id", self.id, "--process", path]
            if console_socket:
                flags += ["--console-socket", os.path.abspath(console_socket)]
            if preserve_fds:
                flags += ["--preserve-fds", str(preserve_fds)]
            if cgroup:
                flags += ["--cgroup", cgroup]
            supervisor = None
            if supervise:
                supervisor, report = launcher.supervise("exec", *flags, stdio=stdio, preserve_fds=preserve_fds)
            else:
                report = launcher.run("exec", *flags, stdio=stdio, preserve_fds=preserve_fds)
        finally:
            os.unlink(path)
        return Process(int(report["pid"]), supervisor)

    def kill(self, signal: int = 15, *, all_processes: bool = False) -> None:
        """Send a signal to the init of the container, or to every process in it.

        Raises:
            StateError: `not-found`, or `bad-state` when it does not run.
        """
        state = self.refresh()
        states.may("kill", self.id, state.status)
        delivered = False
        for pid in proc.cgroup_processes(state.pid) if all_processes else [state.pid]:
            try:
                os.kill(pid, signal)
                delivered = True
            except ProcessLookupError:
                continue
        if not delivered:
            raise StateError(
                f"cannot kill container {self.id!r}: container not running (it is stopped)", code="bad-state"
            )
        if signal == 9 and state.status == "paused":
            # a frozen process cannot die
            self._set_frozen(state.pid, False)

    def host_pid(self, pid: int) -> int:
        """The host's pid of the process that has `pid` in the container.

        Raises:
            StateError: `not-found`, also when there is no such process.
        """
        for host_pid in self.processes():
            if proc.innermost_pid(host_pid) == pid:
                return host_pid
        raise StateError(f"container {self.id!r} has no process {pid}: no such process", code="not-found")

    def kill_process(self, pid: int, signal: int) -> None:
        """Send a signal to the process that has `pid` in the container. Errors as `host_pid`."""
        os.kill(self.host_pid(pid), signal)

    def wait_process(self, host_pid: int) -> int | None:
        """Wait for one process of the container, by its host pid. Its exit code as `wait` returns it."""
        with exits.Exit(host_pid, proc.start_time(host_pid) or 0) as end:
            end.wait()
            return end.status()

    def update(self, resources: dict[str, Any]) -> None:
        """Change its limits: an OCI `linux.resources` object, of which memory, cpu, pids, blockIO.weight and unified
        count. What is absent stays as it is.

        Raises:
            StateError: `not-found`, or `bad-state` when it does not run.
            SpecError: a value cannot be understood.
            KernelError: the kernel refused a value.
        """
        from . import cgroups

        cgroups.update(self.running("update").pid, resources)

    def pause(self) -> None:
        """Freeze every process of the container where it is.

        Raises:
            StateError: `not-found`, or `bad-state` when it does not run.
            KernelError, InterruptedCheckpoint: it could not be frozen, and goes on.
        """
        self._change("pause", "paused")

    def resume(self) -> None:
        """Let a paused container go on. Errors as `pause`."""
        self._change("resume", "running")

    def _change(self, verb: str, status: str) -> None:
        with self.home as home:
            state = self.refresh()
            states.may(verb, self.id, state.status)
            self._set_frozen(state.pid, status == "paused")
            state.move(status)
            home.write(state)

    @staticmethod
    def _set_frozen(pid: int, frozen: bool) -> None:
        from . import freezer

        freezer.set_frozen(pid, frozen)

    def checkpoint(
        self,
        image_path: str,
        leave_running: bool = False,
        capture: str = "",
        *,
        parent_path: str = "",
        pre_dump: bool = False,
        track: bool = False,
        tcp_established: bool = False,
        tcp_skip_in_flight: bool = False,
        compression: str = "none",
        on_progress: Callable[[Progress], object] | None = None,
    ) -> Checkpoint:
        """Write the container into `image_path`/checkpoint.img and stop it, or with `leave_running` let it go on.

        `capture` says how memory is read of a container that goes on: "background" (from a copy-on-write twin, while it
        runs) or "stop" (while it stands still; needs no memory for the twin). The default is "background", and "stop"
        when little has changed since the parent.

        `parent_path` is the directory of an earlier image of this container, relative to `image_path`: pages that are
        still the same are not written again, and the new image is of no use without the old one. `track` has the kernel
        note from now on what the container writes to, so that the next checkpoint with this one as parent finds what
        changed without reading the rest; without it all memory is read and compared. `pre_dump` writes memory only, to
        be a parent, lets the container go on, and tracks.

        TCP connections inside the container are always carried. Those that lead out of it are closed in the image (the
        program reads ECONNRESET), or kept with `tcp_established`: the peer hears nothing until the restore. Those that
        nobody has accepted yet are a reason to refuse, unless `tcp_skip_in_flight` leaves them out.

        `compression` of the image: "none", "lz4", "zstd" or "zstd:LEVEL" with a level from 1 to 19.

        `on_progress` is called while memory is copied, at most twenty times a second; an error from it undoes the
        checkpoint, as Ctrl-C does: if it is not complete by then.

        The directory is made when it is missing. Whatever goes wrong, the container runs on as before and no file is
        left.

        Raises:
            UsageError: `bad-flag`, there is no such compression.
            StateError: `not-found`, or `bad-state` when it does not run.
            ImageError: `image-exists`, the directory holds an image already; `image-missing`, `image-parent` etc.,
                the parent cannot be used.
            UnsupportedError: the container holds something that cannot be carried; `.object` and `.pid` name it.
            KernelError: `no-space`, `permission` or `kernel`.
            InterruptedCheckpoint: a process died or could not be stopped, or the tracer was killed.
        """
        leave_running = leave_running or pre_dump
        if track and not leave_running:
            raise UsageError(
                "--track is of use only for a container that goes on: add --leave-running",
                code="bad-flag",
                object="--track",
            )
        from .compression import check

        wishes = {
            "leave_running": leave_running,
            "capture": capture or None,
            "parent_path": parent_path or None,
            "pre_dump": pre_dump,
            "track": track or pre_dump,
            "tcp_established": tcp_established,
            "tcp_skip_in_flight": tcp_skip_in_flight,
            "compression": check(compression, "compression"),
        }
        return Checkpoint(image_path, self._checkpoint(image_path, wishes, on_progress=on_progress))

    def checkpoint_detached(
        self,
        image_path: str,
        capture: str = "",
        *,
        parent_path: str = "",
        tcp_established: bool = False,
        tcp_skip_in_flight: bool = False,
        compression: str = "none",
    ) -> PendingCheckpoint:
        """`checkpoint` with `leave_running`, but return as soon as the container runs again. The rest is done by a
        process of its own, also when this one ends; `wait` of what is returned, and `wait_checkpoint`, wait for it.
        Errors as `checkpoint`; those that come later, `wait` raises.
        """
        from .compression import check

        wishes = {
            "leave_running": True,
            "capture": capture or None,
            "parent_path": parent_path or None,
            "tcp_established": tcp_established,
            "tcp_skip_in_flight": tcp_skip_in_flight,
            "compression": check(compression, "compression"),
        }
        report = self._checkpoint(image_path, wishes, detach=True)
        return PendingCheckpoint(self, image_path, report["pause_us"] / 1e6)

    def wait_checkpoint(self) -> Checkpoint | None:
        """Wait until no checkpoint is at work. The image of a detached one; None when the last was none.

        Raises:
            StateError: `not-found`.
            what `checkpoint` raises: the detached one has failed, and the container runs on.
        """
        from . import detached

        done = detached.wait(self.home)
        return None if done is None else Checkpoint(*done)

    def _checkpoint(
        self,
        image_path: str,
        wishes: dict[str, Any],
        *,
        detach: bool = False,
        on_progress: Callable[[Progress], object] | None = None,
    ) -> dict[str, Any]:
        """`wishes` are fields of the engine's request."""
        if not image_path:
            raise UsageError("an image path is required: give the directory to write the image to", code="bad-flag")
        path = os.path.abspath(image_path)
        with self.home as home:
            state = self.refresh()
            states.may("checkpoint", self.id, state.status)
            from . import _core, detached, pager, tracker

            # Memory that has not come yet cannot be saved.
            pager.wait(home)
            made = _make_image_directory(path)
            request = {
                **wishes,
                "pid": state.pid,
                "image_path": path,
                "tracker": home.file(tracker.NOTE),
                "spec": self.spec(),
                "container": {"id": self.id, "flags": state.flags},
            }
            if detach:
                request["detached"] = detached.begin(home, home.lock_fd, made)
            else:
                detached.forget(home)
            try:
                tell = told_to(on_progress)
                report: dict[str, Any] = quick_json.loads(_core.checkpoint(quick_json.dumps(request), tell))
            except BaseException:
                for directory in made:
                    _remove_if_empty(directory)
                raise
            log.debug(f"checkpoint of {self.id}: {report}")
            if detach:
                detached.note(home, image_path, report["tracer"], state.pid)
            if not wishes["leave_running"]:
                # The engine ends it with status 0: to sleep is no failure (runsc does the same).
                state.status, state.exit_status = "stopped", 0
                home.write(state)
                self._state = state
        return report

    # ---- its end
    # ------------------------------------------------------------------------------------------------------------------

    def wait_restored(self) -> dict[str, Any]:
        """Wait until a restore in the background has brought all memory. What it took: faults that were served, bytes,
        blocks that were brought first, ...; empty when there was none.

        Raises:
            ImageError: `image-corrupt`, a part of the image could not be read: whoever touches that part gets SIGBUS.
        """
        from . import pager

        return pager.wait(self.home)

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait until the container has ended and return its exit code, 128 + N when signal N killed it.

        None means that nobody knows: it ended before anyone looked, or it is not a child of ours and the kernel is
        older than 6.15.

        Raises:
            StateError: `not-found`.
            TimeoutError: it still runs after `timeout` seconds.
        """
        if self._exit_status is not None:
            return self._exit_status
        if self._supervisor is not None:
            if not self._supervisor.wait(timeout):
                raise TimeoutError(f"container {self.id!r} still runs after {timeout} seconds")
            self._exit_status = self._supervisor.reap()
        elif (state := self.refresh()).exit_status is not None:
            self._exit_status = state.exit_status
        else:
            with exits.Exit(state.pid, state.start_time) as end:
                if state.status in states.LIVING and not end.wait(timeout):
                    raise TimeoutError(f"container {self.id!r} still runs after {timeout} seconds")
                self._exit_status = end.status()
        self._remember_end()
        return self._exit_status

    def _remember_end(self) -> None:
        try:
            with self.home as home:
                state = home.read()
                if state is not None and (state.status != "stopped" or state.exit_status is None):
                    state.status = "stopped"
                    state.exit_status = self._exit_status
                    home.write(state)
        except StateError:
            pass  # deleted by somebody else meanwhile

    def delete(self, force: bool = False) -> None:
        """Remove a created or stopped container and all that belongs to it; with `force` a running one too.

        Raises:
            StateError: `not-found`, or `bad-state` when it runs and `force` is not given.
            LauncherError: not everything could be removed; call it again.
        """
        if force:
            # Before the lock: whoever holds it may be waiting for this very container.
            ruins.kill(self._state)
        with self.home as home:
            state = self.refresh()
            if not force:
                states.may("delete", self.id, state.status)
            ruins.clear(home, state)
            state.status = "stopped"
            self._state = state
        if self._supervisor is not None:
            self._exit_status = self._supervisor.reap()

    def __enter__(self) -> Container:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self.delete(force=True)
        except StateError as error:
            if error.code != "not-found":
                raise

    @property
    def supervisor(self) -> exits.Child | None:
        """The launcher that waits for the container on our behalf, None when there is none."""
        return self._supervisor


class Process:
    """A program started in a container by `exec`."""

    def __init__(self, pid: int, supervisor: exits.Child | None) -> None:
        self.pid = pid
        self.supervisor = supervisor

    def wait(self, timeout: float | None = None) -> int | None:
        """Its exit code, 128 + N when signal N killed it. None when nobody can know it.

        Raises:
            TimeoutError: it still runs after `timeout` seconds.
        """
        if self.supervisor is None:
            return None
        if not self.supervisor.wait(timeout):
            raise TimeoutError(f"process {self.pid} still runs after {timeout} seconds")
        return self.supervisor.reap()


class PendingCheckpoint:
    """A checkpoint of a container that runs again, while its image is still being written."""

    __slots__ = ("_container", "path", "pause_seconds")

    def __init__(self, container: Container, path: str, pause_seconds: float) -> None:
        self._container = container
        self.path = path
        # How long the container stood still.
        self.pause_seconds = pause_seconds

    def __repr__(self) -> str:
        return f"<torpor.PendingCheckpoint {self.path!r}>"

    def wait(self) -> Checkpoint:
        """Return when the image is complete.

        Raises:
            what `Container.checkpoint` raises: it has failed, and the container runs on.
            StateError: `not-found`, the container was deleted before; `bad-state`, another checkpoint came after it.
        """
        done = self._container.wait_checkpoint()
        if done is None or done.path != self.path:
            raise StateError(f"another checkpoint of {self._container.id!r} came after this one", code="bad-state")
        return done


def told_to(listener: Callable[[Progress], object] | None) -> Callable[[str, int, int], None] | None:
    """What the engine is to call so that `listener`, if there is one, is told."""
    if listener is None:
        return None
    from .progress import teller

    return teller(listener)


class Checkpoint:
    """An image that was written: where it is and what it took."""

    __slots__ = ("path", "report")

    def __init__(self, path: str, report: dict[str, Any]) -> None:
        self.path = path
        self.report = report

    def __repr__(self) -> str:
        return f"<torpor.Checkpoint {self.path!r} {self.tasks} tasks, {self.bytes} bytes>"

    @property
    def bytes(self) -> int:
        """Size of the image."""
        return int(self.report.get("bytes", 0))

    @property
    def tasks(self) -> int:
        """How many processes are in it."""
        return int(self.report.get("tasks", 0))

    @property
    def inherited_bytes(self) -> int:
        """How much of its memory is in its parent."""
        return int(self.report.get("inherited_pages", 0)) * 4096

    @property
    def pause_seconds(self) -> float:
        """How long the container stood still."""
        return float(self.report.get("pause_us", 0)) / 1e6

    @property
    def warnings(self) -> list[str]:
        return list(self.report.get("warnings") or [])


def as_oci(state: State) -> dict[str, Any]:
    """The object `torpor state` prints."""
    return {
        "ociVersion": states.OCI_VERSION,
        "id": state.id,
        "status": state.status,
        "pid": 0 if state.status == "stopped" else state.pid,
        "bundle": state.bundle,
        "rootfs": state.rootfs,
        "created": state.created,
        "annotations": state.annotations,
        "owner": state.owner,
    }


def load_all(root: str) -> list[Container]:
    """Every container under `root`, ruins cleared away."""
    found = []
    for name in states.ids(root):
        try:
            container = Container.load(name, root=root)
            container.refresh()
            found.append(container)
        except TorporError as e:
            # deleted while we looked, or damaged: the others are still worth showing
            log.debug(f"skipping {name}: {e}")
    return found


def load_states(root: str) -> list[State]:
    """The states of `load_all`."""
    return [container._state for container in load_all(root)]


def stdio_of(stdin: object, stdout: object, stderr: object) -> Stdio | None:
    """File descriptors for what a caller gives as standard streams; None when all are our own."""
    if stdin is None and stdout is None and stderr is None:
        return None
    streams = (stdin, stdout, stderr)
    fds = [
        number if stream is None else stream if isinstance(stream, int) else stream.fileno()  # type: ignore[attr-defined]
        for number, stream in enumerate(streams)
    ]
    for fd in fds:
        if fd < 0 and fd != launcher.DEVNULL:
            raise UsageError("stdin, stdout and stderr take a file, a descriptor or subprocess.DEVNULL")
    return fds[0], fds[1], fds[2]


def _make_image_directory(path: str) -> list[str]:
    """Make the directory and its parents; returns those that were made, innermost first.

    Raises:
        ImageError: `image-exists`.
        KernelError: `permission` and the like.
    """
    from .errors import KernelError

    if os.path.lexists(os.path.join(path, "checkpoint.img")):
        raise ImageError(
            f"{path} already holds a checkpoint.img: give another --image-path or remove it",
            code="image-exists",
            object=path,
        )
    made: list[str] = []
    missing = path
    while not os.path.isdir(missing):
        if os.path.lexists(missing):
            raise UsageError(
                f"{missing} is not a directory: give another --image-path", code="bad-flag", object=missing
            )
        made.append(missing)
        missing = os.path.dirname(missing)
    done: list[str] = []
    try:
        for directory in reversed(made):
            os.mkdir(directory, 0o755)
            done.insert(0, directory)
    except OSError as e:
        for directory in done:
            _remove_if_empty(directory)
        code = {13: "permission", 1: "permission", 30: "permission", 28: "no-space"}.get(e.errno or 0, "kernel")
        raise KernelError(f"cannot make {path}: {e.strerror}", code=code, object=path) from None
    return done


def _remove_if_empty(path: str) -> None:
    try:
        os.rmdir(path)
    except OSError:
        pass
