"""Files that an image leaves where they are: what they must still be when it is restored."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torpor as api
from support.cli import Container, Torpor, new_id
from support.workloads import compiled

pytestmark = pytest.mark.requires("root", "command:gcc", "command:busybox")

READER = """
exec 3< /data; read first <&3
trap 'read line <&3; echo "OK $first $line"' USR1
echo READY
sleep 1000000 &
while :; do wait $!; done
"""


def same_size(data: Path) -> None:
    data.write_text("one\nnew\nmore\n")


def longer(data: Path) -> None:
    data.write_text("one\ntwo\nmore and more\n")


@pytest.fixture
def nap(torpor: Torpor, busybox: Callable[..., Path], tmp: Path) -> tuple[Container, Path]:
    bundle = busybox(["sh", "-c", READER])
    data = bundle / "rootfs" / "data"
    data.write_text("one\ntwo\nmore\n")
    os.utime(data, (1, 1))
    c = Container(torpor, bundle, new_id("f")).run().wait_ready()
    c.checkpoint(tmp / "image")
    c.delete()
    return Container(torpor, bundle, new_id("f")), data


@pytest.mark.parametrize(
    ("change", "policy", "says"),
    [
        (None, "strict", ""),
        (same_size, "strict", "it was written to since the image was made"),
        (same_size, "size", ""),
        (longer, "size", "it had 13 bytes when the image was made and has 22 now"),
        (longer, "ignore", ""),
    ],
)
def test_a_file_that_was_read(nap: tuple[Container, Path], tmp: Path, change: Callable[[Path], None] | None, policy: str, says: str) -> None:  # fmt: skip
    c, data = nap
    if change is not None:
        change(data)
    done = c.restore_from(tmp / "image", f"--files={policy}", check=not says)
    if says:
        assert done.code == 128 and f"file /data: {says}" in done.err, done
    else:
        assert c.verify() == ("OK one new" if change is same_size else "OK one two")


def test_the_default_is_the_size_and_the_library_has_it_too(nap: tuple[Container, Path], tmp: Path) -> None:
    c, data = nap
    longer(data)
    assert "and has 22 now" in c.restore_from(tmp / "image", check=False).err
    with pytest.raises(api.UnsupportedError, match="restore with the files of the checkpoint"):
        api.restore(str(tmp / "image"), bundle=str(c.bundle), root=str(c.torpor.root), files="size")
    again = api.restore(str(tmp / "image"), bundle=str(c.bundle), root=str(c.torpor.root), files="ignore")
    assert again.status == "running"
    again.delete(force=True)


def test_a_program_that_was_replaced(torpor: Torpor, busybox: Callable[..., Path], tmp: Path) -> None:
    """Its code is mapped: another program of another size at its place is refused, a copy of it is not, except when asked for."""
    bundle = busybox(["/bin/alone"])
    program = bundle / "rootfs" / "bin" / "alone"
    shutil.copy(compiled("alone"), program)
    os.utime(program, (1, 1))
    c = Container(torpor, bundle, new_id("f")).run().wait_ready()
    c.checkpoint(tmp / "image")
    c.delete()
    os.utime(program, (2, 2))
    again = Container(torpor, bundle, new_id("f"))
    assert "/bin/alone: it was written to since" in again.restore_from(tmp / "image", "--files=strict", check=False).err
    again.restore_from(tmp / "image")
    again.verify()
    again.delete()
    with open(program, "ab") as f:
        f.write(b"more")
    last = Container(torpor, bundle, new_id("f"))
    assert "bytes when the image was made" in last.restore_from(tmp / "image", check=False).err
