"""The k-th open, write, fsync or rename fails, for every k: the old file or the new one stands, whole, and it is said.

Over the one module that opens files (`hessdiag.store.files`), after SQLite's tests, which make each call fail in turn. `make
test` tries every seventh k and the first few, `make test-all` all of them.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from typer.testing import CliRunner

import hessdiag as hd
from experiments.__main__ import main
from experiments.folder import Folder
from experiments.sweep import export
from experiments.sweep.keys import RunConfig
from experiments.sweep.store import Store
from experiments.sweep.worker import work
from experiments.trained import load_trained
from hessdiag.cli.program import app
from hessdiag.errors import HessdiagError
from hessdiag.measuring.loop import Loop
from hessdiag.show import read_document
from hessdiag.store import files

CALLS = ("open", "write", "fsync", "replace")


class Faulty:
    """`os` as `hessdiag.store.files` sees it; the call number `fails` of those in CALLS ends as on a full disk."""

    def __init__(self, fails: int | None) -> None:
        self.fails, self.calls = fails, 0
        self.seen: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        honest = getattr(os, name)
        if name not in CALLS:
            return honest

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            self.seen[name] += 1
            if self.calls == self.fails:
                raise OSError(errno.ENOSPC, "No space left on device")
            return honest(*arguments, **options)

        return call


def every(task: Callable[[int], Callable[[], None]], monkeypatch: pytest.MonkeyPatch, *, step: int) -> int:
    """`task(k)` with the k-th call failing, for k = 1, 2, 3 and then in steps, until none fails; how many were tried.

    What a task returns is called once the disk works again.
    """
    k, tried = 1, 0
    while True:
        faulty = Faulty(k)
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", faulty)
            afterwards = task(k)
        if faulty.calls < k:
            return tried
        afterwards()
        tried += 1
        k += 1 if k < 3 else step


STEPS = [pytest.param(7, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]


@pytest.mark.parametrize("step", STEPS)
def test_measure(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hessdiag.measuring.loop.SAVE_EVERY", 1e9)
    checkpoint, state, told, diagonal = (tmp_path / name for name in ("m.pt", "m.resume", "m.json", "m.diag"))
    hd.save_checkpoint(checkpoint, hd.networks.build("mlp", in_features=64, widths=(3,), seed=0), data="digits")
    line = (
        f"measure {checkpoint} --samples 8 --batch-size 8 --method hutchinson --min-replicates 4 --max-replicates 4 -q"
    )
    line += f" --resume {state} --json {told} --save-diagonal {diagonal}"
    first = CliRunner().invoke(app, line.split())
    assert first.exit_code == 1, first.output  # wider than asked for
    old = {path: path.read_bytes() for path in (told, diagonal)}
    codes: Counter[int] = Counter()

    def task(k: int) -> Callable[[], None]:
        state.unlink(missing_ok=True)
        for path, content in old.items():
            path.write_bytes(content)
        found = CliRunner().invoke(app, line.split())
        codes[found.exit_code] += 1

        def afterwards() -> None:
            assert not list(tmp_path.glob(".*.tmp"))
            read_document(told)  # old or new, whole
            numbers = load(diagonal.read_bytes())  # whole, and the same numbers again
            assert all(torch.equal(numbers[name], tensor) for name, tensor in load(old[diagonal]).items())
            if found.exit_code == 3:  # before any work: nothing was lost, and one line says so
                assert found.stdout == ""
                assert told.read_bytes() == old[told]
                assert found.stderr.count("\n") == 1
                return
            assert found.stdout == first.stdout
            assert found.exit_code in (1, 8 + 1, 8 + 4, 8 + 16), found.output
            names = {8 + 1: "--json", 8 + 4: "--save-diagonal", 8 + 16: "--resume"}
            assert names.get(found.exit_code, "") in found.stderr
            assert (found.exit_code == 1) == (found.stderr == "")

        return afterwards

    tried = every(task, monkeypatch, step=step)
    assert tried >= 20 / step
    if step == 1:
        assert {3, 8 + 1, 8 + 4, 8 + 16} <= set(codes)
        print(f"{tried} faults in measure: exit codes {dict(codes)}")


@pytest.mark.parametrize("step", STEPS)
def test_train(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--method", "standard", "--quiet", "--save-seconds", "0"]
    for name, value in {**TRAIN, "epochs": 2}.items():
        command += ["--set", f"{name}={json.dumps(value)}"]
    fine = main([*command, "--out", str(tmp_path / "whole")])
    assert fine in (0, 1)  # two epochs need not learn anything
    wanted = load_trained(tmp_path / "whole").model.state_dict()
    codes: Counter[int] = Counter()

    def task(k: int) -> Callable[[], None]:
        folder = tmp_path / str(k)
        capsys.readouterr()
        code = main([*command, "--out", str(folder)])
        codes[code] += 1
        told = capsys.readouterr().err
        assert code in (fine, 3)
        assert (code == 3) == ("experiments: " in told)
        assert told.count("\n") <= 1

        def afterwards() -> None:
            for path in folder.glob("*.pt"):
                if path.name != "state.pt":
                    load_trained(path)  # whole, whichever epoch's
            assert not list(folder.glob(".*.tmp"))
            assert main([*command, "--out", str(folder)]) == fine
            found = load_trained(folder).model.state_dict()
            assert all(bool((found[name] == tensor).all()) for name, tensor in wanted.items())
            told, whole = (json.loads((tmp_path / name / "result.json").read_text()) for name in (str(k), "whole"))
            assert told["status"] == whole["status"]

        return afterwards

    tried = every(task, monkeypatch, step=step)
    assert tried >= 30 / step
    print(f"{tried} faults in train: exit codes {dict(codes)}")


@pytest.mark.parametrize("step", STEPS)
def test_sweep(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [RunConfig({"method": "fake", "activation": f"rct:{i}", "seed": 0}) for i in range(2)]
    done: Counter[str] = Counter()
    ends: Counter[str] = Counter()

    def runner(config: RunConfig, out: Path) -> dict[str, Any]:
        done[config.key] += 1
        return {"clean_accuracy": {"value": 0.5, "low": 0.25, "high": 0.75, "samples": 4}}

    def drive(root: Path) -> bytes:
        store = Store(root)
        store.add("smoke/figure3", runs, tier="smoke", figure="figure3")
        work(root, runner)
        store = Store(root)
        export.publish(store, "smoke/figure3", root.with_name(f"{root.name}-results"))
        return (root.with_name(f"{root.name}-results") / "smoke" / "figure3.json").read_bytes()

    def plain(text: bytes) -> list[Any]:
        return [entry["record"] for entry in json.loads(text)["runs"]]

    wanted = plain(drive(tmp_path / "whole"))

    def task(k: int) -> Callable[[], None]:
        root = tmp_path / str(k)
        done.clear()
        told = ""
        try:
            drive(root)
            ends["fine"] += 1
        except HessdiagError as error:
            told = str(error)
            ends[type(error).__name__] += 1
        assert "\n" not in told

        def afterwards() -> None:
            assert not list(root.rglob(".*.tmp"))
            assert plain(drive(root)) == wanted
            assert max(done.values()) <= 2  # one run is done again at most, if its record could not be written
            assert len(export.read(root.with_name(f"{root.name}-results") / "smoke" / "figure3.json").runs) == 2

        return afterwards

    tried = every(task, monkeypatch, step=step)
    assert tried >= 20 / step
    assert set(ends) <= {"fine", "StoreError"}
    print(f"{tried} faults in sweep: {dict(ends)}")


MEASURE = (
    "measure digits-example --samples 16 --batch-size 8 --method hutchinson -q --min-replicates 4 --max-replicates 4"
)
TRAIN = {
    **{"network": "mlp", "network_options": {"widths": [4]}, "activation": "silu", "data": "digits", "epochs": 3},
    **{"train_samples": 100, "batch_size": 50, "augment": {"crop": 0, "flip": False}, "watch": {"samples": 8}},
}


def train_in(folder: Path) -> int:
    command = ["train", "--method", "standard", "--quiet", "--save-seconds", "0", "--out", str(folder)]
    for name, value in TRAIN.items():
        command += ["--set", f"{name}={json.dumps(value)}"]
    return main(command)


def test_a_folder_that_vanishes_under_a_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number is printed as it is without, and the exit code says what was not written; the folder is not made anew."""
    monkeypatch.setattr("hessdiag.measuring.loop.SAVE_EVERY", 0.0)
    monkeypatch.setattr("hessdiag.measuring.loop.SAVE_SHARE", 0.0)
    folder = tmp_path / "there"
    folder.mkdir()
    honest = Loop._save
    saves: list[bool] = []

    def vanishing(self: Loop) -> None:
        saves.append((folder / "r").exists())
        if saves[-1]:
            shutil.rmtree(folder)
        honest(self)

    wanted = CliRunner().invoke(app, MEASURE.split())
    monkeypatch.setattr(Loop, "_save", vanishing)
    found = CliRunner().invoke(app, f"{MEASURE} --resume {folder / 'r'} --json {folder / 'j'}".split())
    assert True in saves
    assert found.stdout == wanted.stdout
    assert found.exit_code == 8 + 1 + 16, found.output
    assert found.stderr.count("\n") == 2
    assert not folder.exists()


