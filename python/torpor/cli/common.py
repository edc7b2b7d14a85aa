"""What several verbs share: their flags, and how they find the container they are about."""

from __future__ import annotations

import os

from torpor.container import Container
from torpor.errors import UsageError
from torpor.flags import BOOL, LIST, NUMBER, TEXT, Flag, Parsed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from torpor.config import Config
    from torpor.create import Options
    from torpor.progress import Display

# create, run, restore
START_FLAGS = (
    Flag("bundle", TEXT, "directory with config.json (the current one)", short="b"),
    Flag("console-socket", TEXT, "AF_UNIX socket that gets the master of the container's terminal"),
    Flag("pid-file", TEXT, "file to write the host's pid of the container to, last of all"),
    Flag("pidfd-socket", TEXT, "AF_UNIX socket that gets a pidfd of the container's init"),
    Flag("preserve-fds", NUMBER, "hand on this many descriptors from 3 upwards"),
    Flag("no-pivot", BOOL, "do not use pivot_root, for a root on a ramdisk"),
    Flag("no-new-keyring", BOOL, "stay in the session keyring of the caller"),
    Flag("user-log", TEXT, "accepted and ignored", hidden=True),
)

NO_SUBREAPER = Flag("no-subreaper", BOOL, "accepted; torpor never makes itself the subreaper of its caller")
DETACH = Flag("detach", BOOL, "return as soon as the container runs", short="d")

PROGRESS = Flag(
    "progress",
    TEXT,
    "on stderr: JSON lines, or a bar if it takes long and that is a terminal",
    default="auto",
    choices=("auto", "json", "none"),
)

# Help for what asks for permission that CRIU needs and torpor does not.
PERMISSION = "accepted; what can be carried is carried without being asked"

# checkpoint and restore: what clients of runc hand on to CRIU.
CRIU_FLAGS = (
    Flag("ext-unix-sk", BOOL, PERMISSION),
    Flag("shell-job", BOOL, PERMISSION),
    Flag("file-locks", BOOL, PERMISSION),
    Flag("manage-cgroups-mode", TEXT, "accepted; the spec decides", choices=("soft", "full", "strict", "ignore")),
    Flag("empty-ns", LIST, "accepted for `network`; repeatable"),
    Flag("network-lock", TEXT, "accepted", choices=("iptables", "nftables", "skip")),
    Flag("auto-dedup", BOOL, "accepted; parent images stay as they are"),
    Flag("direct", BOOL, "accepted; torpor chooses how to do its I/O"),
)

# Not there yet, and ignoring them would break a promise: (flag, kind, what it would need).
Refused = tuple[tuple[str, str, str], ...]


def display(verb: str, flags: Parsed) -> Display | None:
    """What --progress asks for."""
    mode = flags.text("progress")
    if mode != "json" and not (mode == "auto" and os.isatty(2)):
        return None
    from torpor.progress import Display

    return Display(verb, lines=mode == "json")


def start_options(
    flags: Parsed,
    *,
    supervise: bool,
    console_socket: str = "",
    committed: Callable[[int], None] | None = None,
) -> Options:
    from torpor.create import Options

    preserve = flags.number("preserve-fds")
    if preserve < 0:
        raise UsageError("--preserve-fds cannot be negative", code="bad-flag")
    return Options(
        console_socket=console_socket or flags.text("console-socket"),
        pid_file=flags.text("pid-file"),
        pidfd_socket=flags.text("pidfd-socket"),
        preserve_fds=preserve,
        no_pivot=flags.on("no-pivot"),
        no_new_keyring=flags.on("no-new-keyring"),
        supervise=supervise,
        committed=committed,
    )


def one_id(flags: Parsed) -> str:
    """The container id that is the only argument.

    Raises:
        UsageError: there is none, or more.
    """
    if not flags.args:
        raise UsageError("a container id is required")
    if len(flags.args) > 1:
        raise UsageError(f"unexpected argument {flags.args[1]!r}: flags come before the container id")
    return flags.args[0]


def id_and_command(flags: Parsed) -> tuple[str, list[str]]:
    """The container id and the words after it, without a `--` between them.

    Raises:
        UsageError: there is no id.
    """
    if not flags.args:
        raise UsageError("a container id is required")
    container_id, *command = flags.args
    return container_id, command[1:] if command[:1] == ["--"] else command


def container(config: Config, container_id: str) -> Container:
    """The container that a command is about.

    Raises:
        StateError: `not-found` or `bad-id`.
        UsageError: a flag before the verb differs from what the container was made with.
    """
    found = Container.load(container_id, root=config.root)
    state = found.refresh()
    config.check_against(state.flags, found.id)
    return found


def refused_flags(refused: Refused) -> tuple[Flag, ...]:
    return tuple(Flag(name, kind, "not supported yet", hidden=True) for name, kind, _ in refused)


def check_refused(flags: Parsed, refused: Refused) -> None:
    """Refuse the flags whose promise cannot be kept.

    Raises:
        UsageError: `bad-flag`.
    """
    for name, kind, why in refused:
        value = flags.values[name]
        if name in flags.given and (kind != BOOL or value):
            raise UsageError(f"--{name} is not supported yet: {why}", code="bad-flag", object=f"--{name}")
