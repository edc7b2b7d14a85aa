"""Sockets of a container whose users have other numbers outside."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import workloads
from support.cli import Container, Torpor, new_id

pytestmark = [pytest.mark.requires("root", "command:gcc", "command:busybox"), pytest.mark.timeout(120)]

TMPFS = {"destination": "/wl", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755", "size=8m"]}


@pytest.mark.parametrize("other", [100_000, 300_000])
def test_owners_are_those_of_the_container(torpor: Torpor, busybox: Callable[..., Path], tmp: Path, other: int) -> None:
    """Sockets, the files they are bound to, and memfds; also when the new container has other ids outside."""

    def mapped(first: int) -> Callable[[dict[str, Any]], None]:
        def edit(config: dict[str, Any]) -> None:
            config["linux"]["namespaces"].append({"type": "user"})
            for kind in ("uidMappings", "gidMappings"):
                config["linux"][kind] = [{"containerID": 0, "hostID": first, "size": 65536}]

        return edit

    def container(first: int) -> Container:
        made = busybox(["/owned"], mounts=[TMPFS], edit=mapped(first))
        shutil.copy2(workloads.compiled("owned"), made / "rootfs" / "owned")
        subprocess.run(["chown", "-Rh", f"{first}:{first}", str(made / "rootfs")], check=True)
        for directory in (tmp, made):
            directory.chmod(0o755)
        return Container(torpor, made, new_id())

    c = container(100_000).run().wait_ready()
    c.verify()
    c.checkpoint(tmp / "image")
    again = container(other)
    again.restore_from(tmp / "image")
    again.verify()
