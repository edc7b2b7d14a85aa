"""config.json: read it, check it, make one.

What is checked here is what would otherwise fail deep inside the launcher with a message nobody can act on. Field names
and rules are those of the OCI runtime specification, version 1.2.
"""

from __future__ import annotations

import os

from . import quick_json
from .errors import SpecError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    Spec = dict[str, Any]

OCI_VERSION = "1.2.0"

# What runc puts into a new config.json, and what Docker gives a container: known to be enough for most programs.
SPEC_CAPABILITIES = ("CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE")
HOST_ROOT_CAPABILITIES = (
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)

MASKED_PATHS = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/sys/firmware",
    "/proc/scsi",
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


def load(path: str) -> Spec:
    """Read and check a config.json.

    Raises:
        SpecError: `bad-bundle` when it is not there, `bad-spec` when it cannot be used. The message names the field.
    """
    try:
        with open(path, encoding="utf-8") as f:
            text = f.read()
    except FileNotFoundError:
        raise SpecError(
            f"no config.json in bundle {os.path.dirname(path)}: make one with `torpor spec` or give --bundle",
            code="bad-bundle",
        ) from None
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "it is not UTF-8"
        raise SpecError(f"cannot read {path}: {why}", code="bad-bundle") from None
    try:
        spec = quick_json.loads(text)
    except ValueError as e:
        raise SpecError(f"{path} is not JSON: {e}", code="bad-spec") from None
    check(spec, path)
    return spec  # type: ignore[no-any-return]


def check(spec: Any, where: str) -> None:
    """Check the fields that torpor itself relies on.

    Raises:
        SpecError: `bad-spec`.
    """
    _Checker(where).check(spec)


class _Checker:
    def __init__(self, where: str) -> None:
        self.where = where

    def fail(self, what: str) -> SpecError:
        return SpecError(f"{self.where} {what}", code="bad-spec")

    def field(self, parent: Any, path: str, kind: type, required: bool = False) -> Any:
        name = path.rsplit(".", 1)[-1]
        value = parent.get(name)
        if value is None:
            if required:
                raise self.fail(f"lacks {path}")
            return None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.fail(f"has a {path} that is not {_KIND_NAMES[kind]}")
        return value

    def strings(self, parent: Any, path: str, required: bool = False) -> list[str]:
        value = self.field(parent, path, list, required) or []
        if not all(isinstance(item, str) for item in value):
            raise self.fail(f"has a {path} with something other than strings in it")
        if any("\0" in item for item in value):
            raise self.fail(f"has a {path} with a NUL byte in it")
        return value

    def check(self, spec: Any) -> None:
        if not isinstance(spec, dict):
            raise self.fail("is not a JSON object")
        version = self.field(spec, "ociVersion", str, required=True)
        if not version.startswith("1."):
            raise self.fail(f"has ociVersion {version!r}: torpor knows 1.x")
        self.process(self.field(spec, "process", dict, required=True))
        root = self.field(spec, "root", dict, required=True)
        if not self.field(root, "root.path", str, required=True):
            raise self.fail("has an empty root.path")
        self.field(root, "root.readonly", bool)
        self.field(spec, "hostname", str)
        for key, value in (self.field(spec, "annotations", dict) or {}).items():
            if not isinstance(value, str):
                raise self.fail(f"has an annotation {key!r} that is not a string")
        self.mounts(self.field(spec, "mounts", list) or [])
        self.linux(self.field(spec, "linux", dict) or {})

    def process(self, process: Any) -> None:
        if not self.strings(process, "process.args", required=True):
            raise self.fail("has an empty process.args: name the program to run")
        if not process["args"][0]:
            raise self.fail("has an empty first word in process.args: name the program to run")
        cwd = self.field(process, "process.cwd", str, required=True)
        if not cwd.startswith("/"):
            raise self.fail(f"has process.cwd {cwd!r}: it must be an absolute path")
        for entry in self.strings(process, "process.env"):
            if "=" not in entry[1:]:
                raise self.fail(f"has a process.env entry {entry!r} that is not NAME=VALUE")
        self.field(process, "process.terminal", bool)
        user = self.field(process, "process.user", dict) or {}
        for name in ("uid", "gid"):
            self.field(user, f"process.user.{name}", int)
        capabilities = self.field(process, "process.capabilities", dict) or {}
        for name in capabilities:
            self.strings(capabilities, f"process.capabilities.{name}")
        for limit in self.field(process, "process.rlimits", list) or []:
            if not isinstance(limit, dict):
                raise self.fail("has a process.rlimits entry that is not an object")
            self.field(limit, "process.rlimits.type", str, required=True)

    def mounts(self, mounts: list[Any]) -> None:
        for mount in mounts:
            if not isinstance(mount, dict):
                raise self.fail("has a mounts entry that is not an object")
            self.field(mount, "mounts.destination", str, required=True)
            self.field(mount, "mounts.source", str)
            options = self.strings(mount, "mounts.options")
            # libcontainer refuses these too, but without saying which mount it means.
            if mount.get("uidMappings") or mount.get("gidMappings") or {"idmap", "ridmap"} & set(options):
                raise self.fail(
                    f"maps the ids of the mount at {mount['destination']}, which is not supported: "
                    "leave uidMappings, gidMappings and idmap out and give the files the owner they need"
                )

    def linux(self, linux: Any) -> None:
        for namespace in self.field(linux, "linux.namespaces", list) or []:
            if not isinstance(namespace, dict):
                raise self.fail("has a linux.namespaces entry that is not an object")
            self.field(namespace, "linux.namespaces.type", str, required=True)
            self.field(namespace, "linux.namespaces.path", str)
        self.field(linux, "linux.cgroupsPath", str)
        self.field(linux, "linux.resources", dict)
        self.field(linux, "linux.seccomp", dict)
        for device in self.field(linux, "linux.netDevices", dict) or {}:
            if not os.path.exists(os.path.join("/sys/class/net", device)):
                raise self.fail(f"moves the network device {device!r} (linux.netDevices), which is not there")


