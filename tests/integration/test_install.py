"""`torpor install` and `uninstall` change what is theirs in other programs' configuration, and nothing else."""

import json
import os
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cli import TORPOR, Torpor

pytestmark = pytest.mark.requires("root")

SETTINGS: dict[str, Any] = {
    "debug": False,
    "runtimes": {"other": {"path": "/usr/bin/other", "runtimeArgs": ["--x"]}},
    "labels": ["größe=1"],
    "unknown": {"to": ["torpor"]},
}


def test_docker(torpor: Torpor, tmp: Path) -> None:
    config = tmp / "daemon.json"
    config.write_text(json.dumps(SETTINGS))
    config.chmod(0o640)
    torpor("install", "--config-file", config, "--restore-from", tmp)
    now = json.loads(config.read_text())
    assert now.pop("runtimes") == SETTINGS["runtimes"] | {
        "torpor": {"path": str(TORPOR), "runtimeArgs": [f"--restore-from={os.path.realpath(tmp)}"]}
    }
    assert now == {k: v for k, v in SETTINGS.items() if k != "runtimes"}
    assert stat.S_IMODE(config.stat().st_mode) == 0o640
    torpor("uninstall", "--config-file", config)
    assert json.loads(config.read_text()) == SETTINGS
    assert "has no runtime" in torpor("uninstall", "--config-file", config).out


def test_docker_as_runsc_has_it(torpor: Torpor, tmp: Path) -> None:
    config = tmp / "etc" / "docker" / "daemon.json"
    torpor("install", "--config_file", config, "--runtime=deep", "--experimental", "--cgroupdriver", "cgroupfs", "--default", "--", "--debug")  # fmt: skip
    assert json.loads(config.read_text()) == {
        "runtimes": {"deep": {"path": str(TORPOR), "runtimeArgs": ["--debug"]}},
        "experimental": True,
        "default-runtime": "deep",
        "exec-opts": ["native.cgroupdriver=cgroupfs"],
    }
    torpor.fails("install", "--config-file", config, "--runtime", "deep", "--clobber=false", says="already")
    torpor("uninstall", "--config_file", config, "--runtime=deep")
    left = json.loads(config.read_text())
    assert "default-runtime" not in left and "runtimes" not in left and left["experimental"] is True


@pytest.mark.parametrize("text", ["{", "[]", '{"runtimes": []}', '"x"'])
def test_a_file_that_is_not_understood_is_left_alone(torpor: Torpor, tmp: Path, text: str) -> None:
    config = tmp / "daemon.json"
    config.write_text(text)
    torpor.fails("install", "--config-file", config)
    assert config.read_text() == text


def test_a_link_stays_a_link(torpor: Torpor, tmp: Path) -> None:
    (tmp / "real.json").write_text("")
    (tmp / "daemon.json").symlink_to("real.json")
    torpor("install", "--config-file", tmp / "daemon.json")
    assert (tmp / "daemon.json").is_symlink() and "torpor" in (tmp / "real.json").read_text()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--runtime", "runc"], "cannot be the name"),
        (["--runtime", "a b"], "cannot be the name"),
        (["--restore-from", "/nope"], "not a directory"),
        (["--", "--x=a b"], "Docker cannot hand on"),
        (["--", "--x=$(reboot)"], "Docker cannot hand on"),
    ],
)
def test_what_is_refused(torpor: Torpor, tmp: Path, args: list[str], says: str) -> None:
    torpor.fails("install", "--config-file", tmp / "daemon.json", *args, says=says)
    assert not (tmp / "daemon.json").exists()


def test_containerd(torpor: Torpor, tmp: Path) -> None:
    import tomllib

    path = tmp / "conf.d" / "torpor.toml"
    out = torpor("install", "--containerd", "--containerd-file", path, "--restore-from", tmp).out
    assert f'imports = ["{path}"]' in out
    runtimes = tomllib.loads(path.read_text())["plugins"]["io.containerd.grpc.v1.cri"]["containerd"]["runtimes"]
    program = runtimes["torpor"]["options"]["BinaryName"]
    assert runtimes["torpor"]["runtime_type"] == "io.containerd.runc.v2"
    assert subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.startswith(
        "torpor version"
    )
    torpor("uninstall", "--containerd", "--containerd-file", path)
    assert list(path.parent.iterdir()) == []


def test_podman(torpor: Torpor, tmp: Path) -> None:
    import tomllib

    path, criu = tmp / "conf.d" / "torpor.conf", tmp / "bin" / "criu"
    flags = ["--podman", "--podman-file", path, "--criu", criu]
    torpor("install", *flags, env={"PATH": str(tmp)})
    config = tomllib.loads(path.read_text())["engine"]
    assert config["runtimes"]["torpor"] == [str(TORPOR)] and "torpor" in config["runtime_supports_json"]
    assert ask(criu, b"\x08\x0a") == b"\x08\x0a\x10\x01\x52\x06\x08\x04\x10\x02\x20\x00", "VERSION: 4.2.0"
    assert ask(criu, b"\x08\x09\x42\x02\x08\x01")[:4] == b"\x08\x09\x10\x01", "FEATURE_CHECK: success"
    assert ask(criu, b"\x08\x01")[:4] == b"\x08\x01\x10\x00", "DUMP: no"
    torpor("uninstall", *flags)
    assert not path.exists() and not criu.exists()


def test_a_criu_that_is_there_stays(torpor: Torpor, tmp: Path) -> None:
    (tmp / "bin").mkdir()
    real = tmp / "bin" / "criu"
    real.write_text("#!/bin/sh\n")
    real.chmod(0o755)
    flags = ["--podman", "--podman-file", tmp / "torpor.conf"]
    out = torpor("install", *flags, "--criu", tmp / "criu", env={"PATH": str(tmp / "bin")}).out
    assert str(real) in out and not (tmp / "criu").exists()
    assert "not one of torpor's" in torpor("uninstall", *flags, "--criu", real).out
    assert real.read_text() == "#!/bin/sh\n"


def ask(criu: Path, request: bytes) -> bytes:
    """What go-criu does: `criu swrk FD` at the other end of a packet socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            process = subprocess.Popen([criu, "swrk", str(theirs.fileno())], pass_fds=[theirs.fileno()])
        ours.settimeout(20)
        ours.send(request)
        answer = ours.recv(4096)
    assert process.wait(20) == 0
    return answer


def test_a_change_that_cannot_be_written_leaves_the_file(
    torpor: Torpor, tmp: Path, busybox: Callable[..., Path]
) -> None:
    directory = tmp / "a-file"
    directory.write_text("")
    torpor.fails("install", "--config-file", directory / "daemon.json", says="daemon.json")
