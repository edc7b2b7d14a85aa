"""Files in memory, mounts and IPC objects: what travels in an image, what the new container must have, what is refused by name.

What a tmpfs can hold is told by tests/workloads/tmpfs.c, and what a forged image may do by the engine's own tests.
"""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import bundles, procs
from support.cli import Container, Torpor, new_id
from support.image_edit import edit
from support.workloads import compiled

from .conftest import WAITER

pytestmark = [pytest.mark.requires("root", "command:busybox"), pytest.mark.timeout(180)]

Make = Callable[..., Path]
SMALL = {"destination": "/data", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755", "size=8m"]}
FILES = "mkdir /data/d; echo content > /data/d/file; head -c 3000000 /dev/urandom > /data/random; "


def started(torpor: Torpor, bundle: Path) -> Container:
    return Container(torpor, bundle, new_id()).run().wait_ready()


def restored(torpor: Torpor, image: Path, bundle: Path) -> Container:
    c = Container(torpor, bundle, new_id())
    c.restore_from(image)
    return c


def inside(c: Container, path: str) -> Path:
    return Path(f"/proc/{c.pid}/root{path}")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def with_mounts(*mounts: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["mounts"].extend(mounts)


def bind(source: Path, destination: str) -> dict[str, Any]:
    return {"destination": destination, "type": "bind", "source": str(source), "options": ["rbind", "rw"]}


def refused(torpor: Torpor, image: Path, bundle: Path, *says: str) -> None:
    """A restore that is refused before anything is created leaves nothing of the container."""
    name = new_id()
    torpor.fails("restore", "--detach", "--image-path", image, "--bundle", bundle, name, says=says)
    assert name not in torpor.ids()


# -- files -----------------------------------------------------------------------------------------


def test_nothing_of_a_file_changes_by_a_checkpoint(torpor: Torpor, busybox: Make, tmp: Path) -> None:
    """Not even the time of the last access, although all was read."""
    c = started(torpor, busybox(["sh", "-c", FILES + WAITER], mounts=[SMALL]))

    def look() -> list[os.stat_result]:
        return [
            os.lstat(inside(c, p)) for p in ("/data", "/data/d", "/data/d/file", "/data/random", "/dev", "/dev/null")
        ]

    os.utime(inside(c, "/data/random"), ns=(1, 1))
    os.utime(inside(c, "/data"), ns=(1, 1))
    before = look()
    c.checkpoint(tmp / "image", "--leave-running")
    assert look() == before
    c.verify()


def test_files_come_back_under_another_root_and_again(torpor: Torpor, busybox: Make, tmp: Path) -> None:
    arguments: dict[str, Any] = {"mounts": [SMALL]}
    first = started(torpor, busybox(["sh", "-c", FILES + WAITER], **arguments))
    was = digest(inside(first, "/data/random"))
    first.checkpoint(tmp / "image1")
    second = restored(torpor, tmp / "image1", busybox(["sh", "-c", FILES + WAITER], **arguments))
    second.verify()
    assert digest(inside(second, "/data/random")) == was
    assert inside(second, "/data/d/file").read_text() == "content\n"
    inside(second, "/data/d/file").write_text("changed\n")
    inside(second, "/data/random").unlink()
    second.checkpoint(tmp / "image2")
    third = restored(torpor, tmp / "image2", busybox(["true"], **arguments))
    assert sorted(os.listdir(inside(third, "/data"))) == ["d"]
    assert inside(third, "/data/d/file").read_text() == "changed\n"
    # the first image was not touched by what happened since
    fourth = restored(torpor, tmp / "image1", busybox(["true"], **arguments))
    assert digest(inside(fourth, "/data/random")) == was


def test_a_file_larger_than_the_buffers(torpor: Torpor, busybox: Make, tmp: Path) -> None:
    big = {**SMALL, "options": ["mode=755"]}
    bundle = busybox(["sh", "-c", "cat /big > /data/big; rm /big; " + WAITER], mounts=[big])
    content = os.urandom(1 << 20) * 70 + b"end"
    (bundle / "rootfs" / "big").write_bytes(content)
    c = started(torpor, bundle)
    c.checkpoint(tmp / "image")
    again = restored(torpor, tmp / "image", bundle)
    assert inside(again, "/data/big").read_bytes() == content
    again.verify()


def memory_group(pid: int) -> Path | None:
    """The directory that tells how much memory the group of a process has."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return Path("/sys/fs/cgroup/memory") / path.lstrip("/")
    return None


def test_restored_files_count_as_memory_of_the_container(torpor: Torpor, busybox: Make, tmp: Path) -> None:
    script = "head -c 20000000 /dev/urandom > /data/random; " + WAITER
    bundle = busybox(["sh", "-c", script], mounts=[{**SMALL, "options": ["size=64m"]}])
    c = started(torpor, bundle)
    if memory_group(c.pid) is None:
        pytest.skip("no memory control group (v1) here")
    c.checkpoint(tmp / "image")
    again = restored(torpor, tmp / "image", bundle)
    group = memory_group(again.pid)
    assert group is not None
    assert int((group / "memory.usage_in_bytes").read_text()) > 20_000_000
    assert set(map(int, (group / "cgroup.procs").read_text().split())) == set(again.host_pids())


def test_a_tmpfs_that_is_too_small_is_refused(torpor: Torpor, busybox: Make, tmp: Path) -> None:
    c = started(torpor, busybox(["sh", "-c", FILES + WAITER], mounts=[SMALL]))
    c.checkpoint(tmp / "image")
    small = busybox(["true"], mounts=[{**SMALL, "options": ["size=1m"]}])
    refused(torpor, tmp / "image", small, "tmpfs /data", "3006464 bytes", "larger size")


def test_volumes_are_left_alone(torpor: Torpor, busybox: Make, tmp: Path) -> None:
    """A tmpfs of the host that is mounted into the container is not the container's."""
    host = tmp / "host"
    host.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(host)], check=True)
    try:
        (host / "sub").mkdir()
        mounts = [bind(host, "/whole"), bind(host / "sub", "/part")]
        bundle = busybox(["sh", "-c", "echo 1 > /whole/a; echo 1 > /part/b; " + WAITER], mounts=mounts)
        c = started(torpor, bundle)
        c.checkpoint(tmp / "image")
        (host / "a").write_text("2\n")
        (host / "c").write_text("new\n")
        again = restored(torpor, tmp / "image", bundle)
        again.verify()
        assert (host / "a").read_text() == "2\n" and (host / "c").exists() and (host / "sub" / "b").exists()
        # a volume cannot take the place of the container's own files in memory
        own = started(torpor, busybox(["sh", "-c", FILES + WAITER], mounts=[SMALL]))
        own.checkpoint(tmp / "own")
        refused(torpor, tmp / "own", busybox(["true"], mounts=[bind(host, "/data")]), "mount /data", "from outside")
        assert sorted(os.listdir(host)) == ["a", "c", "sub"]
        for container in (again, c, own):
            container.delete()
    finally:
        subprocess.run(["umount", str(host)], check=True)


