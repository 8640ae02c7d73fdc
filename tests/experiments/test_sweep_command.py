"""`python -m experiments sweep` and `status`: what is refused before the start, what an export may replace, and the
cluster's arithmetic.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hessdiag
from experiments.__main__ import main
from experiments.commands import sweep as command
from experiments.config import TrainConfig
from experiments.sweep import cluster, export, grid, local
from experiments.sweep.clock import Clock
from experiments.sweep.files import read_result
from experiments.sweep.keys import RunConfig
from experiments.sweep.reader import Reader
from experiments.sweep.run import Sets, cost, measured, run_one
from experiments.sweep.store import Store
from experiments.trainer.rig import build_network
from hessdiag import data
from hessdiag.errors import ConfigurationError, StoreError

TEXT = """
figure = "figure3"
tier = "smoke"
title = "a [/b] c [red]"
[train]
method = "n_fgsm"
network = "small_resnet"
network_options = { width = 4 }
data = "digits"
eps = "0.15"
epochs = 1
[measure]
samples = 16
batch_size = 8
rtol = 0.0001
losses = ["clean"]
splits = ["test"]
[[grid]]
beta = [0, 1]
curvature = 2
seed = [0, 1]
"""


def write(folder: Path, text: str = TEXT, name: str = "mine") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def finished(root: Path, sweep: grid.Sweep, number: int) -> None:
    """Register the sweep and put a result under its first so many runs."""
    store = Store(root)
    store.add(sweep.name, sweep.runs, tier=sweep.tier, figure=sweep.figure)
    for _ in range(number):
        claim = store.claim(sweep=sweep.name)
        assert claim is not None
        claim.finish({"clean_accuracy": {"value": 0.5}}, 30.0)


def test_a_results_directory_that_cannot_be_written_is_refused_first(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for kind in ("--export", "--only-export"):
        finished(tmp_path / "s", grid.load(write(tmp_path)), 1)
        before = (tmp_path / "s" / "sweeps" / "smoke" / "mine.json").read_bytes()
        words = ("sweep", write(tmp_path), "--store", tmp_path / "s", "--results", tmp_path / "file", kind)
        code, out, err = call(capsys, *words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "--results" in err
        assert "cannot be written" in err
        assert (tmp_path / "s" / "sweeps" / "smoke" / "mine.json").read_bytes() == before


def test_listing_and_exporting_make_no_store(tmp_path, capsys):
    for kind in ("--list", "--only-export"):
        words = ("sweep", write(tmp_path), "--store", tmp_path / "s", "--results", tmp_path / "r", kind)
        code, _, err = call(capsys, *words)
        assert code == 3
        assert "there is none" in err
        assert not (tmp_path / "s").exists()


def test_an_export_says_what_is_missing_and_never_replaces_more(tmp_path, capsys):
    sweep, results = grid.load(write(tmp_path)), tmp_path / "results"
    finished(tmp_path / "s", sweep, 3)
    words = ["sweep", write(tmp_path), "--results", results, "--only-export", "--store"]
    code, out, _ = call(capsys, *words, tmp_path / "s")
    assert (code, out.strip()) == (0, f"{results}/smoke/mine.json (3 runs, 1 missing)")
    before = (results / "smoke" / "mine.json").read_bytes()
    finished(tmp_path / "fewer", sweep, 2)
    code, _, err = call(capsys, *words, tmp_path / "fewer")
    assert code == 3
    assert "holds 1 run of this sweep that store" in err
    assert (results / "smoke" / "mine.json").read_bytes() == before
    finished(tmp_path / "none", sweep, 0)
    code, _, err = call(capsys, *words, tmp_path / "none")
    assert code == 3
    assert "nothing exported" in err
    finished(tmp_path / "fewer", sweep, 2)  # the other two: now it holds them all
    code, out, _ = call(capsys, *words, tmp_path / "fewer")
    assert (code, "(4 runs)" in out) == (0, True)
    other = grid.load(write(tmp_path, TEXT.replace("epochs = 1", "epochs = 2")))
    finished(tmp_path / "s", other, 1)  # settings were edited: another experiment, whose file it becomes
    code, out, _ = call(capsys, *words, tmp_path / "s")
    assert (code, "(1 run, 3 missing)" in out) == (0, True)


def test_what_was_exported_is_taken_over_into_a_new_store_and_not_done_again(tmp_path, capsys):
    file, results = write(tmp_path), tmp_path / "results"
    words = ("sweep", file, "--results", results)
    finished(tmp_path / "lost", grid.load(file), 3)
    assert call(capsys, *words, "--only-export", "--store", tmp_path / "lost")[0] == 0
    path = results / "smoke" / "mine.json"
    before = path.read_bytes()
    store = tmp_path / "new"

    code, _, err = call(capsys, *words, "--adopt", "--dry-run", "--store", store)
    assert code == 0 and "3 done" in err and not store.exists()
    code, _, err = call(capsys, *words, "--only-export", "--adopt", "--store", store)
    assert code == 0 and f"3 runs taken over from {path}" in err
    assert path.read_bytes() == before  # what is exported again is what was taken, to the last digit
    assert Reader(store).counts()["done"] == 3 and Reader(store).counts()["queued"] == 1
    sources = [Reader(store).attempts(row.key)[0]["worker"] for row in Reader(store).rows() if row.state == "done"]
    assert sources == [str(path)] * 3
    assert "taken over" not in call(capsys, *words, "--list", "--adopt", "--store", store)[2]  # once is enough

    former = tmp_path / "former"
    former.mkdir()
    (former / "store.sqlite").touch()
    code, _, err = call(capsys, *words, "--only-export", "--adopt", "--store", former)
    assert code == 3 and "of the form before" in err


def test_only_results_that_are_whole_and_free_are_taken_over(tmp_path):
    sweep = grid.load(write(tmp_path))
    finished(tmp_path / "lost", sweep, 4)
    results = tmp_path / "results"
    export.publish(Reader(tmp_path / "lost"), sweep.name, results)
    path = results / f"{sweep.name}.json"
    content = json.loads(path.read_text())
    del content["runs"][0]["sha256"]  # of before there were checksums
    content["runs"] = [run for run in content["runs"] if run["key"] != sweep.runs[1].key]
    path.write_text(json.dumps(content))

    store = Store(tmp_path / "new")
    store.add(sweep.name, sweep.runs, tier=sweep.tier)
    finished_keys = {run.key for run in sweep.runs[2:]}
    found = export.finished(results)
    assert found.keys() == finished_keys
    claim = store._take(sweep.runs[2], 0, 10)  # somebody does this one
    assert claim is not None
    assert export.adopt(store, sweep.runs, found) == [path]
    claim.finish({"clean_accuracy": {"value": 0.25}}, 1.0)
    assert export.adopt(store, sweep.runs, found) == []
    record, seconds, _ = read_result(store.folder(sweep.runs[2].key), sweep.runs[2])
    assert record == {"clean_accuracy": {"value": 0.25}} and seconds == 1.0

    content["runs"][-1]["record"]["clean_accuracy"]["value"] = 0.75
    path.write_text(json.dumps(content))
    with pytest.raises(StoreError, match="not what was written"):
        export.finished(results)


def test_results_of_no_tier_are_refused_and_stop_no_sweep(tmp_path, capsys):
    finished(tmp_path / "s", grid.load(write(tmp_path)), 2)
    store = Reader(tmp_path / "s")
    path = export.save(export.from_store(store, "smoke/mine"), tmp_path / "r")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "tier": "smok"}))
    with pytest.raises(ConfigurationError, match="no tier 'smok'"):
        export.read_all(tmp_path / "r")
    code, _, err = call(
        capsys, "sweep", write(tmp_path), "--store", tmp_path / "s", "--results", tmp_path / "r", "--dry-run"
    )
    assert code == 0
    assert "note: results" in err
    assert "a [/b] c [red]\n" in err  # a title is text, not markup
    assert "4 runs, 2 done, 2 to do; about 30 s each" in err


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('data = "digits"', 'data = "digit"', "did you mean 'digits'"),
        ("epochs = 1", "epochs = 1\nheld_out = 100000", "leaves none of"),
        ("epochs = 1", "epochs = 1\ntrain_samples = 100000", "fewer than the 100000"),
        ('data = "digits"', 'data = "cifar10"', "hessdiag data cifar10"),
    ],
)
def test_data_that_every_run_would_miss_is_missed_before_the_first(tmp_path, capsys, monkeypatch, old, new, words):
    monkeypatch.setenv("HESSDIAG_DATA", str(tmp_path / "nothing"))
    code, _, err = call(capsys, "sweep", write(tmp_path, TEXT.replace(old, new)), "--store", tmp_path / "s")
    assert code == (2 if "digit" in new.split('"') or "held_out" in new else 3)  # a word that is wrong, or data
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_the_cost_of_a_sweep_is_told_where_its_data_are_not(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HESSDIAG_DATA", str(tmp_path / "nothing"))
    path = write(tmp_path, TEXT.replace('data = "digits"', 'data = "cifar10"'))
    code, _, err = call(capsys, "sweep", path, "--store", tmp_path / "s", "--results", tmp_path / "r", "--dry-run")
    assert code == 0
    assert "note: sweep smoke/mine: cifar10 is not in" in err
    assert "4 runs, 0 done" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget", "nan"], "--budget nan"),
        (["--budget", "-3"], "--budget -3"),
        (["--budget", "30", "--no-pilot"], "4 runs not timed yet"),
        (["--budget", "0.001"], "more than --budget 0.001 min"),
        (["--per-gpu", "4"], "no GPU is visible"),
        (["--executor", "ray", "--workers", "2"], "--workers is of --executor local"),
        (["--executor", "locl"], "did you mean 'local'"),
        (["AGAIN"], "another file named here makes smoke/mine too"),
    ],
)
def test_options_without_meaning_are_refused(tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.setattr(local, "visible_gpus", lambda: ())
    options = [str(write(tmp_path / "again")) if word == "AGAIN" else word for word in options]
    line = ["sweep", write(tmp_path), *options, "--store", tmp_path / "s", "--results", tmp_path / "r"]
    code, _, err = call(capsys, *line)
    assert code == (4 if words.startswith(("4 runs", "more than")) else 2)  # 4: it would take too long
    assert words in err


def test_ray_that_is_not_there_is_missed_before_the_store_is_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, out, err = call(capsys, "sweep", write(tmp_path), "--store", tmp_path / "s", "--executor", "ray")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "pip install" in err
    assert not (tmp_path / "s").exists()


def test_status_names_the_nearest_sweep(tmp_path):
    finished(tmp_path / "s", grid.load(write(tmp_path)), 0)
    store = Reader(tmp_path / "s")
    with pytest.raises(StoreError, match="did you mean 'smoke/mine'"):
        store.about("smoke/mien")
    assert main(["status", "--store", str(tmp_path / "s"), "--sweep", "smoke/mien"]) == 3
    assert main(["status", "--store", str(tmp_path / "s"), "--sweep", "smoke/mine"]) == 0


def test_a_picture_that_cannot_be_drawn_ends_no_sweep(monkeypatch):
    drawn = []

    def render(*_: object) -> str:
        drawn.append(1)
        raise StoreError("another process has held it")

    monkeypatch.setattr(command.status, "render", render)
    monkeypatch.setattr(command.time, "monotonic", lambda: 100.0)
    watch = command._watcher(SimpleNamespace(update=drawn.append), None, "smoke/mine")
    watch()
    assert drawn == [1]


def test_a_measurement_cut_short_by_ctrl_c_is_no_result(tmp_path, monkeypatch):
    """The engine answers Ctrl-C with what it has by then; a run must not be recorded with that."""
    config = grid.load(write(tmp_path)).runs[0]
    settings = TrainConfig.from_dict(config.train)
    model = build_network(settings, (1, 8, 8), 10).eval()
    events, real = count(), hessdiag.measure

    def progress(event: object) -> None:
        if next(events) > 30:
            raise KeyboardInterrupt

    monkeypatch.setattr(hessdiag, "measure", partial(real, progress=progress))
    with pytest.raises(KeyboardInterrupt):
        measured(config, model, torch.device("cpu"), Clock(), Sets(settings))
    assert next(events) > 30  # it was Ctrl-C that ended it


def test_norms_at_the_end_are_of_the_same_images_whatever_part_is_trained_on(tmp_path, monkeypatch):
    config, seen = grid.load(write(tmp_path)).runs[0], []

    def taken(model, batches, **options):
        seen.append(torch.cat([inputs for inputs, _ in batches]))
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.sweep.run.crafted", taken)
    for part in ({}, {"train_samples": 100}):
        changed = config.replace(train=part)
        settings = TrainConfig.from_dict(changed.train)
        model = build_network(settings, (1, 8, 8), 10).eval()
        with pytest.raises(KeyboardInterrupt):
            measured(changed, model, torch.device("cpu"), Clock(), Sets(settings))
    assert torch.equal(*seen)
    assert not set(map(bytes, seen[1].numpy())) <= set(map(bytes, Sets(settings).pair[0].inputs.numpy()))


def test_a_batch_larger_than_the_data_costs_what_the_data_do(tmp_path):
    config = grid.load(write(tmp_path)).runs[0].replace(train={"batch_size": 5000})
    settings = TrainConfig.from_dict(config.train)
    model = build_network(settings, (1, 8, 8), 10)
    found = cost(config, model, torch.device("cpu"), Sets(settings))
    assert found["saved_bytes"] > 1297 * 64 * 4  # at least the images themselves


def test_a_run_reads_each_split_once_and_judges_in_the_weights_own_precision(tmp_path, monkeypatch):
    """bfloat16 is for training: test accuracy, AA-2 and norms never see it, and the record says so."""
    train = {"epochs": 1, "autocast": "bfloat16", "channels_last": True, "batch_size": 256}
    norms = {"samples": 8, "rtol": 9.0, "plugin_probes": 2, "splits": ["train", "test"]}
    config = grid.load(write(tmp_path)).runs[0].replace(train=train, attack={"aa2_samples": 10}, measure=norms)
    reads, types = [], {"train": set(), "after": set()}
    real, convolution = data.load, torch.nn.Conv2d.forward

    def load(name, *, split, **options):
        reads.append(split)
        return real(name, split=split, **options)

    def forward(self, x):
        y = convolution(self, x)
        types["train" if training else "after"].add(y.dtype)
        return y

    def trained(*arguments, **options):
        nonlocal training
        result = train_alone(*arguments, **options)
        training = False
        return result

    module = import_module("experiments.sweep.run")
    training, train_alone = True, module.train
    monkeypatch.setattr(data, "load", load)
    monkeypatch.setattr(torch.nn.Conv2d, "forward", forward)
    monkeypatch.setattr(module, "train", trained)
    record = run_one(config, tmp_path / "run")
    assert sorted(reads) == ["test", "train"]
    assert types["train"] == {torch.bfloat16, torch.float32}  # the clean test
    assert types["after"] == {torch.float32, torch.float64}  # the audit's twin
    told = record["train"]["precision"]
    assert (told["training"], told["weights"], told["evaluation"]) == ("bfloat16 autocast", "float32", "float32")
    assert told["channels_last"] is True


def ray_of(*nodes: dict[str, float]) -> SimpleNamespace:
    return SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": node} for node in nodes])


def test_a_cluster_is_asked_for_its_gpus_not_the_machine_of_the_driver():
    assert cluster._share(ray_of({"CPU": 4.0}), 3) == 0.0
    assert cluster._share(ray_of({"CPU": 4.0}, {"CPU": 8.0, "GPU": 1.0}), 4) == 0.25


@pytest.mark.parametrize("per_gpu", [1, 2, 3, 5, 10])
def test_every_share_of_a_gpu_is_a_place(per_gpu):
    ray = ray_of({"CPU": 100.0, "GPU": 8.0}, {"CPU": 64.0})
    assert cluster._slots(ray, 1, 1.0 / per_gpu) == 8 * per_gpu


class TaskDiedError(Exception):
    """Stands for what ray.get raises when a task's process or node is gone."""


