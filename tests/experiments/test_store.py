"""The store: claims, leases, failures, foreign and old files, full disks; one process at a time."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.fields import storable
from experiments.sweep import schema, worker
from experiments.sweep.files import disk_full, read_result, write_result
from experiments.sweep.keys import RunConfig, canonical
from experiments.sweep.owner import Owner
from experiments.sweep.reader import Reader
from experiments.sweep.store import Store
from experiments.sweep.worker import do, work
from hessdiag.errors import ConfigurationError, StoreError
from hessdiag.store.files import replace_file


def configs(number: int, **extra: object) -> list[RunConfig]:
    return [RunConfig({"method": "fake", "activation": f"rct:{i}", "seed": 0, **extra}) for i in range(number)]


def dead_owner() -> str:
    """An owner on this machine whose process has ended."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "pass"])
    owner = replace(Owner.current(), pid=process.pid)
    process.wait()
    return owner.text


def test_key_covers_every_setting_and_ignores_spelling():
    base = RunConfig({"epochs": 7, "eps": 0.1, "activation": "silu", "seed": 0}, {"aa2": 300}, {"rtol": 0.1})
    assert base.key == RunConfig.from_dict(json.loads(json.dumps(base.to_dict()))).key
    assert (
        base.key
        == RunConfig({"seed": 0, "activation": "silu", "eps": 0.1, "epochs": 7.0}, {"aa2": 300.0}, {"rtol": 0.1}).key
    )
    others = [
        base.replace(train={"epochs": 8}),
        base.replace(attack={"aa2": 301}),
        base.replace(measure={"rtol": 0.2}),
        base.replace(train={"seed": 1}),
        RunConfig(base.train, base.attack, base.measure, schema=base.schema + "+"),
    ]
    assert len({base.key, *(other.key for other in others)}) == 6
    assert base.family == base.replace(train={"seed": 3, "activation": "relu"}).family
    assert base.family != others[0].family


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {"a": {1, 2}}])
def test_key_refuses_what_cannot_be_stored(value):
    with pytest.raises(ConfigurationError):
        canonical(value)


def test_a_run_is_claimed_once_and_finished_once(tmp_path):
    with Store(tmp_path / "s") as one, Store(tmp_path / "s") as two:
        assert one.add("sweep", configs(3), tier="smoke") == 3
        assert two.add("sweep", configs(4), tier="smoke") == 1
        me, other = Owner.current().text, Owner.current().text
        claims = [one.claim(me), two.claim(other), one.claim(me), two.claim(other)]
        assert len({claim.key for claim in claims if claim}) == 4
        assert one.claim(me) is None
        assert claims[0] is not None
        assert claims[0].config.train["activation"] == "rct:0"
        assert one.finish(claims[0], {"x": 1.5, "bad": float("nan")}, 2.0)
        assert not one.finish(claims[0], {"x": 2}, 2.0)
        assert not one.fail(claims[0], "late")
        row = two.rows("sweep")[0]
        assert (row.state, row.record, row.seconds) == ("done", {"x": 1.5, "bad": None}, 2.0)
        assert two.counts("sweep") == {"queued": 0, "running": 3, "done": 1, "failed": 0}


def test_the_dead_are_reclaimed_at_once_the_stalled_never_the_distant_by_lease(tmp_path):
    with Store(tmp_path / "s") as store:
        store.add("sweep", configs(1), tier="smoke")
        first = store.claim(dead_owner(), lease=1000.0)
        second = store.claim(Owner.current().text, lease=-1.0)  # alive on this machine, lease long over
        assert first is not None
        assert second is not None
        assert (second.key, second.attempt) == (first.key, 2)
        assert store.claim(Owner.current().text) is None
        assert not store.finish(first, {"late": 1}, 1.0)
        assert not store.heartbeat(first)
        assert store.heartbeat(second)
        assert store.release(second, "test")
        elsewhere = replace(Owner.current(), machine="elsewhere").text
        third = store.claim(elsewhere, lease=30.0)
        assert third is not None
        assert store.claim(Owner.current().text) is None
        assert store.heartbeat(third, lease=-1.0)
        fourth = store.claim(Owner.current().text)
        assert fourth is not None
        assert [a["outcome"] for a in store.attempts(first.key)] == [
            "interrupted",
            "released",
            "interrupted",
            None,
        ]


