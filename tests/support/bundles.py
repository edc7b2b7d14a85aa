"""Bundles to run: an OCI config and a root file system, small (busybox) or the host's own files under an overlay."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
CACHE = REPO / ".cache" / "tests"

# What runc gives by default, and what an ordinary Docker container has.
DOCKER_CAPS = [
    "CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD", "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
]  # fmt: skip


def spec(
    args: Sequence[str],
    *,
    rootfs: Path | str = "rootfs",
    readonly: bool = False,
    env: Sequence[str] = (),
    cwd: str = "/",
    terminal: bool = False,
    caps: Sequence[str] = DOCKER_CAPS,
    user: tuple[int, int] = (0, 0),
    namespaces: Sequence[str] = ("pid", "network", "ipc", "uts", "mount"),
    no_new_privileges: bool = False,
    seccomp: dict[str, Any] | None = None,
    rlimits: Sequence[dict[str, Any]] = (),
    mounts: Sequence[dict[str, Any]] = (),
    hooks: dict[str, Any] | None = None,
    annotations: dict[str, str] | None = None,
    hostname: str = "torpor-test",
) -> dict[str, Any]:
    """A config.json that Docker could have written."""
    process: dict[str, Any] = {
        "terminal": terminal,
        "user": {"uid": user[0], "gid": user[1]},
        "args": list(args),
        "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm", *env],
        "cwd": cwd,
        "capabilities": {kind: list(caps) for kind in ("bounding", "effective", "permitted")},
        "rlimits": list(rlimits),
        "noNewPrivileges": no_new_privileges,
    }
    linux: dict[str, Any] = {
        "namespaces": [{"type": n} for n in namespaces],
        "maskedPaths": ["/proc/kcore", "/proc/latency_stats", "/proc/timer_list", "/proc/sched_debug", "/sys/firmware"],
        "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
    }
    if seccomp is not None:
        linux["seccomp"] = seccomp
    out: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "process": process,
        "root": {"path": str(rootfs), "readonly": readonly},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            *mounts,
        ],
        "linux": linux,
    }  # fmt: skip
    if "uts" in namespaces:
        out["hostname"] = hostname
    if hooks is not None:
        out["hooks"] = hooks
    if annotations is not None:
        out["annotations"] = annotations
    return out


def write(bundle: Path, config: dict[str, Any]) -> Path:
    bundle.mkdir(parents=True, exist_ok=True)
    (bundle / "config.json").write_text(json.dumps(config, indent=2))
    return bundle


def busybox_root(at: Path) -> Path:
    """A root file system with busybox-static and nothing else, made anew at `at`."""
    for name in ("bin", "dev", "etc", "proc", "root", "sys", "tmp", "var", "wl"):
        (at / name).mkdir(parents=True, exist_ok=True)
    (at / "tmp").chmod(0o1777)
    shutil.copy2("/bin/busybox", at / "bin" / "busybox")
    for applet in _applets():
        if applet != "busybox":
            (at / "bin" / applet).symlink_to("busybox")
    (at / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")
    (at / "etc" / "group").write_text("root:x:0:\nnogroup:x:65534:\n")
    return at


_known_applets: list[str] = []


def _applets() -> list[str]:
    if not _known_applets:
        out = subprocess.run(["/bin/busybox", "--list"], check=True, capture_output=True, text=True).stdout
        _known_applets.extend(out.split())
    return _known_applets


class HostRoot:
    """The host's own files, read-only, under an overlay at DIR/rootfs; what the container writes lands in DIR/upper."""

    def __init__(self, directory: Path, copy_of: Path | None = None) -> None:
        """With `copy_of`, what is in that upper directory is there from the beginning."""
        self.directory = directory
        self.path = directory / "rootfs"
        for name in ("rootfs", "work"):
            (directory / name).mkdir(parents=True)
        if copy_of is None:
            (directory / "upper").mkdir()
        else:
            # -a keeps overlayfs's own attributes
            subprocess.run(["cp", "-a", str(copy_of), str(directory / "upper")], check=True)
        options = f"lowerdir=/,upperdir={directory}/upper,workdir={directory}/work"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(self.path)], check=True)
        (self.path / "wl").mkdir(exist_ok=True)

    def close(self) -> None:
        if os.path.ismount(self.path):
            subprocess.run(["umount", str(self.path)], check=True)
        # overlayfs leaves directories without permissions in its work directory
        shutil.rmtree(self.directory / "work", ignore_errors=True)
