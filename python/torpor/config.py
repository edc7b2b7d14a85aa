"""The flags that come before the verb.

Those that shape the container are written into its state by run, create and restore. A later command need not repeat
them, and one that gives another value is refused: otherwise the same container would silently be handled in two ways.
"""

from __future__ import annotations

import os

from .errors import UsageError
from .flags import BOOL, LIST, SWITCH, TEXT, Flag, Parsed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FLAGS = (
    Flag("root", TEXT, "directory for the state of containers ($XDG_RUNTIME_DIR/torpor or /run/torpor)"),
    Flag("log", TEXT, "file that errors are appended to, one JSON object each"),
    Flag("log-format", TEXT, "text, json or json-k8s; --log is always JSON", default="text"),
    Flag("debug", BOOL, "write what is being done to --debug-log, else to --log, else to standard error"),
    Flag("debug-log", TEXT, "file for debug output; with a trailing / a directory that gets a file per command"),
    Flag("systemd-cgroup", BOOL, "make the container's cgroup through systemd"),
    Flag("network", TEXT, "sandbox, host or none", default="sandbox", choices=("sandbox", "host", "none")),
    Flag(
        "restore-from",
        LIST,
        "directory of images that containers may ask to start from (dev.torpor.restore); repeatable",
    ),
    Flag(
        "cgroup-manager",
        TEXT,
        "cgroupfs or systemd, as crun has it",
        choices=("cgroupfs", "systemd", "disabled"),
        hidden=True,
    ),
    Flag(
        "rootless",
        SWITCH,
        "accepted; torpor finds out by itself what it may do",
        choices=("true", "false", "auto", "1", "0"),
    ),
    Flag("version", BOOL, "print the version and leave", short="v"),
)

# What shapes a container, with the values of a container that was made without saying anything.
REMEMBERED: dict[str, bool | str] = {"systemd_cgroup": False, "network": "sandbox"}


class Config:
    """Frozen: the flags before the verb, with defaults filled in. `given` are the remembered ones that were really
    typed.
    """

    __slots__ = (
        "debug",
        "debug_log",
        "given",
        "log",
        "log_format",
        "network",
        "restore_from",
        "root",
        "systemd_cgroup",
    )

    root: str
    log: str
    log_format: str
    debug: bool
    debug_log: str
    systemd_cgroup: bool
    network: str
    restore_from: tuple[str, ...]
    given: frozenset[str]

    def __init__(
        self,
        *,
        root: str | None = None,
        log: str = "",
        log_format: str = "text",
        debug: bool = False,
        debug_log: str = "",
        systemd_cgroup: bool = False,
        network: str = "sandbox",
        restore_from: tuple[str, ...] = (),
        given: frozenset[str] = frozenset(),
    ) -> None:
        put = object.__setattr__
        put(self, "root", os.path.abspath(root) if root else default_root())
        put(self, "log", log)
        put(self, "log_format", log_format)
        put(self, "debug", debug)
        put(self, "debug_log", debug_log)
        put(self, "systemd_cgroup", systemd_cgroup)
        put(self, "network", network)
        put(self, "restore_from", restore_from)
        put(self, "given", given)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Config is frozen, cannot set {name}")

    def remembered(self) -> dict[str, bool | str]:
        """What goes into the container's state."""
        return {name: getattr(self, name) for name in REMEMBERED}

    def check_against(self, remembered: dict[str, Any], container_id: str) -> None:
        """Refuse a flag that differs from the one the container was made with.

        Raises:
            UsageError: `bad-flag`.
        """
        for name in sorted(self.given):
            made_with = remembered.get(name, REMEMBERED[name])
            mine = getattr(self, name)
            if mine != made_with:
                flag = "--" + name.replace("_", "-")
                raise UsageError(
                    f"container {container_id!r} was made with {flag}={_text(made_with)}, not {_text(mine)}: "
                    f"leave {flag} out or give the same value",
                    code="bad-flag",
                    object=flag,
                )


def from_flags(flags: Parsed) -> Config:
    """The Config for a parsed command line.

    Raises:
        UsageError: `bad-flag`, for a value that torpor cannot honour.
    """
    manager = flags.text("cgroup-manager")
    if manager == "disabled":
        raise UsageError(
            "--cgroup-manager=disabled is not supported: torpor freezes a container by its cgroup",
            code="bad-flag",
            object="--cgroup-manager",
        )
    if flags.text("log-format") not in ("text", "json", "json-k8s"):
        raise UsageError("invalid value for flag --log-format: use text, json or json-k8s", code="bad-flag")
    given = {name for name in REMEMBERED if name.replace("_", "-") in flags.given}
    if manager:
        given.add("systemd_cgroup")
    return Config(
        root=flags.text("root"),
        log=flags.text("log"),
        log_format=flags.text("log-format"),
        debug=flags.on("debug"),
        debug_log=flags.text("debug-log"),
        systemd_cgroup=flags.on("systemd-cgroup") or manager == "systemd",
        network=flags.text("network"),
        restore_from=tuple(os.path.abspath(path) for path in flags.words("restore-from")),
        given=frozenset(given),
    )


def default_root() -> str:
    """Where state lives when nobody says: as runsc and runc choose it."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return os.path.join(runtime, "torpor") if runtime else "/run/torpor"


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