def test_a_reused_process_id_is_not_taken_for_the_owner():
    me = Owner.current()
    assert me.alive is True
    assert replace(me, started="1").alive is False
    assert replace(me, machine="elsewhere").alive is None
    assert Owner.parse(me.text) == me


def test_a_process_that_may_not_be_looked_at_is_not_taken_for_dead(monkeypatch):
    """A /proc that hides other users' processes (hidepid): the lease decides, not the missing file."""
    me = Owner.current()

    def hidden(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    def foreign(pid: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "read_text", hidden)
    monkeypatch.setattr("experiments.sweep.owner.machine", lambda: me.machine)
    monkeypatch.setattr(os, "kill", foreign)
    assert me.alive is None
    assert replace(me, started="").alive is True  # where no start time is ever known, a number that lives is enough

    def missing(pid: int, number: int) -> None:
        raise ProcessLookupError

    monkeypatch.setattr(os, "kill", missing)
    assert me.alive is False


def test_failures_keep_their_error_and_are_retried_as_often_as_asked(tmp_path):
    calls: list[str] = []

    def runner(config: RunConfig, out: Path) -> dict[str, object]:
        calls.append(config.key)
        raise ValueError("the reason")

    with Store(tmp_path / "s") as store:
        store.add("sweep", configs(2), tier="smoke")
    assert work(tmp_path / "s", runner, sweep="sweep") == {"failed": 2}
    assert len(calls) == 2
    assert work(tmp_path / "s", runner, sweep="sweep") == {}
    assert work(tmp_path / "s", runner, sweep="sweep", retries=2) == {"failed": 4}
    assert work(tmp_path / "s", runner, sweep="sweep", retries=2) == {}
    with Reader(tmp_path / "s") as store:
        row = store.rows("sweep")[0]
        assert row.failures == 3
        assert row.error is not None
        assert row.error.startswith("ValueError: the reason")
        assert "runner" in row.error


def test_a_run_that_kills_its_workers_ends_as_failed(tmp_path):
    with Store(tmp_path / "s") as store:
        store.add("sweep", configs(1), tier="smoke")
        for _ in range(3):
            assert store.claim(dead_owner(), interruptions=3) is not None
        assert store.claim(dead_owner(), interruptions=3) is None
        row = store.rows()[0]
        assert (row.state, row.failures) == ("failed", 1)
        assert "died 3 times" in str(row.error)


def test_a_result_on_disk_is_adopted_and_a_torn_or_foreign_one_is_not(tmp_path):
    runs = configs(4)
    calls: list[str] = []

    def runner(config: RunConfig, out: Path) -> dict[str, object]:
        calls.append(config.key)
        return {"value": config.train["activation"]}

    with Store(tmp_path / "s") as store:
        store.add("sweep", runs, tier="smoke")
        for run in runs[:3]:
            store.folder(run.key).mkdir()
        write_result(store.folder(runs[0].key), runs[0], {"value": "kept"}, 5.0)
        write_result(store.folder(runs[1].key), runs[3], {"value": "foreign"}, 5.0)
        (store.folder(runs[2].key) / "result.json").write_text('{"key": "' + runs[2].key + '", "rec')
    assert work(tmp_path / "s", runner) == {"adopted": 1, "done": 3}
    assert calls == [run.key for run in runs[1:]]
    with Reader(tmp_path / "s") as store:
        assert [row.record["value"] for row in store.rows()] == ["kept", "rct:1", "rct:2", "rct:3"]
        assert read_result(store.folder(runs[2].key), runs[2]) is not None


def test_writes_are_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "file"
    replace_file(path, b"old")

    def no_space(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_fails_no_run_and_loses_none(tmp_path, monkeypatch):
    def runner(config: RunConfig, out: Path) -> dict[str, object]:
        return {"value": 1}

    def full(config: RunConfig, out: Path) -> dict[str, object]:
        raise RuntimeError("saving failed") from OSError(28, "No space left on device")

    with Store(tmp_path / "s") as store:
        store.add("sweep", configs(2), tier="smoke")
    with pytest.raises(StoreError, match="disk is full"):
        work(tmp_path / "s", full)
    with Reader(tmp_path / "s") as store:
        assert store.counts() == {"queued": 2, "running": 0, "done": 0, "failed": 0}
    assert work(tmp_path / "s", runner) == {"done": 2}


def test_a_database_that_cannot_grow_rolls_back_and_adopts_later(tmp_path):
    """SQLite's own SQLITE_FULL at the moment of recording: the file is there, the row is not, nothing runs
    twice.
    """
    calls: list[str] = []

    def runner(config: RunConfig, out: Path) -> dict[str, object]:
        calls.append(config.key)
        return {"value": "x" * 200_000}

    owner = dead_owner()
    with Store(tmp_path / "s") as store:
        store.add("sweep", configs(1), tier="smoke")
        claim = store.claim(owner)
        assert claim is not None
        connection = store._connection
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages + 3}")
        with pytest.raises(StoreError, match="disk is full") as caught:
            do(store, claim, runner)
        assert disk_full(caught.value)
        assert store.counts()["running"] == 1
    with Store(tmp_path / "s") as store:
        assert store.rows()[0].record is None
    assert work(tmp_path / "s", runner) == {"adopted": 1}
    assert len(calls) == 1


def test_foreign_stores_are_refused(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    with pytest.raises(StoreError, match="holds other files"):
        Store(other)
    assert sorted(os.listdir(other)) == ["thesis.tex"]

    garbage = tmp_path / "garbage"
    garbage.mkdir()
    (garbage / schema.NAME).write_bytes(b"not a database at all" * 100)
    with pytest.raises(StoreError, match="not a database of this program"):
        Store(garbage)

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with sqlite3.connect(foreign / schema.NAME) as connection:
        connection.execute("CREATE TABLE runs (a)")
    before = (foreign / schema.NAME).read_bytes()
    with pytest.raises(StoreError, match="another program"):
        Store(foreign)
    assert (foreign / schema.NAME).read_bytes() == before


def test_a_damaged_store_says_how_its_results_are_found_again(tmp_path):
    root = tmp_path / "s"
    with Store(root) as store:
        store.add("sweep", configs(40), tier="smoke")
    assert work(root, lambda config, out: {"value": 1}) == {"done": 40}
    content = (root / schema.NAME).read_bytes()
    (root / schema.NAME).write_bytes(content[: len(content) // 2])
    for kind in (Store, Reader):
        with pytest.raises(StoreError, match="found again in runs/"):
            kind(root).rows()
    for path in root.glob(f"{schema.NAME}*"):  # as the message says
        path.rename(tmp_path / path.name)
    with Store(root) as store:
        store.add("sweep", configs(40), tier="smoke")
    assert work(root, lambda config, out: {"value": 2}) == {"adopted": 40}


def test_any_name_of_a_directory_is_read_where_it_was_written(tmp_path):
    root = tmp_path / "a%20b#c?d"
    with Store(root) as store:
        store.add("sweep", configs(2), tier="smoke")
    with Reader(root) as store:
        assert len(store.rows("sweep")) == 2
    assert os.listdir(tmp_path) == [root.name]


def test_an_empty_file_is_no_store_to_read(tmp_path):
    (tmp_path / schema.NAME).write_bytes(b"")
    with pytest.raises(StoreError, match="there is none"):
        Reader(tmp_path)


def test_the_heart_beats_on_after_a_store_that_could_not_be_opened(tmp_path, monkeypatch):
    root, refusals = tmp_path / "s", [1]
    with Store(root) as store:
        store.add("sweep", configs(1), tier="smoke")
        claim = store.claim(Owner.current().text, lease=0.6)
        assert claim is not None
        before = store.rows()[0].lease

        def opened(path: Path) -> Store:
            if refusals:
                refusals.pop()
                raise StoreError("the disk is full")
            return Store(path)

        monkeypatch.setattr(worker, "Store", opened)
        with worker.Heart(root, claim, lease=0.6, parent=None).beating():
            while store.rows()[0].lease == before:
                time.sleep(0.05)
        assert not refusals


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_run_that_is_told_to_stop_is_given_back(tmp_path, stop):
    def runner(config: RunConfig, out: Path) -> dict[str, object]:
        raise stop

    with Store(tmp_path / "s") as store:
        store.add("sweep", configs(1), tier="smoke")
    with pytest.raises(stop):
        work(tmp_path / "s", runner)
    with Reader(tmp_path / "s") as store:
        assert store.counts()["queued"] == 1
        assert [attempt["outcome"] for attempt in store.attempts(configs(1)[0].key)] == ["released"]


def test_unwritable_and_missing_stores_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        Store(tmp_path / "file" / "store")
    with pytest.raises(StoreError, match="there is none"):
        Reader(tmp_path / "nothing")
    if os.getuid() == 0:
        pytest.skip("root may write anywhere: the permission bits cannot be tested")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(StoreError, match="cannot be written"):
        Store(locked)


def test_a_store_of_version_1_migrates_with_its_results(tmp_path):
    root = tmp_path / "old"
    (root / "runs").mkdir(parents=True)
    runs = configs(3)
    with sqlite3.connect(root / schema.NAME) as connection:
        for statement in schema.TABLES[:4]:
            old = statement.replace(",\n       interruptions INTEGER NOT NULL DEFAULT 0", "")
            connection.execute(old.replace(" variant TEXT NOT NULL DEFAULT '',", ""))
        connection.execute("INSERT INTO sweeps VALUES ('sweep', 'smoke', '', '', 1.0)")
        for position, run in enumerate(runs):
            state = ("done", "failed", "queued")[position]
            values = (
                run.key,
                json.dumps(run.to_dict()),
                run.label,
                state,
                int(position == 1),
                int(position < 2),
            )
            connection.execute(
                "INSERT INTO runs (key, config, label, state, failures, attempt) VALUES (?,?,?,?,?,?)", values
            )
            connection.execute("INSERT INTO members VALUES ('sweep', ?, ?)", (position, run.key))
        connection.execute("UPDATE runs SET record = '{\"x\": 1}' WHERE state = 'done'")
        connection.execute(f"PRAGMA application_id = {schema.APPLICATION}")
        connection.execute("PRAGMA user_version = 1")
    assert "interruptions" not in connection.execute("SELECT sql FROM sqlite_master WHERE name = 'runs'").fetchone()[0]
    connection.close()
    with pytest.raises(StoreError, match="migrates it to 2"):
        Reader(root)
    with Store(root) as store:
        assert [row.state for row in store.rows("sweep")] == ["done", "failed", "queued"]
        assert store.rows("sweep")[0].record == {"x": 1}
        assert [attempt["outcome"] for attempt in store.attempts(runs[1].key)] == ["failed"]
        claim = store.claim(Owner.current().text)
        assert claim is not None
        assert claim.key == runs[2].key
    with Reader(root) as store:
        assert len(store.rows()) == 3


def test_a_newer_store_is_refused(tmp_path):
    with Store(tmp_path / "s"):
        pass
    with sqlite3.connect(tmp_path / "s" / schema.NAME) as connection:
        connection.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    connection.close()
    with pytest.raises(StoreError, match="newer than this code"):
        Store(tmp_path / "s")


def test_edited_settings_leave_a_sweep_and_new_seeds_join_it(tmp_path):
    with Store(tmp_path / "s") as store:
        store.add("sweep", configs(2), tier="smoke")
        store.add("sweep", [run.replace(train={"seed": 1}) for run in configs(2)], tier="smoke")
        assert len(store.rows("sweep")) == 4
        store.add("sweep", configs(1), tier="smoke")  # an activation was taken out of the file; seed 1 has it yet
        assert sorted(row.config.train["seed"] for row in store.rows("sweep")) == [0, 1, 1]
        store.add("sweep", configs(2, epochs=5), tier="smoke")
        assert len(store.rows("sweep")) == 2
        assert len(store.rows()) == 6


def test_storable_is_strict_json():
    assert storable({"a": [1.0, float("inf"), {"b": float("nan")}], 2: (True, None)}) == {
        "a": [1.0, None, {"b": None}],
        "2": [True, None],
    }


def test_a_thousand_runs_are_listed(tmp_path):
    with Store(tmp_path / "s") as store:
        store.add("sweep", configs(1000), tier="smoke")
        owner = Owner.current().text
        for _ in range(20):
            claim = store.claim(owner, sweep="sweep")
            assert claim is not None
            assert store.finish(claim, {"x": 1}, 1.0)
        assert len(store.rows("sweep")) == 1000


def shares(value: float = 0.5) -> dict[str, object]:
    return {"clean_accuracy": {"value": value, "low": 0.25, "high": 0.75, "samples": 4}}


def edited(root: Path, key: str, column: str, change) -> None:
    connection = sqlite3.connect(root / schema.NAME)
    (old,) = connection.execute(f"SELECT {column} FROM runs WHERE key = ?", (key,)).fetchone()
    connection.execute(f"UPDATE runs SET {column} = ? WHERE key = ?", (change(old), key))
    connection.commit()
    connection.close()


def test_a_damaged_row_is_named_and_the_others_go_on(tmp_path, capsys):
    """An accuracy of 750%, with its seal and without, a record that is no JSON, a configuration of another key."""
    from rich.console import Console

    from experiments.sweep import export, status

    runs, root = configs(8), tmp_path / "s"
    with Store(root) as store:
        store.add("smoke/figure3", runs, tier="smoke", figure="figure3")
    assert work(root, lambda config, out: shares()) == {"done": 8}

    def without_seal(text: str) -> str:
        record = json.loads(text)
        del record["sha256"]
        return json.dumps(record)

    edited(root, runs[1].key, "record", lambda text: text.replace("0.5", "7.5"))
    edited(root, runs[2].key, "record", lambda text: without_seal(text).replace("0.5", "7.5"))
    edited(root, runs[3].key, "record", lambda text: text[:-5])
    edited(root, runs[4].key, "config", lambda text: text.replace("rct:4", "rct:5"))
    edited(root, runs[5].key, "record", without_seal)  # as records were before they had one: read, and marked
    bad = {run.key for run in runs[1:5]}
    with Reader(root) as reader:
        rows = reader.rows("smoke/figure3")
        assert {row.key for row in rows if row.state == "damaged"} == bad
        assert [row.sealed for row in rows].count(False) == 1
        reasons = [row.error for row in rows if row.state == "damaged"]
        for word, reason in zip(("sha256", "value is 7.5", "no JSON", "its key"), reasons, strict=True):
            assert word in reason
        told = Console(width=200, file=io.StringIO(), record=True)
        told.print(status.render(reader, records=True))
        told.print(status.listing(rows))
        assert "damaged" in told.export_text()
        line = export.publish(reader, "smoke/figure3", tmp_path / "r")
        assert "4 runs, 4 missing, 4 of them damaged" in line
        assert "1 recorded without a checksum" in line
    assert len(export.read(tmp_path / "r" / "smoke" / "figure3.json").runs) == 4
    calls: list[str] = []
    with Store(root) as store:
        assert {row.key for row in store.requeue_damaged("smoke/figure3")} == bad - {runs[4].key}
    # Their own files are whole, and are taken up; the run whose configuration is lost stays named.
    assert work(root, lambda config, out: calls.append(config.key) or shares()) == {"adopted": 3}
    assert calls == []
    with Reader(root) as reader:
        assert [row.state for row in reader.rows("smoke/figure3")].count("done") == 7


def test_a_result_file_that_was_edited_is_not_adopted(tmp_path):
    (run,) = configs(1)
    write_result(tmp_path, run, shares(), 1.0)
    assert read_result(tmp_path, run) == (shares(), 1.0)
    path = tmp_path / "result.json"
    path.write_text(path.read_text().replace("0.5", "0.6"))
    assert read_result(tmp_path, run) is None


def test_an_export_says_which_line_was_edited_and_reads_older_ones(tmp_path):
    from experiments.sweep import export

    runs, root = configs(2), tmp_path / "s"
    with Store(root) as store:
        store.add("smoke/figure3", runs, tier="smoke", figure="figure3")
    work(root, lambda config, out: shares())
    with Reader(root) as reader:
        export.publish(reader, "smoke/figure3", tmp_path)
    path = tmp_path / "smoke" / "figure3.json"
    text = path.read_text()
    assert [run.sealed for run in export.read(path).runs] == [True, True]
    path.write_text(text.replace('"value": 0.5', '"value": 0.6', 1))
    with pytest.raises(ConfigurationError, match=f"run {runs[0].key[:8]} is damaged: not what was written"):
        export.read(path)
    content = json.loads(text)
    for entry in content["runs"]:
        del entry["sha256"]
    path.write_text(json.dumps(content))
    assert [run.sealed for run in export.read(path).runs] == [False, False]
    content["runs"][1]["record"]["clean_accuracy"]["value"] = 7.5
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigurationError, match=r"value is 7\.5"):
        export.read(path)
