"""Without --detach the command passes signals and the terminal on and exits with the program's exit code."""

from __future__ import annotations

from torpor import api, quick_json
from torpor.errors import UsageError
from torpor.flags import BOOL, LIST, NUMBER, TEXT, Flag

from .common import container, id_and_command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from torpor.config import Config
    from torpor.container import Container, Process
    from torpor.flags import Parsed

USAGE = "[flags] ID COMMAND [ARGS...]"
FLAGS = (
    Flag("cwd", TEXT, "working directory"),
    Flag("env", LIST, "add NAME=VALUE to the environment; repeatable", short="e"),
    Flag("user", TEXT, "UID or UID:GID", short="u"),
    Flag("additional-gids", LIST, "more groups; repeatable", short="g"),
    Flag("cap", LIST, "add a capability; repeatable", short="c"),
    Flag("tty", BOOL, "give it a terminal", short="t"),
    Flag("detach", BOOL, "return as soon as it runs", short="d"),
    Flag("process", TEXT, "file with an OCI process object that says it all", short="p"),
    Flag("pid-file", TEXT, "file to write the host's pid of the program to"),
    Flag("internal-pid-file", TEXT, "file to write its pid in the container to"),
    Flag("console-socket", TEXT, "AF_UNIX socket that gets the master of its terminal"),
    Flag("pidfd-socket", TEXT, "AF_UNIX socket that gets a pidfd of the program"),
    Flag("preserve-fds", NUMBER, "hand on this many descriptors from 3 upwards"),
    Flag("cgroup", TEXT, "cgroup below the container's"),
    Flag("no-new-privs", BOOL, "forbid it to gain privileges"),
    Flag("process-label", TEXT, "SELinux label"),
    Flag("apparmor", TEXT, "AppArmor profile"),
    Flag("ignore-paused", BOOL, "also in a paused container"),
)


def execute(config: Config, flags: Parsed) -> int:
    container_id, command = id_and_command(flags)
    found = container(config, container_id)
    process = process_object(found, flags, command)
    terminal, socket, detach = bool(process.get("terminal")), flags.text("console-socket"), flags.on("detach")
    if terminal and detach and not socket:
        raise UsageError("a terminal and --detach need --console-socket")
    if socket and not (terminal and detach):
        raise UsageError("--console-socket needs a terminal and --detach")
    api.check_console_socket(socket)
    if detach:
        started = _start(found, flags, process, supervise=False, socket=socket)
        _write_pid_files(flags, started.pid)
        return 0
    return _attach(config, found, flags, process)


def process_object(found: Container, flags: Parsed, command: list[str]) -> dict[str, Any]:
    """The OCI process to start, from --process or from the other flags."""
    from torpor import spec

    if flags.text("process"):
        return _read_process(flags.text("process"))
    if not command:
        raise UsageError("a command is required")
    if not all(text.isdigit() for text in flags.words("additional-gids")):
        raise UsageError("--additional-gids needs numbers", code="bad-flag")
    if any("=" not in entry[1:] for entry in flags.words("env")):
        raise UsageError("--env needs NAME=VALUE", code="bad-flag")
    return spec.process_for_exec(
        found.spec(),
        command,
        cwd=flags.text("cwd"),
        env=flags.words("env"),
        user=flags.text("user"),
        additional_gids=[int(text) for text in flags.words("additional-gids")],
        capabilities=flags.words("cap"),
        terminal=flags.on("tty"),
        no_new_privileges=flags.on("no-new-privs"),
        process_label=flags.text("process-label"),
        apparmor=flags.text("apparmor"),
    )


def _read_process(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as f:
            process = quick_json.loads(f.read())
    except OSError as e:
        raise UsageError(f"cannot read --process {path}: {e.strerror}", code="bad-flag") from None
    except ValueError as e:
        raise UsageError(f"--process {path} is not JSON: {e}", code="bad-flag") from None
    if not isinstance(process, dict) or not process.get("args"):
        raise UsageError(f"--process {path} lacks args", code="bad-flag")
    return process


def _start(found: Container, flags: Parsed, process: dict[str, Any], *, supervise: bool, socket: str) -> Process:
    return found.exec_process(
        process,
        supervise=supervise,
        console_socket=socket,
        preserve_fds=flags.number("preserve-fds"),
        cgroup=flags.text("cgroup"),
        even_if_paused=flags.on("ignore-paused"),
    )


def _attach(config: Config, found: Container, flags: Parsed, process: dict[str, Any]) -> int:
    from .attach import Signals, Terminal, exit_code, follow

    with Signals(patient=True) as signals, Terminal(config.root, bool(process.get("terminal"))) as terminal:
        started = _start(found, flags, process, supervise=True, socket=terminal.socket)
        assert started.supervisor is not None
        _write_pid_files(flags, started.pid)
        follow(started.supervisor, started.pid, signals, terminal.receive())
        return exit_code(started.wait())


def _write_pid_files(flags: Parsed, pid: int) -> None:
    from torpor.create import send_pidfd, write_pid_file

    if flags.text("pidfd-socket"):
        send_pidfd(flags.text("pidfd-socket"), pid)
    if flags.text("internal-pid-file"):
        from torpor import proc

        write_pid_file(flags.text("internal-pid-file"), proc.innermost_pid(pid))
    if flags.text("pid-file"):
        write_pid_file(flags.text("pid-file"), pid)
