"""Workers and drivers as processes: two drivers at once, SIGKILL at random moments, a disk that takes no
more.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import hessdiag
from experiments.sweep import local
from experiments.sweep.files import GoneError, read_result
from experiments.sweep.keys import RunConfig
from experiments.sweep.reader import Reader
from experiments.sweep.store import Store
from hessdiag.cli.exits import UNWRITTEN
from hessdiag.errors import ConfigurationError, StoreError

RUNNER = """
import os, time
from pathlib import Path

def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"

def note(out, word):
    line = f"{word} {out.name} {os.getpid()}\\n".encode()
    handle = os.open(out.parent.parent / "logs" / "events", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, line)
    os.close(handle)

def run_one(config, out):
    busy = out / "busy"
    if busy.exists() and int(busy.read_text() or 0) and alive(int(busy.read_text())):
        note(out, "TWICE")
    busy.write_text(str(os.getpid()))
    note(out, "start")
    time.sleep(config.train["sleep"])
    note(out, "end")
    busy.unlink()
    return {"value": config.train["number"] ** 2}

def run_held(config, out):
    note(out, "start")
    while (out.parent.parent / "logs" / "held").exists():
        time.sleep(0.01)
    return run_one(config, out)

def run_big(config, out):
    (out / "weights").write_bytes(b"x" * config.train["bytes"])
    return {"value": 1}

def run_apart(config, out):
    while os.path.exists(os.environ["HELD"]):
        time.sleep(0.01)
    return {"value": config.train["number"] ** 2}

def run_hungrily(config, out):
    if config.train["number"] == 1:
        with open(os.path.join(os.environ["GROUP"], "cgroup.procs"), "w") as group:
            group.write(str(os.getpid()))
        x = b"x" * (1 << 30)
    return {"value": config.train["number"] ** 2}

def run_at_odd_times(config, out):
    moments = iter([1e9, -1e9, 5.0, 1e12, 0.0] * 1000)
    time.time = lambda: next(moments)
    return run_one(config, out)

def run_fatally(config, out):
    os._exit(9)

def run_killed(config, out):
    os.kill(os.getpid(), 9)

def run_badly(config, out):
    os._exit(9) if config.train["number"] == 1 else None
    return {"value": config.train["number"] ** 2}
"""

DRIVER = """
import sys
from pathlib import Path
from experiments.sweep.local import Workers, execute
execute(Path(sys.argv[1]), sweep="sweep", workers=Workers(int(sys.argv[2])), runner=sys.argv[3],
        interruptions=int(sys.argv[4]), interval=0.05)
"""


@pytest.fixture
def house(tmp_path, monkeypatch):
    (tmp_path / "fakes").mkdir()
    (tmp_path / "fakes" / "fake_runs.py").write_text(RUNNER)
    (tmp_path / "fakes" / "driver.py").write_text(DRIVER)
    # The processes here need the engine's error classes alone: without torch they start in a tenth of the time.
    (tmp_path / "fakes" / "hessdiag").mkdir()
    light = f"__path__ = [{str(Path(hessdiag.__file__).parent)!r}]\n"
    (tmp_path / "fakes" / "hessdiag" / "__init__.py").write_text(light)
    paths = [str(tmp_path / "fakes"), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    return tmp_path


def fill(root: Path, number: int, **extra: object) -> list[RunConfig]:
    runs = [RunConfig({"number": i, "activation": "a", "seed": i, **extra}) for i in range(number)]
    store = Store(root)
    store.add("sweep", runs, tier="smoke")
    (root / "logs").mkdir(exist_ok=True)
    return runs


def drive(
    house: Path, root: Path, workers: int, runner: str = "run_one", interruptions: int = 1000
) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        str(house / "fakes" / "driver.py"),
        str(root),
        str(workers),
        f"fake_runs:{runner}",
    ]
    return subprocess.Popen([*command, str(interruptions)], cwd=house)


def events(root: Path) -> collections.Counter[tuple[str, str]]:
    lines = (root / "logs" / "events").read_text().splitlines()
    return collections.Counter((line.split()[0], line.split()[1]) for line in lines)


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def lives(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def wait_for_holders(root: Path, driver: subprocess.Popen[bytes]) -> list[int]:
    """The driver's workers that hold a run, as soon as there is one."""
    log = root / "logs" / "events"
    while True:
        began = {int(line.split()[2]) for line in log.read_text().splitlines()} if log.exists() else set()
        if found := [pid for pid in children(driver.pid) if pid in began and lives(pid)]:
            return found
        assert driver.poll() is None
        time.sleep(0.01)


