"""The state file: what it refuses, what it survives, and that old ones are carried forward."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from messcli.errors import MessError, StateBusy, StateError, UsageError
from messcli.state import database as state_module
from messcli.state.database import SCHEMA_VERSION
from messcli.state.journal import Done, Work
from messcli.state.state import State, print_rows

HERE = Path(__file__).parent
SETTINGS = {"period": "", "horizon": None}


def done(number: int, line: str = "") -> Done:
    key = number.to_bytes(16, "big")
    return Done(key, key, line or f'{{"id": {number}}}', t=number)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def finish(state: State, numbers: range) -> None:
    state.commit(Work([done(number) for number in numbers], [b"{}" for _ in numbers]))


def new_state(path: Path, output: str, numbers: range) -> None:
    with State(path) as state:
        state.journal.change(1, SETTINGS, b"", [])
        state.output.open(output)
        finish(state, numbers)
        state.output.finish()


def lines_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as db:
        return int(db.execute("SELECT count(*) FROM requests").fetchone()[0])


def test_what_is_finished_is_known_again(tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    new_state(path, str(tmp_path / "out"), range(1, 4))
    with State(path) as state:
        assert state.journal.t == 3
        assert state.journal.known((2).to_bytes(16, "big")) == (2).to_bytes(16, "big")
        assert state.journal.known((9).to_bytes(16, "big")) is None
        assert state.journal.snapshot() == b""
        assert list(state.journal.events()) == [([b"{}"] * 3, True)]
        assert state.journal.period("") == (None, 3)
    assert names(tmp_path) == {"a.state", "out"}


def test_a_folder_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "before").mkdir()
    monkeypatch.chdir(tmp_path / "before")
    new_state(Path("a.state"), "out", range(1, 4))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "before").rename("after")
    with State(tmp_path / "after" / "a.state") as state:
        state.output.open("after/out")
        finish(state, range(4, 6))
        state.output.finish()
    assert len(Path("after/out").read_text().splitlines()) == 5


def test_several_outputs_and_standard_output_over_one_state(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    path = tmp_path / "a.state"
    new_state(path, str(tmp_path / "one"), range(1, 4))
    with State(path) as state:
        state.output.open("-")
        finish(state, range(4, 6))
        state.output.finish()
    with State(path) as state:
        state.output.open(str(tmp_path / "two"))
        finish(state, range(6, 7))  # dies before it is synced
    with State(path) as state:
        state.output.open(str(tmp_path / "one"))
        assert state.output.unfinished() == [(str(tmp_path / "two"), 1)]
        finish(state, range(7, 8))
        state.output.finish()
    with State(path) as state:
        state.output.open(str(tmp_path / "two"))
        state.output.finish()
        assert state.output.unfinished() == []
    assert (tmp_path / "one").read_text().split() == [
        '{"id":',
        "1}",
        '{"id":',
        "2}",
        '{"id":',
        "3}",
        '{"id":',
        "7}",
    ]
    assert (tmp_path / "two").read_text() == '{"id": 6}\n'
    printed = capfdbinary.readouterr().out
    assert printed == b'{"id": 4}\n{"id": 5}\n'
    assert print_rows(path, "-") == []
    assert print_rows(path, str(tmp_path / "two")) == [str(tmp_path / name) for name in ("one", "two")]
    assert capfdbinary.readouterr().out == printed


def test_rows_of_a_state_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="no such file"):
        print_rows(tmp_path / "none", "-")
    assert names(tmp_path) == set()


def test_an_output_that_the_state_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine\n")
    with (
        State(tmp_path / "a.state") as state,
        pytest.raises(StateError, match=r"rows that .* knows nothing of"),
    ):
        state.output.open(str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine\n"


def test_an_output_must_not_be_the_state(tmp_path: Path) -> None:
    with State(tmp_path / "a.state") as state:
        for end in ("", ".lock", "-wal"):
            with pytest.raises(UsageError, match="state's own file"):
                state.output.open(str(tmp_path / f"a.state{end}"))


def test_an_output_that_was_changed_after_the_run(tmp_path: Path) -> None:
    path, output = tmp_path / "a.state", tmp_path / "out"
    new_state(path, str(output), range(1, 4))
    rows = output.read_text()
    for text in (rows + "mine\n", rows[:-10], None):
        output.unlink()
        if text is not None:
            output.write_text(text)
        with State(path) as state, pytest.raises(MessError, match=r"Put (the file|it) back"):
            state.output.open(str(output))
        assert (output.read_text() if text is not None else None) == text
        output.write_text(rows)
    with State(path) as state:  # put back as it was, it goes on
        state.output.open(str(output))


@pytest.mark.parametrize(
    "content", [b"some text that is long enough\n" * 10, b"x", b"SQLite format 2\0" * 10]
)
def test_a_file_that_is_no_state(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.state"
    path.write_bytes(content)
    with pytest.raises(StateError, match="is no messcli state, or a damaged one; it was left as it is"):
        State(path)
    assert path.read_bytes() == content
    assert names(tmp_path) == {"a.state"}


def test_another_programs_database(tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE theirs (x)")
    db.commit()
    db.close()
    content = path.read_bytes()
    with pytest.raises(StateError, match="a database of another program; it was left as it is"):
        State(path)
    assert path.read_bytes() == content


def test_a_state_of_a_newer_version(tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    new_state(path, str(tmp_path / "out"), range(1, 4))
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    db.close()
    with pytest.raises(StateError, match=rf"newer messcli \(schema {SCHEMA_VERSION + 1}.*Upgrade messcli"):
        State(path)


def test_places_that_cannot_hold_a_state(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"can't be created: .* existing, writable folder"):
        State(tmp_path / "none" / "a.state")
    with pytest.raises(StateError, match="no regular file"):
        State(tmp_path)


def schema_of(path: Path) -> tuple[set[tuple[str, ...]], int]:
    """Columns and indices of every table, however they came to be."""
    db = sqlite3.connect(path)
    try:
        found: set[tuple[str, ...]] = set()
        for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            columns = db.execute(f"PRAGMA table_info({table})").fetchall()
            found.update(
                (table, name, kind, str(notnull), str(pk)) for _, name, kind, notnull, _, pk in columns
            )
        indices = db.execute("SELECT name FROM sqlite_master WHERE type = 'index'").fetchall()
        found.update(("index", *row) for row in indices)
        return found, db.execute("PRAGMA user_version").fetchone()[0]
    finally:
        db.close()


@pytest.mark.parametrize("version", range(1, SCHEMA_VERSION))
def test_old_states_are_carried_forward(tmp_path: Path, version: int) -> None:
    old, new = tmp_path / "old.state", tmp_path / "new.state"
    db = sqlite3.connect(old)
    db.executescript((HERE / "data" / f"state-{version}.sql").read_text(encoding="utf-8"))
    db.close()
    State(new).close()
    with State(old) as state:
        assert lines_of(old) == 26
        assert state.journal.t == 24
        assert state.journal.period("") == (60 if version == 3 else None, 24)
    assert schema_of(old) == schema_of(new)


def test_a_migration_that_fails_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.state"
    new_state(path, str(tmp_path / "out"), range(1, 4))
    before = schema_of(path)
    monkeypatch.setattr(state_module, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
    script = "CREATE TABLE extra (x); INSERT INTO missing VALUES (1);"
    monkeypatch.setitem(state_module.MIGRATIONS, SCHEMA_VERSION, script)
    with pytest.raises(StateError, match=r"is damaged \(no such table: missing\) and was left as it is"):
        State(path)
    assert schema_of(path) == before
    monkeypatch.setitem(state_module.MIGRATIONS, SCHEMA_VERSION, "CREATE TABLE extra (x);")
    with State(path) as state:
        assert state.journal.t == 3
    assert schema_of(path)[1] == SCHEMA_VERSION + 1


def test_damage_is_told_and_never_overwritten(tmp_path: Path) -> None:
    """Whatever is broken, opening, reading and writing either works or ends in a StateError."""
    whole, path, output = tmp_path / "whole", tmp_path / "a.state", tmp_path / "out"
    with State(whole) as state:
        state.journal.change(1, SETTINGS, bytes(20_000), [])
        state.output.open(str(output))
        for start in range(1, 200, 8):
            finish(state, range(start, start + 8))
        state.output.finish()
    content, rows = whole.read_bytes(), output.read_bytes()
    rng = random.Random(1)
    told = 0
    for attempt in range(150):
        damaged = bytearray(content)
        if attempt % 3 == 0:
            del damaged[rng.randrange(20, len(damaged)) :]
        elif attempt % 3 == 1:
            start = rng.randrange(len(damaged))
            damaged[start : start + 4096] = rng.randbytes(len(damaged[start : start + 4096]))
        else:
            for _ in range(200):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        shutil.copy(whole, path)
        path.write_bytes(damaged)
        output.write_bytes(rows)
        opened = False
        try:
            with State(path) as state:
                (
                    state.database.meta("signature"),
                    state.journal.settings(),
                    state.journal.known(b"x"),
                    state.journal.accounts(""),
                )
                for events, _ in state.journal.events():
                    assert events
                opened = True
                state.output.open(str(output))
                finish(state, range(1000, 1001))
        except MessError:
            told += 1
        assert opened or path.read_bytes() == damaged
        assert not path.with_name("a.state.lock").exists()
    assert told > 75
    print({"damaged files": 150, "told": told})


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.state"
    with State(path):
        with pytest.raises(StateBusy, match=rf"in use by process {os.getpid()} on .*--wait") as caught:
            State(path)
        assert caught.value.exit_code == 75
        with pytest.raises(StateBusy):
            State(path, wait_seconds=0.3)
    State(path).close()


def test_a_lock_that_nobody_holds_does_not_block(tmp_path: Path) -> None:
    (tmp_path / "a.state.lock").write_text("process 1 on another machine, and a longer line than ours\n" * 3)
    with State(tmp_path / "a.state"):
        held = (tmp_path / "a.state.lock").read_text()
        assert held.splitlines() == [held.strip()]
        assert f"process {os.getpid()} " in held
    assert names(tmp_path) == {"a.state"}


def test_a_child_that_outlives_its_parent_does_not_hold_the_state(tmp_path: Path) -> None:
    """As a server process that a backend forked: it must not keep the lock of a parent that was killed."""
    script = f"""
