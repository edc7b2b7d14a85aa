"""The commands of docs/clients.md and of the README's sections on clients are run as they stand, on a machine whose /etc, /var/lib and /usr/local are copies."""

import fnmatch
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import daemons, procs
from support.bundles import REPO
from support.cli import TORPOR
from support.docker import CLIENT

pytestmark = [pytest.mark.requires("root", "command:busybox", "command:unshare"), pytest.mark.timeout(180)]


def blocks(document: str) -> dict[str, str]:
    return dict(re.findall(r"<!-- tested: (\S+) -->\n```\w+\n(.*?)```", (REPO / document).read_text(), re.DOTALL))


BLOCKS = blocks("docs/clients.md")
README = blocks("README.md")

# Copies of what is written to; what containers are kept in must not be an overlay itself.
PREPARE = """
set -e
for d in etc var/lib usr/local; do
    mkdir -p "$1/o/$d/u" "$1/o/$d/w"
    mount -t overlay overlay -o "lowerdir=/$d,upperdir=$1/o/$d/u,workdir=$1/o/$d/w" "/$d"
done
mount -t tmpfs tmpfs /run
mkdir -p /var/lib/containers /etc/containers
mount -t tmpfs tmpfs /var/lib/containers
printf '[engine]\\ncgroup_manager = "cgroupfs"\\nevents_logger = "none"\\n[containers]\\ncgroups = "no-conmon"\\n' > /etc/containers/containers.conf
rm -f /etc/docker/daemon.json
# a machine without criu
rm -f /usr/local/*bin/criu
if criu=$(command -v criu); then mount --bind /dev/null "$criu"; fi
exec sleep infinity
"""


# dockerd sometimes stumbles over its own store when two commands about one checkpoint follow each other (moby#42900).
PATIENT = r"""
docker() {
    local errors=$TMPDIR/errors try
    for try in {1..20}; do
        if command docker "$@" 2>"$errors"; then return 0; fi
        if ! grep -q sha256 "$errors" || ! grep -Eq 'already exists|not found' "$errors"; then break; fi
        sleep 0.5
    done
    cat "$errors" >&2
    return 1
}
"""


class Machine(daemons.Daemon):
    """Namespaces in which the files that the commands write are copies."""

    def __init__(self) -> None:
        super().__init__("doc")
        (self.directory / "bin").mkdir()
        (self.directory / "here").mkdir()
        (self.directory / "client").mkdir()
        (self.directory / "client" / "config.json").write_text("{}")
        # what the document calls torpor and docker
        (self.directory / "bin" / "torpor").symlink_to(TORPOR)
        (self.directory / "bin" / "docker").symlink_to(CLIENT)
        self.start(["bash", "-c", PREPARE, "bash", str(self.directory)])
        assert self.wait_ready(["nsenter", "-t", str(self.pid), "-m", "mountpoint", "-q", "/var/lib/containers"]), (
            self.log()
        )
        daemons.root_file_system(self.directory / "rootfs")
        subprocess.run(["tar", "-C", self.directory / "rootfs", "-cf", self.directory / "image.tar", "."], check=True)
        self.started: list[subprocess.Popen[bytes]] = []

    def env(self) -> dict[str, str]:
        return {
            **os.environ, "PATH": f"{self.directory}/bin:{os.environ['PATH']}", "DOCKER_HOST": f"unix://{self.directory}/d",
            "DOCKER_CONFIG": f"{self.directory}/client", "CONTAINERD_ADDRESS": f"{self.directory}/c",
            "TMPDIR": str(self.directory),
        }  # fmt: skip

    def sh(self, text: str) -> str:
        command = ["bash", "-euo", "pipefail", "-c", f"cd {self.directory}/here\n{PATIENT}\n{text}"]
        return self.run(self.inside(*command), timeout=90).stdout

    def background(self, *argv: str) -> None:
        with procs.claiming, open(self.directory / f"log{len(self.started)}", "wb") as log:
            p = subprocess.Popen(self.inside(*argv), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.env())
            procs.claimed.add(p.pid)
        self.started.append(p)

    def stop(self) -> None:
        for p in self.started:
            p.terminate()
            p.wait(20)
            procs.claimed.discard(p.pid)
        super().stop()


@pytest.fixture
def machine(leak_check: None) -> Iterator[Machine]:
    made = Machine()
    yield made
    made.stop()


def test_there_are_blocks() -> None:
    assert list(BLOCKS) == [
        "docker-install",
        "docker",
        "docker-new",
        "containerd",
        "podman",
        "podman-previous",
        "kubernetes-containerd",
        "kubernetes",
    ]
    assert list(README) == ["docker", "containerd", "podman", "kubernetes-node", "kubernetes"]