class Cluster:
    """What `cluster.execute` uses of Ray, on this process alone: a task is done when it is asked for."""

    exceptions = SimpleNamespace(RayError=TaskDiedError)

    def __init__(self, deaths: int = 0) -> None:
        self.deaths, self.asked = deaths, dict[str, object]()

    def nodes(self) -> list[dict[str, object]]:
        return [{"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0}}, {"Alive": False, "Resources": {"CPU": 64.0}}]

    def remote(self, **options: object) -> Callable[[Callable[..., object]], SimpleNamespace]:
        self.asked = options
        return lambda function: SimpleNamespace(remote=lambda *arguments: partial(function, *arguments))

    def wait(self, references: list[object], timeout: float) -> tuple[list[object], list[object]]:
        return references[:1], references[1:]

    def get(self, reference: Callable[[], object]) -> object:
        if self.deaths:
            self.deaths -= 1
            raise TaskDiedError
        return reference()


def test_a_cluster_does_every_run_once_and_again_where_its_task_died(tmp_path, monkeypatch):
    """The driver's side without Ray itself; tests/experiments/test_sweep_ray.py has a real cluster."""
    (tmp_path / "squares.py").write_text(
        "def run_one(config, out):\n    return {'value': config.train['number'] ** 2}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    there = Cluster(deaths=2)
    monkeypatch.setattr(cluster, "connect", lambda address: there)
    runs = [RunConfig({"number": number}) for number in range(5)]
    store = Store(tmp_path / "s")
    store.add("sweep", runs, tier="smoke")
    counts = cluster.execute(tmp_path / "s", sweep="sweep", runner="squares:run_one", per_gpu=4)
    assert counts == {"queued": 0, "running": 0, "done": 5, "failed": 0}
    assert (there.asked["num_cpus"], there.asked["num_gpus"]) == (1, 0.25)
    store = Reader(tmp_path / "s")
    assert [row.record for row in store.rows("sweep")] == [{"value": number**2} for number in range(5)]
    outcomes = [attempt["outcome"] for run in runs for attempt in store.attempts(run.key)]
    assert sorted(outcomes) == ["done"] * 5 + ["interrupted"] * 2
    assert all(read_result(store.folder(run.key), run) for run in runs)


def test_a_cluster_without_room_for_a_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "connect", lambda address: ray_of({"CPU": 2.0}, {"CPU": 3.0}))
    with pytest.raises(ConfigurationError, match="--threads 4: no node"):
        cluster.execute(tmp_path / "s", sweep="sweep", threads=4)


def test_a_full_disk_of_the_driver_of_a_cluster_is_one_line(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("experiments.sweep.store.write_result", full)
    store = Store(tmp_path / "s")
    store.add("sweep", [RunConfig({"number": 1})], tier="smoke")
    claim = store.claim()
    assert claim is not None
    ray = SimpleNamespace(get=lambda reference: ("done", {}, 1.0), exceptions=SimpleNamespace(RayError=OSError))
    with pytest.raises(StoreError, match="the disk is full; free space and start the same command again"):
        cluster._record(ray, None, claim)


def test_networks_that_did_not_learn_are_named_and_give_an_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four finished runs two, of seed 1, answer at chance; nothing is left to run."""
    sweep = grid.load(write(tmp_path))
    good = {"train": {"status": "finished", "clean_loss": 0.1}, "clean_accuracy": {"value": 0.9, "samples": 500}}
    dead = {"train": {"status": "did_not_learn", "clean_loss": 2.3, "reason": "did not learn: 10%"}}
    store = Store(tmp_path / "s")
    store.add(sweep.name, sweep.runs, tier=sweep.tier, figure=sweep.figure)
    while claim := store.claim(sweep=sweep.name):
        claim.finish(dead if claim.config.train["seed"] else good, 30.0)
    words = ("sweep", tmp_path / "mine.toml", "--store", tmp_path / "s", "--results", tmp_path / "r")
    code, out, err = call(capsys, *words)
    assert code == 1
    assert "4 done, 0 failed, 2 did not learn" in out
    assert err.count("digits 1: did not learn: 10%") == 2
    code, out, _ = call(capsys, *words, "--seeds", "0")
    assert code == 0
    assert "did not learn" not in out


def test_a_dry_run_forecasts_by_hand(tmp_path, capsys):
    """Four runs; three exported ones of the family took 20, 30 and 40 s: 30 s each, 60 s on two workers."""
    path = write(tmp_path)
    sweep = grid.load(path)
    runs = [export.Result(run.key, run, "", seconds, {}) for run, seconds in zip(sweep.runs, (20.0, 30.0, 40.0))]
    export.save(
        export.SweepResults(sweep.name, sweep.figure, sweep.tier, sweep.title, 1, tuple(runs)), tmp_path / "results"
    )
    places = ("--store", tmp_path / "store", "--results", tmp_path / "results")
    code, _, err = call(capsys, "sweep", path, "--dry-run", "--workers", 2, *places)
    assert code == 0
    assert "4 runs, 0 done, 4 to do; about 30 s each (exported results: 3 runs), 60 s on 2 workers" in err
