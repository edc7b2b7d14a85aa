"""Time run, checkpoint, pause and restore for heaps of several sizes, next to the raw write and read of as many bytes.

    make bench                               # 16 MiB, 256 MiB and 1 GiB, five runs each
    make bench ARGS="--runs 9 --sizes 64"

Medians, in milliseconds. `pause` is what torpor reports for --leave-running; `gap` is what a thread of the program saw: the largest step
of CLOCK_MONOTONIC. The raw write ends with fsync, as a checkpoint does; the raw read is, like the restore's, of a file in the page cache.
Numbers of one machine in one hour: compare two builds by running both in turn, not with a table from elsewhere.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "tests"))

import torpor
from support import bundles, procs
from support.cli import Container, Torpor, new_id
from support.workloads import compiled

CHUNK = 4 << 20


def milliseconds(work: Callable[[], object]) -> float:
    before = time.monotonic()
    work()
    return (time.monotonic() - before) * 1000


def raw_write(path: Path, size: int) -> None:
    block = os.urandom(CHUNK)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        left = size
        while left > 0:
            left -= os.write(fd, block[: min(left, CHUNK)])
        os.fsync(fd)
    finally:
        os.close(fd)


def raw_read(path: Path) -> None:
    buffer = bytearray(CHUNK)
    with open(path, "rb", buffering=0) as f:
        while f.readinto(buffer):
            pass


@contextmanager
def bundle_of(directory: Path, mib: int) -> Iterator[Path]:
    bundle = directory / f"bundle{mib}"
    root = bundles.busybox_root(bundle / "rootfs")
    shutil.copy2(compiled("gap"), root / "bin" / "gap")
    yield bundles.write(bundle, bundles.spec(["/bin/gap", str(mib)]))
    shutil.rmtree(bundle)


def gap_of(c: Container) -> float:
    """The largest gap since the last time it was asked, which also checks the heap."""
    return float(c.verify().split()[1]) * 1000


def one_round(command: Torpor, bundle: Path, directory: Path) -> dict[str, float]:
    times: dict[str, float] = {}
    c = Container(command, bundle, new_id("bench"))
    times["run"] = milliseconds(c.run)
    c.wait_ready(120)

    gap_of(c)
    saved = torpor.Container.load(c.id, root=str(command.root)).checkpoint(str(directory / "left"), leave_running=True)
    times["gap"] = gap_of(c)
    times["pause"] = saved.report["pause_us"] / 1000
    shutil.rmtree(directory / "left")

    times["checkpoint"] = milliseconds(lambda: c.checkpoint(directory / "image"))
    c.delete()
    image = directory / "image" / "checkpoint.img"
    size = image.stat().st_size
    again = Container(command, bundle, new_id("bench"))
    times["restore"] = milliseconds(lambda: again.restore_from(directory / "image"))
    gap_of(again)
    again.delete()
    times["read"] = milliseconds(lambda: raw_read(image))
    times["write"] = milliseconds(lambda: raw_write(directory / "raw", size))
    (directory / "raw").unlink()
    shutil.rmtree(directory / "image")
    return times


def runc_run(directory: Path, bundle: Path) -> float | None:
    """`runc run --detach` of the same bundle, where runc is installed."""
    if shutil.which("runc") is None:
        return None
    name = new_id("runc")
    words = ["runc", "--root", str(directory / "runc")]
    null = subprocess.DEVNULL
    start = [*words, "run", "--detach", "--bundle", str(bundle), name]
    took = milliseconds(lambda: subprocess.run(start, stdin=null, stdout=null, stderr=null, check=True))
    subprocess.run([*words, "delete", "--force", name], check=True)
    procs.reap()
    return took


COLUMNS = ["run", "checkpoint", "write", "pause", "gap", "restore", "read"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--sizes", default="16,256,1024", help="MiB, separated by commas")
    parser.add_argument("--directory", default="/var/tmp", help="where images are written")
    parser.add_argument("--json", action="store_true", help="print all single times")
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("this needs root: it makes containers", file=sys.stderr)
        return 1
    procs.become_subreaper()
    procs.Reaper()
    everything: dict[str, list[dict[str, float]]] = {}
    if not options.json:
        print(
            f"medians of {options.runs} runs in milliseconds, images in {options.directory}; torpor {torpor.__version__}\n"
        )
        print(f"{'heap':>8} " + " ".join(f"{c:>10}" for c in [*COLUMNS, "runc run"]), flush=True)
    with tempfile.TemporaryDirectory(prefix="torpor-bench-", dir=options.directory) as name:
        directory = Path(name)
        command = Torpor(directory)
        for mib in map(int, options.sizes.split(",")):
            with bundle_of(directory, mib) as bundle:
                one_round(command, bundle, directory)  # warms caches, is not counted
                rounds = [one_round(command, bundle, directory) for _ in range(options.runs)]
                runc = [t for _ in range(options.runs) if (t := runc_run(directory, bundle)) is not None]
            everything[f"{mib} MiB"] = rounds
            if not options.json:
                cells = [f"{statistics.median(r[c] for r in rounds):10.1f}" for c in COLUMNS]
                cells.append(f"{statistics.median(runc):10.1f}" if runc else f"{'-':>10}")
                print(f"{mib:>4} MiB " + " ".join(cells), flush=True)
        command.clean_up()
    if options.json:
        print(json.dumps(everything, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
