"""Takes back what `torpor install` did. Other settings, and files that torpor did not write, stay."""

from __future__ import annotations

from torpor import clients
from torpor.flags import BOOL, TEXT, Flag

TYPE_CHECKING = False
if TYPE_CHECKING:
    from torpor.config import Config
    from torpor.flags import Parsed

USAGE = "[flags]"
FLAGS = (
    Flag("config-file", TEXT, "Docker's configuration", default=clients.DOCKER),
    Flag("config_file", TEXT, "as --config-file, spelled as runsc has it", hidden=True),
    Flag("runtime", TEXT, "name of the runtime", default="torpor"),
    Flag("containerd", BOOL, "remove the file for containerd, instead"),
    Flag("containerd-file", TEXT, "that file", default=clients.CONTAINERD),
    Flag("podman", BOOL, "remove the file for Podman and the stand-in for criu, instead"),
    Flag("podman-file", TEXT, "that file", default=clients.PODMAN),
    Flag("criu", TEXT, "the stand-in", default=clients.CRIU),
)


def execute(config: Config, flags: Parsed) -> int:
    done = []
    if flags.on("containerd"):
        done.append(clients.remove_own(flags.text("containerd-file")))
    if flags.on("podman"):
        done += [clients.remove_own(flags.text("podman-file")), clients.remove_own(flags.text("criu"))]
    if not done:
        done.append(
            clients.uninstall_docker(flags.text("config_file") or flags.text("config-file"), flags.text("runtime"))
        )
    print("\n".join(done))
    return 0
