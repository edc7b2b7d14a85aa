"""The configuration files of Docker, containerd and Podman, as far as they name runtimes.

Docker's is JSON that others write to as well: it is read, changed and replaced in one step. For the others torpor
writes a file of its own, with a mark in its first lines, and removes only files with that mark.
"""

from __future__ import annotations

import json
import os
import sys

from .errors import KernelError, UsageError
from .state import replace_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

DOCKER = "/etc/docker/daemon.json"
CONTAINERD = "/etc/containerd/conf.d/torpor.toml"
PODMAN = "/etc/containers/containers.conf.d/torpor.conf"
CRIU = "/usr/local/bin/criu"
MARK = "# Written by `torpor install`; `torpor uninstall` removes it."

# Files that may have such a script beside them.
_LISTS = (".toml", ".conf")

# Podman's own list, which a configuration file replaces and cannot add to.
_PODMAN_JSON = ("crun", "runc", "kata", "runsc", "youki", "krun", "ocijail")


def own_path() -> str:
    """The command that is running, as others can call it.

    Raises:
        UsageError: it was not started as a program of its own.
    """
    path = os.path.abspath(sys.argv[0])
    if os.path.isfile(path) and os.access(path, os.X_OK) and not path.endswith(".py"):
        return path
    import shutil

    found = shutil.which("torpor")
    if not found:
        raise UsageError("cannot tell where the torpor command is: call it by its path")
    return os.path.abspath(found)


# ---- Docker
# ------------------------------------------------------------------------------------------------------------------


def install_docker(
    path: str,
    name: str,
    program: str,
    arguments: Sequence[str],
    *,
    experimental: bool,
    default: bool,
    clobber: bool,
    cgroup_driver: str,
) -> str:
    """Add a runtime to daemon.json. Returns what was done.

    Raises:
        UsageError: the file is not what dockerd reads; the runtime is there and may not be replaced.
        KernelError: it cannot be written.
    """
    settings = _read(path)
    runtimes = settings.setdefault("runtimes", {})
    if not isinstance(runtimes, dict):
        raise UsageError(f"{path}: runtimes is not an object", code="bad-flag", object=path)
    if name in runtimes and not clobber:
        raise UsageError(f"{path} has a runtime {name!r} already: leave --clobber=false out", code="bad-flag")
    runtimes[name] = {"path": program} | ({"runtimeArgs": list(arguments)} if arguments else {})
    if experimental:
        settings["experimental"] = True
    if default:
        settings["default-runtime"] = name
    if cgroup_driver:
        options = [o for o in settings.get("exec-opts") or [] if not o.startswith("native.cgroupdriver=")]
        settings["exec-opts"] = [*options, f"native.cgroupdriver={cgroup_driver}"]
    _write(path, json.dumps(settings, indent=4, ensure_ascii=False) + "\n")
    return f"added runtime {name} to {path}: restart dockerd, or send it SIGHUP"


def uninstall_docker(path: str, name: str) -> str:
    """Take a runtime out of daemon.json again. Errors as `install_docker`."""
    settings = _read(path)
    runtimes = settings.get("runtimes") or {}
    if name not in runtimes:
        return f"{path} has no runtime {name}"
    del runtimes[name]
    if not runtimes:
        del settings["runtimes"]
    if settings.get("default-runtime") == name:
        # dockerd would not start with a default that it does not know
        del settings["default-runtime"]
    _write(path, json.dumps(settings, indent=4, ensure_ascii=False) + "\n")
    return f"removed runtime {name} from {path}: restart dockerd, or send it SIGHUP"


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as f:
            text = f.read()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "it is not UTF-8"
        raise UsageError(f"cannot read {path}: {why}", code="bad-flag", object=path) from None
    try:
        # dockerd takes an empty file for no settings
        settings = json.loads(text) if text.strip() else {}
    except ValueError as e:
        raise UsageError(f"{path} is not JSON, so it is left alone: {e}", code="bad-flag", object=path) from None
    if not isinstance(settings, dict):
        raise UsageError(f"{path} is not a JSON object, so it is left alone", code="bad-flag", object=path)
    return settings


# ---- containerd
# ------------------------------------------------------------------------------------------------------------------


