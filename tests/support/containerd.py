"""containerd, started for the tests, and ctr."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

from support import daemons
from support.cli import TORPOR

IMAGE = "docker.io/library/box:latest"


class Containerd(daemons.Daemon):
    def __init__(self) -> None:
        super().__init__("containerd")
        self.socket = self.directory / "s"
        config = self.directory / "config.toml"
        config.write_text(f"""
version = 2
root = "{self.directory}/root"
state = "{self.directory}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.devmapper"]
[grpc]
  address = "{self.socket}"
[ttrpc]
  address = "{self.socket}.ttrpc"
""")
        self.start(["containerd", "-c", str(config)])
        assert self.wait_ready(["ctr", "-a", str(self.socket), "version"]), self.log()
        archive = self.directory / "image.tar"
        save_image(daemons.root_file_system(self.directory / "rootfs"), archive)
        self("image", "import", str(archive))

    def __call__(self, *args: str, check: bool = True) -> str:
        return self.run(["ctr", "-a", str(self.socket), *args], check=check).stdout.strip()

    def start_container(self, name: str, *command: str) -> None:
        cgroup = f"{self.cgroup}/{name}"
        self("run", "-d", "--runc-binary", str(TORPOR), "--runc-root", str(self.directory / "runc"), "--cgroup", cgroup, IMAGE, name, *command)  # fmt: skip

    def tasks(self) -> dict[str, str]:
        rows = [line.split() for line in self("tasks", "ls").splitlines()[1:]]
        return {name: status for name, _, status in rows}

    def pid(self, name: str) -> int:
        return next(int(line.split()[1]) for line in self("tasks", "ls").splitlines() if line.split()[0] == name)

    def clean_up(self) -> None:
        for name in self.tasks():
            self("tasks", "rm", "--force", name, check=False)
        for name in self("containers", "ls", "-q").split():
            self("containers", "rm", name)


def save_image(root: Path, archive: Path) -> None:
    """An archive as `docker save` makes it."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        tar.add(root, arcname=".")
    digest = hashlib.sha256(layer.getvalue()).hexdigest()
    config = json.dumps({
        "architecture": "amd64", "os": "linux", "config": {"Env": ["PATH=/bin"], "Cmd": ["sh"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }).encode()  # fmt: skip
    name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = json.dumps([{"Config": name, "RepoTags": [IMAGE], "Layers": [f"{digest}/layer.tar"]}]).encode()
    with tarfile.open(archive, "w") as tar:
        for path, data in ((name, config), (f"{digest}/layer.tar", layer.getvalue()), ("manifest.json", manifest)):
            info = tarfile.TarInfo(path)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