def check_all_done(root: Path, runs: list[RunConfig]) -> None:
    """Every run is done, with the right value, in the store and on disk, recorded once, never run by two at
    once.
    """
    store = Reader(root)
    rows = store.rows("sweep")
    assert [row.state for row in rows] == ["done"] * len(runs)
    for run, row in zip(runs, rows, strict=True):
        assert row.record == {"value": run.train["number"] ** 2}
        assert read_result(store.folder(run.key), run)[0] == row.record
        assert [attempt["outcome"] for attempt in store.attempts(run.key)].count("done") == 1
        assert not list(store.folder(run.key).glob("*.tmp"))
    assert not [word for word, _ in events(root) if word == "TWICE"]


def test_two_drivers_on_one_store_do_every_run_once(house):
    root = house / "store"
    runs = fill(root, 24, sleep=0.05)
    drivers = [drive(house, root, 2) for _ in range(2)]
    assert [driver.wait() for driver in drivers] == [0, 0]
    check_all_done(root, runs)
    counted = events(root)
    assert all(counted["start", run.key] == 1 and counted["end", run.key] == 1 for run in runs)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find the workers")
def test_sigkill_of_workers_and_drivers_loses_nothing(house):
    """Kills of the driver and of workers: of workers that hold a run, which no run ends before, and then at random
    moments, wherever they strike. No worker outlives its driver.
    """
    root, dice = house / "store", random.Random(6)
    runs = fill(root, 16, sleep=0.1)
    held = root / "logs" / "held"
    held.touch()
    driver = drive(house, root, 2, "run_held")
    orphans: list[int] = []
    hits = kills = 0
    while kills < 10:
        if hits == 4:
            held.unlink(missing_ok=True)
        victims = wait_for_holders(root, driver) if held.exists() else children(driver.pid)
        time.sleep(dice.random() * 0.4)
        if kills % 3 == 2:
            orphans += children(driver.pid)
            driver.kill()
            driver.wait()
            driver = drive(house, root, 2, "run_held")
        elif victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(dice.choice(victims), signal.SIGKILL)
                hits += held.exists()
        kills += not held.exists() or kills < 4  # the fifth comes when four have hit a worker that held a run
    assert driver.wait() == 0
    check_all_done(root, runs)
    store = Reader(root)
    outcomes = [attempt["outcome"] for run in runs for attempt in store.attempts(run.key)]
    assert outcomes.count("interrupted") >= hits
    while any(lives(pid) for pid in orphans):  # else the test's own limit ends it
        time.sleep(0.05)


def test_a_run_that_ends_its_process_fails_alone(house):
    root = house / "store"
    runs = fill(root, 3)
    assert drive(house, root, 1, "run_badly", interruptions=2).wait() == 0
    store = Reader(root)
    assert [row.state for row in store.rows("sweep")] == ["done", "failed", "done"]
    assert len(store.attempts(runs[1].key)) == 2


def test_a_worker_that_is_killed_is_told_with_its_run(house, monkeypatch):
    monkeypatch.chdir(house)
    (run,) = fill(house / "store", 1)
    told: list[str] = []
    options = {"runner": "fake_runs:run_killed", "interruptions": 2, "interval": 0.02, "tell": told.append}
    counts = local.execute(house / "store", sweep="sweep", workers=local.Workers(1), **options)
    assert counts["failed"] == 1
    assert len(told) == 2
    for number, line in enumerate(told, start=1):
        assert line.startswith("worker 0 was killed (SIGKILL")
        assert f"while it did {run.key[:8]}" in line
        assert line.endswith(f": {number} of at most 2 times")


