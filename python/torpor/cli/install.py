"""Makes torpor known to Docker: adds it to the runtimes in daemon.json and leaves everything else there as it is. Words
after -- become flags of every call. With --containerd or --podman, writes a file for those instead. dockerd learns of
it by SIGHUP or restart; docker checkpoint needs --experimental and a restart."""

from __future__ import annotations

import os

from torpor import clients
from torpor.errors import UsageError
from torpor.flags import BOOL, LIST, TEXT, Flag

TYPE_CHECKING = False
if TYPE_CHECKING:
    from torpor.config import Config
    from torpor.flags import Parsed

USAGE = "[flags] [-- RUNTIME-FLAGS...]"


def client_flags(containerd: str, podman: str) -> tuple[Flag, ...]:
    """Which client and which files: for install and uninstall."""
    return (
        Flag("config-file", TEXT, "Docker's configuration", default=clients.DOCKER),
        Flag("config_file", TEXT, "as --config-file, spelled as runsc has it", hidden=True),
        Flag("runtime", TEXT, "name of the runtime", default="torpor"),
        Flag("containerd", BOOL, f"{containerd}, instead"),
        Flag("containerd-file", TEXT, "that file", default=clients.CONTAINERD),
        Flag("podman", BOOL, f"{podman}, instead"),
        Flag("podman-file", TEXT, "that file", default=clients.PODMAN),
        Flag("criu", TEXT, "the stand-in", default=clients.CRIU),
    )


FLAGS = (
    *client_flags(
        "write a file for containerd's config.toml to import",
        "write a file for Podman, and a stand-in for criu where there is none",
    ),
    Flag("restore-from", LIST, "directory of images that containers may ask to start from; repeatable"),
    Flag("experimental", BOOL, "turn Docker's experimental features on: docker checkpoint is one"),
    Flag("default", BOOL, "make it the runtime of containers that name none"),
    Flag("clobber", BOOL, "replace a runtime of this name that is there already", default=True),
    Flag("cgroupdriver", TEXT, "cgroupfs or systemd: Docker's cgroup driver", choices=("cgroupfs", "systemd")),
)


def execute(config: Config, flags: Parsed) -> int:
    name = flags.text("runtime")
    if not name or name == "runc" or not all(c.isalnum() or c in "_-." for c in name):
        raise UsageError(f"{name!r} cannot be the name of a runtime", code="bad-flag", object="--runtime")
    arguments = [f"--restore-from={checked(path)}" for path in flags.words("restore-from")]
    arguments += flags.args
    for word in arguments:
        # dockerd writes them into a shell script without quotes
        if any(c.isspace() or c in "'\"\\$`&|;<>()*?[]#~" for c in word):
            raise UsageError(f"Docker cannot hand on the argument {word!r}", code="bad-flag", object=word)
    program = clients.own_path()
    done = []
    if flags.on("containerd"):
        done.append(clients.install_containerd(flags.text("containerd-file"), name, program, arguments))
    if flags.on("podman"):
        done += clients.install_podman(flags.text("podman-file"), name, program, arguments, flags.text("criu"))
    if not done:
        done.append(
            clients.install_docker(
                flags.text("config_file") or flags.text("config-file"),
                name,
                program,
                arguments,
                experimental=flags.on("experimental"),
                default=flags.on("default"),
                clobber=flags.on("clobber"),
                cgroup_driver=flags.text("cgroupdriver"),
            )
        )
    print("\n".join(done))
    return 0


def checked(path: str) -> str:
    if not os.path.isdir(path):
        raise UsageError(f"--restore-from {path} is not a directory", code="bad-flag", object="--restore-from")
    return os.path.realpath(path)
