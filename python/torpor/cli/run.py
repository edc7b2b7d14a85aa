"""Without --detach the command stays in front of the container, passes signals and the terminal on, exits with the
program's exit code and deletes the container. With words after the id and no --bundle, the container runs them on
the host's own files, read-only under a layer of its own."""

from __future__ import annotations

from torpor import api, create, plan
from torpor.errors import UsageError
from torpor.flags import BOOL, Flag

from .common import DETACH, NO_SUBREAPER, START_FLAGS, id_and_command, start_options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from torpor.config import Config
    from torpor.container import Container
    from torpor.create import Options
    from torpor.flags import Parsed
    from torpor.plan import Plan

USAGE = "[flags] ID [COMMAND ARGS...]"
FLAGS = (
    *START_FLAGS,
    DETACH,
    NO_SUBREAPER,
    Flag("keep", BOOL, "do not delete the container when its program has ended"),
)


def execute(config: Config, flags: Parsed) -> int:
    container_id, what = id_and_plan(config, flags, attached=not flags.on("detach"))

    def build(options: Options) -> Container:
        return create.run(config, container_id, what, options)

    return start(config, flags, what, build, keep=flags.on("keep"))


def id_and_plan(config: Config, flags: Parsed, *, attached: bool) -> tuple[str, Plan]:
    """What to run, from the words after the flags."""
    container_id, command = id_and_command(flags)
    api.check_id(container_id)
    if not command:
        return container_id, plan.from_bundle(config, flags.text("bundle"))
    if flags.text("bundle"):
        raise UsageError("the bundle says what to run: give either --bundle or a command")
    return container_id, on_host_root(
        config, command, hostname=container_id, attached=attached, socket=flags.text("console-socket")
    )


def on_host_root(config: Config, command: list[str], *, hostname: str, attached: bool, socket: str = "") -> Plan:
    import os

    terminal = bool(socket) or (attached and os.isatty(0) and os.isatty(1))
    return plan.on_host_root(config, command, hostname=hostname, terminal=terminal)


def start(
    config: Config, flags: Parsed, what: Plan, build: Callable[[Options], Container], *, keep: bool = False
) -> int:
    """Build a container and leave it, or stay with it to its end."""
    attached = not flags.on("detach")
    api.check_console(what, flags.text("console-socket"), attached=attached)
    if not attached:
        build(start_options(flags, supervise=False))
        return 0
    return attach(config, flags, what, build, keep=keep)


def attach(
    config: Config, flags: Parsed, what: Plan, build: Callable[[Options], Container], *, keep: bool = False
) -> int:
    from .attach import Signals, Terminal, exit_code, follow

    with Signals() as signals, Terminal(config.root, what.terminal) as terminal:
        container = build(
            start_options(flags, supervise=True, console_socket=terminal.socket, committed=signals.aim_at)
        )
        assert container.supervisor is not None
        try:
            follow(container.supervisor, container.pid, signals, terminal.receive())
            return exit_code(container.wait())
        finally:
            if not keep:
                forget(container)


def forget(container: Container) -> None:
    """Delete a container whose program has ended; somebody else may have been quicker."""
    from torpor import log
    from torpor.errors import StateError, TorporError

    try:
        container.delete(force=True)
    except StateError:
        pass
    except TorporError as e:
        log.warning(f"container {container.id!r} could not be removed: {e}")