def test_a_folder_that_vanishes_under_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = Folder.save

    def vanishing(self: Folder, *arguments: Any) -> None:
        honest(self, *arguments)
        shutil.rmtree(self.path)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "save", vanishing)
        assert train_in(tmp_path / "run") == 3
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "No such file or directory" in told
    assert not (tmp_path / "run").exists()
    assert train_in(tmp_path / "run") in (0, 1)


@pytest.mark.parametrize("jump", [1e9, -1e9])
def test_a_clock_that_jumps(jump: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock of the day is decades after or before the last: the same numbers, the same weights."""
    wanted = CliRunner().invoke(app, f"{MEASURE} --max-seconds 10000 --resume {tmp_path / 'r0'}".split())
    assert train_in(tmp_path / "steady") in (0, 1)
    moments = itertools.count(1)
    monkeypatch.setattr("time.time", lambda: 1.7e9 + jump * next(moments))
    found = CliRunner().invoke(app, f"{MEASURE} --max-seconds 10000 --resume {tmp_path / 'r1'}".split())
    assert (found.exit_code, found.stdout) == (wanted.exit_code, wanted.stdout)
    assert train_in(tmp_path / "jumping") in (0, 1)
    one, other = (load_trained(tmp_path / name).model.state_dict() for name in ("steady", "jumping"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_layer_counts_all_four_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = Faulty(None)
    monkeypatch.setattr(files, "os", faulty)
    files.write_bytes(tmp_path / "a", b"x")
    assert set(faulty.seen) == set(CALLS)
