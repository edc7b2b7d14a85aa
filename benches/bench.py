"""The targets table: what torpor takes, next to a raw write or read of as many bytes in the same directory in the same run.

    make bench                               # everything, medians of 7, and docs/benchmarks.md written anew
    make bench ARGS="--quick"                # medians of 3, nothing written
    make bench ARGS="--only tree,small"      # some of it

Times are those of whole commands, Python's start included, but `pause`, which is what torpor reports, and `gap`, which is what a thread of
the program saw: the largest step of CLOCK_MONOTONIC. The raw write ends with fsync, as a checkpoint does; the raw read fills fresh memory
from a file in the page cache, as a restore does. After every restore the program checks every byte of its memory. Where runc with a criu
that works on this kernel is on PATH, it does the same work beside. Numbers of one machine in one hour: compare ratios, not milliseconds.
"""

import argparse
import compileall
import json
import mmap
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "tests"))
sys.path.insert(0, str(REPO / "benches"))

import figures
import torpor
from support import bundles, procs
from support.cli import Container, Torpor, new_id
from support.workloads import compiled

CHUNK = 4 << 20
GIB = 1 << 30
CLONES = 20


@dataclass
class Row:
    """One line of the table. `limit` makes the target from the median of the raw times."""

    what: str
    limit: Callable[[float], float]
    target: str
    unit: str = "ms"
    times: list[float] = field(default_factory=list)
    raws: list[float] = field(default_factory=list)
    peers: list[float] = field(default_factory=list)
    note: str = ""

    def add(self, value: float, raw: float | None = None, peer: float | None = None) -> None:
        self.times.append(value)
        if raw is not None:
            self.raws.append(raw)
        if peer is not None:
            self.peers.append(peer)

    def figure(self) -> figures.Figure:
        raw = statistics.median(self.raws) if self.raws else None
        peer = statistics.median(self.peers) if self.peers else None
        limit = self.limit(raw or 0.0)
        value = statistics.median(self.times) if self.times else None
        return figures.Figure(self.what, self.unit, value, raw, peer, limit, self.target, self.note)


def at_most(limit: float) -> Callable[[float], float]:
    return lambda _: limit


def milliseconds(work: Callable[[], object]) -> float:
    before = time.monotonic()
    work()
    return (time.monotonic() - before) * 1000


def apart(work: Callable[[], float]) -> float:
    """Runs in a process of its own: the memory that it takes would count as the peak of whatever is started after it (getrusage(2))."""
    with tempfile.TemporaryFile() as answer:
        pid = os.fork()
        if pid == 0:
            try:
                os.write(answer.fileno(), str(work()).encode())
            finally:
                os._exit(0)
        with procs.claiming:
            procs.claimed.add(pid)
        os.waitpid(pid, 0)
        procs.claimed.discard(pid)
        answer.seek(0)
        return float(answer.read())


def raw_write(path: Path, size: int) -> float:
    """write(2) of random bytes and fsync."""
    return apart(lambda: _raw_write(path, size))


def _raw_write(path: Path, size: int) -> float:
    block = os.urandom(CHUNK)

    def work() -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            left = size
            while left > 0:
                left -= os.write(fd, block[: min(left, CHUNK)])
            os.fsync(fd)
        finally:
            os.close(fd)

    took = milliseconds(work)
    path.unlink()
    return took


def raw_read(path: Path) -> float:
    """read(2) of a whole file into memory that nobody has touched yet."""
    return apart(lambda: _raw_read(path))


def _raw_read(path: Path) -> float:
    size = path.stat().st_size
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = memoryview(memory)

    def work() -> None:
        at = 0
        with open(path, "rb", buffering=0) as f:
            while got := f.readinto(view[at : at + CHUNK]):
                at += got

    took = milliseconds(work)
    view.release()
    memory.close()
    return took


