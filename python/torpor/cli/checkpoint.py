"""DIR is made when it is missing and gets one file, checkpoint.img, and with --work-path an inventory.img, which Podman
looks for. Without --leave-running the container is stopped and its state kept until `delete`. Whatever goes wrong, the
container runs on and nothing is left in DIR.

With --parent-path the image holds only what has changed since the one there, and needs it to be restored. It is found
at once if that checkpoint was made with --track or --pre-dump; else all memory is read and compared."""

from __future__ import annotations

import os

from torpor import compression
from torpor.errors import UsageError
from torpor.flags import BOOL, NUMBER, TEXT, Flag, assume

from .common import (
    CRIU_FLAGS,
    PERMISSION,
    PROGRESS,
    Refused,
    check_refused,
    container,
    display,
    one_id,
    refused_flags,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from torpor.config import Config
    from torpor.container import Checkpoint, Container
    from torpor.flags import Parsed

USAGE = "--image-path DIR [flags] ID"

_REFUSED: Refused = (
    ("lazy-pages", BOOL, "an image always holds all pages"),
    ("page-server", TEXT, "an image always holds all pages"),
    ("cuda-checkpoint-path", TEXT, "GPU state is not carried"),
    ("cuda-checkpoint-sequential", BOOL, "GPU state is not carried"),
    ("save-restore-exec-argv", TEXT, "nothing is run inside the container"),
)
FLAGS = (
    Flag("image-path", TEXT, "directory to write the image to"),
    Flag("leave-running", BOOL, "let the container go on afterwards"),
    Flag("detach", BOOL, "with --leave-running: return as soon as the container runs again; see wait --checkpoint"),
    Flag("stats", BOOL, "print what each stage took"),
    PROGRESS,
    Flag("capture", TEXT, "how --leave-running reads memory; stop if it is little", choices=("background", "stop")),
    Flag("parent-path", TEXT, "directory of an earlier image, relative to --image-path, to go on from"),
    Flag("track", BOOL, "with --leave-running: note what is written to from now on, for the next --parent-path"),
    Flag("pre-dump", BOOL, "write memory only, for a later --parent-path; --leave-running and --track are implied"),
    Flag("work-path", TEXT, "directory for dump.log"),
    Flag("compression", TEXT, compression.HELP, default="none"),
    # Each of these permits something. What cannot be carried is refused by name, with or without them.
    Flag("tcp-established", BOOL, "keep TCP connections that lead out of the container; else they are closed"),
    Flag("tcp-skip-in-flight", BOOL, "leave out TCP connections that nobody has accepted yet"),
    Flag("link-remap", BOOL, PERMISSION),
    *CRIU_FLAGS,
    Flag("exclude-committed-zero-pages", BOOL, "accepted; zero pages are never written"),
    Flag("status-fd", NUMBER, "", default=-1, hidden=True),
    Flag("save-restore-exec-timeout", TEXT, "", hidden=True),
    *refused_flags(_REFUSED),
)  # fmt: skip


def execute(config: Config, flags: Parsed) -> int:
    container_id = one_id(flags)
    image = flags.text("image-path")
    if not image:
        raise UsageError(
            "--image-path is required: give the directory to write the image to", code="bad-flag", object="--image-path"
        )
    check_refused(flags, _REFUSED)
    if flags.number("status-fd") >= 0:
        raise UsageError(
            "--status-fd is not supported yet: it belongs to --lazy-pages", code="bad-flag", object="--status-fd"
        )
    compression.check(flags.text("compression"))
    check_empty_ns(flags)
    _check_detach(flags)
    found = container(config, container_id)
    heed_annotations(found.refresh().annotations, flags)
    from torpor import criu

    with WorkLog(flags.text("work-path"), "dump.log") as work_log:
        path = os.path.abspath(image)
        if flags.on("detach"):
            pending = found.checkpoint_detached(
                path,
                capture=flags.text("capture"),
                parent_path=flags.text("parent-path"),
                tcp_established=flags.on("tcp-established"),
                tcp_skip_in_flight=flags.on("tcp-skip-in-flight"),
                compression=flags.text("compression"),
            )
            work_log.note(f"writing {path}, after a pause of {pending.pause_seconds * 1000:.1f} ms")
            return 0
        old = flags.text("work-path") and os.path.isfile(os.path.join(path, "checkpoint.img"))
        # Beside the old one: a parent path is the same from there.
        saved = _save(found, f"{path}.torpor-{os.getpid()}" if old else path, flags)
        if old:
            _replace(saved.path, path)
        work_log.note(f"wrote {path}: {saved.report}")
        if flags.text("work-path"):
            _mark_for_clients(path)
            work_log.put("stats-dump", criu.dump_stats(saved.report))
    from torpor import log

    for warning in saved.warnings:
        log.warning(warning)
    if flags.on("stats"):
        from torpor import stats

        print(stats.table(saved.report), end="")
    return 0


def _save(found: Container, path: str, flags: Parsed) -> Checkpoint:
    shown = display("checkpoint", flags)
    try:
        saved = found.checkpoint(
            path,
            leave_running=flags.on("leave-running"),
            capture=flags.text("capture"),
            parent_path=flags.text("parent-path"),
            pre_dump=flags.on("pre-dump"),
            track=flags.on("track"),
            tcp_established=flags.on("tcp-established"),
            tcp_skip_in_flight=flags.on("tcp-skip-in-flight"),
            compression=flags.text("compression"),
            on_progress=shown.tell if shown else None,
        )
    except BaseException:
        if shown:
            shown.abandon()
        raise
    if shown:
        shown.end(saved.report["pause_us"])
    return saved


_ANNOTATIONS = "dev.torpor.checkpoint."
# What whoever starts a container may wish of its checkpoints. Not where they are written.
_MAY_BE_ANNOTATED = ("capture", "compression", "save-rootfs", "tcp-close", "tcp-established", "tcp-skip-in-flight")


def heed_annotations(annotations: Mapping[str, str], flags: Parsed) -> None:
    """`dev.torpor.checkpoint.NAME=VALUE` in the spec is the default of --NAME, for clients that have no such flag;
    `dev.torpor.checkpoint.tcp=POLICY` that of --tcp-POLICY, unless the command chooses a policy.

    Raises:
        UsageError: `bad-flag`, the flag does not take that value.
    """
    from torpor import log

    policy = any(name.startswith("tcp-") for name in flags.given)
    for annotation, value in annotations.items():
        if not annotation.startswith(_ANNOTATIONS):
            continue
        name, text = annotation[len(_ANNOTATIONS) :], value
        if name == "tcp":
            name, text = f"tcp-{value}", "true"
        if policy and name.startswith("tcp-"):
            continue
        try:
            known = name in _MAY_BE_ANNOTATED and assume(FLAGS, flags, name, text)
        except UsageError as e:
            raise UsageError(f"annotation {annotation}={value}: {e}", code="bad-flag", object=annotation) from None
        if not known:
            log.warning(f"annotation {annotation}={value} is not supported and has no effect")


def _check_detach(flags: Parsed) -> None:
    if not flags.on("detach"):
        return
    why = "" if flags.on("leave-running") else "--detach needs --leave-running: otherwise nothing runs meanwhile"
    for name in ("track", "pre-dump"):
        if flags.on(name):
            why = f"--{name} needs a checkpoint that is waited for: leave --detach out"
    if flags.text("progress") == "json":
        why = "--progress=json needs a checkpoint that is waited for: leave --detach out"
    if flags.on("stats"):
        why = "--stats needs a checkpoint that is waited for: leave --detach out"
    if why:
        raise UsageError(why, code="bad-flag", object="--detach")


def _replace(new: str, path: str) -> None:
    """Podman, which always gives --work-path, has one directory for a container and writes there again and again. The
    old image goes when the new one is complete.
    """
    os.replace(os.path.join(new, "checkpoint.img"), os.path.join(path, "checkpoint.img"))
    os.rmdir(new)


def _mark_for_clients(image: str) -> None:
    """Podman and CRI-O, who always give --work-path, take an image for one when it has an inventory.img."""
    try:
        with open(os.path.join(image, "inventory.img"), "w") as f:
            f.write(
                "torpor: all that was saved is in checkpoint.img; this file is for clients that look for its name\n"
            )
    except OSError as e:
        from torpor import log

        log.warning(f"cannot write {image}/inventory.img, without which Podman will not restore: {e.strerror}")


def check_empty_ns(flags: Parsed) -> None:
    for name in flags.words("empty-ns"):
        if name != "network":
            raise UsageError(f"invalid value {name!r} for flag --empty-ns: only network is accepted", code="bad-flag")


class WorkLog:
    """dump.log or restore.log in --work-path: containerd's shim and Podman show it to people when something failed."""

    def __init__(self, directory: str, name: str) -> None:
        self._path = os.path.join(os.path.abspath(directory), name) if directory else ""

    def note(self, line: str) -> None:
        if not self._path:
            return
        from torpor.log import one_line, rfc3339

        try:
            os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
            with open(self._path, "a", encoding="utf-8", errors="replace") as f:
                f.write(f"{rfc3339()} {one_line(line)}\n")
        except OSError as e:
            # It is for reading afterwards; the checkpoint itself must not depend on it.
            from torpor import log

            log.debug(f"cannot write {self._path}: {e}")

    def put(self, name: str, data: bytes) -> None:
        """A file beside the log."""
        try:
            with open(os.path.join(os.path.dirname(self._path), name), "wb") as f:
                f.write(data)
        except OSError as e:
            from torpor import log

            log.debug(f"cannot write {name}: {e}")

    def __enter__(self) -> WorkLog:
        return self

    def __exit__(self, kind: object, e: BaseException | None, tb: object) -> None:
        if e is not None:
            self.note(f"Error: {e}")
