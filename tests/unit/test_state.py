"""state.json, its lock, the table of moves, and ids."""

import itertools
import json
import multiprocessing
import os
import subprocess
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torpor import freezer, proc, ruins, state
from torpor.errors import StateError
from torpor.state import MAY, MOVES, Home, State, check_id, find_id, may, observe


@pytest.fixture(autouse=True)
def nothing_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freezer, "is_frozen", lambda pid: None)


def living(status: str = "running") -> State:
    return State(id="c", status=status, pid=os.getpid(), start_time=proc.start_time(os.getpid()) or 0)


def make(root: Path, container_id: str, status: str = "running", owner: tuple[int, int] | None = None) -> Home:
    home = Home(str(root), container_id)
    home.make()
    home.write(State(id=container_id, status=status, pid=os.getpid(), start_time=1, owner_process=owner))
    home.release()
    return home


# ---- ids ----


@pytest.mark.parametrize("good", ["a", "A_b-c.d+e", "0" * 64, "...", "-x", "a" * 255])
def test_good_ids(good: str) -> None:
    assert check_id(good) == good


@pytest.mark.parametrize("bad", ["", ".", "..", "a/b", "../x", "a b", "a\n", "ä", "a\0", "a:b", "*", "a" * 256])
def test_bad_ids(bad: str) -> None:
    with pytest.raises(StateError) as e:
        check_id(bad)
    assert e.value.code == "bad-id" and "\n" not in str(e.value)


@given(st.text())
def test_an_id_never_leaves_the_root(text: str) -> None:
    try:
        check_id(text)
    except StateError:
        return
    assert (Path("/root-of-state") / text).resolve().parent == Path("/root-of-state")


def test_a_unique_beginning_is_enough(tmp_path: Path) -> None:
    for name in ("apple", "apricot", "banana", "ban"):
        make(tmp_path, name)
    root = str(tmp_path)
    assert find_id(root, "app") == "apple"
    assert find_id(root, "ban") == "ban"
    with pytest.raises(StateError, match="ambiguous: apple, apricot") as e:
        find_id(root, "ap")
    assert e.value.code == "bad-id"
    with pytest.raises(StateError, match="does not exist") as e:
        find_id(root, "cherry")
    assert e.value.code == "not-found"


def test_there_may_be_no_root_yet(tmp_path: Path) -> None:
    assert state.ids(str(tmp_path / "none")) == []


# ---- moves ----


def test_the_table_is_closed() -> None:
    assert set(MOVES) == {target for targets in MOVES.values() for target in targets} | {"creating"}
    assert all(set(statuses) <= set(MOVES) for statuses in MAY.values())


@pytest.mark.parametrize(("old", "new"), list(itertools.product(MOVES, MOVES)))
def test_every_move(old: str, new: str) -> None:
    moving = State(id="c", status=old)
    if new in MOVES[old]:
        moving.move(new)
        assert moving.status == new
    else:
        with pytest.raises(StateError) as e:
            moving.move(new)
        assert e.value.code == "bad-state" and moving.status == old


def test_settling_forgets_the_owner() -> None:
    moving = State(id="c", status="creating", owner_process=(1, 2))
    moving.move("restoring")
    assert moving.owner_process == (1, 2)
    moving.move("running")
    assert moving.owner_process is None


