"""A real Ray cluster of two nodes on this machine, one of which is killed while it works."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments.sweep import cluster
from experiments.sweep.files import read_result
from experiments.sweep.keys import RunConfig
from experiments.sweep.reader import Reader
from experiments.sweep.store import Store
from experiments.sweep.worker import load_runner, work
from hessdiag.errors import ConfigurationError

RUNNER = """
import os, time, random

def run_one(config, out):
    number = config.train["number"]
    time.sleep(config.train["sleep"])
    if config.train.get("bad") == number:
        raise ValueError("the reason")
    dice = random.Random(number)
    return {"value": number ** 2, "noise": [dice.random() for _ in range(5)]}
"""


@pytest.fixture
def house(tmp_path, monkeypatch):
    (tmp_path / "fakes").mkdir()
    (tmp_path / "fakes" / "fake_ray_runs.py").write_text(RUNNER)
    paths = [str(tmp_path / "fakes"), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.syspath_prepend(str(tmp_path / "fakes"))
    return tmp_path


def fill(root: Path, number: int, sleep: float, **extra: object) -> list[RunConfig]:
    runs = [RunConfig({"number": i, "activation": "a", "sleep": sleep, **extra}) for i in range(number)]
    store = Store(root)
    store.add("sweep", runs, tier="smoke")
    return runs


def test_without_ray_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigurationError, match="pip install"):
        cluster.connect(None)


@pytest.mark.slow
def test_two_nodes_one_killed_in_mid_sweep(house):
    """Every run ends done, with the numbers that the local executor gets; the lost ones were given to the
    other node.
    """
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    root, local = house / "store", house / "local"
    runs = fill(root, 12, 1.0, bad=5)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100_000_000})
    victim = nodes.add_node(num_cpus=1, object_store_memory=100_000_000)
    nodes.wait_for_nodes()
    ray.init(address=nodes.address, log_to_driver=False)
    try:

        def kill_when_busy() -> None:
            while True:
                store = Reader(root)
                if store.counts()["done"] >= 3:
                    break
                time.sleep(0.1)
            time.sleep(0.4)
            nodes.remove_node(victim, allow_graceful=False)

        killer = threading.Thread(target=kill_when_busy)
        killer.start()
        counts = cluster.execute(root, sweep="sweep", runner="fake_ray_runs:run_one", retries=1)
        killer.join()
    finally:
        ray.shutdown()
        nodes.shutdown()
    assert counts == {"queued": 0, "running": 0, "done": 11, "failed": 1}
    fill(local, 12, 0.0, bad=5)
    work(local, load_runner("fake_ray_runs:run_one"), sweep="sweep")
    store = Reader(root)
    other = Reader(local)
    rows, expected = store.rows("sweep"), other.rows("sweep")
    assert [row.record for row in rows] == [row.record for row in expected]
    assert rows[5].failures == 2
    assert "ValueError: the reason" in str(rows[5].error)
    outcomes = [attempt["outcome"] for run in runs for attempt in store.attempts(run.key)]
    assert outcomes.count("done") == 11
    assert outcomes.count("interrupted") >= 1
    assert all(read_result(store.folder(run.key), run) for run in runs if run.train["number"] != 5)
