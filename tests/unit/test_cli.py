"""The command without containers: help, versions, refusals, and what it costs to start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torpor.cli import main as cli
from torpor.cli.kill import signal_number
from torpor.errors import UsageError

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"


def torpor(tmp_path: Path, *words: str, **more: object) -> subprocess.CompletedProcess[str]:
    code = "import sys; from torpor.cli.main import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, "--root", str(tmp_path / "state"), "--log", str(tmp_path / "log"), *words],
        capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, cwd=tmp_path,
    )  # fmt: skip


def fails(tmp_path: Path, *words: str) -> str:
    """It must fail as every failure must: code 128, one line, one object."""
    done = torpor(tmp_path, *words)
    assert done.returncode == 128 and done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    entry = json.loads((tmp_path / "log").read_text())
    assert entry["level"] == "error" and entry["msg"] == done.stderr.strip()
    return done.stderr.strip()


def test_version(tmp_path: Path) -> None:
    first, second = torpor(tmp_path, "--version").stdout.splitlines()
    assert first.startswith("torpor version ") and second == "spec: 1.2.0"


@pytest.mark.parametrize("verb", sorted(cli.VERBS))
def test_help_of_a_verb(tmp_path: Path, verb: str) -> None:
    # Podman and CRI-O ask `checkpoint --help` and look at the exit code only
    done = torpor(tmp_path, verb, "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith(f"usage: torpor {verb}")
    assert torpor(tmp_path, "help", verb).stdout == done.stdout


def test_help(tmp_path: Path) -> None:
    done = torpor(tmp_path, "help")
    assert done.returncode == 0
    assert all(f"  {verb} " in done.stdout for verb in cli.VERBS)
    assert torpor(tmp_path, "--help").stdout == done.stdout


def test_podman_can_ask_for_a_flag(tmp_path: Path) -> None:
    assert "flag needs an argument" in fails(tmp_path, "restore", "--lsm-mount-context")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no verb given"),
        (["fly"], "unknown verb 'fly'"),
        (["--nope", "list"], "not defined: --nope"),
        (["run", "--nope", "c"], "not defined: --nope"),
        (["run"], "a container id is required"),
        (["run", "../c"], "invalid container id"),
        (["run", "c"], "no config.json in bundle"),
        (["run", "--bundle", "/nope", "c"], "does not exist"),
        (["run", "--bundle", "/tmp", "c", "ls"], "either --bundle or a command"),
        (["state", "c"], "does not exist"),
        (["state"], "a container id is required"),
        (["state", "a", "b"], "unexpected argument 'b'"),
        (["start", "c"], "does not exist"),
        (["kill", "c"], "does not exist"),
        (["kill", "c", "LOUD"], "unknown signal 'LOUD'"),
        (["kill", "c", "99"], "unknown signal '99'"),
        (["kill"], "a container id is required"),
        (["delete", "c"], "does not exist"),
        (["delete"], "a container id is required"),
        (["exec", "c", "ls"], "does not exist"),
        (["ps", "c"], "does not exist"),
        (["wait", "c"], "does not exist"),
        (["list", "c"], "unexpected argument"),
        (["list", "--format", "xml"], "use table or text or json"),
        (["checkpoint", "c"], "--image-path is required"),
        (["checkpoint", "--image-path=", "c"], "--image-path is required"),
        (["checkpoint", "--image-path", "x", "c"], "does not exist"),
        (["checkpoint", "--image-path", "x", "--capture", "fast", "c"], "use background or stop"),
        (["checkpoint", "--image-path", "x", "--lazy-pages", "c"], "--lazy-pages is not supported yet"),
        (["checkpoint", "--image-path", "x", "--page-server=h:1", "c"], "--page-server is not supported yet"),
        (["restore", "--image-path", "x", "--track", "--background", "c"], "--track is not supported with --background"),
        (["checkpoint", "--image-path", "x", "--compression=gzip", "c"], "use none, lz4, zstd"),
        (["checkpoint", "--image-path", "x", "--compression=zstd:20", "c"], "use none, lz4, zstd"),
        (["checkpoint", "--image-path", "x", "--compression=flate-best-speed", "c"], "does not exist"),
        (["squash", "x"], "two directories are required"),
        (["squash", "/nope", "x"], "does not exist"),
        (["squash", "--compression=lz4:1", "/nope", "x"], "use none, lz4, zstd"),
        (["checkpoint", "--image-path", "x", "--empty-ns", "pid", "c"], "only network"),
        (["checkpoint", "--image-path", "x", "--image-path", "y", "c"], "given twice with different values"),
        (["restore", "c"], "--image-path is required"),
        (["restore", "--image-path", "/nope", "c"], "does not exist"),
        (["inspect"], "one image directory is required"),
        (["inspect", "/nope"], "does not exist"),
        (["do"], "a command is required"),
        (["do", "--force-overlay=false", "ls"], "never writes to the host's files"),
        (["help", "fly"], "unknown verb"),
    ],
)  # fmt: skip
def test_bad_input(tmp_path: Path, words: list[str], says: str) -> None:
    assert says in fails(tmp_path, *words)
    assert not (tmp_path / "state").exists() or list((tmp_path / "state").iterdir()) == []
    assert not (tmp_path / "x").exists()


def test_a_directory_without_image(tmp_path: Path) -> None:
    assert "holds no checkpoint.img" in fails(tmp_path, "restore", "--image-path", str(tmp_path), "c")


def test_unknown_is_fine_for_delete_force(tmp_path: Path) -> None:
    assert torpor(tmp_path, "delete", "--force", "c", "d").returncode == 0


def test_list_of_nothing(tmp_path: Path) -> None:
    assert torpor(tmp_path, "list", "-q").stdout == ""
    assert json.loads(torpor(tmp_path, "list", "-f", "json").stdout) == []
    assert torpor(tmp_path, "list").stdout.split() == ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]


def test_spec_writes_a_bundle_once(tmp_path: Path) -> None:
    assert torpor(tmp_path, "spec", "--", "sleep", "-x").returncode == 0
    made = json.loads((tmp_path / "config.json").read_text())
    assert made["process"]["args"] == ["sleep", "-x"] and made["root"] == {"path": "rootfs", "readonly": True}
    assert "already exists" in fails(tmp_path, "spec")


def test_no_traceback_for_a_bug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(verb: str) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(cli, "load", broken)
    assert cli.main(["list"]) == 128
    assert capsys.readouterr().err == "internal error: ZeroDivisionError: oops (run again with --debug to see where)\n"


def test_closed_standard_streams(tmp_path: Path) -> None:
    code = "import sys; from torpor.cli.main import main; sys.exit(main(['list']))"
    for closed in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        done = subprocess.run(["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, code], cwd=tmp_path, timeout=60)
        assert done.returncode == 0, closed


@pytest.mark.parametrize(
    ("text", "number"),
    [("TERM", 15), ("SIGTERM", 15), ("sigterm", 15), ("9", 9), ("0", 0), ("64", 64), ("RTMIN", 34), ("SIGRTMIN+3", 37),
     ("RTMAX-1", 63), ("IOT", 6), ("WINCH", 28)],
)  # fmt: skip
def test_signals(text: str, number: int) -> None:
    assert signal_number(text) == number


@pytest.mark.parametrize("text", ["", "65", "-1", "SIG", "SIG_IGN", "TERM+1", "RTMAX+1", "__doc__", "signal"])
def test_what_is_no_signal(text: str) -> None:
    with pytest.raises(UsageError):
        signal_number(text)


def test_documentation_is_what_help_says() -> None:
    mark = "-k documentation`. -->\n"
    head, found, tail = DOCS.read_text().partition(mark)
    assert found
    wanted = "".join(f"\n### {verb}\n```\n{cli.usage_of(verb, cli.load(verb))}\n```\n" for verb in cli.VERBS)
    wanted = f"```\n{cli.usage()}\n```\n{wanted}"
    if os.environ.get("TORPOR_UPDATE_DOCS"):
        DOCS.write_text(head + mark + wanted)
    else:
        assert tail == wanted, "docs/cli.md is out of date: TORPOR_UPDATE_DOCS=1 writes it anew"


# What a verb may cost before it does anything: containerd starts a process for every event.
HEAVY = (
    "argparse",
    "subprocess",
    "typing",
    "dataclasses",
    "inspect",
    "asyncio",
    "logging",
    "tempfile",
    "shutil",
    "pathlib",
)


@pytest.mark.parametrize("verb", ["state", "list", "create", "run", "checkpoint", "restore", "kill", "delete"])
def test_starting_is_cheap(tmp_path: Path, verb: str) -> None:
    argv = ["--root", str(tmp_path), verb]
    if verb in ("checkpoint", "restore"):
        argv.append("--image-path=/nope")
    if verb != "list":
        argv.append("c")
    code = f"""
import sys
sys.path[:] = {sys.path}
before = set(sys.modules)
from torpor.cli.main import main
main({argv})
print(*sorted(set(sys.modules) - before))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path
    )
    loaded = done.stdout.split("\n")[-2].split()
    assert "torpor.cli.main" in loaded
    assert [name for name in HEAVY if name in loaded] == []
