"""The card command: what is stored is left out, what is cut off stays stored, what is not here is told."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from benchmarks import card as benchmark
from benchmarks import nanogpt, tables
from experiments import card
from experiments.__main__ import main
from experiments.sweep import export, grid
from experiments.sweep.export import Result
from experiments.sweep.run import saved_bytes
from experiments.sweep.store import Store
from hessdiag.data import load


def packed(images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of one part, in a single strip."""
    stream = io.BytesIO()
    Image.fromarray(images.reshape(-1, 32, 3)).save(stream, "WEBP", lossless=True, exact=True)
    content = np.frombuffer(stream.getvalue(), dtype=np.uint8)
    return {"data": content, "offsets": np.array([0, len(content)]), "labels": labels}


RECORD = {"clean_accuracy": {"value": 0.5}, "aa2": {"value": 0.25}}


def places(folder: Path) -> card.Places:
    return card.Places(folder / "results", folder / "out", folder / "store")


def small(sweep: grid.Sweep, count: int = 3) -> grid.Sweep:
    return replace(sweep, runs=sweep.runs[:count])


@pytest.fixture
def told() -> list[str]:
    return []


def test_without_a_gpu_it_says_what_can_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert main(["card"]) == 2
    assert "--rehearse" in capsys.readouterr().err
    assert main(["card", "--rehearse", "--seconds", "0"]) == 2


def test_the_order_is_that_of_worth() -> None:
    first, second = (grid.load("campaign/card", stage=stage) for stage in (1, 2))
    alphas = [run.train["activation"].rpartition("=")[2] for run in first.runs]
    assert [float(alpha) / 2 for alpha in alphas] == [6, 1, 25, 2.5, 12, 50]
    assert {run.train["seed"] for run in first.runs} == {0}
    assert (len(second.runs), len(grid.load("campaign/card", stage=3).runs)) == (12, 18)
    assert len(grid.load("campaign/card_standard").runs) == 10
    run = first.runs[0]
    assert (run.attack["aa2_samples"], run.attack["pgd_samples"], run.measure["rtol"]) == (1000, 10000, 0.1)
    assert not run.train["compile"]  # steps are replayed as a graph there
    names = [part.sweep or part.words for part in card.PARTS if part.sweep or part.words]
    assert names[:4] == [("throughput",), ("nanogpt",), "campaign/card", ("norms",)]


def test_what_results_hold_is_left_out_and_kept(tmp_path: Path, told: list[str]) -> None:
    sweep = small(grid.load("campaign/card", stage=1))
    done = tuple(Result(run.key, run, "", 9.0, RECORD) for run in sweep.runs)
    about = (sweep.name, sweep.figure, sweep.tier, sweep.title)
    export.save(export.SweepResults(*about, 0, done[:1]), tmp_path / "results")
    export.save(export.SweepResults(*about, 0, done[1:]), tmp_path / "out")
    assert card.trained(sweep, places(tmp_path), 60, workers=1, name="x", tell=told.append) == 0
    assert told == ["x: all 3 runs are there"]
    assert not (tmp_path / "store").exists()


def test_results_are_exported_in_order_with_those_before(tmp_path: Path) -> None:
    sweep = small(grid.load("campaign/card", stage=1))
    stranger = grid.load("campaign/card_standard").runs[0]
    done = {run.key: Result(run.key, run, "", 9.0, RECORD) for run in (stranger, sweep.runs[2], sweep.runs[0])}
    card._save(sweep, done, tmp_path)
    found = export.read(tmp_path / "campaign" / "card.json")
    assert [run.key for run in found.runs] == [sweep.runs[0].key, sweep.runs[2].key, stranger.key]
    assert found.missing == 1


