"""Podman in namespaces that last as long as the tests, set up by `torpor install --podman`."""

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

from support import daemons, procs
from support.cli import TORPOR


class Podman(daemons.Daemon):
    def __init__(self) -> None:
        super().__init__("podman")
        self.bin = self.directory / "bin"
        self.warm = self.directory / "warm"
        self.config = self.directory / "containers.conf.d" / "torpor.conf"
        self.bin.mkdir()
        self.warm.mkdir()
        install = [str(TORPOR), "install", "--podman", "--podman-file", str(self.config), "--criu", str(self.bin / "criu"),
                   "--restore-from", str(self.warm)]  # fmt: skip
        # a machine without criu
        subprocess.run(install, check=True, capture_output=True, env={**os.environ, "PATH": str(self.bin)})
        self.start(["sleep", "infinity"])
        assert self.wait_ready(["nsenter", "-t", str(self.pid), "-n", "ip", "link"])
        root = daemons.root_file_system(self.directory / "rootfs")
        with tarfile.open(self.directory / "image.tar", "w") as tar:
            tar.add(root, arcname=".")
        self("import", str(self.directory / "image.tar"), "box")

    def env(self) -> dict[str, str]:
        path = f"{self.bin}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "CONTAINERS_CONF": str(self.config), "TMPDIR": str(self.directory)}

    def argv(self, *args: str) -> list[str]:
        d = self.directory
        return self.inside(
            "podman", "--root", f"{d}/root", "--runroot", f"{d}/run", "--tmpdir", f"{d}/tmp", "--volumepath", f"{d}/volumes",
            "--network-config-dir", f"{d}/networks", "--cgroup-manager", "cgroupfs", "--events-backend", "none",
            "--storage-driver", "overlay", "--runtime", "torpor", *args,
        )  # fmt: skip

    def __call__(self, *args: str, timeout: float = 60) -> str:
        return self.run(self.argv(*args), timeout=timeout).stdout.strip()

    def container(self, name: str, *args: str) -> str:
        """podman run -d."""
        return self("run", "-d", "--name", name, *self.flags, *args)

    @property
    def flags(self) -> tuple[str, ...]:
        return ("--cgroup-parent", self.cgroup, "--cgroups", "no-conmon")

    def fails(self, *args: str, says: str) -> subprocess.CompletedProcess[str]:
        done = self.run(self.argv(*args), check=False)
        assert done.returncode != 0 and says in done.stderr + done.stdout, done
        return done

    def wait_log(self, name: str, more_than: int = 0) -> list[str]:
        return procs.wait_until(
            f"{name} to print", lambda: (n := self("logs", name).split()) and len(n) > more_than and n
        )

    def clean_up(self) -> None:
        self("rm", "-a", "-f", "-t", "0", "-v")
        for directory in self.warm.iterdir():
            shutil.rmtree(directory)

    def userdata(self, name: str) -> Path:
        found = self("inspect", "--format", "{{.StaticDir}}", name)
        return Path(found)