@pytest.mark.requires("command:dockerd", "command:docker")
def test_docker(machine: Machine) -> None:
    machine.sh(BLOCKS["docker-install"])
    machine.background(
        "dockerd", "--data-root", f"{machine.directory}/data", "--exec-root", f"{machine.directory}/exec", "-H", f"unix://{machine.directory}/d",
        "--pidfile", f"{machine.directory}/pid", "--cgroup-parent", machine.cgroup,
    )  # fmt: skip
    assert machine.wait_ready([CLIENT, "info"])
    machine.run([CLIENT, "import", str(machine.directory / "image.tar"), "box"])
    try:
        numbers = [int(word) for word in machine.sh(BLOCKS["docker"]).split() if word.isdigit()]
        assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 5
        out = machine.sh(BLOCKS["docker-new"])
        assert "NUMBER=2" in out
        first = next(int(word) for word in out[out.index("NUMBER=2") :].split() if word.isdigit())
        assert first > 5
        machine.sh("docker rm -f counting")
        machine.sh(README["docker"])
        lines = procs.wait_until(
            "more", lambda: (n := machine.sh("docker logs counting").split()) and len(n) > 15 and n
        )
        assert lines == [str(n) for n in range(1, len(lines) + 1)]
        assert "removed runtime torpor" in machine.sh("torpor uninstall")
    finally:
        machine.run([CLIENT, "rm", "-f", *machine.run([CLIENT, "ps", "-aq"]).stdout.split()])


@pytest.mark.requires("command:containerd", "command:ctr")
def test_containerd(machine: Machine) -> None:
    from support.containerd import save_image

    save_image(machine.directory / "rootfs", machine.directory / "oci.tar")
    config = machine.directory / "config.toml"
    config.write_text(f"""
version = 2
root = "{machine.directory}/root"
state = "{machine.directory}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.devmapper"]
[grpc]
  address = "{machine.directory}/c"
[ttrpc]
  address = "{machine.directory}/c.ttrpc"
""")
    machine.background("containerd", "-c", str(config))
    assert machine.wait_ready(["ctr", "version"])
    machine.sh(f"ctr image import {machine.directory}/oci.tar")
    try:
        machine.sh(BLOCKS["containerd"])
        assert (machine.directory / "here" / "image" / "checkpoint.img").exists()
        assert "example.org/one:nap" in machine.sh("ctr image ls -q")
        _remove_one(machine)
        machine.sh(f"mkdir readme; cd readme\n{README['containerd']}")
        assert (machine.directory / "here" / "readme" / "image" / "checkpoint.img").exists()
    finally:
        _remove_one(machine)
        _remove_cgroup("default")


def _remove_one(machine: Machine) -> None:
    machine.sh("ctr tasks rm -f one || true; ctr containers rm one || true")


@pytest.mark.requires("command:podman", "command:conmon")
def test_podman(machine: Machine) -> None:
    machine.sh(f"podman import {machine.directory}/image.tar box")
    try:
        numbers = [int(word) for word in machine.sh(BLOCKS["podman"]).split() if word.isdigit()]
        # Podman brings the log along; what was counted after it goes on from there
        assert len(numbers) > 12 and numbers == list(range(1, len(numbers) + 1))
        numbers = [int(word) for word in machine.sh(BLOCKS["podman-previous"]).split() if word.isdigit()]
        assert len(numbers) > 12 and numbers == list(range(1, len(numbers) + 1))
        machine.sh(f"mkdir readme; cd readme\n{README['podman']}")
        assert machine.sh("podman inspect --format '{{.State.Status}}' again").strip() == "running"
    finally:
        machine.sh("podman rm -a -f -t 0")
        machine.sh("torpor uninstall --podman; test ! -e /etc/containers/containers.conf.d/torpor.conf")
        _remove_cgroup("libpod_parent")


def test_kubernetes(machine: Machine) -> None:
    """The handler of the RuntimeClass is the name that install gives containerd."""
    machine.sh(README["kubernetes-node"])
    plugins = tomllib.loads(machine.sh("cat /etc/containerd/conf.d/torpor.toml"))["plugins"]
    runtimes = plugins["io.containerd.grpc.v1.cri"]["containerd"]["runtimes"]
    assert README["kubernetes"] in BLOCKS["kubernetes"]
    (handler,) = re.findall(r"^handler: (\S+)$", README["kubernetes"], re.MULTILINE)
    assert list(runtimes) == [handler]
    assert shutil.which(runtimes[handler]["options"]["BinaryName"])


@pytest.mark.requires("command:containerd")
def test_kubernetes_containerd_reads_the_files(machine: Machine) -> None:
    machine.sh("mkdir -p /var/lib/torpor/images /etc/containerd")
    machine.sh("torpor install --containerd --restore-from /var/lib/torpor/images")
    machine.sh(f"cat > /etc/containerd/config.toml <<'END'\n{BLOCKS['kubernetes-containerd']}END")
    merged = tomllib.loads(machine.sh("containerd config dump"))
    runtime = merged["plugins"]["io.containerd.grpc.v1.cri"]["containerd"]["runtimes"]["torpor"]
    assert runtime["runtime_type"] == "io.containerd.runc.v2"
    # by a glob, as CRI matches them
    (annotation,) = re.findall(r"^    (dev\.torpor\.\S+): ", BLOCKS["kubernetes"], re.MULTILINE)
    for field in ("pod_annotations", "container_annotations"):
        assert any(fnmatch.fnmatchcase(annotation, pattern) for pattern in runtime[field])
    version = machine.sh(f"{runtime['options']['BinaryName']} --version")
    assert version.startswith("torpor version")
    assert "removed" in machine.sh("torpor uninstall --containerd")


def _remove_cgroup(name: str) -> None:
    """The parent that a client makes for its containers and leaves; only when nobody else is in it."""
    for hierarchy in Path("/sys/fs/cgroup").iterdir():
        for directory, _, _ in os.walk(hierarchy / name, topdown=False):
            try:
                os.rmdir(directory)
            except OSError:
                break