_KIND_NAMES: dict[type, str] = {
    str: "a string",
    list: "a list",
    dict: "an object",
    bool: "true or false",
    int: "a number",
}


def default(args: Sequence[str] = ("sh",), cwd: str = "/", netns: str = "", terminal: bool = True) -> Spec:
    """What `torpor spec` writes: the same container that `runc spec` describes."""
    network: dict[str, str] = {"type": "network", "path": netns} if netns else {"type": "network"}
    namespaces = [{"type": "pid"}, network, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}]
    if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        namespaces.append({"type": "cgroup"})
    return {
        "ociVersion": OCI_VERSION,
        "process": {
            "terminal": terminal,
            "user": {"uid": 0, "gid": 0},
            "args": list(args),
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": cwd,
            "capabilities": {name: list(SPEC_CAPABILITIES) for name in ("bounding", "effective", "permitted")},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "torpor",
        "mounts": _mounts(),
        "linux": {
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "namespaces": namespaces,
            "maskedPaths": list(MASKED_PATHS),
            "readonlyPaths": list(READONLY_PATHS),
        },
    }


def host_root(
    args: Sequence[str],
    *,
    env: Sequence[str],
    cwd: str,
    hostname: str,
    terminal: bool,
    network: str,
    volumes: Sequence[str] = (),
    masked: Sequence[str] = (),
) -> Spec:
    """The container on the host's own files: `torpor do`, and run, create and restore without a bundle.

    root.path is filled in when the overlay is mounted. `network` is `host` to share the host's, else the container has
    an empty one of its own, which is what lets one image run many times at once.
    """
    spec = default(args, cwd=cwd, terminal=terminal)
    process = spec["process"]
    process["env"] = list(env)
    process["capabilities"] = {name: list(HOST_ROOT_CAPABILITIES) for name in ("bounding", "effective", "permitted")}
    process["noNewPrivileges"] = False
    del process["rlimits"]
    spec["root"] = {"path": "/", "readonly": False}
    spec["hostname"] = hostname
    spec["mounts"] += [volume(text) for text in volumes]
    spec["linux"]["maskedPaths"] += list(masked)
    set_network(spec, network, bundle_less=True)
    return spec


def set_network(spec: Spec, network: str, *, bundle_less: bool) -> None:
    """Apply the flag --network to a spec.

    `none` always means an empty network namespace. `host` means the host's for a container on the host's files; with a
    bundle the spec says which namespace is used, as runsc has it.
    """
    linux = spec.setdefault("linux", {})
    others = [n for n in linux.get("namespaces") or [] if n["type"] != "network"]
    if bundle_less and network == "host":
        linux["namespaces"] = others
    elif bundle_less or network == "none":
        linux["namespaces"] = [*others, {"type": "network"}]


def volume(text: str) -> dict[str, Any]:
    """`SRC[:DST]` as a bind mount.

    Raises:
        SpecError: `bad-spec`.
    """
    source, _, destination = text.partition(":")
    destination = destination or source
    if not source or not destination.startswith("/"):
        raise SpecError(f"invalid volume {text!r}: use SRC or SRC:DST with an absolute DST", code="bad-spec")
    source = os.path.abspath(source)
    if not os.path.exists(source):
        raise SpecError(f"volume source {source} does not exist", code="bad-spec")
    return {"destination": destination, "type": "bind", "source": source, "options": ["rbind", "rw"]}


def _mounts() -> list[dict[str, Any]]:
    def mount(destination: str, kind: str, source: str, *options: str) -> dict[str, Any]:
        made: dict[str, Any] = {"destination": destination, "type": kind, "source": source}
        if options:
            made["options"] = list(options)
        return made

    return [
        mount("/proc", "proc", "proc"),
        mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        mount("/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
        mount("/dev/shm", "tmpfs", "shm", "nosuid", "noexec", "nodev", "mode=1777", "size=65536k"),
        mount("/dev/mqueue", "mqueue", "mqueue", "nosuid", "noexec", "nodev"),
        mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro"),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid", "noexec", "nodev", "relatime", "ro"),
    ]


def process_for_exec(
    spec: Spec,
    args: Sequence[str],
    *,
    cwd: str = "",
    env: Sequence[str] = (),
    user: str = "",
    additional_gids: Sequence[int] = (),
    capabilities: Sequence[str] = (),
    terminal: bool = False,
    no_new_privileges: bool = False,
    process_label: str = "",
    apparmor: str = "",
) -> dict[str, Any]:
    """The OCI process object of an exec: the container's own, with what the caller wants different.

    Raises:
        SpecError: `bad-spec`, for a user or capability that cannot be read.
    """
    own = spec["process"]
    process: dict[str, Any] = {
        key: own[key]
        for key in ("rlimits", "noNewPrivileges", "apparmorProfile", "selinuxLabel", "oomScoreAdj")
        if key in own
    }
    process |= {
        "terminal": terminal,
        "args": list(args),
        "cwd": cwd or own["cwd"],
        "env": [*(own.get("env") or []), *env],
        "user": _user(user, own.get("user") or {"uid": 0, "gid": 0}),
    }
    if additional_gids:
        process["user"]["additionalGids"] = [*process["user"].get("additionalGids", []), *additional_gids]
    sets = {name: list(values) for name, values in (own.get("capabilities") or {}).items()}
    for text in capabilities:
        name = text.upper() if text.upper().startswith("CAP_") else f"CAP_{text.upper()}"
        for which in ("bounding", "effective", "permitted"):
            if name not in sets.setdefault(which, []):
                sets[which].append(name)
    if sets:
        process["capabilities"] = sets
    if no_new_privileges:
        process["noNewPrivileges"] = True
    if process_label:
        process["selinuxLabel"] = process_label
    if apparmor:
        process["apparmorProfile"] = apparmor
    if not process["cwd"].startswith("/"):
        raise SpecError(f"invalid working directory {cwd!r}: use an absolute path", code="bad-spec")
    return process


def _user(text: str, own: dict[str, Any]) -> dict[str, Any]:
    if not text:
        return dict(own)
    uid, _, gid = text.partition(":")
    if not uid.isdigit() or (gid and not gid.isdigit()):
        raise SpecError(f"invalid user {text!r}: use UID or UID:GID with numbers", code="bad-spec")
    return {"uid": int(uid), "gid": int(gid) if gid else own.get("gid", 0)}
