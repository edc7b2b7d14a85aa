"""Bring a container into being: create, run, and restore from an image.

Each is one transaction on the state directory. Until it is through, the status is `creating` or `restoring` with this
process as owner; whatever way it ends early, everything is taken down again: by us, by the tracer, or by the next
torpor that finds our ruin.
"""

from __future__ import annotations

import os

from . import exits, launcher, log, overlay, proc, quick_json, ruins, warm
from .container import Container, told_to
from .errors import StateError, TorporError, UsageError
from .state import Home, State, check_id, may, replace_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any

    from .config import Config
    from .launcher import Stdio
    from .plan import Plan
    from .progress import Progress


class Filling:
    """How a restore brings memory, and what it leaves out."""

    __slots__ = ("background", "files", "loaded", "on_progress", "record_working_set", "restored", "tcp_close", "track")

    def __init__(
        self,
        *,
        background: bool = False,
        record_working_set: bool = False,
        track: bool = False,
        tcp_close: bool = False,
        files: str = "size",
        on_progress: Callable[[Progress], object] | None = None,
        loaded: Callable[[], object] | None = None,
        restored: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        # The program runs before its memory is there.
        self.background = background
        # What it touches first is noted beside the image, and brought first by the next one.
        self.record_working_set = record_working_set
        # TCP connections that lead out of the container are closed.
        self.tcp_close = tcp_close
        # What files that the image does not hold must still be: "strict", "size" or "ignore".
        self.files = files
        # Called while memory is brought.
        self.on_progress = on_progress
        # Called when all is there and nothing runs yet.
        self.loaded = loaded
        # Called with the engine's report when the program runs.
        self.restored = restored
        # What it writes to from then on is noted, for an incremental checkpoint.
        self.track = track
        if track and background:
            # A page that comes while the program runs cannot be told from one that the program writes.
            raise UsageError(
                "--track is not supported with --background: track from the first checkpoint on",
                code="bad-flag",
                object="--track",
            )
        if record_working_set and not background:
            raise UsageError(
                "--record-working-set needs --background: it records what the program waits for",
                code="bad-flag",
                object="--record-working-set",
            )


class Options:
    """How a container is started, apart from what it is."""

    __slots__ = (
        "committed",
        "console_socket",
        "filling",
        "no_new_keyring",
        "no_pivot",
        "pid_file",
        "pidfd_socket",
        "preserve_fds",
        "stdio",
        "supervise",
    )

    def __init__(
        self,
        *,
        console_socket: str = "",
        pid_file: str = "",
        pidfd_socket: str = "",
        preserve_fds: int = 0,
        no_pivot: bool = False,
        no_new_keyring: bool = False,
        stdio: Stdio | None = None,
        supervise: bool = False,
        committed: Callable[[int], None] | None = None,
        filling: Filling | None = None,
    ) -> None:
        self.console_socket = console_socket
        self.pid_file = pid_file
        self.pidfd_socket = pidfd_socket
        self.preserve_fds = preserve_fds
        self.no_pivot = no_pivot
        self.no_new_keyring = no_new_keyring
        self.stdio = stdio
        self.supervise = supervise
        self.filling = filling or Filling()
        # Called with the pid of init just before its program runs: from there on a signal to us is meant for it.
        self.committed = committed


def create(config: Config, container_id: str, plan: Plan, options: Options) -> Container:
    """Build a container that waits for `start`. Errors as `run`."""
    with _Building(config, container_id, plan, options) as building:
        building.settle("created")
        return building.done()


def run(config: Config, container_id: str, plan: Plan, options: Options) -> Container:
    """Build a container and start its program.

    Raises:
        StateError: `exists` or `bad-id`.
        KernelError: the overlay cannot be mounted.
        LauncherError or another TorporError: what the launcher reports.
    """
    with _Building(config, container_id, plan, options) as building:
        if building.image:
            building.fill()
        else:
            building.commit()
            launcher.run("start", *building.home_flags())
            building.settle("running")
        return building.done()


def restore(config: Config, container_id: str, plan: Plan, options: Options, image: str) -> Container:
    """Build a container and fill it from an image.

    Raises:
        as `run`, and as `restore_into`.
    """
    with _Building(config, container_id, plan, options, image) as building:
        building.fill()
        return building.done()


def restore_into(
    container: Container,
    image: str,
    pid_file: str = "",
    committed: Callable[[int], None] | None = None,
    filling: Filling | None = None,
) -> None:
    """Fill a created container from an image. A refusal leaves it as it was; a failure half way removes it.

    Raises:
        StateError: `bad-state`, it is not in status created, or exec has put a process there that still runs.
        ImageError: the image is missing or damaged.
        UnsupportedError, RefusedError: the image needs what this machine or this container does not have.
        KernelError, InterruptedCheckpoint: the restore failed.
    """
    with container.home as home:
        state = container.refresh()
        may("restore", state.id, state.status)
        _check_alone(state)
        state.owner_process = _self()
        state.move("restoring")
        home.write(state)
        try:
            commit = lambda: committed(state.pid) if committed else None  # noqa: E731
            _fill(home, state, container.spec(), image, commit, filling or Filling())
            if pid_file:
                write_pid_file(pid_file, state.pid)
        except BaseException as e:
            untouched = isinstance(e, TorporError) and (e.stage in ("read", "plan") or e.code.startswith("image-"))
            if untouched and state.status == "restoring" and proc.is_alive(state.pid, state.start_time):
                state.move("created")
                home.write(state)
            else:
                ruins.clear(home, state)
            raise


def _check_alone(state: State) -> None:
    """A process that exec put there may have a pid that the image needs.

    Raises:
        StateError: `bad-state`.
    """
    for pid in proc.cgroup_processes(state.pid):
        if pid != state.pid:
            raise StateError(
                f"cannot restore into {state.id!r}: process {pid} ({proc.comm(pid)}) runs in it, end it first",
                code="bad-state",
                object=state.id,
            )


def _fill(
    home: Home, state: State, spec: dict[str, Any], image: str, commit: Callable[[], None], filling: Filling
) -> None:
    """Let the engine rebuild the image's processes in the container's waiting init."""
    from . import _core, pager, tracker

    def on_loaded() -> None:
        if filling.loaded is not None:
            filling.loaded()
        # Everything is there and still stopped: from here on it is a running container, whatever becomes of us.
        commit()
        state.move("running")
        home.write(state)

    request = {
        "pid": state.pid,
        "image_path": os.path.abspath(image),
        "spec": spec,
        "filter": _seccomp_filter(home, spec),
        "orphan": ruins.orphan_command(home, state),
        "background": filling.background,
        "record_working_set": filling.record_working_set,
        "tcp_close": filling.tcp_close,
        "files": filling.files,
        "pager_report": home.file(pager.REPORT),
        "track": filling.track,
        "tracker": home.file(tracker.NOTE),
    }
    tell = told_to(filling.on_progress)
    report = quick_json.loads(_core.restore(quick_json.dumps(request), on_loaded, tell))
    log.debug(f"restored {image} into {state.id}: {report}")
    if report["background"]:
        pager.note(home, report["pager"])
    if filling.restored is not None:
        filling.restored(report)
    for warning in report.get("warnings") or []:
        log.warning(warning)
    try:
        launcher.run("started", *_home_flags(home))
    except TorporError as e:
        # The program runs. A poststart hook that fails is worth a warning and no more (OCI runtime spec, "Lifecycle"
        # step 10); that the program has ended already is worth none.
        say = log.warning if proc.is_alive(state.pid, state.start_time) else log.debug
        say(str(e))


def _seccomp_filter(home: Home, spec: dict[str, Any]) -> dict[str, Any] | None:
    """The spec's filter as the kernel gets it: what an image holds is no reason to go without."""
    if not (spec.get("linux") or {}).get("seccomp"):
        return None
    found: dict[str, Any] | None = launcher.run("filter", *_home_flags(home))["filter"]
    return found


class _Building:
    """A container under construction. Leaving the block before `done` takes it down."""

    def __init__(self, config: Config, container_id: str, plan: Plan, options: Options, image: str = "") -> None:
        self.config = config
        # What it is filled from instead of starting its program, "" for nothing: the caller's choice, else the spec's.
        self.image = image
        self.plan = plan
        self.options = options
        self.home = Home(config.root, check_id(container_id))
        self.state = State(id=container_id, owner_process=_self())
        self.supervisor: exits.Child | None = None
        self.finished = False

    def __enter__(self) -> _Building:
        _check_cgroup_driver(self.config)
        ruins.clear_if_ruin(self.home)
        self.home.make()
        try:
            self._build()
        except BaseException:
            self._abandon()
            raise
        return self

    def _build(self) -> None:
        plan = self.plan
        self.state.bundle = plan.bundle or self.home.path
        self.state.owner = _user_name()
        self.state.annotations = plan.spec.get("annotations") or {}
        self.state.flags = {**self.config.remembered(), "on_host_root": plan.on_host_root}
        self.state.terminal = plan.terminal
        self.state.overlay = self.state.on_host_root = plan.on_host_root
        self._look_for_image()
        self.home.write(self.state)
        if plan.lower:
            plan.spec["root"]["path"] = overlay.mount(self.home, plan.lower)
        self.state.rootfs = plan.spec["root"]["path"]
        self.home.write_text("config.json", quick_json.dumps(plan.spec))
        flags = self._create_flags()
        if self.options.supervise:
            self.supervisor, report = launcher.supervise("create", *flags, **self._spawn_options())
        else:
            report = launcher.run("create", *flags, **self._spawn_options())
        self.state.pid = int(report["pid"])
        self.state.start_time = proc.start_time(self.state.pid) or 0
        self.home.write(self.state)

    def _look_for_image(self) -> None:
        spec = self.plan.spec
        name = warm.wanted(spec)
        if not name:
            return
        if not self.image:
            self.image = warm.find(name, self.config.restore_from)
            from . import _core

            warm.check(spec, self.image, quick_json.loads(_core.peek(self.image)))
            self.state.flags["image"] = self.image
        warm.add_environment(self.home, spec)

    def _create_flags(self) -> list[str]:
        options = self.options
        flags = [*self.home_flags(), "--bundle", self.state.bundle, "--spec", self.home.file("config.json")]
        if options.console_socket:
            flags += ["--console-socket", os.path.abspath(options.console_socket)]
        if options.preserve_fds:
            flags += ["--preserve-fds", str(options.preserve_fds)]
        for name, on in (
            ("--systemd-cgroup", self.config.systemd_cgroup),
            ("--no-pivot", options.no_pivot),
            ("--no-new-keyring", options.no_new_keyring),
        ):
            if on:
                flags.append(name)
        return flags

    def _spawn_options(self) -> dict[str, Any]:
        return {"stdio": self.options.stdio, "preserve_fds": self.options.preserve_fds}

    def home_flags(self) -> list[str]:
        return _home_flags(self.home)

    def fill(self) -> None:
        self.state.move("restoring")
        self.home.write(self.state)
        _fill(self.home, self.state, self.plan.spec, self.image, self.commit, self.options.filling)
        self.write_pid_file()

    def settle(self, status: str) -> None:
        self.state.move(status)
        self.home.write(self.state)
        self.write_pid_file()

    def write_pid_file(self) -> None:
        if self.options.pidfd_socket:
            send_pidfd(self.options.pidfd_socket, self.state.pid)
        if self.options.pid_file:
            write_pid_file(self.options.pid_file, self.state.pid)

    def commit(self) -> None:
        if self.options.committed is not None:
            self.options.committed(self.state.pid)

    def done(self) -> Container:
        self.finished = True
        return Container(self.home, self.state, supervisor=self.supervisor)

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if self.finished:
            self.home.release()
        else:
            self._abandon()

    def _abandon(self) -> None:
        try:
            ruins.clear(self.home, self.state)
        except (TorporError, OSError) as e:
            log.warning(f"container {self.home.id!r} could not be removed completely: {e}")
        finally:
            self.home.release()
        if self.supervisor is not None:
            self.supervisor.reap()


def _check_cgroup_driver(config: Config) -> None:
    """The check of sd_booted(3), which libcontainer makes only on cgroup v2.

    Raises:
        UsageError: `bad-flag`.
    """
    if config.systemd_cgroup and not os.path.isdir("/run/systemd/system"):
        raise UsageError(
            "--systemd-cgroup needs systemd as init: leave it out, and set the client's cgroup driver to cgroupfs",
            code="bad-flag",
            object="--systemd-cgroup",
        )


def _home_flags(home: Home) -> list[str]:
    return ["--root", home.file("oci"), "--id", home.id]


def write_pid_file(path: str, pid: int) -> None:
    """Digits and no newline: containerd's shim reads it with Atoi, and takes its appearance for success."""
    try:
        replace_file(os.path.abspath(path), str(pid).encode(), 0o644)
    except OSError as e:
        raise UsageError(f"cannot write --pid-file {path}: {e.strerror}", code="bad-flag", object=path) from None


def send_pidfd(path: str, pid: int) -> None:
    """Hand a pidfd of the container's process to whoever listens: it names the process for good."""
    import socket

    try:
        fd = os.pidfd_open(pid)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as s:
                s.connect(path)
                # the name is what runc sends along
                socket.send_fds(s, [b"pidfd"], [fd])
        finally:
            os.close(fd)
    except OSError as e:
        raise UsageError(f"cannot use --pidfd-socket {path}: {e.strerror}", code="bad-flag", object=path) from None


def _self() -> tuple[int, int]:
    return os.getpid(), proc.start_time(os.getpid()) or 0


def _user_name() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
