"""Interrupted measurements: killed anywhere and started again, the result is that of the uninterrupted one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import hessdiag as hd
from hessdiag.cli.program import app
from hessdiag.data import load
from hessdiag.errors import ResumeError
from hessdiag.measuring.loop import Event, Loop
from hessdiag.measuring.resume import restore
from hessdiag.methods import METHODS, Plan, Work
from hessdiag.methods.batches import fingerprint

COUNT = 40


class Killed(BaseException):
    """Stands for a process that ends between two statements."""


def setting(name: str = "mlp", activation: str = "silu") -> tuple[hd.Objective, Any]:
    options: dict[str, Any] = {"in_features": 64, "widths": (4, 3)} if name == "mlp" else {"width": 2, "strides": (1,)}
    model = hd.networks.build(name, activation=activation, seed=0, **options).eval()
    return hd.Objective(model), load("digits", samples=40).batches(9)


def plain(m: hd.Measurement) -> dict[str, Any]:
    """All numbers of a measurement but its clock."""
    content = json.loads(json.dumps(m.to_dict()))
    del content["seconds"], content["provenance"]["when"]
    return content


def measured(**options: Any) -> hd.Measurement:
    objective, batches = setting()
    options = {"min_replicates": COUNT, "max_replicates": COUNT, "rtol": 1e-9, **options}
    return hd.measure(objective, batches, **options)


def killer(after: int) -> Any:
    """A progress callback that ends the process after so many events."""
    seen = [0]

    def tell(_event: Event) -> None:
        seen[0] += 1
        if seen[0] > after:
            raise Killed

    return tell


@pytest.mark.parametrize("plan", [Plan("hutchinson"), Plan("propagation"), Plan("propagation", deflate=2)])
def test_killed_anywhere_gives_the_same_bits(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after every few events, the file written as often as can be: all numbers equal, the history too."""
    monkeypatch.setattr("hessdiag.measuring.loop.SAVE_EVERY", 0.0)
    monkeypatch.setattr("hessdiag.measuring.loop.SAVE_SHARE", 0.0)
    whole = plain(measured(plan=plan, min_replicates=10))
    path, kills, rng = tmp_path / "r.st", 0, random.Random(0)
    while True:
        try:
            found = measured(plan=plan, min_replicates=10, resume=path, progress=killer(rng.randrange(4, 30)))
            break
        except Killed:
            kills += 1
            assert kills < 100
    assert kills >= 4
    assert plain(found) == whole
    again = measured(plan=plan, min_replicates=10, resume=path)  # finished: nothing is left to do
    assert plain(again) == whole


def test_ctrl_c_within_a_batch_does_not_count_it_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A KeyboardInterrupt between the replicates of one batch must not leave half of them in the file."""
    monkeypatch.setattr("hessdiag.measuring.loop.SAVE_EVERY", 0.0)
    monkeypatch.setattr("hessdiag.measuring.loop.SAVE_SHARE", 0.0)
    whole = plain(measured(method="hutchinson"))
    work = METHODS["hutchinson"].work
    path, honest, calls = tmp_path / "r.st", work.replicate, [0]

    def interrupted(self: Work, batch: Any, r: int) -> Any:
        calls[0] += 1
        if calls[0] == 101:  # neither the first batch of a round nor the first replicate of a batch
            raise KeyboardInterrupt
        return honest(self, batch, r)

    monkeypatch.setattr(work, "replicate", interrupted)
    cut = measured(method="hutchinson", resume=path)
    assert "interrupted" in cut.status
    assert cut.replicates < COUNT
    monkeypatch.setattr(work, "replicate", honest)
    assert plain(measured(method="hutchinson", resume=path)) == whole


@pytest.mark.parametrize("ignored", [False, True])
def test_sigterm_of_a_queue_is_what_ctrl_c_is(ignored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the exact pass: the file keeps what was done and the message says so; also where Ctrl-C is ignored."""
    weights, state = tmp_path / "m.pt", tmp_path / "r.st"
    hd.save_checkpoint(weights, setting()[0].model, data="digits")
    args = ["measure", str(weights), "--samples", "40", "--batch-size", "9", "--method", "exact", "-q", "--no-spread"]
    whole = CliRunner().invoke(app, args)
    honest = Loop._save_in_time

    def told(self: Loop) -> None:
        honest(self)
        if self._position == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_save_in_time", told)
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            found = CliRunner().invoke(app, [*args, "--resume", str(state)])
        finally:
            signal.signal(signal.SIGINT, before[1])
    assert found.exit_code == 130, found.output
    assert f"interrupted before there was a result; {state} holds what was done" in found.stderr
    assert restore(state, identity=None)[1]["position"] == 3
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert CliRunner().invoke(app, [*args, "--resume", str(state)]).stdout == whole.stdout


