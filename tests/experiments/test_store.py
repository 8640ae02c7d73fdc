"""The store: claims, failures, foreign, damaged and old files, full disks; one process at a time."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from experiments.__main__ import main
from experiments.fields import storable
from experiments.sweep import export, status
from experiments.sweep.files import held, read_result, write_result
from experiments.sweep.keys import RunConfig, canonical
from experiments.sweep.reader import MARK, Reader
from experiments.sweep.seals import DamagedError
from experiments.sweep.store import Store
from experiments.sweep.worker import work
from hessdiag.errors import ConfigurationError, StoreError
from hessdiag.store.files import replace_file


def configs(number: int, **extra: object) -> list[RunConfig]:
    return [RunConfig({"method": "fake", "activation": f"rct:{i}", "seed": 0, **extra}) for i in range(number)]


def killed(root: Path) -> None:
    """A process that takes a run and dies with it."""
    code = (
        "import os, signal, sys; from experiments.sweep.store import Store;"
        "assert Store(sys.argv[1]).claim(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(root)], check=False).returncode == -9


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
    one, two = Store(tmp_path / "s"), Store(tmp_path / "s")
    one.add("sweep", configs(3), tier="smoke")
    two.add("sweep", configs(4), tier="smoke")
    claims = [one.claim(), two.claim(), one.claim(), two.claim()]
    assert len({claim.config.key for claim in claims if claim}) == 4
    assert one.claim() is None
    assert claims[0] is not None
    assert claims[0].config.train["activation"] == "rct:0"
    claims[0].finish({"x": 1.5, "bad": float("nan")}, 2.0)
    row = two.rows("sweep")[0]
    assert (row.state, row.record, row.seconds) == ("done", {"x": 1.5, "bad": None}, 2.0)
    assert two.counts("sweep") == {"done": 1, "running": 3, "queued": 0, "failed": 0}


def test_the_dead_are_taken_from_at_once_and_the_stalled_never_whatever_the_clock_says(tmp_path, monkeypatch):
    store = Store(tmp_path / "s")
    store.add("sweep", configs(1), tier="smoke")
    (run,) = configs(1)
    killed(tmp_path / "s")
    assert store.counts()["queued"] == 1
    claim = store.claim()
    assert claim is not None
    assert len(claim.tried) == 2
    for jump in (1e9, -1e9):
        now = time.time() + jump
        monkeypatch.setattr(time, "time", lambda now=now: now)
        assert Store(tmp_path / "s").claim() is None  # alive on this machine, however long it stalls
        assert store.counts()["running"] == 1
    claim.release("test")
    again = store.claim()
    assert again is not None
    assert [attempt["outcome"] for attempt in store.attempts(run.key)] == ["interrupted", "released", None]
    again.finish({}, 1.0)
    assert [attempt["outcome"] for attempt in store.attempts(run.key)] == ["interrupted", "released", "done"]


def test_who_only_looks_takes_no_run(tmp_path):
    """A reader that asks at the same moment whether a run is held does not keep a worker from it."""
    store = Store(tmp_path / "s")
    store.add("sweep", configs(1), tier="smoke")
    folder = store.folder(configs(1)[0].key)
    folder.mkdir()
    looking = [True]

    def look() -> None:
        while looking:
            assert held(folder) in (True, False)

    (folder / "lock").touch()
    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(50):
            claim = store.claim()
            assert claim is not None
            claim.release("test")
    finally:
        looking.clear()
        thread.join()


def test_failures_keep_their_error_and_are_retried_as_often_as_asked(tmp_path):
    calls: list[str] = []

    def runner(config: RunConfig, out: Path) -> dict[str, object]:
        calls.append(config.key)
        raise ValueError("the reason")

    store = Store(tmp_path / "s")
    store.add("sweep", configs(2), tier="smoke")
    assert work(tmp_path / "s", runner, sweep="sweep") == {"failed": 2}
    assert len(calls) == 2
    assert work(tmp_path / "s", runner, sweep="sweep") == {}
    assert work(tmp_path / "s", runner, sweep="sweep", retries=2) == {"failed": 4}
    assert work(tmp_path / "s", runner, sweep="sweep", retries=2) == {}
    store = Reader(tmp_path / "s")
    row = store.rows("sweep")[0]
    assert row.failures == 3
    assert row.error is not None
    assert row.error.startswith("ValueError: the reason")
    assert "runner" in row.error


def test_a_run_that_kills_its_workers_ends_as_failed(tmp_path):
    store = Store(tmp_path / "s")
    store.add("sweep", configs(1), tier="smoke")
    for _ in range(3):
        claim = store.claim(interruptions=3)
        assert claim is not None
        claim.let_go()  # as the kernel does for a process that dies
    assert store.claim(interruptions=3) is None
    row = store.rows()[0]
    assert (row.state, row.failures) == ("failed", 1)
    assert "died 3 times" in str(row.error)


def test_a_result_on_disk_is_the_runs_result_and_a_torn_or_foreign_one_is_done_again(tmp_path):
    runs = configs(4)
    calls: list[str] = []

    def runner(config: RunConfig, out: Path) -> dict[str, object]:
        calls.append(config.key)
        return {"value": config.train["activation"]}

    store = Store(tmp_path / "s")
    for run in runs[:3]:
        store.folder(run.key).mkdir()
    write_result(store.folder(runs[0].key), runs[0], {"value": "kept"}, 5.0)
    write_result(store.folder(runs[1].key), runs[3], {"value": "foreign"}, 5.0)
    (store.folder(runs[2].key) / "result.json").write_text('{"key": "' + runs[2].key + '", "rec')
    store.add("sweep", runs, tier="smoke")
    reasons = [row.error for row in store.requeue_damaged("sweep")]
    assert "of another configuration" in str(reasons[0])
    assert "no JSON" in str(reasons[1])
    assert work(tmp_path / "s", runner) == {"done": 3}
    assert calls == [run.key for run in runs[1:]]
    assert [row.record["value"] for row in store.rows()] == ["kept", "rct:1", "rct:2", "rct:3"]
    assert (store.folder(runs[2].key) / "damaged.json").exists()


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

    store = Store(tmp_path / "s")
    store.add("sweep", configs(2), tier="smoke")
    with pytest.raises(StoreError, match="disk is full"):
        work(tmp_path / "s", full)
    store = Reader(tmp_path / "s")
    assert store.counts() == {"queued": 2, "running": 0, "done": 0, "failed": 0}
    assert work(tmp_path / "s", runner) == {"done": 2}


def test_foreign_stores_are_refused(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    with pytest.raises(StoreError, match="holds other files"):
        Store(other)
    assert sorted(os.listdir(other)) == ["thesis.tex"]

    garbage = tmp_path / "garbage"
    garbage.mkdir()
    (garbage / MARK).write_bytes(b"not one of ours at all" * 100)
    with pytest.raises(StoreError, match="is no JSON; choose another directory"):
        Store(garbage)


def test_a_damaged_sweep_is_named_and_written_anew_and_loses_no_result(tmp_path):
    root = tmp_path / "s"
    store = Store(root)
    store.add("sweep", configs(40), tier="smoke")
    assert work(root, lambda config, out: {"value": 1}) == {"done": 40}
    path = root / "sweeps" / "sweep.json"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(StoreError, match="what is finished in runs/ is kept"):
        Reader(root).rows()
    store.add("sweep", configs(40), tier="smoke")  # as the message says
    assert work(root, lambda config, out: {"value": 2}) == {}
    assert [row.record for row in store.rows("sweep")] == [{"value": 1}] * 40


def test_any_name_of_a_directory_is_read_where_it_was_written(tmp_path):
    root = tmp_path / "a%20b#c?d"
    store = Store(root)
    store.add("sweep", configs(2), tier="smoke")
    store = Reader(root)
    assert len(store.rows("sweep")) == 2
    assert os.listdir(tmp_path) == [root.name]


def test_a_store_whose_folder_goes_loses_nothing_that_was_finished(tmp_path):
    root = tmp_path / "s"
    store = Store(root)
    store.add("sweep", configs(3), tier="smoke")
    claims = [store.claim(), store.claim()]
    assert claims[0] is not None
    claims[0].finish({"value": 0}, 1.0)
    root.rename(tmp_path / "elsewhere")
    assert claims[1] is not None
    claims[1].finish({"value": 1}, 1.0)
    for ask in (store.claim, store.counts, store.remaining, store.rows):
        with pytest.raises(StoreError, match="no longer there"):
            ask()
    with pytest.raises(StoreError, match="no longer there"):
        Store(root, make=False)
    again = Store(root)  # begun anew
    again.add("sweep", configs(3), tier="smoke")
    assert [row.record for row in again.rows()] == [None, {"value": 1}, None]
    with pytest.raises(StoreError, match="no longer there"):  # another store has its name
        store.counts()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_run_that_is_told_to_stop_is_given_back(tmp_path, stop):
    def runner(config: RunConfig, out: Path) -> dict[str, object]:
        raise stop

    store = Store(tmp_path / "s")
    store.add("sweep", configs(1), tier="smoke")
    with pytest.raises(stop):
        work(tmp_path / "s", runner)
    store = Reader(tmp_path / "s")
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


def test_a_store_of_the_form_before_is_listed_and_exported_and_not_written(tmp_path, capsys):
    """Rows in SQLite, results in runs/: as the code before wrote them."""
    runs, root = configs(3), tmp_path / "old"
    connection = sqlite3.connect(tmp_path / "rows")
    connection.execute("CREATE TABLE sweeps (name, tier, figure, title, added)")
    connection.execute("CREATE TABLE runs (key, config, label, state, record)")
    connection.execute("CREATE TABLE members (sweep, position, key, variant)")
    connection.execute("INSERT INTO sweeps VALUES ('smoke/figure3', 'smoke', 'figure3', 'a title', 1.0)")
    for position, run in enumerate(runs):
        connection.execute("INSERT INTO runs VALUES (?, ?, '', 'done', NULL)", (run.key, json.dumps(run.to_dict())))
        connection.execute("INSERT INTO members VALUES ('smoke/figure3', ?, ?, 'v')", (2 - position, run.key))
    connection.commit()
    connection.close()
    for run in runs[:2]:
        (root / "runs" / run.key).mkdir(parents=True)
        write_result(root / "runs" / run.key, run, shares(), 1.0)
    (tmp_path / "rows").rename(root / "store.sqlite")
    before = sorted(root.rglob("*"))
    store = Reader(root)
    assert [row.key for row in store.rows("smoke/figure3")] == [run.key for run in runs[::-1]]
    assert [row.state for row in store.rows()] == ["queued", "done", "done"]
    assert main(["status", "--store", str(root), "--list"]) == 0
    assert "2/3" in capsys.readouterr().out
    assert "(2 runs, 1 missing)" in export.publish(store, "smoke/figure3", tmp_path / "r")
    assert [run.variant for run in export.read(tmp_path / "r" / "smoke" / "figure3.json").runs] == ["v", "v"]
    with pytest.raises(StoreError, match="of the form before"):
        Store(root)
    assert sorted(root.rglob("*")) == before


def test_a_newer_store_is_refused(tmp_path):
    Store(tmp_path / "s")
    (tmp_path / "s" / MARK).write_text('{"form": "hessdiag-store/4"}')
    for kind in (Store, Reader):
        with pytest.raises(StoreError, match="'hessdiag-store/4', where this code knows hessdiag-store/3; update the"):
            kind(tmp_path / "s")


def test_edited_settings_leave_a_sweep_and_new_seeds_join_it(tmp_path):
    store = Store(tmp_path / "s")
    store.add("sweep", configs(2), tier="smoke")
    store.add("sweep", [run.replace(train={"seed": 1}) for run in configs(2)], tier="smoke")
    assert len(store.rows("sweep")) == 4
    store.add("sweep", configs(1), tier="smoke")  # an activation was taken out of the file; seed 1 has it yet
    assert sorted(row.config.train["seed"] for row in store.rows("sweep")) == [0, 1, 1]
    store.add("sweep", configs(2, epochs=5), tier="smoke")
    assert len(store.rows("sweep")) == 2


def test_storable_is_strict_json():
    assert storable({"a": [1.0, float("inf"), {"b": float("nan")}], 2: (True, None)}) == {
        "a": [1.0, None, {"b": None}],
        "2": [True, None],
    }


def test_a_thousand_runs_are_listed(tmp_path):
    store = Store(tmp_path / "s")
    store.add("sweep", configs(1000), tier="smoke")
    for _ in range(20):
        claim = store.claim(sweep="sweep")
        assert claim is not None
        claim.finish({"x": 1}, 1.0)
    assert len(store.rows("sweep")) == 1000


def shares(value: float = 0.5) -> dict[str, object]:
    return {"clean_accuracy": {"value": value, "low": 0.25, "high": 0.75, "samples": 4}}


def edited(path: Path, change: Callable[[str], str]) -> None:
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))


def test_a_damaged_row_is_named_and_the_others_go_on(tmp_path, capsys):
    """An accuracy of 750%, with its seal and without, a record that is no JSON, a configuration of another key."""
    runs, root = configs(8), tmp_path / "s"
    store = Store(root)
    store.add("smoke/figure3", runs, tier="smoke", figure="figure3")
    assert work(root, lambda config, out: shares()) == {"done": 8}

    def result(number: int) -> Path:
        return store.folder(runs[number].key) / "result.json"

    def without_seal(text: str) -> str:
        return json.dumps({name: value for name, value in json.loads(text).items() if name != "sha256"})

    edited(result(1), lambda text: text.replace("0.5", "7.5"))
    edited(result(2), lambda text: without_seal(text).replace("0.5", "7.5"))
    edited(result(3), lambda text: text[:-5])
    edited(root / "sweeps" / "smoke" / "figure3.json", lambda text: text.replace("rct:4", "rct:5"))
    edited(result(5), without_seal)  # as records were before they had one: read, and marked
    bad = {run.key for run in runs[1:5]}
    reader = Reader(root)
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
    # What is damaged is done again; the run whose configuration is lost stays named until its sweep is given again.
    calls: list[str] = []
    assert {row.key for row in store.requeue_damaged("smoke/figure3")} == bad - {runs[4].key}
    assert work(root, lambda config, out: calls.append(config.key) or shares()) == {"done": 3}
    assert calls == [run.key for run in runs[1:4]]
    assert [row.state for row in reader.rows("smoke/figure3")].count("done") == 7
    store.add("smoke/figure3", runs, tier="smoke", figure="figure3")
    assert [row.state for row in reader.rows("smoke/figure3")].count("done") == 8


def test_a_result_file_that_was_edited_is_not_adopted(tmp_path):
    (run,) = configs(1)
    write_result(tmp_path, run, shares(), 1.0)
    assert read_result(tmp_path, run) == (shares(), 1.0, True)
    path = tmp_path / "result.json"
    path.write_text(path.read_text().replace("0.5", "0.6"))
    with pytest.raises(DamagedError, match="not what was written"):
        read_result(tmp_path, run)


def test_an_export_says_which_line_was_edited_and_reads_older_ones(tmp_path):
    runs, root = configs(2), tmp_path / "s"
    store = Store(root)
    store.add("smoke/figure3", runs, tier="smoke", figure="figure3")
    work(root, lambda config, out: shares())
    reader = Reader(root)
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
