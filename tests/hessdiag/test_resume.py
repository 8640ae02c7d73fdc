"""Interrupted measurements: killed anywhere and started again, the result is that of the uninterrupted one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import hessdiag as hd
from hessdiag.cli.program import app
from hessdiag.data import load
from hessdiag.errors import ResumeError
from hessdiag.measuring.loop import Event, Loop
from hessdiag.measuring.resume import FORMAT, restore
from hessdiag.methods import METHODS, Plan, Work
from hessdiag.methods.batches import fingerprint
from hessdiag.store.states import read_state, write_state

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


class Shuffled:
    """Batches in another order in every pass, by a generator that nobody else knows, or by python's or numpy's."""

    def __init__(self, x: Tensor, y: Tensor, shuffle: Callable[[list[int]], object]) -> None:
        self.x, self.y, self.shuffle = x, y, shuffle

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = list(range(len(self.y)))
        self.shuffle(order)
        for some in torch.tensor(order).split(8):
            yield self.x[some], self.y[some]


def uneven(dtype: torch.dtype = torch.float64) -> tuple[hd.Objective, Tensor, Tensor]:
    """Samples of very different curvature, so that one that is left out or counted twice is seen."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype).eval()
        x = torch.randn(40, 5, dtype=dtype) * torch.linspace(0.1, 4, 40, dtype=dtype)[:, None]
        return hd.Objective(model), x, torch.randint(0, 3, (40,))