def test_exact_part_is_taken_up_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hessdiag.measuring.loop.SAVE_EVERY", 0.0)
    monkeypatch.setattr("hessdiag.measuring.loop.SAVE_SHARE", 0.0)
    whole, path = plain(measured(method="exact")), tmp_path / "r.st"
    batches = [0]
    work = METHODS["exact"].work
    honest = work.known

    def counted(self: Work, batch: Any, tell: Any) -> Any:
        batches[0] += 1
        return honest(self, batch, tell)

    monkeypatch.setattr(work, "known", counted)
    with pytest.raises(Killed):
        measured(method="exact", resume=path, progress=killer(5))
    before = batches[0]
    assert plain(measured(method="exact", resume=path)) == whole
    assert 0 < before < 5
    assert batches[0] <= 6


def test_writes_are_rare_where_they_take_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write of 0.02 s is not repeated within 20 times that, whatever SAVE_EVERY says."""
    from hessdiag.measuring import resume as files

    monkeypatch.setattr("hessdiag.measuring.loop.SAVE_EVERY", 0.0)
    honest, writes = files.store, []

    def slow(*args: Any, **kwargs: Any) -> None:
        time.sleep(0.02)
        writes.append(time.monotonic())
        honest(*args, **kwargs)

    monkeypatch.setattr(files, "store", slow)
    begun = time.monotonic()
    measured(method="hutchinson", resume=tmp_path / "r.st")
    looks = 4  # the first write, after the known phase, at the look at 40, and one in doubt
    assert len(writes) <= looks + (time.monotonic() - begun) / 0.4


def test_another_measurement_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.st"
    measured(method="hutchinson", resume=path)
    with pytest.raises(ResumeError, match="seed"):
        measured(method="hutchinson", resume=path, seed=1)
    objective, _ = setting()
    with pytest.raises(ResumeError, match="remove it to start anew"):
        hd.measure(objective, load("digits", samples=39).batches(9), method="hutchinson", resume=path)
    with pytest.raises(ResumeError, match="begun with method"):
        measured(method="propagation", resume=path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ResumeError):
        measured(method="hutchinson", resume=path)


def test_a_plan_whose_parts_are_other_is_refused(tmp_path: Path) -> None:
    """A file by signs holds the head's share of the Gauss-Newton part alone, under the name of the whole."""
    objective, batches = setting()
    plan = Plan("propagation", gauss_newton="signs")
    hd.measure(objective, batches, plan=plan, max_replicates=4, min_replicates=4, resume=tmp_path / "r.st")
    for changed in ({"gauss_newton": "exact"}, {"parts": False}):
        with pytest.raises(ResumeError, match=next(iter(changed))):
            hd.measure(objective, batches, plan=replace(plan, **changed), resume=tmp_path / "r.st")


def test_masks_of_infinities_tell_samples_apart(tmp_path: Path) -> None:
    masks = torch.zeros(4, 3, 3)
    for sample, column in enumerate((1, 2, 2, 1)):
        masks[sample, :, column:] = -torch.inf
    y = torch.zeros(4, dtype=torch.long)
    marks = fingerprint(masks, y)
    assert marks.isfinite().all()
    assert marks[0] == marks[3] != marks[1]

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: dict[str, Tensor]) -> Tensor:
            rows = torch.softmax(self.score(x["x"]) + x["mask"], -1) @ x["x"]
            return self.head(rows).mean(1)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    objective, batches = hd.Objective(Attend().double()), [({"x": torch.randn(4, 3, 3).double(), "mask": masks}, y)]
    plan = Plan("propagation", deflate=2)
    for most in (10, 12):
        found = hd.measure(objective, batches, plan=plan, max_replicates=most, resume=tmp_path / "r.st", rtol=1e-9)
        assert found.replicates == most


