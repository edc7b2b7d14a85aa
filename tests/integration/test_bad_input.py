"""Bad input: one clear line that says what to do, an exit code that is not 0, nothing changed."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from support import procs
from support.cli import Container, Torpor, new_id
from support.workloads import Stage

pytestmark = [pytest.mark.requires("root")]


def tree(path: Path) -> dict[str, tuple[int, int, bytes]]:
    """Everything below a directory, to see that nothing changed."""
    found = {}
    for p in sorted(path.rglob("*")):
        s = p.lstat()
        found[str(p.relative_to(path))] = (
            s.st_mode,
            s.st_size if p.is_file() else 0,
            p.read_bytes() if p.is_file() and not p.is_symlink() else b"",
        )
    return found


@pytest.fixture
def image(waiter: Callable[..., Container], tmp: Path) -> tuple[Container, Path]:
    """A running container and an image of it."""
    c = waiter()
    c.checkpoint(tmp / "image", "--leave-running")
    return c, tmp / "image"


# ---- ids ------------------------------------------------------------------------------------------------------------------------------

VERBS_WITH_ID = ["state", "start", "kill", "delete", "pause", "resume", "ps", "wait", "checkpoint", "exec"]


def words_for(verb: str, container_id: str, tmp: Path) -> list[str]:
    flags = {"checkpoint": ["--image-path", str(tmp / "image")]}.get(verb, [])
    return [verb, *flags, container_id, *(["true"] if verb == "exec" else [])]


@pytest.mark.parametrize("verb", VERBS_WITH_ID)
def test_unknown_id(torpor: Torpor, tmp: Path, verb: str) -> None:
    torpor.fails(*words_for(verb, "nobody", tmp), says=["nobody", "does not exist"])
    assert not (tmp / "image").exists()
    assert not torpor.root.exists() or list(torpor.root.iterdir()) == []


@pytest.mark.parametrize("verb", ["run", "create", "restore", *VERBS_WITH_ID])
@pytest.mark.parametrize("bad", ["a/b", "../x", "..", ".", "", "a b", "a\nb", "ünï", "a;b", "/abs", "x" * 300])
def test_illegal_id(torpor: Torpor, busybox: Callable[..., Path], tmp: Path, verb: str, bad: str) -> None:
    before = tree(tmp)
    flags = {
        "run": ["--bundle", str(tmp)],
        "create": ["--bundle", str(tmp)],
        "restore": ["--bundle", str(tmp), "--image-path", str(tmp / "image")],
    }.get(verb)
    torpor.fails(*([verb, *flags, bad] if flags else words_for(verb, bad, tmp)), says="id")
    after = {k: v for k, v in tree(tmp).items() if not k.startswith(("cmd", "torpor.log", "state"))}
    assert after == before
    assert not torpor.root.exists() or list(torpor.root.iterdir()) == []


@pytest.mark.parametrize("verb", ["run", "create", "restore", *VERBS_WITH_ID])
def test_no_id_at_all(torpor: Torpor, tmp: Path, verb: str) -> None:
    torpor.fails(verb, *(["--image-path", tmp] if verb in ("checkpoint", "restore") else []), says="id")


# ---- --image-path ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--image-path", ""], ["--image-path="]])
@pytest.mark.parametrize("verb", ["checkpoint", "restore"])
def test_image_path_missing_or_empty(
    torpor: Torpor, waiter: Callable[..., Container], verb: str, flags: list[str]
) -> None:
    c = waiter()
    torpor.fails(verb, *flags, c.id if verb == "checkpoint" else new_id(), says="--image-path")
    assert torpor.ids() == [c.id]
    c.verify()


def test_image_path_that_is_a_file(torpor: Torpor, waiter: Callable[..., Container], tmp: Path) -> None:
    c = waiter()
    (tmp / "file").write_text("mine")
    for path in (tmp / "file", tmp / "file" / "below"):
        torpor.fails("checkpoint", "--image-path", path, c.id, says=str(tmp / "file"))
    assert (tmp / "file").read_text() == "mine"
    assert c.status == "running"
    c.verify()


def test_image_path_that_is_not_writable(torpor: Torpor, waiter: Callable[..., Container], tmp: Path) -> None:
    # the container's clean-up comes before the mount's
    path = tmp / "readonly"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(path)], check=True)
    try:
        c = waiter()
        torpor.fails("checkpoint", "--image-path", path, c.id, says="ead-only")
        torpor.fails("checkpoint", "--image-path", path / "new", c.id, says="ead-only")
        assert list(path.iterdir()) == []
        assert c.status == "running"
        c.verify()
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_image_path_that_holds_a_checkpoint_already(torpor: Torpor, image: tuple[Container, Path]) -> None:
    c, path = image
    before = (path / "checkpoint.img").read_bytes()
    stat = (path / "checkpoint.img").stat()
    for flags in ([], ["--leave-running"]):
        torpor.fails("checkpoint", "--image-path", path, *flags, c.id, says=["checkpoint.img", str(path)])
    assert (path / "checkpoint.img").read_bytes() == before
    assert (path / "checkpoint.img").stat().st_mtime_ns == stat.st_mtime_ns
    assert [p.name for p in path.iterdir()] == ["checkpoint.img"]
    assert c.status == "running"
    c.verify()


@pytest.mark.parametrize("leave_running", [False, True])
def test_no_space_left(torpor: Torpor, stage: Callable[[str], Stage], tmp: Path, leave_running: bool) -> None:
    """A small tmpfs fills up while memory is written: the container runs on, no file is left."""
    path = tmp / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(path)], check=True)
    try:
        c = stage("memory").start()
        words = [
            "checkpoint",
            "--image-path",
            str(path / "image"),
            *(["--leave-running"] if leave_running else []),
            c.id,
        ]
        torpor.fails(*words, says="space")
        assert list(path.iterdir()) == []
        assert shutil.disk_usage(path).used == 0
        assert c.status == "running"
        c.verify()
    finally:
        subprocess.run(["umount", str(path)], check=True)


# ---- states ---------------------------------------------------------------------------------------------------------------------------


def test_checkpoint_of_a_created_container(torpor: Torpor, busybox: Callable[..., Path], tmp: Path) -> None:
    c = Container(torpor, busybox(["echo", "started"]), new_id()).create()
    torpor.fails("checkpoint", "--image-path", tmp / "image", c.id, says="created")
    assert not (tmp / "image").exists()
    assert c.status == "created"
    torpor("start", c.id)
    assert c.next_line() == "started"


def test_checkpoint_of_a_stopped_container(torpor: Torpor, waiter: Callable[..., Container], tmp: Path) -> None:
    c = waiter()
    torpor("kill", c.id, "KILL")
    torpor.wait_status(c.id, "stopped")
    torpor.fails("checkpoint", "--image-path", tmp / "image", c.id, says="stopped")
    assert not (tmp / "image").exists()


def test_restore_into_a_running_container(
    torpor: Torpor, image: tuple[Container, Path], waiter: Callable[..., Container]
) -> None:
    other = waiter()
    torpor.fails("restore", "--detach", "--image-path", image[1], other.id, says="running")
    torpor.fails("restore", "--detach", "--image-path", image[1], "--bundle", other.bundle, other.id)
    assert other.status == "running"
    other.verify()
    image[0].verify()


# ---- damaged images -------------------------------------------------------------------------------------------------------------------


def restore_fails(torpor: Torpor, c: Container, path: Path, *says: str) -> None:
    """Refused before anything is created; a created container stays as it was."""
    name = new_id("damaged")
    torpor.fails("restore", "--detach", "--image-path", path, "--bundle", c.bundle, name, says=list(says))
    assert torpor.ids() == [c.id]


def damaged(image: Path, at: Path, change: Callable[[bytearray], bytes | bytearray]) -> Path:
    at.mkdir()
    (at / "checkpoint.img").write_bytes(change(bytearray((image / "checkpoint.img").read_bytes())))
    return at


def test_no_image(torpor: Torpor, image: tuple[Container, Path], tmp: Path) -> None:
    restore_fails(torpor, image[0], tmp / "nowhere", "nowhere")
    (tmp / "empty").mkdir()
    restore_fails(torpor, image[0], tmp / "empty", "checkpoint.img")


@pytest.mark.parametrize("keep", [0, 1, 7, 100, 4095, 4096, 0.3, 0.5, 0.9, -4096, -1])
def test_truncated_image(torpor: Torpor, image: tuple[Container, Path], tmp: Path, keep: float) -> None:
    def cut(data: bytearray) -> bytearray:
        size = (
            keep
            if isinstance(keep, int) and keep >= 0
            else len(data) + keep
            if isinstance(keep, int)
            else len(data) * keep
        )
        return data[: int(size)]

    restore_fails(torpor, image[0], damaged(image[1], tmp / "cut", cut), "checkpoint.img")
    torpor.fails("inspect", tmp / "cut")


def test_image_of_zeros(torpor: Torpor, image: tuple[Container, Path], tmp: Path) -> None:
    restore_fails(torpor, image[0], damaged(image[1], tmp / "zeros", lambda data: bytes(len(data))), "checkpoint.img")
    restore_fails(torpor, image[0], damaged(image[1], tmp / "zeros2", lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2)), "checkpoint.img")  # fmt: skip


def test_image_with_something_behind_it(torpor: Torpor, image: tuple[Container, Path], tmp: Path) -> None:
    restore_fails(torpor, image[0], damaged(image[1], tmp / "longer", lambda data: data + b"more"), "checkpoint.img")


def test_a_flipped_bit_anywhere_is_found(torpor: Torpor, image: tuple[Container, Path], tmp: Path) -> None:
    """Sixty places spread over the whole file, so some in every section, the first and last bytes among them."""
    from torpor import _core
    from torpor.errors import ImageError

    c, path = image
    original = (path / "checkpoint.img").read_bytes()
    _core.verify(str(path))
    size = len(original)
    places = sorted({0, 8, 16, 24, 40, 64, size - 1, size - 8, size - 16, size - 40, *range(100, size, size // 50)})
    (tmp / "flipped").mkdir()
    target = tmp / "flipped" / "checkpoint.img"
    unnoticed = []
    for place in places:
        data = bytearray(original)
        data[place] ^= 1 << (place % 8)
        target.write_bytes(data)
        try:
            _core.verify(str(target.parent))
        except ImageError:
            continue
        unnoticed.append(place)
    assert unnoticed == []
    # and restore itself looks, in the beginning, the middle and at the end
    for place in (9, size // 3, size // 2, size - 20):
        data = bytearray(original)
        data[place] ^= 4
        target.write_bytes(data)
        restore_fails(torpor, c, target.parent, "checkpoint.img")


def test_a_flipped_bit_leaves_a_created_container_as_it_was(
    torpor: Torpor, image: tuple[Container, Path], tmp: Path
) -> None:
    c, path = image

    def flip(data: bytearray) -> bytearray:
        data[len(data) // 2] ^= 1
        return data

    damaged(path, tmp / "flipped", flip)
    other = Container(torpor, c.bundle, new_id()).create()
    torpor.fails("restore", "--detach", "--image-path", tmp / "flipped", other.id)
    assert other.status == "created"
    torpor("restore", "--detach", "--image-path", path, other.id)
    other.verify()


def test_image_of_a_newer_major_version(torpor: Torpor, image: tuple[Container, Path], tmp: Path) -> None:
    """The frame of the header is the same in all versions (docs/image-format.md), so this is told from damage."""
    c, path = image
    header = bytearray((path / "checkpoint.img").read_bytes())
    major = int.from_bytes(header[8:10], "little")
    header[8:10] = (major + 1).to_bytes(2, "little")
    newer = tmp / "newer"
    newer.mkdir()
    (newer / "checkpoint.img").write_bytes(header)
    restore_fails(torpor, c, newer, "damaged")  # its checksum is wrong
    header[4088:4096] = xxhash.xxh3_64_intdigest(bytes(header[:4088])).to_bytes(8, "little")
    (newer / "checkpoint.img").write_bytes(header)
    restore_fails(torpor, c, newer, "version", str(major + 1))
    torpor.fails("inspect", newer, says="version")


# ---- bundles --------------------------------------------------------------------------------------------------------------------------


def break_config(bundle: Path, how: Callable[[dict[str, object]], object]) -> None:
    config = json.loads((bundle / "config.json").read_text())
    how(config)
    (bundle / "config.json").write_text(json.dumps(config))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (lambda b: shutil.rmtree(b), "does not exist"),
    "no config.json": (lambda b: (b / "config.json").unlink(), "config.json"),
    "not JSON": (lambda b: (b / "config.json").write_text('{"ociVersion": '), "JSON"),
    "empty": (lambda b: (b / "config.json").write_text(""), "JSON"),
    "an array": (lambda b: (b / "config.json").write_text("[]"), "object"),
    "binary": (lambda b: (b / "config.json").write_bytes(b"\xff\xfe\0\1"), "config.json"),
    "no process": (lambda b: break_config(b, lambda c: c.pop("process")), "process"),
    "no args": (lambda b: break_config(b, lambda c: c["process"].pop("args")), "process.args"),  # type: ignore[attr-defined]
    "empty args": (lambda b: break_config(b, lambda c: c["process"].update(args=[])), "process.args"),  # type: ignore[attr-defined]
    "args a string": (lambda b: break_config(b, lambda c: c["process"].update(args="sh")), "process.args"),  # type: ignore[attr-defined]
    "no root": (lambda b: break_config(b, lambda c: c.pop("root")), "root"),
    "no root.path": (lambda b: break_config(b, lambda c: c.update(root={})), "root.path"),
    "root that is not there": (lambda b: break_config(b, lambda c: c.update(root={"path": "nowhere"})), "nowhere"),
    "relative cwd": (lambda b: break_config(b, lambda c: c["process"].update(cwd="tmp")), "cwd"),  # type: ignore[attr-defined]
    "version 9": (lambda b: break_config(b, lambda c: c.update(ociVersion="9.0.0")), "ociVersion"),
    "unknown namespace": (lambda b: break_config(b, lambda c: c["linux"]["namespaces"].append({"type": "dream"})), "dream"),  # type: ignore[index]
    "unknown capability": (lambda b: break_config(b, lambda c: c["process"]["capabilities"]["bounding"].append("CAP_DREAM")), "CAP_DREAM"),  # type: ignore[index]
    "hostname without uts namespace": (lambda b: break_config(b, lambda c: c["linux"].update(namespaces=[{"type": "mount"}, {"type": "pid"}])), "hostname"),  # type: ignore[attr-defined]
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("verb", ["run", "create", "restore"])
def test_broken_bundle(
    torpor: Torpor, busybox: Callable[..., Path], waiter: Callable[..., Container], tmp: Path, verb: str, what: str
) -> None:
    how, word = BROKEN[what]
    bundle = busybox(["true"])
    flags = []
    if verb == "restore":
        c = waiter()
        c.checkpoint(tmp / "image")
        torpor("delete", c.id)
        flags = ["--image-path", str(tmp / "image"), "--detach"]
    how(bundle)
    torpor.fails(verb, *flags, "--bundle", bundle, new_id(), says=word)
    assert torpor.ids() == []


# ---- flags ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["run", "checkpoint", "restore", "exec", "kill", "list", "do"])
def test_unknown_flag(torpor: Torpor, verb: str) -> None:
    torpor.fails(verb, "--no-such-flag", "x", says="no-such-flag")


def test_unknown_top_level_flag(torpor: Torpor) -> None:
    result = torpor("list", check=False, top=["--no-such-flag"])
    assert result.code not in (0, 1) and result.err.count("\n") == 1 and "no-such-flag" in result.err, str(result)


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--bundle"],
        ["checkpoint", "--image-path"],
        ["restore", "--image-path"],
        ["restore", "--lsm-mount-context"],
    ],
)
def test_flag_without_its_value(torpor: Torpor, words: list[str]) -> None:
    torpor.fails(*words, says=["flag needs an argument", words[1].lstrip("-")])


def test_one_flag_twice(torpor: Torpor, waiter: Callable[..., Container], tmp: Path) -> None:
    """Different values are refused; the same twice is accepted, as Podman does it."""
    c = waiter()
    torpor.fails("checkpoint", "--image-path", tmp / "a", "--image-path", tmp / "b", c.id, says=["image-path", "twice"])
    assert not (tmp / "a").exists() and not (tmp / "b").exists()
    torpor(
        "checkpoint", "--image-path", tmp / "a", "--image-path", tmp / "a", "--leave-running", "--leave-running", c.id
    )
    c.verify()


@pytest.mark.parametrize(
    "words",
    [
        ["checkpoint", "--leave-running=perhaps", "x"],
        ["restore", "--detach=2", "x"],
        ["exec", "--user", "nobody", "x", "true"],
    ],
)
def test_value_of_the_wrong_kind(torpor: Torpor, words: list[str]) -> None:
    torpor.fails(*words)


def test_unknown_verb_and_none(torpor: Torpor) -> None:
    torpor.fails("dance", says="dance")
    result = torpor(check=False)
    assert result.code != 0


def test_surplus_words(torpor: Torpor, waiter: Callable[..., Container], tmp: Path) -> None:
    c = waiter()
    torpor.fails("checkpoint", "--image-path", tmp / "image", c.id, "surplus", says="surplus")
    torpor.fails("state", c.id, "surplus", says="surplus")
    # a flag behind the id is not a flag: it must not be overlooked
    torpor.fails("checkpoint", "--image-path", tmp / "image", c.id, "--leave-running", says="--leave-running")
    assert not (tmp / "image").exists()
    c.verify()


# ---- errors in --log ------------------------------------------------------------------------------------------------------------------


def test_each_error_is_one_json_object_in_the_log(torpor: Torpor) -> None:
    for i in range(3):
        torpor.fails("state", "nobody")
        lines = torpor.log.read_text().strip()
        decoder, at, entries = json.JSONDecoder(), 0, []
        while at < len(lines):
            entry, end = decoder.raw_decode(lines, at)
            entries.append(entry)
            at = end + len(lines[end:]) - len(lines[end:].lstrip())
        assert len(entries) == i + 1
        assert entries[-1]["level"] == "error" and "does not exist" in entries[-1]["msg"]
        assert entries[-1]["time"][10] == "T"


def test_a_log_that_cannot_be_written_does_not_hide_the_error(torpor: Torpor, tmp: Path) -> None:
    words = [*torpor.argv("list")[:3], "--log", "/proc/nowhere/log", "state", "nobody"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    # a warning may follow, but the first line is the error
    assert done.returncode == 128 and "Traceback" not in done.stderr, done
    assert "does not exist" in done.stderr.splitlines()[0], done


def test_state_that_is_damaged(torpor: Torpor, waiter: Callable[..., Container]) -> None:
    c = waiter()
    state = torpor.root / c.id / "state.json"
    text = state.read_text()
    state.write_text(text[: len(text) // 2])
    torpor.fails("state", c.id, says=c.id)
    torpor("list")
    state.write_text(text)
    c.verify()


def test_closed_standard_streams(torpor: Torpor) -> None:
    """A command started without stdin, stdout or stderr must not write into whatever got their numbers."""
    for which in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        done = subprocess.run(
            ["sh", "-c", f"{' '.join(torpor.argv('list'))} {which}; echo $?"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split()[-1:] in (["0"], []), (which, done)


def test_interrupted_by_ctrl_c(torpor: Torpor, busybox: Callable[..., Path]) -> None:
    """SIGINT while it waits: no traceback."""
    import signal
    import time

    c = Container(torpor, busybox(["sleep", "1000"]), new_id()).run()
    p = torpor.popen("wait", c.id, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    time.sleep(0.3)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=20)
    procs.claimed.discard(p.pid)
    assert p.returncode != 0 and b"Traceback" not in err and err.count(b"\n") <= 1, err
    assert c.status == "running"
    assert os.path.exists(torpor.root / c.id)
