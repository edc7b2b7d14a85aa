"""SQLite in WAL mode: three processes write to one file all the time, with locks and a shared index in memory; one transaction stays open."""

import os
import sqlite3
import subprocess
import sys
import time

import protocol

FILE = "/wl/books.db"


def connect() -> sqlite3.Connection:
    return sqlite3.connect(FILE, timeout=30, isolation_level=None)


def writer(number: int) -> None:
    """Moves one from an account to another; what went through is counted, in the same transaction."""
    db, n = connect(), 0
    while True:
        n += 1
        db.execute("begin immediate")
        db.execute("update account set balance = balance - 1 where id = ?", (n % 50,))
        db.execute("update account set balance = balance + 1 where id = ?", ((n + number) % 50,))
        db.execute("update done set count = count + 1 where writer = ?", (number,))
        db.execute("commit")
        time.sleep(0.002)


if len(sys.argv) > 1:
    writer(int(sys.argv[1]))

protocol.block()
db = connect()
assert db.execute("pragma journal_mode=wal").fetchone() == ("wal",)
db.executescript(
    "create table account(id integer primary key, balance integer); create table done(writer integer primary key, count integer);"
)
db.executemany("insert into account values(?, 1000)", [(i,) for i in range(50)])
db.executemany("insert into done values(?, 0)", [(i,) for i in (1, 2, 3)])
writers = [subprocess.Popen([sys.executable, __file__, str(i)], preexec_fn=protocol.unblocked) for i in (1, 2, 3)]
# a reader's snapshot, held through every checkpoint
reader = connect()
reader.execute("begin")
held = reader.execute("select sum(count) from done").fetchone()[0]


def verify() -> int:
    global held
    assert [w.poll() for w in writers] == [None] * 3, "a writer has ended"
    assert reader.execute("select sum(count) from done").fetchone()[0] == held, "a snapshot has changed"
    reader.execute("commit")
    assert db.execute("select sum(balance), count(*) from account").fetchone() == (50_000, 50)
    before = dict(db.execute("select writer, count from done").fetchall())
    deadline = time.monotonic() + 30
    while not all(dict(db.execute("select writer, count from done").fetchall())[w] > n for w, n in before.items()):
        assert time.monotonic() < deadline, f"a writer stands still: {before}"
        time.sleep(0.02)
    assert db.execute("pragma integrity_check").fetchone() == ("ok",)
    assert sorted(os.listdir("/wl")) == sorted({*os.listdir("/wl"), "books.db-wal", "books.db-shm"})
    reader.execute("begin")
    held = reader.execute("select sum(count) from done").fetchone()[0]
    return int(held)


protocol.serve(verify)
