"""State of processes that no image carries: refused by name, and the container does not notice."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.cli import Container, Torpor, new_id
from support.workloads import CAPS, Stage, compiled

pytestmark = [pytest.mark.requires("root", "command:gcc", "command:busybox")]

KINDS = {
    "dispatch": "syscall user dispatch: without a selector, a call made for the checkpoint",
    "dispatch-read-only": "syscall user dispatch: its selector cannot be written",
    "vfork": "vfork: it waits for process",
    "threads-fs": "working directory (CLONE_FS): it has one that its process has not, but task",
    "threads-files": "descriptor table: it has one that its process has not, but task",
    "crossed-files": "descriptor table: it shares its descriptor table with process 2, but their places in the tree",
    "shared-memory": "address space: it shares its address space with process 2, but their places in the tree",
    "pid-namespace": "pid namespace: it has one of its own",
    "pid-for-children": "pid namespace: its children would be born in another one",
    "time-for-children": "time namespace: its children would be born in another one",
    "io-uring": "(anon_inode:[io_uring]): this kind of file is not carried yet",
    "listener": "(anon_inode:seccomp notify): this kind of file is not carried yet",
    "vdso": "vdso: the process has changed",
    "traced": "ptrace: it is traced by process",
}


@pytest.mark.parametrize("kind", KINDS)
def test_is_refused_by_name(kind: str, busybox: Callable[..., Path], torpor: Torpor, tmp: Path) -> None:
    switch = Path("/proc/sys/kernel/io_uring_disabled")
    if kind == "io-uring" and not (switch.exists() and switch.read_text().strip() == "0"):
        pytest.skip("io_uring is switched off here")
    bundle = busybox(["/bin/uncarried", kind], caps=[*CAPS, "CAP_SYS_PTRACE", "CAP_SYS_TIME"])
    shutil.copy2(compiled("uncarried"), bundle / "rootfs" / "bin" / "uncarried")
    c = Container(torpor, bundle, new_id()).run().wait_ready()
    pids = c.host_pids()
    for flags in ([], ["--leave-running"]):
        torpor.fails("checkpoint", "--image-path", tmp / "image", *flags, c.id, says=KINDS[kind])
        assert not (tmp / "image").exists()
        assert c.status == "running" and c.host_pids() == pids
        c.verify()


BITS32 = """
static const char ready[] = "READY\\n";
void _start(void) {
    int r;
    __asm__ volatile("int $0x80" : "=a"(r) : "a"(4), "b"(1), "c"(ready), "d"(6) : "memory");
    for (;;) __asm__ volatile("int $0x80" : "=a"(r) : "a"(29) : "memory");
}
"""


def test_a_32_bit_program_is_refused(busybox: Callable[..., Path], torpor: Torpor, tmp: Path) -> None:
    """Made without a C library, which a machine has seldom for 32 bits."""
    (tmp / "bits32.c").write_text(BITS32)
    bundle = busybox(["/bin/bits32"])
    target = bundle / "rootfs" / "bin" / "bits32"
    flags = ["-m32", "-O1", "-static", "-nostdlib", "-fno-pic", "-no-pie", "-fcf-protection=none"]
    if subprocess.run(["gcc", *flags, "-o", target, tmp / "bits32.c"], capture_output=True, check=False).returncode:
        pytest.skip("gcc makes no 32-bit programs here")
    c = Container(torpor, bundle, new_id()).run().wait_ready()
    torpor.fails("checkpoint", "--image-path", tmp / "image", c.id, says="only 64-bit programs are carried")
    assert not (tmp / "image").exists() and c.status == "running"


@pytest.mark.parametrize("flags", [[], ["--leave-running"]])
def test_a_task_that_does_not_stop_is_refused(
    flags: list[str], busybox: Callable[..., Path], torpor: Torpor, tmp: Path
) -> None:
    """The kernel waits in it for a page and cannot stop; its call goes on when the container is let go."""
    bundle = busybox(["/bin/uncarried", "stuck"], caps=[*CAPS, "CAP_SYS_PTRACE"])
    shutil.copy2(compiled("uncarried"), bundle / "rootfs" / "bin" / "uncarried")
    c = Container(torpor, bundle, new_id()).run().wait_ready()
    tid = max(int(tid) for tid in os.listdir(f"/proc/{c.pid}/task"))
    done = torpor("checkpoint", "--image-path", tmp / "image", *flags, c.id, check=False)
    assert done.code == 128
    # The whole time, not only that of the last look.
    assert re.search(rf"task {tid} did not stop within 1\d{{4}} ms \(state [RSD], ", done.err), done.err
    assert not (tmp / "image").exists() and c.status == "running"
    c.verify()


@contextmanager
def moved(c: Container, task: int, file: str) -> Iterator[Path]:
    """A task in a group below that of its container, until the end."""
    entries = [line.split(":", 2) for line in Path(f"/proc/{c.pid}/cgroup").read_text().splitlines()]
    home = Path("/sys/fs/cgroup/pids" + next(path for _, names, path in entries if names == "pids"))
    below = home / "below"
    below.mkdir()
    (below / file).write_text(str(task))
    try:
        yield below
    finally:
        (home / file).write_text(str(task))
        below.rmdir()


@pytest.mark.requires("freezer-v1")
@pytest.mark.parametrize("flags", [[], ["--leave-running"]])
def test_a_process_in_a_group_below_is_refused(
    flags: list[str], busybox: Callable[..., Path], torpor: Torpor, tmp: Path
) -> None:
    bundle = busybox(["/bin/uncarried", "child"], caps=CAPS)
    shutil.copy2(compiled("uncarried"), bundle / "rootfs" / "bin" / "uncarried")
    c = Container(torpor, bundle, new_id()).run().wait_ready()
    child = next(pid for pid in c.host_pids() if pid != c.pid)
    with moved(c, child, "cgroup.procs") as below:
        says = f"process {child}: cgroup (pids): it is in {str(below).removeprefix('/sys/fs/cgroup/pids')}"
        torpor.fails("checkpoint", "--image-path", tmp / "image", *flags, c.id, says=says)
        c.verify()
    assert not (tmp / "image").exists() and c.status == "running"
    c.checkpoint(tmp / "image", *flags)


@pytest.mark.requires("freezer-v1")
def test_a_thread_in_a_group_below_is_refused(stage: Callable[[str], Stage], torpor: Torpor, tmp: Path) -> None:
    c = stage("threads").start()
    tid = max(int(tid) for tid in os.listdir(f"/proc/{c.pid}/task"))
    with moved(c, tid, "tasks"):
        torpor.fails("checkpoint", "--image-path", tmp / "image", c.id, says="cgroup (pids): it is in ")
    c.verify()