class Life(RuleBasedStateMachine):
    """Whatever is tried in whatever order, a container that has stopped stays stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.state = State(id="c")
        self.seen = ["creating"]

    @rule(status=st.sampled_from(sorted(MOVES)))
    def move(self, status: str) -> None:
        try:
            self.state.move(status)
        except StateError:
            return
        self.seen.append(status)

    @invariant()
    def stopped_is_the_end(self) -> None:
        assert "stopped" not in self.seen[:-1]

    @invariant()
    def it_survives_the_disk(self) -> None:
        assert State.from_json(self.state.to_json()).to_json() == self.state.to_json()


TestLife = Life.TestCase


@pytest.mark.parametrize(
    ("verb", "status", "words"),
    [("checkpoint", "stopped", "container not running"), ("checkpoint", "created", "container not running"),
     ("kill", "stopped", "container not running"), ("exec", "paused", "container paused"),
     ("resume", "running", "container not paused"), ("pause", "paused", "container paused"),
     ("delete", "running", "container still running"), ("start", "running", "cannot start"),
     ("restore", "running", "cannot restore"), ("ps", "creating", "container not running")],
)  # fmt: skip
def test_refusals_in_the_words_that_clients_look_for(verb: str, status: str, words: str) -> None:
    with pytest.raises(StateError, match=words):
        may(verb, "c", status)


def test_paused_containers_can_be_checkpointed() -> None:
    may("checkpoint", "c", "paused")


# ---- liveness ----


def test_a_living_process_keeps_its_status() -> None:
    for status in ("created", "running", "paused"):
        assert observe(living(status)) == status


def test_another_process_with_the_same_pid_is_not_it() -> None:
    someone = living()
    someone.start_time += 1
    assert observe(someone) == "stopped"


def test_a_zombie_has_stopped() -> None:
    child = subprocess.Popen(["sleep", "60"])
    started = proc.start_time(child.pid) or 0
    running = State(id="c", status="running", pid=child.pid, start_time=started)
    assert observe(running) == "running"
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert observe(running) == "stopped"
    assert proc.exit_status_of_zombie(child.pid, started) == 137
    child.wait()
    assert observe(running) == "stopped"
    assert proc.exit_status_of_zombie(child.pid, started) is None


@pytest.mark.parametrize(("frozen", "status"), [(True, "paused"), (False, "running")])
def test_the_freezer_has_the_last_word(monkeypatch: pytest.MonkeyPatch, frozen: bool, status: str) -> None:
    monkeypatch.setattr(freezer, "is_frozen", lambda pid: frozen)
    assert observe(living("running")) == status
    assert observe(living("paused")) == status


# ---- disk ----


def test_a_claim_is_exclusive(tmp_path: Path) -> None:
    make(tmp_path, "c")
    with pytest.raises(StateError, match="already exists") as e:
        Home(str(tmp_path), "c").make()
    assert e.value.code == "exists"


def test_a_claim_whose_owner_died_at_once_can_be_taken(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    home = Home(str(tmp_path), "c")
    home.make()
    assert home.is_busy()
    with pytest.raises(StateError, match="already exists"):
        Home(str(tmp_path), "c").make()
    home.release()


def test_only_one_of_many_gets_the_claim(tmp_path: Path) -> None:
    winners = []

    def claim() -> None:
        try:
            home = Home(str(tmp_path), "c")
            home.make()
            home.write(State(id="c"))
            home.release()
            winners.append(home)
        except StateError:
            pass

    threads = [threading.Thread(target=claim) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1


def test_the_lock_excludes_and_notices_deletion(tmp_path: Path) -> None:
    make(tmp_path, "c")
    first, second = Home(str(tmp_path), "c"), Home(str(tmp_path), "c")
    got: list[object] = []

    def wait() -> None:
        try:
            with second:
                got.append("lock")
        except StateError as e:
            got.append(e.code)

    with first:
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
        ruins.remove_tree(first.path)
    thread.join(5)
    assert got == ["not-found"]


def test_the_lock_can_be_taken_again_by_its_holder(tmp_path: Path) -> None:
    home = make(tmp_path, "c")
    with home, home:
        assert Home(str(tmp_path), "c").is_busy()
    assert not home.is_busy()


def test_unknown_fields_of_a_newer_torpor_are_ignored() -> None:
    text = json.dumps({**json.loads(State(id="c").to_json()), "color": "green"})
    assert State.from_json(text).id == "c"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"status": "running"}', "null"])
def test_damage_is_named(tmp_path: Path, text: str) -> None:
    home = make(tmp_path, "c")
    Path(home.file("state.json")).write_text(text)
    with pytest.raises(StateError, match="damaged"):
        home.read()


def _write_forever(root: str) -> None:
    home = Home(root, "c")
    for i in itertools.count():
        home.write(State(id="c", pid=i, bundle="x" * 5000))


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    home = make(tmp_path, "c")
    writer = multiprocessing.get_context("spawn").Process(target=_write_forever, args=(str(tmp_path),))
    writer.start()
    try:
        for _ in range(500):
            assert home.read() is not None
    finally:
        writer.kill()
        writer.join()
    assert home.read() is not None


# ---- ruins ----


def test_what_a_dead_torpor_left_is_a_ruin(tmp_path: Path) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    home = make(tmp_path, "c", "creating", owner=(child.pid, 12345))
    assert ruins.clear_if_ruin(home)
    assert not Path(home.path).exists()


def test_a_torpor_that_nobody_has_reaped_is_dead_too(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "60"])
    home = make(tmp_path, "c", "creating", owner=(child.pid, proc.start_time(child.pid) or 0))
    assert not ruins.clear_if_ruin(home)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert ruins.clear_if_ruin(home)
    child.wait()


def test_an_orphan_is_cleared_by_its_pid(tmp_path: Path) -> None:
    home = make(tmp_path, "c", "running")
    ruins.clear_orphan(home.path, str(os.getpid() + 1))
    assert Path(home.path).exists()
    with home:
        home.write(State(id="c", status="running", pid=2**22 + 1, start_time=1))
    ruins.clear_orphan(home.path, str(2**22 + 1))
    assert not Path(home.path).exists()


def test_what_a_living_torpor_is_at_is_none(tmp_path: Path) -> None:
    me = (os.getpid(), proc.start_time(os.getpid()) or 0)
    home = make(tmp_path, "c", "restoring", owner=me)
    assert not ruins.clear_if_ruin(home)
    assert Path(home.path).exists()


def test_a_finished_container_is_none_whoever_made_it(tmp_path: Path) -> None:
    home = make(tmp_path, "c", "created")
    assert not ruins.clear_if_ruin(home)


def test_an_empty_claim_is_one(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    assert ruins.clear_if_ruin(Home(str(tmp_path), "c"))
    assert list(tmp_path.iterdir()) == []


def test_removing_a_tree_follows_no_links(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").touch()
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "link").symlink_to(tmp_path / "outside")
    (tree / "file-link").symlink_to("nowhere")
    ruins.remove_tree(str(tree))
    ruins.remove_tree(str(tree))
    assert not tree.exists()
    assert (tmp_path / "outside" / "kept").exists()