def test_a_device_that_the_container_may_not_make(torpor: Torpor, busybox: Make, tmp: Path) -> None:
    c = started(torpor, busybox(["sh", "-c", "mknod /dev/mine c 1 3; " + WAITER]))
    c.checkpoint(tmp / "image")
    few = [cap for cap in bundles.DOCKER_CAPS if cap != "CAP_MKNOD"]
    without = busybox(["true"], caps=few)
    name = new_id()
    result = torpor("restore", "--detach", "--image-path", tmp / "image", "--bundle", without, name, check=False)
    assert result.code != 0 and name not in torpor.ids()
    again = restored(torpor, tmp / "image", busybox(["true"]))
    assert inside(again, "/dev/mine").is_char_device()
    # it has its capabilities in the image, too: a program that gave them up can be restored without them
    dropped = started(torpor, busybox(["sh", "-c", WAITER], caps=few))
    os.mknod(inside(dropped, "/dev/mine"), 0o20600, os.makedev(1, 3))
    dropped.checkpoint(tmp / "dropped")
    refused(torpor, tmp / "dropped", without, "/dev/mine", "CAP_MKNOD")
    os.unlink(inside(again, "/dev/mine"))


@pytest.mark.parametrize("other", [100_000, 300_000])
def test_owners_are_those_of_the_container(torpor: Torpor, busybox: Make, tmp: Path, other: int) -> None:
    """In a user namespace, also when the new container has other ids outside."""

    def mapped(first: int) -> Callable[[dict[str, Any]], None]:
        def edit(config: dict[str, Any]) -> None:
            config["linux"]["namespaces"].append({"type": "user"})
            for kind in ("uidMappings", "gidMappings"):
                config["linux"][kind] = [{"containerID": 0, "hostID": first, "size": 65536}]

        return edit

    def bundle(first: int) -> Path:
        made = busybox(["sh", "-c", script], mounts=[SMALL], edit=mapped(first))
        subprocess.run(["chown", "-Rh", f"{first}:{first}", str(made / "rootfs")], check=True)
        for directory in (tmp, made):
            directory.chmod(0o755)
        return made

    script = FILES + "chown 33:44 /data/d/file; chmod 4750 /data/d/file; " + WAITER
    c = started(torpor, bundle(100_000))
    c.checkpoint(tmp / "image")
    again = restored(torpor, tmp / "image", bundle(other))
    again.verify()
    now = os.stat(inside(again, "/data/d/file"))
    assert (now.st_uid, now.st_gid, now.st_mode & 0o7777) == (other + 33, other + 44, 0o4750)
    assert os.stat(inside(again, "/data/random")).st_uid == other