import os, signal, time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from messcli.state.state import State
state = State(Path({str(tmp_path / "a.state")!r}))
child = os.fork()
if not child:
    os.close(1)
    time.sleep(20)
    os._exit(0)
print(child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, "-W", "ignore", "-c", script]
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=False)
    child = int(ended.stdout)
    try:
        assert ended.returncode == -9
        State(tmp_path / "a.state").close()
    finally:
        os.kill(child, 9)


def test_settings_are_kept_with_time_and_request(tmp_path: Path) -> None:
    with State(tmp_path / "a.state") as state:
        state.journal.change(1, {**SETTINGS, "alpha": 0.5}, b"one", [])
        finish(state, range(1, 9))
        state.journal.change(9, {"period": "2026-12", "horizon": 50, "alpha": 0.6}, b"two", [])
        assert state.journal.settings() == {"period": "2026-12", "horizon": 50, "alpha": 0.6}
        finish(state, range(9, 12))
        assert (state.journal.period(""), state.journal.period("2026-12")) == ((None, 8), (50, 3))
        assert state.journal.snapshot() == b"two"
    db = sqlite3.connect(tmp_path / "a.state")
    assert [t for (t,) in db.execute("SELECT t FROM settings ORDER BY rowid")] == [1, 9]
    assert db.execute("SELECT count(*) FROM settings WHERE time LIKE '20__-__-__T__:__:__Z'").fetchone() == (
        2,
    )
    db.close()