def loader(kind: str, x: Tensor, y: Tensor, seed: int) -> Any:
    """A loader that shuffles, and the state that it shuffles by set to `seed`."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (as loaders use it)
    if kind == "python":
        return Shuffled(x, y, random.shuffle)
    if kind == "numpy":
        return Shuffled(x, y, np.random.shuffle)
    if kind == "nobody knows":
        return Shuffled(x, y, random.Random(seed).shuffle)
    own = torch.Generator().manual_seed(seed) if kind == "own" else None
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, generator=own)


def sittings(
    kind: str, path: Path, *, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[hd.Measurement, int]:
    """Killed after every few events and begun again, in a process whose random states are others each time."""
    objective, x, y = uneven(dtype)
    rng, kills = random.Random(3), 0
    while True:
        try:
            batches = loader(kind, x, y, 5 + kills)
            return hd.measure(
                objective, batches, resume=path, progress=killer(rng.randrange(3, 7) + kills), **options
            ), kills
        except Killed:
            kills += 1
            assert kills < 200


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("kind", ["torch", "own", "python", "numpy"])
def test_a_loader_that_shuffles_is_put_back_to_where_it_was(
    kind: str, checked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as without interruption, in the exact pass and among replicates."""
    monkeypatch.setattr("hessdiag.measuring.loop.SAVE_EVERY", 0.0)
    monkeypatch.setattr("hessdiag.measuring.loop.SAVE_SHARE", 0.0)
    objective, x, y = uneven()
    rounds: dict[str, Any] = {"min_replicates": 11, "max_replicates": 11, "rtol": 1e-9, "deterministic_check": checked}
    for method in ("exact", "hutchinson"):
        whole = plain(hd.measure(objective, loader(kind, x, y, 5), method=method, **rounds))
        found, kills = sittings(kind, tmp_path / method, method=method, **rounds)
        assert kills
        assert plain(found) == whole


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("checked", [True, False])
def test_a_pass_whose_order_nobody_knows_begins_anew(
    checked: bool, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut short within the exact pass, again and again: the number is that of all samples in one batch."""
    monkeypatch.setattr("hessdiag.measuring.loop.SAVE_EVERY", 0.0)
    monkeypatch.setattr("hessdiag.measuring.loop.SAVE_SHARE", 0.0)
    objective, x, y = uneven(dtype)
    truth = hd.measure(objective, [(x, y)], method="exact")
    close = 1e-12 if dtype == torch.float64 else 1e-5
    begun: list[int] = []
    honest = Loop._begin_pass_anew

    def anew(self: Loop) -> None:
        begun.append(self._position)
        honest(self)

    monkeypatch.setattr(Loop, "_begin_pass_anew", anew)
    found, kills = sittings("nobody knows", tmp_path / "r", dtype=dtype, method="exact", deterministic_check=checked)
    assert kills
    assert min(begun) > 0
    assert found.rms == pytest.approx(truth.rms, rel=close)
    rounds: dict[str, Any] = {"min_replicates": 12, "max_replicates": 12, "rtol": 1e-9}
    plan = Plan("hutchinson", block=0, at_once=3)
    found, _ = sittings("nobody knows", tmp_path / "s", dtype=dtype, plan=plan, deterministic_check=checked, **rounds)
    assert found.replicates == 12
    same = hd.measure(objective, [(x, y)], plan=plan, **rounds)  # one probe serves all samples, in whichever order
    assert same.rms == pytest.approx(found.rms, rel=close)


def test_a_list_in_another_order_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hessdiag.measuring.loop.SAVE_EVERY", 0.0)
    monkeypatch.setattr("hessdiag.measuring.loop.SAVE_SHARE", 0.0)
    objective, x, y = uneven()
    batches = [(x[k : k + 8], y[k : k + 8]) for k in range(0, 40, 8)]
    with pytest.raises(Killed):
        hd.measure(objective, batches, method="exact", resume=tmp_path / "r", progress=killer(4))
    assert restore(tmp_path / "r", identity=None)[1]["position"] > 1
    found = hd.measure(objective, batches[::-1], method="exact", resume=tmp_path / "r")
    assert found.rms == pytest.approx(hd.measure(objective, [(x, y)], method="exact").rms, rel=1e-12)


def test_other_groups_of_samples_are_another_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They cut the batches anew, and the place in the pass counts those. Files from before this was said say it, too."""
    monkeypatch.setattr("hessdiag.measuring.loop.SAVE_EVERY", 0.0)
    monkeypatch.setattr("hessdiag.measuring.loop.SAVE_SHARE", 0.0)
    objective, batches = setting("small_resnet")
    name = next(n for n, p in objective.parameters.items() if p.ndim == 4).removesuffix(".weight")
    plans = [Plan("propagation"), Plan("propagation", sample_groups={name: 4})]
    path = tmp_path / "r.st"
    rounds: dict[str, Any] = {"min_replicates": 12, "max_replicates": 12, "rtol": 1e-9}
    whole = [plain(hd.measure(objective, batches, plan=plan, **rounds)) for plan in plans]
    for own, other in (plans, plans[::-1]):
        path.unlink(missing_ok=True)
        with pytest.raises(Killed):
            hd.measure(objective, batches, plan=own, resume=path, progress=killer(3), **rounds)
        content = read_state(path, FORMAT)
        assert content["progress"]["position"] > 1
        for older in (False, True):
            if older:
                del content["identity"]["sample groups"], content["progress"]["trail"]
                write_state(path, FORMAT, content)
            with pytest.raises(ResumeError, match="was made with sample groups="):
                hd.measure(objective, batches, plan=other, resume=path, **rounds)
        assert plain(hd.measure(objective, batches, plan=own, resume=path, **rounds)) == whole[plans.index(own)]


def test_a_file_of_before_there_were_trails_is_kept_where_it_is_stopped_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While what was seen before is passed over, there is nothing to say where it ended but the file's own place."""
    monkeypatch.setattr("hessdiag.measuring.loop.SAVE_EVERY", 0.0)
    monkeypatch.setattr("hessdiag.measuring.loop.SAVE_SHARE", 0.0)
    objective, batches = setting()[0], list(setting()[1])
    options: dict[str, Any] = {"method": "hutchinson", "min_replicates": 12, "max_replicates": 12, "rtol": 1e-9}
    whole, path, passes = plain(hd.measure(objective, batches, **options)), tmp_path / "r.st", [0]
    with pytest.raises(Killed):
        hd.measure(objective, batches, resume=path, progress=killer(7), **options)
    content = read_state(path, FORMAT)
    assert content["progress"]["position"] > 1
    del content["progress"]["trail"]
    content["progress"].pop("random", None)
    write_state(path, FORMAT, content)

    class Stopped:
        """The third pass is that of the replicates; the first two look the data through."""

        def __iter__(self) -> Iterator[Any]:
            passes[0] += 1
            yield batches[0]
            if passes[0] > 2:
                raise KeyboardInterrupt
            yield from batches[1:]

    assert "interrupted" in hd.measure(objective, Stopped(), resume=path, **options).status
    assert passes[0] == 3
    assert plain(hd.measure(objective, batches, resume=path, **options)) == whole


def test_a_model_with_a_sparse_buffer_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hessdiag.measuring.loop.SAVE_EVERY", 0.0)

    class Brought(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.sparse.mm(self.adjacency, x.T).T)  # type: ignore[no-any-return]

    _, x, y = uneven()
    torch.manual_seed(0)
    model = Brought(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model.register_buffer("adjacency", torch.eye(5).double().roll(1, 0).to_sparse())
    options: dict[str, Any] = {"method": "hutchinson", "min_replicates": 12, "max_replicates": 12, "rtol": 1e-9}
    whole = plain(hd.measure(hd.Objective(model), [(x, y)], **options))
    with pytest.raises(Killed):
        hd.measure(hd.Objective(model), [(x, y)], resume=tmp_path / "r", progress=killer(5), **options)
    assert plain(hd.measure(hd.Objective(model), [(x, y)], resume=tmp_path / "r", **options)) == whole
    model.get_buffer("adjacency")._values().mul_(1.01)
    with pytest.raises(ResumeError, match=r"made with (loss|weights)="):
        hd.measure(hd.Objective(model), [(x, y)], resume=tmp_path / "r", **options)


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
    options = "--samples 40 --batch-size 20 --method hutchinson --min-replicates 400 --max-replicates 400"
    return [sys.executable, "-m", "hessdiag", "measure", str(checkpoint), *options.split(), "-q", *more]


def kill_and_resume(tmp_path: Path, *, kills: int, seed: int) -> None:
    model = setting()[0].model
    checkpoint, state, rng = tmp_path / "m.pt", tmp_path / "r.st", random.Random(seed)
    hd.save_checkpoint(checkpoint, model, data="digits")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    results = [tmp_path / "whole.json", tmp_path / "resumed.json"]
    codes: list[int] = []
    while len(codes) < kills and not results[1].exists():
        process = subprocess.Popen(command(checkpoint, "--resume", str(state), "--json", str(results[1])), env=env)
        before = state.stat().st_mtime_ns if state.exists() else 0
        while process.poll() is None:
            if state.exists() and state.stat().st_mtime_ns != before:
                break
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        codes.append(process.wait())
    assert -signal.SIGKILL in codes, "every measurement was done before it could be killed"
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
        ("progress", "trail", "none"),
        ("progress", "random", {"first": {"torch": "00", "own": [], "python": [3, [], None], "numpy": None}}),
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
