"""Time Docker with torpor and with runc in the same daemon: `docker run --rm` of a static true, and a checkpoint with the start after it.

    .venv/bin/python benches/clients.py [--runs 9]

Medians in milliseconds, rounds of both runtimes in turn. runc needs a criu that works on this kernel for the second part; where it has
none, its column shows a dash.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "tests"))

from support import procs
from support.daemons import Failed
from support.docker import Docker


def milliseconds(work: Callable[[], object]) -> float:
    before = time.monotonic()
    work()
    return (time.monotonic() - before) * 1000


def median(times: list[float]) -> str:
    return f"{statistics.median(times):10.0f}" if times else f"{'-':>10}"


def run_true(docker: Docker, runtime: str, *flags: str) -> float:
    return milliseconds(lambda: docker("run", f"--runtime={runtime}", "--rm", *flags, "box", "/bin/true"))


def round_trip(docker: Docker, runtime: str) -> tuple[float, float]:
    name = f"bench-{runtime}"
    docker("run", f"--runtime={runtime}", "-d", "--name", name, "box", "counter")
    try:
        docker.wait_log(name, 1)
        saved = milliseconds(lambda: docker("checkpoint", "create", name, "cp"))
        started = milliseconds(lambda: docker("start", "--checkpoint", "cp", name))
    finally:
        docker("rm", "-f", name)
    return saved, started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("this needs root: it starts dockerd", file=sys.stderr)
        return 1
    procs.become_subreaper()
    procs.Reaper()
    docker = Docker()
    try:
        runs: dict[str, list[float]] = {"runc": [], "torpor": []}
        plain: dict[str, list[float]] = {"runc": [], "torpor": []}
        saves: dict[str, list[float]] = {"runc": [], "torpor": []}
        starts: dict[str, list[float]] = {"runc": [], "torpor": []}
        for runtime in runs:
            run_true(docker, runtime)
        for _ in range(options.runs):
            for runtime in runs:
                runs[runtime].append(run_true(docker, runtime))
                plain[runtime].append(run_true(docker, runtime, "--network", "none"))
                try:
                    saved, started = round_trip(docker, runtime)
                except Failed:
                    continue
                saves[runtime].append(saved)
                starts[runtime].append(started)
        print(f"medians of {options.runs} runs in milliseconds")
        print(f"{'':<36}{'runc':>10} {'torpor':>10}")
        for title, times in (
            ("docker run --rm true, bridge network", runs),
            ("docker run --rm true, no network", plain),
            ("docker checkpoint create", saves),
            ("docker start --checkpoint", starts),
        ):
            print(f"{title:<36}{median(times['runc'])} {median(times['torpor'])}")
        docker.clean_up()
    finally:
        docker.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