def test_a_row_is_never_finished_twice(tmp_path: Path) -> None:
    with State(tmp_path / "a.state") as state:
        state.journal.change(1, SETTINGS, b"", [])
        finish(state, range(1, 3))
        with pytest.raises(StateError, match="UNIQUE"):
            finish(state, range(2, 4))
        assert state.journal.known((3).to_bytes(16, "big")) is None  # all or nothing


# ---- what isn't ours, and what was changed --------------------------------------------------------


@pytest.mark.parametrize("content", ["version = 1\n", "process of somebody\n", "process 12\n" * 1000])
def test_a_file_with_the_locks_name_is_left_as_it_is(tmp_path: Path, content: str) -> None:
    lock = tmp_path / "uv.lock"
    lock.write_text(content)
    with pytest.raises(
        StateError, match=r"uv.lock: the state's lock would be here, and this is none of messcli's"
    ):
        State(tmp_path / "uv")
    assert lock.read_text() == content
    assert names(tmp_path) == {"uv.lock"}


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    target, lock = tmp_path / "theirs", tmp_path / "a.state.lock"
    target.write_text("")
    lock.symlink_to(target)
    with pytest.raises(StateError, match="none of messcli's; it was left as it is"):
        State(tmp_path / "a.state")
    assert lock.is_symlink()
    assert target.read_text() == ""
    lock.unlink()
    lock.symlink_to(tmp_path / "none")  # nor is what it names made
    with pytest.raises(StateError, match="none of messcli's"):
        State(tmp_path / "a.state")
    assert names(tmp_path) == {"theirs", "a.state.lock"}


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_lock_that_is_no_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "a.state.lock")
    with pytest.raises(StateError, match="none of messcli's"):
        State(tmp_path / "a.state")
    assert names(tmp_path) == {"a.state.lock"}


