"""An image is data from outside: edited to claim more than the container's spec grants, it is refused, and the container is left as it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.bundles import DOCKER_CAPS
from support.cli import Container, Torpor, new_id
from support.image_edit import edit

pytestmark = [pytest.mark.requires("root", "command:busybox"), pytest.mark.timeout(120)]

SLEEPER = ["sh", "-c", "exec 5</etc/open; trap 'echo OK' USR1; echo READY; sleep 1000000 & while :; do wait $!; done"]
ALLOW_ALL = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "architectures": ["SCMP_ARCH_X86_64"],
    "syscalls": [{"names": ["getpriority"], "action": "SCMP_ACT_ERRNO", "errnoRet": 72}],
}


class Case:
    def __init__(self, says: str, how: Callable[[dict[str, Any]], object], **bundle: Any) -> None:
        self.says, self.how, self.bundle = says, how, bundle


def threads(metadata: dict[str, Any]) -> list[dict[str, Any]]:
    return [thread for process in metadata["processes"] for thread in process["body"]["threads"]]


def of_threads(**claims: Any) -> Callable[[dict[str, Any]], None]:
    def how(metadata: dict[str, Any]) -> None:
        for thread in threads(metadata):
            thread["creds"].update(claims)

    return how


def capability(number: int, *sets: int) -> Callable[[dict[str, Any]], None]:
    def how(metadata: dict[str, Any]) -> None:
        for thread in threads(metadata):
            for index in sets:
                thread["creds"]["caps"][index] |= 1 << number

    return how


def no_filter(metadata: dict[str, Any]) -> None:
    for thread in threads(metadata):
        thread["seccomp"] = []


def opened(path: str, flags: int) -> Callable[[dict[str, Any]], None]:
    """The file that the program has open is another one."""

    def how(metadata: dict[str, Any]) -> None:
        (file,) = [d for d in metadata["descriptions"] if d.get("path") == "/etc/open"]
        file.update(path=path, flags=flags, size=0, pos=0)

    return how


def raised_limit(metadata: dict[str, Any]) -> None:
    for process in metadata["processes"]:
        process["body"]["settings"]["limits"][4][1] = 2**64 - 1


# Docker's capabilities, but those that let a program become somebody else.
FEW = [c for c in DOCKER_CAPS if c not in ("CAP_SETUID", "CAP_SETGID", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_SETPCAP")]
USER = {"user": (1000, 1000), "caps": FEW}
CASES = {
    "CAP_SYS_ADMIN permitted": Case("capabilities", capability(21, 1)),
    "CAP_SYS_ADMIN effective": Case("capabilities", capability(21, 2)),
    "CAP_SYS_ADMIN in the bounding set": Case("capabilities", capability(21, 3)),
    "CAP_SYS_ADMIN ambient": Case("capabilities", capability(21, 0, 4)),
    "CAP_NET_RAW where nothing can be gained": Case("capabilities", capability(13, 1), caps=FEW, edit=lambda c: c["process"]["capabilities"].update(permitted=["CAP_KILL"], effective=["CAP_KILL"]), no_new_privileges=True),
    "capabilities where the spec has no list": Case("capabilities", capability(5, 1, 3), edit=lambda c: c["process"].pop("capabilities")),
    "user 0": Case("acts as user 0", of_threads(uids=[0, 0, 0, 0]), **USER),
    "user 0 only in the file system": Case("acts as user 0", of_threads(uids=[1000, 1000, 1000, 0]), **USER),
    "another user": Case("acts as user 33", of_threads(uids=[33, 33, 33, 33]), **USER),
    "group 0": Case("acts as group 0", of_threads(gids=[0, 0, 0, 0]), **USER),
    "a supplementary group": Case("acts as group 42", of_threads(groups=[42]), **USER),
    "ids that change without losing capabilities": Case("securebits", of_threads(securebits=4), **USER),
    "privileges can be gained again": Case("no_new_privs", of_threads(no_new_privs=False), no_new_privileges=True),
    "no seccomp filter": Case("seccomp", no_filter, seccomp=ALLOW_ALL),
    "a file that its user may not write": Case("/etc/private", opened("/etc/private", 1), **USER),
    "a file that its user may not read": Case("/etc/private", opened("/etc/private", 0), **USER),
    "a higher limit than the spec's": Case("resource limit 4", raised_limit, rlimits=[{"type": "RLIMIT_CORE", "soft": 0, "hard": 0}]),
}  # fmt: skip


def start(busybox: Callable[..., Path], torpor: Torpor, **more: Any) -> Container:
    bundle = busybox(SLEEPER, **more)
    etc = bundle / "rootfs" / "etc"
    (etc / "open").touch()
    (etc / "private").touch(mode=0o600)
    return Container(torpor, bundle, new_id("power")).run().wait_ready()


@pytest.mark.parametrize("name", CASES)
def test_claim_is_refused(name: str, busybox: Callable[..., Path], torpor: Torpor, tmp: Path) -> None:
    case = CASES[name]
    first = start(busybox, torpor, **case.bundle)
    first.checkpoint(tmp / "image")
    edit(tmp / "image", tmp / "forged", case.how)
    other = Container(torpor, first.bundle, new_id()).create()
    torpor.fails("restore", "--detach", "--image-path", tmp / "forged", other.id, says=case.says)
    if "/etc/private" in case.says:
        # Files are opened while the rest is being built: too late to give the container back.
        assert other.id not in torpor.ids()
        other = Container(torpor, first.bundle, new_id()).create()
    torpor("restore", "--detach", "--image-path", tmp / "image", other.id)
    other.verify()


def test_editing_nothing_is_no_forgery(busybox: Callable[..., Path], torpor: Torpor, tmp: Path) -> None:
    """The editor of these tests makes images that are right: refusals are not about checksums."""
    first = start(busybox, torpor)
    first.checkpoint(tmp / "image")
    edit(tmp / "image", tmp / "same", lambda metadata: None)
    other = Container(torpor, first.bundle, new_id())
    other.restore_from(tmp / "same")
    other.verify()


def filters_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("Seccomp_filters:")[1].split()[0])


def test_filter_of_the_spec_is_never_lost(busybox: Callable[..., Path], torpor: Torpor, tmp: Path) -> None:
    """Another filter in the image is no stand-in for the spec's; the same one is not added again, however often."""
    first = start(busybox, torpor, seccomp=ALLOW_ALL)
    assert filters_of(first.pid) == 1
    first.checkpoint(tmp / "image")

    same = Container(torpor, first.bundle, new_id())
    same.restore_from(tmp / "image")
    assert filters_of(same.pid) == 1
    same.verify()
    same.checkpoint(tmp / "again")

    def stricter(config: dict[str, Any]) -> None:
        config["linux"]["seccomp"]["syscalls"][0]["names"].append("sysinfo")

    config = json.loads((first.bundle / "config.json").read_text())
    stricter(config)
    (first.bundle / "config.json").write_text(json.dumps(config))
    for image in ("image", "again"):
        other = Container(torpor, first.bundle, new_id())
        other.restore_from(tmp / image)
        assert filters_of(other.pid) == 2
        other.verify()