@pytest.fixture
def group() -> Iterator[Path]:
    """A group of processes to which the kernel gives 64 MB; what needs more is killed."""
    for root, limit in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
        folder = Path("/sys/fs/cgroup", root, f"hessdiag-{os.getpid()}")
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            if (folder / limit).exists():
                (folder / limit).write_text(str(64 << 20))
                yield folder
                return
        finally:
            folder.rmdir()
    pytest.skip("no group of processes with a limit of memory can be made here")


def test_a_worker_that_the_kernel_kills_for_memory_is_told_and_the_rest_goes_on(house, group, monkeypatch):
    root = house / "store"
    runs = fill(root, 4)
    monkeypatch.chdir(house)
    monkeypatch.setenv("GROUP", str(group))
    told: list[str] = []
    options = {"runner": "fake_runs:run_hungrily", "interruptions": 2, "interval": 0.05, "tell": told.append}
    counts = local.execute(root, sweep="sweep", workers=local.Workers(1), **options)
    assert (counts["done"], counts["failed"]) == (3, 1)
    assert len(told) == 2
    for number, line in enumerate(told, start=1):
        assert line.startswith("worker 0 was killed (SIGKILL: the kernel has killed ")
        assert "fewer --workers" in line
        assert f"while it did {runs[1].key[:8]}" in line
        assert line.endswith(f"{number} of at most 2 times")
    (failed,) = (row for row in Reader(root).rows("sweep") if row.state == "failed")
    assert failed.key == runs[1].key
    assert "memory?" in (failed.error or "")


@pytest.mark.parametrize("fate", ["removed", "moved"])
def test_a_store_whose_folder_vanishes_is_told_and_what_is_under_way_is_kept(house, monkeypatch, fate):
    """Two runs are under way when the folder goes: no empty store takes its place, and their results are in `runs/`."""
    root, held, aside = house / "store", house / "held", house / "aside"
    runs = fill(root, 3)
    held.touch()
    monkeypatch.chdir(house)
    monkeypatch.setenv("HELD", str(held))
    raised: list[StoreError] = []

    def work(count: int) -> dict[str, int]:
        return local.execute(
            root, sweep="sweep", workers=local.Workers(count), runner="fake_runs:run_apart", interval=0.05
        )

    def drive() -> None:
        try:
            work(2)
        except StoreError as error:
            raised.append(error)

    driver = threading.Thread(target=drive)
    driver.start()
    while len(list(root.glob("runs/*/config.json"))) < 2:
        time.sleep(0.02)
    root.rename(aside)
    if fate == "removed":
        shutil.rmtree(aside)
    time.sleep(1.0)
    assert not root.exists()
    held.unlink()
    driver.join()
    (error,) = raised
    assert isinstance(error, GoneError)
    assert "no longer there" in str(error)
    assert "\n" not in str(error)
    assert sorted(path.name for path in (root / "runs").iterdir()) == sorted(run.key for run in runs[:2])
    if fate == "moved":
        shutil.rmtree(root)
        aside.rename(root)
    else:
        fill(root, 3)
    assert work(1)["done"] == 3
    store = Reader(root)
    assert [row.record for row in store.rows("sweep")] == [{"value": 0}, {"value": 1}, {"value": 4}]


def test_clocks_that_jump_change_nothing(house, monkeypatch):
    """Every worker's clock of the day jumps by decades at every look; each run is done once."""
    root = house / "store"
    runs = fill(root, 6, sleep=0.1)
    monkeypatch.chdir(house)
    counts = local.execute(
        root, sweep="sweep", workers=local.Workers(2), runner="fake_runs:run_at_odd_times", interval=0.05
    )
    assert counts["done"] == 6
    counted = events(root)
    assert all(counted["start", run.key] == 1 for run in runs)