class Bench:
    """Where a run puts its things, and the rows that it fills."""

    def __init__(self, directory: Path, runs: int) -> None:
        self.directory = directory
        self.runs = runs
        self.command = Torpor(directory)
        self.rows: dict[str, Row] = {}
        self.peer = Peer(directory)

    def row(self, what: str, limit: Callable[[float], float], target: str, unit: str = "ms") -> Row:
        return self.rows.setdefault(what, Row(what, limit, target, unit))

    def container(self, bundle: Path) -> Container:
        return Container(self.command, bundle, new_id("bench"))

    @contextmanager
    def bundle(self, *words: str) -> Iterator[Path]:
        bundle = self.directory / "bundle"
        root = bundles.busybox_root(bundle / "rootfs")
        shutil.copy2(compiled("gap"), root / "bin" / "gap")
        yield bundles.write(bundle, bundles.spec(["/bin/gap", *words]))
        shutil.rmtree(bundle)

    @contextmanager
    def running(self, bundle: Path) -> Iterator[Container]:
        c = self.container(bundle)
        c.run()
        c.wait_ready(120)
        try:
            yield c
        finally:
            c.delete()

    def measured(self, *args: str | Path) -> tuple[float, float]:
        """A command's time in milliseconds, and the most memory that it or a child of it had at once, in MiB."""
        with open(self.directory / "measured.err", "wb") as err, procs.claiming:
            before = time.monotonic()
            process = subprocess.Popen(self.command.argv(*args), stdin=subprocess.DEVNULL, stdout=err, stderr=err)
            procs.claimed.add(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        took = (time.monotonic() - before) * 1000
        process.returncode = os.waitstatus_to_exitcode(status)
        procs.claimed.discard(process.pid)
        if process.returncode != 0:
            raise AssertionError(f"{args}: {(self.directory / 'measured.err').read_text()}")
        return took, usage.ru_maxrss / 1024


def seen(c: Container) -> tuple[float, float]:
    """The largest gap since the last time in milliseconds, and when the program went on. Every byte is checked."""
    _, gap, resumed = c.verify(120).split()
    return float(gap) * 1000, float(resumed)


def pause_of(b: Bench, c: Container, **how: bool) -> tuple[float, float]:
    """(reported pause, gap) of a checkpoint that leaves the container running."""
    seen(c)
    saved = torpor.Container.load(c.id, root=str(b.command.root)).checkpoint(
        str(b.directory / "left"), leave_running=True, **how
    )
    gap, _ = seen(c)
    shutil.rmtree(b.directory / "left")
    return saved.report["pause_us"] / 1000, gap


def round_trip(b: Bench, bundle: Path, save: Row, load: Row, memory: Row | None = None) -> None:
    with b.running(bundle) as c:
        took, peak = b.measured("checkpoint", "--image-path", b.directory / "image", c.id)
    image = b.directory / "image" / "checkpoint.img"
    save.add(took, raw_write(b.directory / "raw", image.stat().st_size), b.peer.save(bundle))
    raw = raw_read(image)
    again = b.container(bundle)
    with open(again.output, "ab") as out:
        before = time.monotonic()
        argv = ["restore", "--detach", "--image-path", b.directory / "image", "--bundle", bundle, again.id]
        process = b.command.popen(*argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        _, status, usage = os.wait4(process.pid, 0)
        took = (time.monotonic() - before) * 1000
    process.returncode = os.waitstatus_to_exitcode(status)
    procs.claimed.discard(process.pid)
    assert process.returncode == 0, again.text()
    load.add(took, raw, b.peer.load(bundle))
    seen(again)
    again.delete()
    if memory is not None:
        memory.add(max(peak, usage.ru_maxrss / 1024))
    shutil.rmtree(b.directory / "image")


def small(b: Bench) -> None:
    pause = b.row("pause, --leave-running, 16 MiB", at_most(10 + 40 / 64), "10 ms + 40 ms/GiB")
    save = b.row("checkpoint, 16 MiB container", at_most(80), "80 ms")
    load = b.row("restore, 16 MiB container", at_most(80), "80 ms")
    with b.bundle("16") as bundle:
        for _ in range(b.runs):
            round_trip(b, bundle, save, load)
        with b.running(bundle) as c:
            for _ in range(b.runs):
                pause.add(pause_of(b, c)[0])


def large(b: Bench) -> None:
    pause = b.row("pause, --leave-running, 1 GiB", at_most(50), "10 ms + 40 ms/GiB")
    gap = b.row("gap that the program sees, 1 GiB", at_most(50), "as the pause")
    save = b.row("checkpoint 1 GiB, container stops", lambda raw: 1.25 * raw + 50, "1.25 x raw write + 50 ms")
    load = b.row("restore eager 1 GiB", lambda raw: 1.25 * raw + 60, "1.25 x raw read + 60 ms")
    memory = b.row("torpor's own peak memory, 1 GiB", at_most(96), "96 MiB", "MiB")
    with b.bundle("1024") as bundle:
        for _ in range(b.runs):
            round_trip(b, bundle, save, load, memory)
        with b.running(bundle) as c:
            for _ in range(b.runs):
                paused, step = pause_of(b, c)
                pause.add(paused)
                gap.add(step)


def huge(b: Bench) -> None:
    for gib in (1, 4):
        row = b.row(f"pause, --leave-running, {gib} GiB of huge pages", at_most(15), "15 ms")
        with b.bundle(str(gib * 1024), "huge") as bundle, b.running(bundle) as c:
            for _ in range(b.runs):
                row.add(pause_of(b, c)[0])


def incremental(b: Bench) -> None:
    pause = b.row("pause, incremental, 1 % of 1 GiB changed", at_most(10), "10 ms")
    size = b.row("its image, of the full one", at_most(2), "2 %", "%")
    if "--track" not in b.command("checkpoint", "--help").out:
        pause.note = size.note = "not in this build"
        return
    with b.bundle("1024") as bundle, b.running(bundle) as c:
        c.checkpoint(b.directory / "image0", "--leave-running", "--track")
        full = (b.directory / "image0" / "checkpoint.img").stat().st_size
        for i in range(1, b.runs + 1):
            b.command("kill", c.id, "USR2")
            assert c.next_line() == "DIRTY"
            image = b.directory / f"image{i}"
            out = c.checkpoint(image, "--leave-running", "--track", "--parent-path", f"../image{i - 1}", "--stats").out
            pause.add(float(re.findall(r"pause\D*([\d.]+) ms", out)[0]))
            size.add((image / "checkpoint.img").stat().st_size / full * 100)
        again = b.container(bundle)
        again.restore_from(b.directory / f"image{b.runs}")
        seen(again)
        again.delete()
    for i in range(b.runs + 1):
        shutil.rmtree(b.directory / f"image{i}")


def background(b: Bench) -> None:
    for name, mib in (("64 MiB", 64), ("1 GiB", 1024), ("4 GiB", 4096)):
        row = b.row(f"restore --background, first instruction, {name}", at_most(80), "80 ms")
        with b.bundle(str(mib)) as bundle:
            with b.running(bundle) as c:
                c.checkpoint(b.directory / "image")
            for _ in range(b.runs):
                again = b.container(bundle)
                before = time.time()
                again.restore_from(b.directory / "image", "--background")
                row.add((seen(again)[1] - before) * 1000)
                again.delete()
        shutil.rmtree(b.directory / "image")


def tree(b: Bench) -> None:
    save = b.row("checkpoint, tree of 64 processes of 1 MiB", at_most(250), "250 ms")
    load = b.row("restore, tree of 64 processes of 1 MiB", at_most(300), "300 ms")
    pause = b.row("pause, --leave-running, tree of 64 processes", at_most(12.5), "10 ms + 40 ms/GiB")
    with b.bundle("1", "processes=64", "quiet") as bundle:
        for _ in range(b.runs):
            round_trip(b, bundle, save, load)
        with b.running(bundle) as c:
            for _ in range(b.runs):
                pause.add(pause_of(b, c)[0])


def available() -> int:
    """Bytes of memory to be had without swapping."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024 if found else 0


def sectors_read(path: Path) -> int:
    """Bytes that the disk under a file has given so far, to whomever."""
    device = path.stat().st_dev
    text = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text()
    return int(text.split()[2]) * 512


def clones(b: Bench) -> None:
    row = b.row(f"{CLONES} clones of one 1 GiB image, all running", at_most(1500), "1.5 s")
    read = b.row("the image read from disk for them, times", at_most(1.05), "once", "x")
    # They would fill up while the last is still being started.
    if available() < 12 * GIB:
        row.note = read.note = f"{available() / GIB:.0f} GiB of free memory do not do"
        return
    with b.bundle("1024", "quiet") as bundle:
        with b.running(bundle) as c:
            c.checkpoint(b.directory / "image")
        image = b.directory / "image" / "checkpoint.img"
        for _ in range(max(1, b.runs // 2)):
            clone_round(b, bundle, image, row, read)
    shutil.rmtree(b.directory / "image")


def clone_round(b: Bench, bundle: Path, image: Path, row: Row, read: Row) -> None:
    with open(image, "rb") as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    all_clones = [b.container(bundle) for _ in range(CLONES)]
    before, disk = time.monotonic(), sectors_read(image)
    started = []
    for c in all_clones:
        with open(c.output, "ab") as out:
            words = ["restore", "--detach", "--background", "--image-path", image.parent, "--bundle", bundle, c.id]
            started.append(b.command.popen(*words, stdin=subprocess.DEVNULL, stdout=out, stderr=out))
    codes = [p.wait(120) for p in started]
    took = (time.monotonic() - before) * 1000
    for process in started:
        procs.claimed.discard(process.pid)
    failed = [c.text() for c, code in zip(all_clones, codes, strict=True) if code]
    # Most go at once: all of them, filled, would need more memory than a machine may have.
    for c in all_clones[2:]:
        c.delete()
    assert not failed, failed
    row.add(took)
    for c in all_clones[:2]:
        seen(c)
        c.delete()
    read.add((sectors_read(image) - disk) / image.stat().st_size)


def commands(b: Bench) -> None:
    state = b.row("torpor state", at_most(45), "45 ms")
    listed = b.row("torpor list", at_most(45), "45 ms")
    run = b.row("torpor run of a static /bin/true", at_most(90), "90 ms")
    with b.bundle("1", "quiet") as bundle:
        with b.running(bundle) as c:
            for _ in range(b.runs):
                state.add(b.measured("state", c.id)[0])
                listed.add(b.measured("list")[0], peer=b.peer.listed())
        bundles.write(bundle, bundles.spec(["/bin/busybox", "true"]))
        for _ in range(b.runs):
            run.add(b.measured("run", "--bundle", bundle, new_id("bench"))[0], peer=b.peer.run(bundle))


class Peer:
    """runc, with criu where that works here. Every method gives milliseconds, or None where it cannot do it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.words = ["runc", "--root", str(directory / "runc")]
        self.image = directory / "runc-image"
        self.has_runc = shutil.which("runc") is not None
        self.has_criu = self.has_runc and self._criu_works()

    def _criu_works(self) -> bool:
        """`criu check` passes on kernels where a checkpoint fails: only a checkpoint tells."""
        if shutil.which("criu") is None:
            return False
        bundle = self.directory / "criu-trial"
        root = bundles.busybox_root(bundle / "rootfs")
        shutil.copy2(compiled("gap"), root / "bin" / "gap")
        bundles.write(bundle, bundles.spec(["/bin/gap", "1", "quiet"]))
        self.has_criu = True
        try:
            return self.save(bundle) is not None and self.load(bundle) is not None
        except (subprocess.SubprocessError, OSError):
            return False
        finally:
            shutil.rmtree(bundle)
            shutil.rmtree(self.image, ignore_errors=True)

    def _call(self, *args: str | Path, check: bool = True) -> None:
        null = subprocess.DEVNULL
        words = [*self.words, *map(str, args)]
        subprocess.run(words, stdin=null, stdout=null, stderr=null, check=check, timeout=120)

    def run(self, bundle: Path) -> float | None:
        if not self.has_runc:
            return None
        return milliseconds(lambda: self._call("run", "--bundle", bundle, new_id("runc")))

    def listed(self) -> float | None:
        return milliseconds(lambda: self._call("list")) if self.has_runc else None

    def save(self, bundle: Path) -> float | None:
        if not self.has_criu:
            return None
        shutil.rmtree(self.image, ignore_errors=True)
        name = new_id("runc")
        self._call("run", "--detach", "--bundle", bundle, name)
        try:
            time.sleep(1)
            return milliseconds(lambda: self._call("checkpoint", "--image-path", self.image, name))
        finally:
            self._call("delete", "--force", name, check=False)
            procs.reap()

    def load(self, bundle: Path) -> float | None:
        if not self.has_criu:
            return None
        name = new_id("runc")
        words = ["restore", "--detach", "--image-path", self.image, "--bundle", bundle, name]
        try:
            return milliseconds(lambda: self._call(*words))
        finally:
            self._call("delete", "--force", name, check=False)
            procs.reap()


SCENARIOS = {
    "small": small,
    "large": large,
    "huge": huge,
    "incremental": incremental,
    "background": background,
    "tree": tree,
    "clones": clones,
    "commands": commands,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="medians of 3, and docs/benchmarks.md stays as it is")
    parser.add_argument("--only", default=",".join(SCENARIOS), help=f"some of {','.join(SCENARIOS)}")
    parser.add_argument("--directory", default="/var/tmp", help="where images are written")
    parser.add_argument("--json", action="store_true", help="print all single times instead of the table")
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("this needs root: it makes containers", file=sys.stderr)
        return 1
    procs.become_subreaper()
    procs.Reaper()
    # As pip leaves it: without this every command would compile what it imports.
    compileall.compile_dir(str(Path(torpor.__file__).parent), quiet=2)
    wanted = options.only.split(",")
    with tempfile.TemporaryDirectory(prefix="torpor-bench-", dir=options.directory) as name:
        b = Bench(Path(name), 3 if options.quick else options.runs)
        try:
            for scenario in wanted:
                print(f"{scenario} ...", file=sys.stderr, flush=True)
                SCENARIOS[scenario](b)
        finally:
            b.command.clean_up()
    found = [row.figure() for row in b.rows.values()]
    if options.json:
        print(
            json.dumps(
                {r.what: {"times": r.times, "raws": r.raws, "peers": r.peers} for r in b.rows.values()}, indent=2
            )
        )
    else:
        print(figures.table(found))
    if not options.quick and wanted == list(SCENARIOS):
        figures.write(REPO / "docs", found, b.runs, bool(b.peer.has_criu))
    return 0


if __name__ == "__main__":
    sys.exit(main())