def test_a_worker_is_ended_when_the_time_is_over(tmp_path: Path, told: list[str], monkeypatch: Any) -> None:
    """Whatever it does just then; its run is given back and the same command goes on with it."""
    monkeypatch.setenv("HESSDIAG_DATA", str(tmp_path / "nowhere"))
    sweep = small(grid.load("campaign/card", stage=1))
    assert card.trained(sweep, places(tmp_path), 0.0, workers=1, name="x", tell=told.append) == 0
    assert told == ["x: the time is over"]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_that_fails_is_told_and_counted(tmp_path: Path, told: list[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("HESSDIAG_DATA", str(tmp_path / "nowhere"))
    sweep = small(grid.load("campaign/card", stage=1), 1)
    assert card.trained(sweep, places(tmp_path), 300, workers=1, name="x", tell=told.append) == 1
    assert "failed: DataError: cifar10 is not in" in told[0]
    assert "Traceback" in told[0]
    assert card.trained(sweep, places(tmp_path), 300, workers=2, name="x", tell=told.append) == 1
    assert len(told) == 2  # tried again, by a later call alone, and told once


def test_a_benchmark_that_is_cut_off_says_what_it_had_said(tmp_path: Path, told: list[str], monkeypatch: Any) -> None:
    def cut(words: list[str], **options: Any) -> Any:
        assert words[1:4] == ["-m", "benchmarks.card", "table2"]
        raise subprocess.TimeoutExpired(words, 1.0, output=b"table2 eager relu: {}\n")

    monkeypatch.setattr(subprocess, "run", cut)
    part = next(part for part in card.PARTS if part.words == ("table2",))
    assert card.measured(part, places(tmp_path), 1.0, rehearse=False, tell=told.append) == 0
    assert told == ["what an activation costs: the time is over\ntable2 eager relu: {}"]


def test_a_benchmark_that_fails_says_how_and_not_more_than_its_last_lines(
    tmp_path: Path, told: list[str], monkeypatch: Any
) -> None:
    rows, trace = "\n".join(f"row {i}" for i in range(99)), "Traceback\n  line 3\nRuntimeError: no kernel\n"

    def failed(words: list[str], **options: Any) -> Any:
        return subprocess.CompletedProcess(words, 1, rows, trace)

    monkeypatch.setattr(subprocess, "run", failed)
    part = next(part for part in card.PARTS if part.words == ("norms",))
    assert card.measured(part, places(tmp_path), 1.0, rehearse=False, tell=told.append) == 1
    lines = told[0].splitlines()
    assert lines[0] == "norms of ResNet-18:"
    assert lines[1:21] == [f"row {i}" for i in range(79, 99)]
    assert lines[21:] == trace.splitlines()


def test_parts_are_unpacked_once_and_what_is_missing_is_told(tmp_path: Path, told: list[str]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(6, dtype=np.uint8)
    np.savez(tmp_path / "cifar10-train-webp-part1of2.npz", **packed(images[:3], labels[:3]))
    assert card.unpacked(tmp_path, tmp_path / "scratch", invent=False, tell=told.append) is None
    assert "part2of2.npz is missing" in told[0]
    np.savez(tmp_path / "cifar10-train-webp-part2of2.npz", **packed(images[3:], labels[3:]))
    np.savez(tmp_path / "cifar10-test-webp.npz", **packed(images, labels))
    for _ in range(2):
        assert card.unpacked(tmp_path, tmp_path / "scratch", invent=False, tell=told.append) == tmp_path / "scratch"
    assert sum(line.startswith("cifar10 unpacked") for line in told) == 1
    found = load("cifar10", split="train", root=tmp_path / "scratch").inputs
    assert np.array_equal(found.numpy(), images.transpose(0, 3, 1, 2))


def test_the_store_is_made_before_the_data_lie_in_it(
    tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card, "PARTS", (card.Part("N-FGSM", sweep="campaign/card"),))
    monkeypatch.setenv(
        "HESSDIAG_DATA", str(tmp_path / "nowhere")
    )  # the command names its own place for all that follows
    images, labels = np.zeros((4, 32, 32, 3), dtype=np.uint8), np.arange(4, dtype=np.uint8)
    for name in ("train-webp-part1of2", "train-webp-part2of2", "test-webp"):
        np.savez(tmp_path / f"cifar10-{name}.npz", **packed(images, labels))
    assert card.run(places(tmp_path), seconds=1e-6, folder=tmp_path, rehearse=False, tell=told.append) == 0
    assert told[-1] == "N-FGSM: no time left"
    assert Store(tmp_path / "store").rows() == []


def test_a_row_that_ran_out_of_memory_is_told_in_the_table() -> None:
    found = {"gradient": {"seconds": 0.1, "gradients": 1.0, "peak_gib": 5.0}, "product": {"out of memory": "CUDA"}}
    first, second = tables.card(found, {})
    assert (first["time"], second) == ("100 ms", {"": "product", "time": "out of memory"})


def test_what_autograd_keeps_is_counted_and_freed() -> None:
    """The log-softmax keeps its own output: held as it is, the whole graph below would never be freed."""
    seen = []
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Softplus(), nn.Linear(5, 3))
    net[2].register_forward_hook(lambda *given: seen.append(StorageWeakRef(given[-1].untyped_storage())))
    assert saved_bytes(net, torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])) > 0
    assert seen[0].expired()


@pytest.mark.slow
def test_it_needs_no_package_that_a_bare_machine_lacks() -> None:
    """Neither pictures nor downloads: importing all that the command and its worker import brings neither in."""
    code = (
        "import sys, json; import experiments.card, experiments.commands.card, experiments.sweep.worker, "
        "experiments.sweep.run, benchmarks.card; "
        "print(json.dumps([n for n in ('matplotlib', 'pooch', 'pyautoattack', 'ray') if n in sys.modules]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == []


def test_the_gpt_is_of_gpt2s_size_its_head_the_table() -> None:
    with torch.device("meta"):
        model = nanogpt.GPT(nanogpt.Shape())
    assert sum(p.numel() for p in model.parameters()) == 50304 * 768 + 1024 * 768 + 12 * 7_087_872 + 2 * 768


def test_what_runs_out_of_memory_says_so_and_loses_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out(bench: nanogpt.Bench) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.\nmore")

    monkeypatch.setitem(nanogpt.ROWS, "replicate", out)
    measured = benchmark.measure("nanogpt", benchmark.sized("cpu"), tmp_path, tmp_path)
    rows = json.loads((tmp_path / "card-nanogpt-cpu.json").read_text())["results"]
    assert measured == len(rows) == len(nanogpt.ROWS)
    assert rows["replicate"]["out of memory"] == "CUDA out of memory. Tried to allocate 1.00 GiB."
    assert "seconds" not in rows["replicate"]
    assert all(row["gradients"] > 0 for name, row in rows.items() if name != "replicate")
    assert benchmark.measure("nanogpt", benchmark.sized("cpu"), tmp_path, tmp_path) == 0