# -- mounts ----------------------------------------------------------------------------------------


def test_a_mount_that_is_missing_is_named(torpor: Torpor, busybox: Make, tmp: Path) -> None:
    volume = tmp / "volume"
    volume.mkdir()
    c = started(torpor, busybox(["sh", "-c", WAITER], mounts=[SMALL, bind(volume, "/volume")]))
    c.checkpoint(tmp / "image")
    bare = busybox(["true"])
    refused(
        torpor, tmp / "image", busybox(["true"], mounts=[SMALL]), "mount /volume", "give the new container that mount"
    )
    refused(torpor, tmp / "image", busybox(["true"], mounts=[bind(volume, "/volume")]), "mount /data")
    refused(torpor, tmp / "image", bare, "mount /")
    elsewhere = tmp / "elsewhere"
    elsewhere.mkdir()
    more = {**SMALL, "destination": "/more"}
    again = restored(torpor, tmp / "image", busybox(["true"], mounts=[more, bind(elsewhere, "/volume"), SMALL]))
    again.verify()


def test_a_mount_that_the_program_made_is_named(torpor: Torpor, busybox: Make, tmp: Path) -> None:
    caps = [*bundles.DOCKER_CAPS, "CAP_SYS_ADMIN"]
    script = "mount -t tmpfs none /wl; echo 1 > /wl/file; " + WAITER
    c = started(torpor, busybox(["sh", "-c", script], caps=caps))
    c.checkpoint(tmp / "image", "--leave-running")
    c.verify()
    refused(torpor, tmp / "image", c.bundle, "mount /wl")
    given = busybox(["true"], caps=caps, mounts=[{**SMALL, "destination": "/wl"}])
    again = restored(torpor, tmp / "image", given)
    again.verify()
    assert inside(again, "/wl/file").read_text() == "1\n"


