"""PostgreSQL with eight clients that run transactions all the time, half of them over TCP. pgbench's books must balance."""

import glob
import shutil
import subprocess
import time

import protocol

BIN = sorted(glob.glob("/usr/lib/postgresql/*/bin"))[-1]
DATA, HERE = "/wl/pg", "/wl"
USER = "postgres"
BOOKS = (
    "select (select sum(abalance) from pgbench_accounts), (select sum(bbalance) from pgbench_branches), "
    "(select sum(tbalance) from pgbench_tellers), (select coalesce(sum(delta), 0) from pgbench_history), "
    "(select count(*) from pgbench_history)"
)

protocol.block()


def start(*command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, preexec_fn=protocol.unblocked, stdin=subprocess.DEVNULL, stdout=log, stderr=log, user=USER, group=USER, extra_groups=[])  # fmt: skip


def run(*command: str) -> None:
    assert start(*command).wait() == 0, command


def query(sql: str) -> list[str]:
    done = subprocess.run(["psql", "-XAtq", "-h", HERE, "-U", USER, "-c", sql], capture_output=True, text=True, preexec_fn=protocol.unblocked)  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout.strip().split("|")


log = open("/wl/log", "ab")
shutil.chown(HERE, USER, USER)
run(f"{BIN}/initdb", "-D", DATA, "-A", "trust", "-U", USER, "-N", "--locale=C")
server = start(
    f"{BIN}/postgres", "-D", DATA, "-k", HERE, "-c", "listen_addresses=127.0.0.1", "-c", "shared_buffers=32MB"
)
while subprocess.run(["pg_isready", "-q", "-h", HERE], preexec_fn=protocol.unblocked).returncode:
    assert server.poll() is None, "the server has ended"
    time.sleep(0.1)
run("pgbench", "-h", HERE, "-U", USER, "-i", "-q", "-s", "2", USER)
clients = [
    start("pgbench", "-h", host, "-U", USER, "-n", "-c", "4", "-j", "2", "-T", "100000", "--rate=200", USER)
    for host in (HERE, "127.0.0.1")
]
done = 0


def verify() -> int:
    """The sums are equal in one snapshot, both kinds of clients still work, and work is done."""
    global done
    before = done
    accounts, branches, tellers, history, count = map(int, query(BOOKS))
    assert accounts == branches == tellers == history, (accounts, branches, tellers, history)
    deadline = time.monotonic() + 30
    while (done := int(query(BOOKS)[4])) < max(before, count) + 20:
        assert time.monotonic() < deadline, f"no transactions any more: {done}, {before} before"
        time.sleep(0.05)
    assert [p.poll() for p in (server, *clients)] == [None] * 3, "a server or a client has ended"
    by_host = query(
        "select count(*) filter (where client_addr is null), count(client_addr) from pg_stat_activity where application_name = 'pgbench'"
    )
    assert by_host == ["4", "4"], by_host
    return done


protocol.serve(verify)