def install_containerd(path: str, name: str, program: str, arguments: Sequence[str]) -> str:
    """Write a file with the runtime for containerd's CRI plugin. Errors as `install_docker`."""
    table = f'plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{_quoted(name)}'
    text = f"""{MARK}
# In /etc/containerd/config.toml, before the first table: imports = ["{path}"]
# A RuntimeClass with handler "{name}" then chooses it.
version = 2

[{table}]
  runtime_type = "io.containerd.runc.v2"
  pod_annotations = ["dev.torpor.*"]
  container_annotations = ["dev.torpor.*"]
  [{table}.options]
    BinaryName = {_quoted(_with_arguments(path, name, program, arguments))}
"""
    _write_own(path, text)
    return f'wrote {path}: containerd reads it when its config.toml has imports = ["{path}"]'


def _with_arguments(path: str, name: str, program: str, arguments: Sequence[str]) -> str:
    """containerd and Podman 4 have no arguments for a runtime, so they go into a script beside their file."""
    if not arguments:
        return program
    script = os.path.join(os.path.dirname(os.path.abspath(path)), f"{name}.sh")
    _write_own(script, f'#!/bin/sh\n{MARK}\nexec {program} {" ".join(arguments)} "$@"\n', 0o755)
    return script


# ---- Podman
# ------------------------------------------------------------------------------------------------------------------


def install_podman(path: str, name: str, program: str, arguments: Sequence[str], criu: str) -> list[str]:
    """Write a file with the runtime for Podman, and a criu to ask where there is none. Errors as `install_docker`."""
    text = f"""{MARK}
[engine]
runtime_supports_json = [{", ".join(map(_quoted, (*_PODMAN_JSON, name)))}]

[engine.runtimes]
{_quoted(name)} = [{_quoted(_with_arguments(path, name, program, arguments))}]
"""
    _write_own(path, text)
    done = [f"wrote {path}"]
    import shutil

    there = shutil.which("criu")
    if there and os.path.realpath(there) != os.path.realpath(criu):
        return [*done, f"Podman will ask {there} for its version; torpor does not use it"]
    _write_own(criu, _stand_in(), 0o755)
    return [*done, f"wrote {criu}, which answers when Podman asks for criu's version"]


def _stand_in() -> str:
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return f"""#!{sys.executable} -ISs
{MARK}
import sys

sys.path.insert(0, {package!r})
from torpor.criu import main

sys.exit(main())
"""


# ---- files
# ------------------------------------------------------------------------------------------------------------------


def remove_own(path: str) -> str:
    """Remove a file that torpor wrote, and the script beside it. Says what was done.

    Raises:
        KernelError: it cannot be removed.
    """
    if not _is_own(path):
        return f"{path} is not one of torpor's" if os.path.lexists(path) else f"there is no {path}"
    directory = os.path.dirname(os.path.abspath(path))
    scripts = [name for name in os.listdir(directory) if name.endswith(".sh")] if path.endswith(_LISTS) else []
    try:
        for script in scripts:
            if _is_own(os.path.join(directory, script)):
                os.unlink(os.path.join(directory, script))
        os.unlink(path)
    except OSError as e:
        raise KernelError(f"cannot remove {path}: {e.strerror}", code="permission", object=path) from None
    return f"removed {path}"


def _is_own(path: str) -> bool:
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            return MARK in f.read(4096)
    except OSError:
        return False


def _write_own(path: str, text: str, mode: int = 0o644) -> None:
    if os.path.lexists(path) and not _is_own(path):
        raise UsageError(f"{path} is there and not torpor's: it is left alone", code="bad-flag", object=path)
    _write(path, text, mode)


def _write(path: str, text: str, mode: int = 0o644) -> None:
    """Replace a file, with the permissions it had. A link is followed: the file may be kept elsewhere."""
    path = os.path.realpath(path)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.exists(path):
            mode = os.stat(path).st_mode & 0o777
        replace_file(path, text.encode("utf-8", "surrogateescape"), mode)
        os.chmod(path, mode)
    except OSError as e:
        code = "no-space" if e.errno == 28 else "permission"
        raise KernelError(f"cannot write {path}: {e.strerror}", code=code, object=path) from None


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
