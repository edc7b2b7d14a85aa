"""A container of this id that waits in status created is filled; else one is created, from --bundle or, for an image
of a container that had none, on the host's files. Without --detach the command stays, and exits with the program's
exit code."""

from __future__ import annotations

import os

from torpor import api, create
from torpor.errors import UsageError
from torpor.flags import BOOL, TEXT, Flag

from .checkpoint import WorkLog, check_empty_ns
from .common import (
    CRIU_FLAGS,
    DETACH,
    NO_SUBREAPER,
    PROGRESS,
    START_FLAGS,
    Refused,
    check_refused,
    display,
    one_id,
    refused_flags,
)
from .run import forget, start

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from torpor.config import Config
    from torpor.container import Container
    from torpor.create import Options
    from torpor.flags import Parsed
    from torpor.progress import Display

USAGE = "--image-path DIR [flags] ID"

_REFUSED: Refused = (
    ("lazy-pages", BOOL, "all pages are read before the container goes on"),
    ("fs-restore-image-path", TEXT, "file system images are not read"),
    ("fs-restore-direct", BOOL, "file system images are not read"),
)
FLAGS = (
    Flag("image-path", TEXT, "directory that holds the image"),
    *START_FLAGS,
    DETACH,
    Flag("work-path", TEXT, "directory for restore.log"),
    NO_SUBREAPER,
    Flag("background", BOOL, "let the program run at once and bring its memory while it runs"),
    Flag("record-working-set", BOOL, "with --background: note beside the image what is touched first"),
    Flag("track", BOOL, "note what is written to from now on, for a checkpoint with --parent-path"),
    Flag("parent-path", TEXT, "accepted; an image knows its parent"),
    PROGRESS,
    Flag("stats", BOOL, "print what each stage took, on stderr: stdout is the program's"),
    Flag("tcp-established", BOOL, "accepted; connections that the image keeps come back"),
    Flag("tcp-close", BOOL, "close TCP connections that lead out of the container"),
    Flag("files", TEXT, "what files that were mapped or read must be: unwritten since, as long as before, or anything",
         default="size", choices=("strict", "size", "ignore")),
    *CRIU_FLAGS,
    Flag("lsm-profile", TEXT, "TYPE:NAME, where this machine has that security module"),
    Flag("lsm-mount-context", TEXT, "SELinux context of mounts, where this machine has SELinux"),
    *refused_flags(_REFUSED),
)  # fmt: skip


def execute(config: Config, flags: Parsed) -> int:
    container_id = one_id(flags)
    image = flags.text("image-path")
    if not image:
        raise UsageError(
            "--image-path is required: give the directory that holds the image", code="bad-flag", object="--image-path"
        )
    check_refused(flags, _REFUSED)
    check_empty_ns(flags)
    _check_lsm(flags)
    shown = display("restore", flags)
    filling = _filling(flags, shown)
    image = os.path.abspath(image)
    with WorkLog(flags.text("work-path"), "restore.log") as work_log:
        work_log.note(f"restoring {image} as {container_id}")
        existing = api.find(container_id, root=config.root)
        try:
            if existing is not None:
                return _fill(config, existing, flags, image, filling)
            return _make(config, container_id, flags, image, filling)
        except BaseException:
            if shown:
                shown.abandon()
            raise


def _fill(config: Config, existing: Container, flags: Parsed, image: str, filling: create.Filling) -> int:
    config.check_against(existing.refresh().flags, existing.id)
    state = existing.refresh()
    other = "bundle" if flags.text("bundle") and os.path.abspath(flags.text("bundle")) != state.bundle else ""
    if flags.text("console-socket"):
        other = "console-socket"
    if other:
        raise UsageError(f"container {existing.id!r} was created without that --{other}: leave it out")
    api.check_image(image)
    if flags.on("detach"):
        create.restore_into(existing, image, flags.text("pid-file"), filling=filling)
        return 0
    from torpor.exits import Exit

    from .attach import Signals, exit_code, follow

    with Signals() as signals, Exit(existing.pid, state.start_time) as end:
        create.restore_into(existing, image, flags.text("pid-file"), signals.aim_at, filling)
        try:
            follow(end, existing.pid, signals)
            return exit_code(end.status())
        finally:
            forget(existing)


def _make(config: Config, container_id: str, flags: Parsed, image: str, filling: create.Filling) -> int:
    api.check_id(container_id)
    what = api.plan_for_restore(config, image, flags.text("bundle"), container_id)

    def build(options: Options) -> Container:
        options.filling = filling
        return create.restore(config, container_id, what, options, image)

    return start(config, flags, what, build)


def _filling(flags: Parsed, shown: Display | None) -> create.Filling:
    return create.Filling(
        background=flags.on("background"),
        record_working_set=flags.on("record-working-set"),
        track=flags.on("track"),
        tcp_close=flags.on("tcp-close"),
        files=flags.text("files"),
        on_progress=shown.tell if shown else None,
        # Before the program has the terminal.
        loaded=shown.end if shown else None,
        restored=_print_stats if flags.on("stats") else None,
    )


def _print_stats(report: dict[str, Any]) -> None:
    import sys

    from torpor import stats

    sys.stderr.write(stats.table(report))
    sys.stderr.flush()


def _check_lsm(flags: Parsed) -> None:
    """A label that cannot be given must not be dropped in silence; without the module there is nothing to label."""
    wanted = flags.text("lsm-profile").partition(":")[0] or ("selinux" if flags.text("lsm-mount-context") else "")
    if wanted and os.path.isdir(
        {"selinux": "/sys/fs/selinux", "apparmor": "/sys/kernel/security/apparmor"}.get(wanted, "/")
    ):
        raise UsageError(f"{wanted} labels on restore are not supported yet", code="bad-flag", object="--lsm-profile")