TRUE = {
    **{"method": "n_fgsm", "network": "mlp", "network_options": {"widths": [4]}, "data": "digits", "eps": "0.15"},
    **{"epochs": 3, "train_samples": 200, "augment": {"crop": 0, "flip": False}, "watch": {"samples": 8}},
}
LOOK = {"samples": 8, "batch_size": 8, "rtol": 10.0, "splits": ["test"], "losses": ["clean"], "plugin_probes": 0}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find the workers")
def test_sigkill_of_workers_that_train_attack_and_measure_loses_nothing(tmp_path):
    """The runner of every sweep, killed wherever it stands: the records are those of an undisturbed sweep, to the bit."""
    from experiments.sweep.settings import complete

    def sweep(root: Path) -> list[RunConfig]:
        runs = [
            complete(RunConfig({**TRUE, "activation": f"rct:beta=1,alpha={a}"}, {"aa2_samples": 20}, LOOK))
            for a in (1, 2, 4)
        ]
        Store(root).add("sweep", runs, tier="smoke")
        (root / "logs").mkdir(exist_ok=True)
        return runs

    def numbers(root: Path) -> list[object]:
        dropped = ("seconds", "provenance", "train_seconds", "images_per_second")

        def kept(value: object) -> object:
            if isinstance(value, dict):
                return {key: kept(item) for key, item in value.items() if key not in dropped}
            return value

        return [kept(row.record) for row in Reader(root).rows("sweep")]

    def start(root: Path) -> subprocess.Popen[bytes]:
        code = DRIVER.replace("runner=sys.argv[3],", "runner='experiments.sweep.run:run_one',")
        return subprocess.Popen([sys.executable, "-c", code, str(root), "1", "", "1000"])

    whole, struck = tmp_path / "whole", tmp_path / "struck"
    sweep(whole)
    assert start(whole).wait() == 0
    sweep(struck)
    dice, kills = random.Random(3), 0
    driver = start(struck)
    while kills < 18:
        while driver.poll() is None and all(row.state != "running" for row in Reader(struck).rows("sweep")):
            time.sleep(0.05)
        time.sleep(dice.random() * 1.5)
        if driver.poll() is not None:
            break  # all are done
        if kills % 6 == 5:
            driver.kill()
            driver.wait()
            driver = start(struck)
        for victim in children(driver.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        kills += 1
    assert driver.wait() == 0
    assert None not in numbers(whole)
    assert numbers(struck) == numbers(whole)
    outcomes = [one["outcome"] for row in Reader(struck).rows("sweep") for one in Reader(struck).attempts(row.key)]
    print(f"{kills} kills, of which {outcomes.count('interrupted')} struck a run; {outcomes.count('done')} done")
    assert outcomes.count("interrupted") >= 5


def test_runs_that_always_end_their_process_fail_after_ten_times_and_end_no_sweep(house):
    """One worker, started 20 times: none of its deaths is taken for a worker that cannot start."""
    root = house / "store"
    runs = fill(root, 2)
    assert drive(house, root, 1, "run_fatally", interruptions=10).wait() == 0
    store = Reader(root)
    assert [row.state for row in store.rows("sweep")] == ["failed", "failed"]
    assert [len(store.attempts(run.key)) for run in runs] == [10, 10]


def test_workers_that_die_before_they_take_a_run_end_the_sweep(house, monkeypatch):
    (house / "fakes" / "broken_runs.py").write_text("raise RuntimeError('the library is broken')")
    monkeypatch.chdir(house)
    fill(house / "store", 2)
    with pytest.raises(
        StoreError, match=r"before they take a run; the last said: .*RuntimeError: the library is broken"
    ):
        local.execute(
            house / "store", sweep="sweep", workers=local.Workers(1), runner="broken_runs:run_one", interval=0.02
        )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_is_told_though_the_log_lies_on_it(house, monkeypatch):
    """/dev/full takes no byte: the worker says by its exit code what it cannot write, and the driver tells it."""
    monkeypatch.delenv(
        "PYTHONUNBUFFERED", raising=False
    )  # a buffer that cannot be emptied changes a process's exit code
    root = house / "store"
    fill(root, 2)
    (house / "fakes" / "full_runs.py").write_text(
        "import errno\n\ndef run_one(config, out):\n    raise OSError(errno.ENOSPC, 'No space left on device')\n"
    )
    command = [sys.executable, "-m", "experiments.sweep.worker", str(root), "--runner", "full_runs:run_one"]
    with open("/dev/full", "wb") as full:
        assert subprocess.run(command, stderr=full, cwd=house, check=False).returncode == UNWRITTEN
    (root / "logs" / "worker-0.log").symlink_to("/dev/full")
    monkeypatch.chdir(house)
    with pytest.raises(StoreError, match="the disk is full; free space"):
        local.execute(root, sweep="sweep", workers=local.Workers(1), runner="full_runs:run_one", interval=0.05)
    store = Reader(root)
    assert store.counts()["queued"] == 2


def test_a_process_that_may_write_no_more_stops_with_one_line(house):
    """RLIMIT_FSIZE makes the kernel refuse bytes (EFBIG), as a full disk does (ENOSPC)."""
    root = house / "store"
    fill(root, 2, bytes=3_000_000)
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000));"
        "from experiments.sweep.worker import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, str(root), "--runner", "fake_runs:run_big"]
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=house)
    assert process.returncode == UNWRITTEN
    assert "disk is full" in process.stderr
    assert len(process.stderr.strip().splitlines()) == 1
    store = Reader(root)
    assert store.counts()["queued"] == 2
    assert drive(house, root, 1, "run_big").wait(60) == 0
    store = Reader(root)
    assert store.counts()["done"] == 2