def test_what_runtimes_add_is_not_missed(torpor: Torpor, busybox: Make, tmp: Path) -> None:
    """Other hidden paths, and the files of Docker that say who a container is."""
    names = ("hosts", "hostname", "resolv.conf")
    for name in names:
        (tmp / name).write_text(f"{name}\n")

    def docker(config: dict[str, Any]) -> None:
        config["mounts"] += [bind(tmp / name, f"/etc/{name}") for name in names]
        config["linux"]["maskedPaths"] += ["/proc/keys", "/proc/acpi", "/proc/scsi", "/var", "/etc/group"]
        config["linux"]["readonlyPaths"] += ["/root"]

    c = started(torpor, busybox(["sh", "-c", WAITER], edit=docker))
    c.checkpoint(tmp / "image")

    def plain(config: dict[str, Any]) -> None:
        config["linux"]["maskedPaths"] = []
        config["linux"]["readonlyPaths"] = ["/proc/sys"]

    restored(torpor, tmp / "image", busybox(["true"], edit=plain)).verify()
    restored(torpor, tmp / "image", busybox(["true"], edit=docker)).verify()


# -- IPC -------------------------------------------------------------------------------------------

KINDS = {
    "shm": "System V shared memory",
    "sem": "System V semaphores",
    "msg": "System V message queue",
    "mq": "POSIX message queue /queue",
}
CARRIED = ["shm", "sem", "msg"]
HOST_IPC = ("pid", "network", "uts", "mount")


def ipc(busybox: Make, *args: str, mqueue: bool = True, **more: Any) -> Path:
    def without(config: dict[str, Any]) -> None:
        if not mqueue:
            config["mounts"] = [m for m in config["mounts"] if m["type"] != "mqueue"]

    bundle = busybox(["/bin/ipc", *args], edit=without, **more)
    shutil.copy2(compiled("ipc"), bundle / "rootfs" / "bin" / "ipc")
    return bundle


@pytest.mark.requires("command:gcc")
@pytest.mark.parametrize("mqueue", [True, False])
def test_message_queues_are_refused_by_name(torpor: Torpor, busybox: Make, tmp: Path, mqueue: bool) -> None:
    c = started(torpor, ipc(busybox, "mq", mqueue=mqueue))
    pids = c.host_pids()
    for flags in ([], ["--leave-running"]):
        says = (KINDS["mq"], "mq_unlink")
        torpor.fails("checkpoint", "--image-path", tmp / "image", *flags, c.id, says=says)
        assert not (tmp / "image").exists()
        c.verify()
    assert c.host_pids() == pids and c.status == "running"


@pytest.mark.requires("command:gcc")
@pytest.mark.parametrize("kind", KINDS)
def test_ipc_objects_that_are_gone_do_no_harm(torpor: Torpor, busybox: Make, tmp: Path, kind: str) -> None:
    c = started(torpor, ipc(busybox, kind, "gone"))
    c.checkpoint(tmp / "image")
    restored(torpor, tmp / "image", c.bundle).verify()


@pytest.mark.requires("command:gcc")
@pytest.mark.parametrize("kind", CARRIED)
def test_ipc_objects_need_a_namespace_of_their_own(torpor: Torpor, busybox: Make, tmp: Path, kind: str) -> None:
    c = started(torpor, ipc(busybox, kind, mqueue=False))
    c.checkpoint(tmp / "image")
    shared = ipc(busybox, kind, namespaces=HOST_IPC, mqueue=False)
    refused(torpor, tmp / "image", shared, f"1 {KINDS[kind]}", "IPC namespace of its own")
    other = started(torpor, busybox(["sh", "-c", WAITER]))
    joined = busybox(["true"], edit=joins("ipc", f"/proc/{other.pid}/ns/ipc"))
    refused(torpor, tmp / "image", joined, f"1 {KINDS[kind]}", "IPC namespace of its own")
    restored(torpor, tmp / "image", c.bundle).verify()


def joins(kind: str, path: str) -> Callable[[dict[str, Any]], None]:
    def join(config: dict[str, Any]) -> None:
        config["mounts"] = [m for m in config["mounts"] if m["type"] != "mqueue"]
        (namespace,) = [n for n in config["linux"]["namespaces"] if n["type"] == kind]
        namespace["path"] = path

    return join