def test_a_file_that_took_the_locks_place_meanwhile_stays(tmp_path: Path) -> None:
    lock = tmp_path / "a.state.lock"
    with State(tmp_path / "a.state"):
        lock.unlink()
        lock.write_text("theirs")
    assert lock.read_text() == "theirs"


def test_two_states_on_one_output(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    with State(tmp_path / "a.state") as first:
        first.journal.change(1, SETTINGS, b"", [])
        first.output.open(output)
        with (
            State(tmp_path / "b.state") as second,
            pytest.raises(StateBusy, match="another process is writing it") as told,
        ):
            second.output.open(output)
        assert told.value.exit_code == 75
        finish(first, range(1, 4))
        first.output.finish()
    assert len(Path(output).read_text().splitlines()) == 3
    with State(tmp_path / "b.state") as second, pytest.raises(StateError, match="knows nothing of"):
        second.output.open(output)


def test_a_flipped_bit_in_the_index_of_keys_is_told_and_nothing_is_written(tmp_path: Path) -> None:
    """A key that its index doesn't lead to would be routed again."""
    path = tmp_path / "a.state"
    keys = random.Random(3).randbytes(16 * 400)
    with State(path) as state:
        state.journal.change(1, SETTINGS, b"", [])
        done_ = [Done(keys[n : n + 16], b"", "{}", t=n // 16 + 1) for n in range(0, len(keys), 16)]
        state.commit(Work(done_, [b"{}"] * 400))
    whole = path.read_bytes()
    told = 0
    for n in range(0, 400, 20):
        key = keys[16 * n : 16 * n + 16]
        places = [at for at in range(len(whole)) if whole.startswith(key, at)]
        assert len(places) == 2  # in the table and in the index
        for at in places:
            damaged = bytearray(whole)
            damaged[at + 7] ^= 0x10
            path.write_bytes(damaged)
            with pytest.raises(StateError, match=r"is damaged \(.*\) and was left as it is"):
                State(path)
            told += 1
            assert path.read_bytes() == damaged
    assert told == 40
    path.write_bytes(whole)
    State(path).close()


def test_a_damaged_state_of_a_killed_run_is_left_as_it_is(tmp_path: Path) -> None:
    """With its log: the state is read before the log is folded in."""
    path, copy = tmp_path / "a.state", tmp_path / "copy"
    copy.mkdir()
    keys = [random.Random(n).randbytes(16) for n in range(200)]
    with State(path) as state:
        state.journal.change(1, SETTINGS, b"", [])
        state.commit(Work([Done(key, b"", "{}", t=n + 1) for n, key in enumerate(keys)], [b"{}"] * 200))
        for name in ("a.state", "a.state-wal"):
            shutil.copy(tmp_path / name, copy / name)
    log = bytearray((copy / "a.state-wal").read_bytes())
    log_whole = bytes(log)
    State(copy / "a.state").close()  # it can be opened as it was left
    shutil.copy(tmp_path / "a.state", copy / "a.state")  # closed: all of it in one file
    content = bytearray((copy / "a.state").read_bytes())
    at = content.index(keys[5])
    content[at + 3] ^= 1
    (copy / "a.state").write_bytes(content)
    (copy / "a.state-wal").write_bytes(log_whole[:32])  # a log that holds nothing yet
    before = {name: (copy / name).read_bytes() for name in ("a.state", "a.state-wal")}
    with pytest.raises(StateError, match="is damaged"):
        State(copy / "a.state")
    assert {name: (copy / name).read_bytes() for name in before} == before


def test_a_large_state_is_checked_by_a_sample_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_module, "ROWS_CHECKED_UNCLEAN", 50)
    path, killed = tmp_path / "a.state", tmp_path / "killed"
    killed.mkdir()
    with State(path) as state:
        state.journal.change(1, SETTINGS, b"", [])
        finish(state, range(1, 200))
        for name in ("a.state", "a.state-wal"):
            shutil.copy(tmp_path / name, killed / name)
    with State(killed / "a.state") as state:
        (note,) = state.database.notes
        assert "ended unclean" in note
        assert "of its 199 rows were checked" in note
    with State(killed / "a.state") as state:
        assert state.database.notes == []


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
def test_an_output_that_was_edited_at_the_same_length_is_noticed(tmp_path: Path, name: str) -> None:
    path, output = tmp_path / "a.state", tmp_path / name
    with State(path) as state:
        state.journal.change(1, SETTINGS, b"", [])
        for start in (1, 600, 1200):  # a part each
            state.output.open(str(output))
            finish(state, range(start, start + 599))
            state.output.finish()
            state.output.close()
    whole = output.read_bytes()
    for at in (5, len(whole) // 2, len(whole) - 4):
        edited = bytearray(whole)
        edited[at] ^= 1
        output.write_bytes(edited)
        with (
            State(path) as state,
            pytest.raises(MessError, match=r"was changed: bytes \d+ to \d+ aren't what messcli"),
        ):
            state.output.open(str(output))
        assert output.read_bytes() == edited
    output.write_bytes(whole)
    with State(path) as state:
        state.output.open(str(output))


def test_state_and_output_can_be_renamed_together(tmp_path: Path) -> None:
    path, output = tmp_path / "a.state", tmp_path / "a"
    new_state(path, str(output), range(1, 4))
    path.rename(tmp_path / "b.state")
    output.rename(tmp_path / "b")
    other = tmp_path / "c"
    other.write_text("x" * (tmp_path / "b").stat().st_size)
    with State(tmp_path / "b.state") as state:
        with pytest.raises(StateError, match="knows nothing of"):
            state.output.open(str(other))
        state.output.open(str(tmp_path / "b"))
        finish(state, range(4, 6))
        state.output.finish()
    assert len((tmp_path / "b").read_text().splitlines()) == 5
    assert names(tmp_path) == {"b.state", "b", "c"}


@pytest.mark.parametrize("name", [":memory:", "file:x", "file:x?mode=memory"])
def test_names_that_mean_something_to_sqlite_are_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    new_state(Path(name), "out", range(1, 4))
    assert names(tmp_path) == {name, "out"}
    with State(Path(name)) as state:
        assert state.journal.t == 3
