"""Containers that start from an image instead of their command, whatever client makes them.

Docker cannot restore a checkpoint into a new container, or from a directory of one's choice. So the wish is written
into the container's spec: the annotation `dev.torpor.restore=NAME`, or for clients without annotations the environment
variable `TORPOR_RESTORE=NAME`. NAME is a directory with an image, directly in one of the directories that the
administrator gave with --restore-from. Whoever may start a container can choose NAME and nothing else.
"""

from __future__ import annotations

import os

from .errors import ImageError, SpecError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from .spec import Spec
    from .state import Home

ANNOTATION = "dev.torpor.restore"
VARIABLE = "TORPOR_RESTORE"
# Where the restored program finds the environment of the container it woke up in; its own is that of the image.
DIRECTORY = "/run/torpor"
# How containerd and CRI-O mark a pod's pause container, which gets the pod's annotations too and must start as ever.
_KINDS = ("io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType")


def wanted(spec: Spec) -> str:
    """The NAME that a spec asks for, "" when it asks for none."""
    annotations = spec.get("annotations") or {}
    if any(annotations.get(name) == "sandbox" for name in _KINDS):
        return ""
    if annotations.get(ANNOTATION):
        return str(annotations[ANNOTATION])
    prefix = f"{VARIABLE}="
    found = [entry[len(prefix) :] for entry in spec["process"].get("env") or [] if entry.startswith(prefix)]
    return found[-1] if found else ""


def find(name: str, directories: Sequence[str]) -> str:
    """The image directory called `name`.

    Raises:
        ImageError: `image-missing`. It says no more than that there is none: a name must not be a way to look around.
        SpecError: `bad-spec`, the name is not one, or nobody said where to look.
    """
    if not directories:
        raise SpecError(
            f"the container asks to start from image {name!r}, but the runtime was not given --restore-from: "
            "`torpor install --restore-from DIR` allows the images in DIR",
            code="bad-spec",
            object=name,
        )
    if name in (".", "..") or "/" in name or "\0" in name:
        raise SpecError(f"{name!r} is not the name of an image: it cannot be a path", code="bad-spec", object=name)
    for directory in directories:
        if _holds_image(directory, name):
            return os.path.join(os.path.realpath(directory), name)
    raise ImageError(f"there is no image {name!r} in {' or '.join(directories)}", code="image-missing", object=name)


def _holds_image(directory: str, name: str) -> bool:
    """Neither NAME nor the file in it may be a link: that would lead out."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    opened: list[int] = []
    try:
        opened.append(os.open(directory, flags))
        opened.append(os.open(name, flags | os.O_NOFOLLOW, dir_fd=opened[0]))
        opened.append(os.open("checkpoint.img", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK,
                              dir_fd=opened[1]))  # fmt: skip
        import stat

        return stat.S_ISREG(os.fstat(opened[2]).st_mode)
    except OSError:
        return False
    finally:
        for fd in opened:
            os.close(fd)


def check(spec: Spec, image: str, peeked: Mapping[str, Any]) -> None:
    """Compare what the image was made with and what the new container is, before it is built.

    The engine checks the rest when it restores: the files that are mapped and open, seccomp, limits, kinds of mounts.

    Raises:
        SpecError: `bad-spec`, with all differences.
    """
    found = differences(peeked.get("spec") or {}, spec)
    if found:
        raise SpecError(
            f"the container differs from that in image {os.path.basename(image)!r}: {'; '.join(found)}",
            code="bad-spec",
            object=image,
        )


def differences(old: Spec, new: Spec) -> list[str]:
    """What keeps an image made with one spec from being restored into a container with another."""
    found = []
    was, now = old.get("process") or {}, new["process"]
    if _user(was) != _user(now):
        found.append(f"user {_user(was)} in the image, {_user(now)} here")
    missing = sorted(_capabilities(was) - _capabilities(now))
    if missing:
        found.append(f"capabilities {' '.join(missing)} in the image, not here")
    if bool(was.get("terminal")) != bool(now.get("terminal")):
        found.append("a terminal " + ("in the image, none here" if was.get("terminal") else "here, none in the image"))
    there = {os.path.normpath(mount["destination"]) for mount in new.get("mounts") or []}
    for mount in old.get("mounts") or []:
        destination = os.path.normpath(mount["destination"])
        if destination not in there and destination != DIRECTORY:
            found.append(f"a mount at {destination} in the image, none here")
    if (new.get("root") or {}).get("readonly") and not (old.get("root") or {}).get("readonly"):
        found.append("a writable root in the image, a read-only one here")
    kinds = _namespaces(old) ^ _namespaces(new)
    if kinds:
        found.append(f"namespaces of its own differ: {' '.join(sorted(kinds))}")
    return found


def _user(process: Mapping[str, Any]) -> str:
    user = process.get("user") or {}
    groups = sorted(set(user.get("additionalGids") or []) - {user.get("gid", 0)})
    return f"{user.get('uid', 0)}:{user.get('gid', 0)}" + "".join(f",{gid}" for gid in groups)


def _capabilities(process: Mapping[str, Any]) -> set[str]:
    return set((process.get("capabilities") or {}).get("bounding") or [])


def _namespaces(spec: Spec) -> set[str]:
    return {namespace["type"] for namespace in (spec.get("linux") or {}).get("namespaces") or []}


def add_environment(home: Home, spec: Spec) -> None:
    """Have the container see its own environment in /run/torpor/environ, as /proc/PID/environ would show it.

    As a mount, so that no link in the container's files can lead the write elsewhere.
    """
    directory = home.file("run")
    os.mkdir(directory, 0o755)
    path = os.path.join(directory, "environ")
    text = "".join(f"{entry}\0" for entry in spec["process"].get("env") or [])
    # It may hold secrets, so only the container's user may read it: as the kernel has it for /proc/PID/environ.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
    try:
        os.write(fd, text.encode("utf-8", "surrogateescape"))
        os.fchown(fd, _on_host(spec, "uid"), _on_host(spec, "gid"))
    finally:
        os.close(fd)
    spec.setdefault("mounts", []).append(
        {
            "destination": DIRECTORY,
            "type": "bind",
            "source": directory,
            "options": ["bind", "ro", "nosuid", "nodev", "noexec"],
        }
    )


def _on_host(spec: Spec, kind: str) -> int:
    number = int((spec["process"].get("user") or {}).get(kind, 0))
    for entry in (spec.get("linux") or {}).get(f"{kind}Mappings") or []:
        first, size = int(entry["containerID"]), int(entry["size"])
        if first <= number < first + size:
            return int(entry["hostID"]) + number - first
    return number
