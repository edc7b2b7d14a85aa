"""--systemd-cgroup: by a real systemd, which is init in namespaces of its own with cgroup v2; and on cgroup v1, where it is not asked."""

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support import daemons, procs
from support.cli import Torpor, new_id

pytestmark = [
    pytest.mark.requires("root", "command:busybox", "command:unshare", "command:nsenter"),
    pytest.mark.timeout(90),
]

UNITS = {
    "test.target": "[Unit]\nDefaultDependencies=no\nRequires=dbus.service\nAfter=dbus.service\n",
    "dbus.socket": "[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream=/run/dbus/system_bus_socket\n",
    "dbus.service": """[Unit]
DefaultDependencies=no
Requires=dbus.socket
[Service]
Type=notify
ExecStart=dbus-daemon --system --address=systemd: --nofork --nopidfile --systemd-activation
""",
}

BOOT = """
set -e
echo $$ > "$2/cgroup.procs"
exec unshare --kill-child --pid --cgroup --mount-proc --fork sh -c '
    set -e
    mount -t tmpfs tmpfs /run
    mkdir /run/dbus
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    exec env -i container=test PATH="$PATH" SYSTEMD_UNIT_PATH="$1" /lib/systemd/systemd --system --unit=test.target --show-status=no
' sh "$1"
"""


class Systemd(daemons.Daemon):
    """systemd as init, with no unit but the bus."""

    def __init__(self) -> None:
        super().__init__("systemd")
        units = self.directory / "units"
        units.mkdir()
        for name, text in UNITS.items():
            (units / name).write_text(text)
        version2 = next(p for p in daemons.hierarchies() if (p / "cgroup.controllers").exists())
        self.start(["sh", "-c", BOOT, "sh", str(units), str(version2 / self.cgroup[1:])])
        self.init = procs.wait_until("init", self._init)
        bus = "org.freedesktop.systemd1"
        assert self.wait_ready(self.inside("busctl", "call", bus, "/org/freedesktop/systemd1", "org.freedesktop.DBus.Peer", "Ping"))  # fmt: skip

    def _init(self) -> int:
        """The process that unshare forks."""
        below = procs.descendants(self.pid)
        return next((p.pid for p in below if os.path.basename(p.command.split()[0]) == "systemd"), 0)

    def stop(self) -> None:
        # unshare waits for its child whatever signal it gets, and systemd takes its time
        os.kill(self.init, signal.SIGKILL)
        super().stop()

    def inside(self, *argv: str) -> list[str]:
        return ["nsenter", "-t", str(self.init), "-m", "-n", "-p", "-C", *argv]

    def __call__(self, *argv: str) -> str:
        return self.run(self.inside(*argv)).stdout.strip()


@pytest.fixture
def systemd(leak_check: None) -> Iterator[Systemd]:
    started = Systemd()
    yield started
    started.stop()


@pytest.mark.requires("command:systemctl", "command:busctl", "command:dbus-daemon")
def test_a_container_is_a_scope_of_systemd(systemd: Systemd, torpor: Torpor, busybox: Callable[..., Path]) -> None:
    def edit(config: dict[str, Any]) -> None:
        config["linux"]["cgroupsPath"] = "machine-test.slice:torpor:one"
        config["linux"].pop("resources", None)

    bundle, name = busybox(["sleep", "1000"], edit=edit), new_id()

    def command(*args: str) -> str:
        return systemd(*torpor.argv(*args, top=["--systemd-cgroup"]))

    command("run", "--detach", "--bundle", str(bundle), name)
    directory = "/machine.slice/machine-test.slice/torpor-one.scope"
    assert systemd("systemctl", "show", "-p", "ControlGroup", "--value", "torpor-one.scope") == directory
    assert systemd("systemctl", "is-active", "torpor-one.scope") == "active"
    pid = json.loads(command("state", name))["pid"]
    assert systemd("cat", f"/sys/fs/cgroup{directory}/cgroup.procs").split() == [str(pid)]
    assert f"0::{directory}" in command("exec", name, "cat", "/proc/self/cgroup").splitlines()
    command("delete", "--force", name)
    assert "torpor-one" not in systemd("systemctl", "list-units", "--all")
    assert "torpor-one.scope" not in systemd("find", "/sys/fs/cgroup", "-type", "d")


class Booted(Torpor):
    """A machine whose /run says that systemd is init."""

    def argv(self, *args: str | Path, top: Sequence[str] | None = None) -> list[str]:
        entry = 'mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system && exec "$@"'
        machine = ["unshare", "--mount", "--propagation", "private", "sh", "-c", entry, "sh"]
        return [*machine, *super().argv(*args, top=["--systemd-cgroup"])]


@pytest.mark.skipif(os.path.exists("/sys/fs/cgroup/cgroup.controllers"), reason="has cgroup v2")
def test_on_cgroup_v1_the_cgroup_is_where_systemd_has_it(torpor: Torpor, busybox: Callable[..., Path]) -> None:
    name = new_id()
    # with this run's mark, and in no slice of others that would be left
    parent = f"{name.partition('-')[0]}.slice"

    def edit(config: dict[str, Any]) -> None:
        config["linux"]["cgroupsPath"] = f"{parent}:torpor:{name}"
        config["linux"]["resources"] = {"memory": {"limit": 64 << 20}}

    script = "cat /proc/self/cgroup"
    done = Booted(torpor.directory)("run", "--bundle", busybox(["sh", "-c", script], edit=edit), name)
    for controller in ("memory", "name=systemd"):
        assert f"{controller}:/{parent}/torpor-{name}.scope" in {line.partition(":")[2] for line in done.out.split()}
    assert "systemd is not told of the container" in done.err
    for hierarchy in daemons.hierarchies():
        # as empty as a slice that another container could be in
        if (hierarchy / parent).exists():
            os.rmdir(hierarchy / parent)


@pytest.mark.skipif(os.path.isdir("/run/systemd/system"), reason="has systemd")
def test_without_systemd_it_is_refused(torpor: Torpor, busybox: Callable[..., Path]) -> None:
    bundle, name = busybox(["true"]), new_id()
    torpor.fails("create", "--bundle", bundle, name, says="--systemd-cgroup needs systemd", top=["--systemd-cgroup"])
    assert torpor.ids() == []


def test_a_name_that_is_none_of_systemds(torpor: Torpor, busybox: Callable[..., Path]) -> None:
    def edit(config: dict[str, Any]) -> None:
        config["linux"]["cgroupsPath"] = "no.slice:name"

    bundle = busybox(["true"], edit=edit)
    Booted(torpor.directory).fails("run", "--bundle", bundle, new_id(), says="is not slice:prefix:name")
    assert torpor.ids() == []