def command(checkpoint: Path, *more: str) -> list[str]:
    options = "--samples 40 --batch-size 20 --method hutchinson --min-replicates 100 --max-replicates 100"
    return [sys.executable, "-m", "hessdiag", "measure", str(checkpoint), *options.split(), "-q", *more]


def kill_and_resume(tmp_path: Path, *, kills: int, seed: int) -> None:
    model = setting()[0].model
    checkpoint, state, rng = tmp_path / "m.pt", tmp_path / "r.st", random.Random(seed)
    hd.save_checkpoint(checkpoint, model, data="digits")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    results = [tmp_path / "whole.json", tmp_path / "resumed.json"]
    done = 0
    while done < kills:
        process = subprocess.Popen(command(checkpoint, "--resume", str(state), "--json", str(results[1])), env=env)
        before = state.stat().st_mtime_ns if state.exists() else 0
        while process.poll() is None:
            if state.exists() and state.stat().st_mtime_ns != before:
                break
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        done += 1
        if results[1].exists():
            break
    assert done > 0
    ended = subprocess.run(
        command(checkpoint, "--json", str(results[1]), "--resume", str(state)), env=env, capture_output=True, text=True
    )
    assert ended.returncode in (0, 1), ended.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other processes: bits repeat for a number of threads
    try:
        CliRunner().invoke(app, command(checkpoint, "--json", str(results[0]))[3:])
    finally:
        torch.set_num_threads(threads)
    whole, resumed = (json.loads(path.read_text()) for path in results)
    for content in (whole, resumed):
        del content["seconds"], content["provenance"]["when"]
        del content["cli"]["spread"]["seconds"], content["cli"]["spread"]["whole"]["seconds"]
    assert resumed == whole


@pytest.mark.slow
def test_sigkill_once(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, kills=1, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_sigkill_at_many_times(tmp_path: Path, seed: int) -> None:
    kill_and_resume(tmp_path, kills=5, seed=seed)


def test_a_damaged_resume_file_is_refused_not_measured_with(tmp_path: Path) -> None:
    """Flipped bits by the checksum; numbers out of range even where the checksum is right."""
    from hessdiag.measuring.resume import FORMAT
    from hessdiag.store.states import read_state, write_state

    path = tmp_path / "r.st"
    measured(method="hutchinson", resume=path)
    data = path.read_bytes()
    for place in range(8, len(data), len(data) // 40):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(ResumeError, match="remove it"):
            measured(method="hutchinson", resume=path)
    path.write_bytes(data)
    for where, key, value in (
        ("progress", "position", 10**9),
        ("progress", "done", -1),
        ("progress", "known_done", "yes"),
        ("progress", "history", [[10, -0.5, 0.1, 0.2]]),
        ("tensors", "stream|total|total", None),
    ):
        path.write_bytes(data)
        content = read_state(path, FORMAT)
        if where == "tensors":
            name = next(name for name, tensor in content["tensors"].items() if tensor.is_floating_point())
            content["tensors"][name].view(-1)[0] = float("nan")
        else:
            content[where][key] = value
        write_state(path, FORMAT, content)
        with pytest.raises(ResumeError, match="damaged"):
            measured(method="hutchinson", resume=path)


def test_a_resume_file_that_cannot_be_written_any_more_does_not_cost_the_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hessdiag.measuring import resume as files

    path, honest, calls = tmp_path / "r.st", files.write_state, [0]

    def full_later(*args: Any) -> None:
        calls[0] += 1
        if calls[0] > 1:
            raise files.BadFileError("cannot be written (No space left on device)")
        honest(*args)

    monkeypatch.setattr(files, "write_state", full_later)
    found = measured(method="hutchinson", resume=path)
    assert calls[0] > 1
    assert any(note.startswith(files.UNSAVED) for note in found.notes)
    monkeypatch.setattr(files, "write_state", honest)
    assert found.rms == measured(method="hutchinson", resume=path).rms
    path.unlink()
    calls[0] = 1
    monkeypatch.setattr(files, "write_state", full_later)
    with pytest.raises(ResumeError, match="No space left"):  # at the first write: nothing is lost yet
        measured(method="hutchinson", resume=path)
