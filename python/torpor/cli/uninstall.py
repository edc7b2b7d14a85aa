"""Takes back what `torpor install` did. Other settings, and files that torpor did not write, stay."""

from __future__ import annotations

from torpor import clients

from .install import client_flags

TYPE_CHECKING = False
if TYPE_CHECKING:
    from torpor.config import Config
    from torpor.flags import Parsed

USAGE = "[flags]"
FLAGS = client_flags("remove the file for containerd", "remove the file for Podman and the stand-in for criu")


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