def test_workers_that_cannot_start_are_not_started_for_ever(house, monkeypatch):
    root = house / "store"
    monkeypatch.chdir(house)
    fill(root, 2)
    with pytest.raises(StoreError, match="no_such_module"):
        local.execute(root, sweep="sweep", workers=local.Workers(1), runner="no_such_module:run_one")


def test_plans_pin_threads_and_spread_over_gpus(monkeypatch):
    monkeypatch.setattr(local, "visible_gpus", lambda: ("0", "1"))
    monkeypatch.setattr(local, "cores_here", lambda: 16)
    plan = local.Workers.plan(per_gpu=3)
    assert (plan.count, plan.threads) == (6, 2)
    assert [plan.environment(i)["CUDA_VISIBLE_DEVICES"] for i in range(4)] == ["0", "1", "0", "1"]
    monkeypatch.setattr(local, "visible_gpus", lambda: ())
    plan = local.Workers.plan()
    assert (plan.count, plan.threads) == (16, 1)
    assert plan.environment(0)["OMP_NUM_THREADS"] == "1"
    assert local.Workers.plan(threads=4).count == 4
    with pytest.raises(ConfigurationError, match="--workers 0"):
        local.Workers.plan(workers=0)


@pytest.mark.parametrize(
    ("said", "seen", "expected"),
    [
        (None, 2, ("0", "1")),
        ("", 0, ()),
        ("-1", 0, ()),
        ("5, 2", 2, ("5", "2")),
        ("GPU-abc,GPU-def", 2, ("GPU-abc", "GPU-def")),
        ("3,-1,2", 1, ("3",)),  # CUDA ends the list at the first name that is none
    ],
)
def test_workers_are_pinned_to_the_gpus_that_this_process_may_use(monkeypatch, said, seen, expected):
    import torch

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if said is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    assert local.visible_gpus() == expected
    plan = local.Workers.plan(per_gpu=2)
    if expected:
        assert plan.count == 2 * len(expected)
        pins = [plan.environment(index)["CUDA_VISIBLE_DEVICES"] for index in range(plan.count)]
        assert pins == [*expected, *expected]
    else:
        assert "CUDA_VISIBLE_DEVICES" not in plan.environment(0)


def test_records_survive_as_plain_json(house):
    root = house / "store"
    runs = fill(root, 1, sleep=0.0)
    assert drive(house, root, 1).wait(60) == 0
    content = json.loads((root / "runs" / runs[0].key / "result.json").read_text())
    assert content["config"] == json.loads((root / "runs" / runs[0].key / "config.json").read_text())
    assert content["record"] == {"value": 0}


def test_a_driver_of_some_seeds_leaves_the_others_queued(house: Path) -> None:
    runs = fill(house / "store", 4, sleep=0.0)
    wanted = local.execute(
        house / "store",
        sweep="sweep",
        seeds=[1, 3],
        workers=local.Workers(2),
        runner="fake_runs:run_one",
        interval=0.05,
    )
    assert (wanted["done"], wanted["queued"]) == (2, 2)
    reader = Reader(house / "store")
    assert {row.config.train["seed"] for row in reader.rows("sweep") if row.state == "done"} == {1, 3}
    check = local.execute(
        house / "store", sweep="sweep", workers=local.Workers(1), runner="fake_runs:run_one", interval=0.05
    )
    assert check["done"] == len(runs)
