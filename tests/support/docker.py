"""dockerd, started for the tests, with torpor as one of its runtimes: put there by `torpor install`."""

import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from support import daemons, procs
from support.cli import TORPOR

# Debian's own client fits Debian's daemon; another one may be first in PATH
CLIENT = "/usr/bin/docker" if os.path.exists("/usr/bin/docker") else shutil.which("docker") or "docker"


class Docker(daemons.Daemon):
    def __init__(self) -> None:
        super().__init__("docker")
        self.host = f"unix://{self.directory}/s"
        self.warm = self.directory / "warm"
        self.warm.mkdir()
        self.config = self.directory / "daemon.json"
        self.config.write_text(json.dumps({"log-opts": {"max-size": "10m"}}))
        install = [str(TORPOR), "install", "--config-file", str(self.config), "--experimental", "--restore-from", str(self.warm)]  # fmt: skip
        subprocess.run(install, check=True, capture_output=True)
        argv = [
            "dockerd", "--config-file", str(self.config), "--data-root", str(self.directory / "data"),
            "--exec-root", str(self.directory / "exec"), "--pidfile", str(self.directory / "pid"), "-H", self.host,
            "--cgroup-parent", self.cgroup,
        ]  # fmt: skip
        self.start(argv)
        ready = [CLIENT, "info"]
        self.has_iptables = self.wait_ready(ready)
        if not self.has_iptables:
            # a kernel without netfilter: published ports then work through docker-proxy only
            self.start([*argv, "--iptables=false"])
            assert self.wait_ready(ready), self.log()
        root = daemons.root_file_system(self.directory / "rootfs")
        with tarfile.open(self.directory / "image.tar", "w") as tar:
            tar.add(root, arcname=".")
        self("import", str(self.directory / "image.tar"), "box")

    def env(self) -> dict[str, str]:
        return {**os.environ, "DOCKER_HOST": self.host, "DOCKER_CONFIG": str(self.directory / "client")}

    def __call__(self, *args: str, check: bool = True, timeout: float = 60) -> str:
        """Run a docker command and return what it printed to stdout."""
        return self.run([CLIENT, *args], check=check, timeout=timeout).stdout.strip()

    def fails(self, *args: str, says: str) -> int:
        done = self.run([CLIENT, *args], check=False)
        assert done.returncode != 0 and says in done.stderr + done.stdout, done
        return done.returncode

    def inspect(self, name: str, what: str = "") -> Any:
        found = json.loads(self("inspect", name))[0]
        for key in what.split("."):
            found = found[key] if key else found
        return found

    def wait_log(self, name: str, more_than: int = 0) -> list[str]:
        """The lines a container has printed, when there are more than so many."""
        return procs.wait_until(
            f"{name} to print", lambda: (n := self("logs", name).split()) and len(n) > more_than and n
        )

    def wait_fetch(self, url: str) -> list[str]:
        def look() -> list[str]:
            try:
                return self.fetch(url).split()
            except daemons.Failed:
                return []

        return procs.wait_until(f"an answer from {url}", look)

    def checkpoint(self, *args: str) -> None:
        """docker checkpoint create. Two of one container within a moment collide in containerd's content store (moby#42900)."""

        self._try_again("checkpoint", "create", *args)

    def wake(self, checkpoint: str, name: str) -> None:
        """docker start --checkpoint, which suffers from the same."""
        self._try_again("start", "--checkpoint", checkpoint, name)

    def _try_again(self, *args: str) -> None:
        def attempt() -> bool:
            done = self.run([CLIENT, *args], check=False)
            if done.returncode == 0:
                return True
            assert "sha256" in done.stderr and ("already exists" in done.stderr or "not found" in done.stderr), done
            return False

        procs.wait_until(f"docker {' '.join(args)}", attempt)

    def clean_up(self) -> None:
        names = self("ps", "-aq").split()
        if names:
            self("rm", "-f", "-v", *names)
        for directory in self.warm.iterdir():
            shutil.rmtree(directory)

    def checkpoints_of(self, name: str) -> Path:
        return self.directory / "data" / "containers" / self.inspect(name, "Id") / "checkpoints"