@pytest.mark.requires("command:nsenter")
@pytest.mark.parametrize("grants", [True, False])
def test_limits_of_system_v_ipc_that_were_changed(torpor: Torpor, busybox: Make, tmp: Path, grants: bool) -> None:
    """They come back where the container may change them, unless the spec sets them."""
    caps = [*bundles.DOCKER_CAPS, *(["CAP_SYS_ADMIN"] if grants else [])]
    c = started(torpor, busybox(["sh", "-c", WAITER], caps=caps))
    script = "echo 123456 > /proc/sys/kernel/shmmax; echo 77 > /proc/sys/kernel/msgmni"
    subprocess.run(["nsenter", "--ipc", "-t", str(c.pid), "sh", "-ec", script], check=True)
    c.checkpoint(tmp / "image")

    def fixed(config: dict[str, Any]) -> None:
        config["linux"]["sysctl"] = {"kernel.msgmni": "99"}

    again = restored(torpor, tmp / "image", busybox(["true"], caps=caps, edit=fixed))
    read = torpor("exec", again.id, "cat", "/proc/sys/kernel/shmmax", "/proc/sys/kernel/msgmni").out.split()
    assert (read[0] == "123456") == grants, read
    assert read[1] == "99", "the new container's spec sets this one itself"
    again.verify()


@pytest.mark.requires("command:gcc")
def test_an_image_cannot_lock_more_memory_than_the_container_may(torpor: Torpor, busybox: Make, tmp: Path) -> None:
    def limited(config: dict[str, Any]) -> None:
        config["process"]["rlimits"] = [{"type": "RLIMIT_MEMLOCK", "soft": 4096, "hard": 4096}]

    bundle = ipc(busybox, "shm")
    started(torpor, bundle).checkpoint(tmp / "image")

    def locks(metadata: dict[str, Any]) -> None:
        (segment,) = metadata["ipc"]["segments"]
        segment["locked"] = True
        for process in metadata["processes"]:
            process["body"]["settings"]["limits"][8] = [4096, 4096]

    edit(tmp / "image", tmp / "forged", locks)
    refused(torpor, tmp / "forged", busybox(["true"], edit=limited), "the image locks 8192 bytes", "RLIMIT_MEMLOCK")


@pytest.mark.requires("command:gcc", "command:ipcrm")
def test_attached_memory_of_the_host_is_refused(torpor: Torpor, busybox: Make, tmp: Path) -> None:
    c = started(torpor, ipc(busybox, "shm", "attached", namespaces=HOST_IPC, mqueue=False))
    try:
        says = ("/SYSV70727030", "not the container's own")
        torpor.fails("checkpoint", "--image-path", tmp / "image", c.id, says=says)
        c.verify()
    finally:
        subprocess.run(["ipcrm", "-M", "0x70727030"], check=True)


@pytest.mark.requires("command:gcc", "command:ipcrm")
def test_ipc_of_the_host_outlives_the_container(torpor: Torpor, busybox: Make, tmp: Path) -> None:
    bundle = ipc(busybox, "sem", namespaces=HOST_IPC, mqueue=False)
    c = started(torpor, bundle)
    try:
        c.checkpoint(tmp / "image")
        restored(torpor, tmp / "image", bundle).verify()
    finally:
        subprocess.run(["ipcrm", "-S", "0x70727030"], check=True)


# -- safety ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["build", "build:kill", "plan", "fill:kill"])
def test_a_restore_that_fails_leaves_no_tmpfs(torpor: Torpor, busybox: Make, tmp: Path, stage: str) -> None:
    bundle = busybox(["sh", "-c", FILES + WAITER], mounts=[SMALL])
    c = started(torpor, bundle)
    c.checkpoint(tmp / "image")
    c.delete()
    failed = Container(torpor, bundle, new_id())
    result = failed.restore_from(tmp / "image", check=False, env={"TORPOR_FAILPOINT": stage})
    assert result.code != 0
    procs.reap()
    assert torpor.ids() == []
    restored(torpor, tmp / "image", bundle).verify()
