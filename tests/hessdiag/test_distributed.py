"""Several processes measure what one does: the same estimate, and no hang where one of them dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import hessdiag as hd
from hessdiag.cli.program import app
from hessdiag.measuring.resume import restore

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process tables are read from /proc")
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shared") / "m.pt"
    model = hd.networks.build("small_resnet", activation="silu", width=2, strides=(1,), seed=0)
    hd.save_checkpoint(path, model, data="digits")
    return path


def arguments(checkpoint: Path, *more: str) -> list[str]:
    options = "--samples 60 --batch-size 13 --dtype float64 -q --timeout 3600"  # none of these tests waits for it
    return ["-m", "hessdiag", "measure", str(checkpoint), *options.split(), *more]


def together(processes: int, args: list[str], **options: Any) -> subprocess.Popen[str]:
    """A torchrun of its own, on a port of its own."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*start, *args], env=ENV, **pipes, **options)  # type: ignore[call-overload,no-any-return]


def assert_same(one: dict[str, Any], many: dict[str, Any]) -> None:
    """Every norm to float64 rounding, counts and plan exactly."""
    assert many["replicates"] == one["replicates"]
    assert many["plan"] == one["plan"]
    for name, row in one["layers"].items():
        for part in ("total", "gauss_newton", "functional"):
            for key in ("square", "low", "high"):
                want, found = row[part][key], many["layers"][name][part][key]
                assert found == pytest.approx(want, rel=1e-11, abs=1e-13 * abs(row["total"]["square"])), (name, part)
    assert many["trace"]["value"] == pytest.approx(one["trace"]["value"], rel=1e-12)


def check(checkpoint: Path, tmp_path: Path, processes: int, method: str, *more: str) -> None:
    """One process first, whose plan the others are given: a pilot's clock might choose otherwise."""
    one, many = tmp_path / "one.json", tmp_path / "many.json"
    rounds = ("--min-replicates", "11", "--max-replicates", "11", *more)
    alone = CliRunner().invoke(app, arguments(checkpoint, "--method", method, *rounds, "--json", str(one))[2:])
    assert alone.exit_code in (0, 1), alone.stderr
    group = together(processes, arguments(checkpoint, "--plan", str(one), *rounds, "--json", str(many)))
    out, err = group.communicate()
    assert many.exists(), err
    assert out.count("\n") == 1  # printed once, by the first
    a, b = json.loads(one.read_text()), json.loads(many.read_text())
    assert b["provenance"]["processes"] == processes
    assert_same(a, b)


def pair(args: list[str], **env: str) -> list[subprocess.Popen[str]]:
    """Two processes without torchrun, so that each one's exit code is seen."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    group = {**ENV, **env, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen([sys.executable, *args], env={**group, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **pipes)  # type: ignore[call-overload]
        for rank in range(2)
    ]


def test_the_first_process_alone_says_that_a_result_is_wide(checkpoint: Path, tmp_path: Path) -> None:
    """Another's exit with 1 would have torchrun end the first while it still writes."""
    rounds = ("--method", "hutchinson", "--min-replicates", "2", "--max-replicates", "2", "--rtol", "1e-9")
    group = pair(arguments(checkpoint, *rounds, "--json", str(tmp_path / "wide.json")))
    told = [process.communicate()[1] for process in group]
    assert [process.returncode for process in group] == [1, 0], told
    assert (tmp_path / "wide.json").exists()


def test_two_processes(checkpoint: Path, tmp_path: Path) -> None:
    check(checkpoint, tmp_path, 2, "propagation", "--attack", "pgd:eps=8/255,steps=2")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["exact", "hutchinson", "propagation"])
@pytest.mark.parametrize("processes", [2, 4])
def test_more_processes_and_methods(checkpoint: Path, tmp_path: Path, processes: int, method: str) -> None:
    check(checkpoint, tmp_path, processes, method)


@pytest.mark.slow
def test_fewer_batches_than_processes(checkpoint: Path, tmp_path: Path) -> None:
    check(checkpoint, tmp_path, 4, "propagation", "--batch-size", "30")


def deflated(checkpoint: Path, tmp_path: Path, *more: str) -> None:
    """A plan with directions, taken from a file: each process finds those of the batches it meets."""
    first, plan = tmp_path / "first.json", tmp_path / "plan.json"
    rounds = ("--method", "propagation", "--min-replicates", "2", "--max-replicates", "2", *more)
    CliRunner().invoke(app, arguments(checkpoint, *rounds, "--json", str(first))[2:])
    content = json.loads(first.read_text())
    content["plan"]["deflate"] = 3
    plan.write_text(json.dumps(content))
    check(checkpoint, tmp_path, 2, "propagation", "--plan", str(plan), *more)
    assert json.loads((tmp_path / "many.json").read_text())["plan"]["deflate"] == 3


@pytest.mark.slow
def test_two_processes_with_directions(checkpoint: Path, tmp_path: Path) -> None:
    deflated(checkpoint, tmp_path)


@pytest.mark.slow
def test_two_processes_with_directions_and_one_batch(checkpoint: Path, tmp_path: Path) -> None:
    deflated(checkpoint, tmp_path, "--batch-size", "60")


@pytest.mark.slow
def test_state_of_one_process_is_taken_up_by_two(checkpoint: Path, tmp_path: Path) -> None:
    """What one process had half summed counts once, not once per process."""
    state, whole, many = (tmp_path / name for name in ("r.st", "whole.json", "many.json"))
    rounds = ("--method", "hutchinson", "--min-replicates", "12", "--max-replicates", "12")
    CliRunner().invoke(app, arguments(checkpoint, *rounds, "--json", str(whole))[2:])
    script = (
        "import sys, hessdiag.measuring.loop as loop\n"
        "loop.SAVE_EVERY = loop.SAVE_SHARE = 0.0\n"
        "honest, seen = loop.Loop._save_in_time, []\n"
        "def stop(self):\n"
        "    honest(self)\n"
        "    seen.append(1)\n"
        "    if len(seen) == 7: __import__('os')._exit(9)\n"  # in the middle of a round
        "loop.Loop._save_in_time = stop\n"
        "from hessdiag.cli import main\n"
        f"sys.argv = {['hessdiag', *arguments(checkpoint, *rounds, '--resume', str(state))[2:]]!r}\n"
        "main()\n"
    )
    assert subprocess.run([sys.executable, "-c", script], env=ENV, check=False).returncode == 9
    group = together(2, arguments(checkpoint, *rounds, "--resume", str(state), "--json", str(many)))
    _, err = group.communicate()
    assert many.exists(), err
    assert_same(json.loads(whole.read_text()), json.loads(many.read_text()))


DIFFERENT = """
import datetime, json, os, sys
import torch, torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
import hessdiag as hd
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=3600))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
x = torch.randn(48, 5).double() * torch.linspace(0.1, 4, 48).double()[:, None]
y = torch.randint(0, 3, (48,))
data, o = TensorDataset(x, y), hd.Objective(model)
plain = list(DataLoader(data, batch_size=8))
told = {}
def tell(name, act):
    torch.manual_seed(100 + rank)  # as scripts of several processes do
    try:
        found = act()
        told[name] = found.rms if hasattr(found, "rms") else [float(t.sum()) for t in found.total.values()]
    except Exception as error:
        told[name] = f"{type(error).__name__}: {error}"
tell("list", lambda: hd.measure(o, plain, method="exact"))
tell("seed of each", lambda: hd.measure(o, DataLoader(data, batch_size=8, shuffle=True), method="exact"))
tell("unchecked", lambda: hd.measure(
    o, DataLoader(data, batch_size=8, shuffle=True), method="hutchinson", deterministic_check=False))
tell("seed of all", lambda: hd.measure(
    o, DataLoader(data, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(1)), method="exact"))
tell("list, shuffled", lambda: hd.diagonal(o, list(DataLoader(data, batch_size=8, shuffle=True))))
tell("sampler", lambda: hd.measure(
    o, DataLoader(data, batch_size=8, sampler=DistributedSampler(data, 2, rank, shuffle=False)), method="exact"))
tell("one short", lambda: hd.measure(o, plain[:6 - rank], method="exact"))
tell("targets", lambda: hd.measure(o, [(a, (b + rank) % 3) for a, b in plain], method="exact"))
tell("seeds", lambda: hd.measure(o, plain, method="hutchinson", seed=rank))
tell("l2", lambda: hd.measure(hd.Objective(model, l2=0.1 * rank), plain, method="exact"))
tell("one refuses", lambda: hd.measure(o, [(a * (float("nan") if rank else 1.0), b) for a, b in plain], method="exact"))
class Broken(list):
    def __iter__(self):
        yield from super().__iter__()
        if rank: raise IndexError("a file is missing")
tell("one breaks", lambda: hd.measure(o, Broken(plain), method="exact"))
tell("of its own", lambda: hd.diagonal(o, plain[3 * rank:3 * rank + 3], per_sample=True))
model[1].running_mean += 1e-9 * rank  # as the last step of training leaves them
tell("buffers", lambda: hd.measure(o, plain, method="exact"))
print(json.dumps(told))
dist.destroy_process_group()
"""


def test_processes_that_do_not_see_the_same_are_refused_in_every_one() -> None:
    """Against the measurement of one process, and the diagonals of single samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    x = torch.randn(48, 5).double() * torch.linspace(0.1, 4, 48).double()[:, None]
    y = torch.randint(0, 3, (48,))
    group = pair(["-c", DIFFERENT])
    said = [process.communicate() for process in group]
    assert [process.returncode for process in group] == [0, 0], said
    ranks = [json.loads(out) for out, _ in said]
    alone = hd.measure(hd.Objective(model), [(x, y)], method="exact").rms
    wanted = {
        "seed of each": "NotDeterministicError: the data come in another order in every pass",
        "unchecked": "ConfigurationError: the orders of the samples differ between processes 0 and 1",
        "seed of all": "NotDeterministicError: the data come in another order in every pass",
        "list, shuffled": "ConfigurationError: the orders of the samples differ",
        "sampler": "ConfigurationError: the samples themselves differ",
        "one short": "ConfigurationError: the numbers of samples differ between processes 0 and 1 (48 and 40)",
        "targets": "ConfigurationError: the samples themselves differ",
        "seeds": "ConfigurationError: seeds differ",
        "l2": "ConfigurationError: the losses' names or options, or l2 differ",
        "buffers": "ConfigurationError: the models differ",
    }
    for rank, told in enumerate(ranks):
        assert told["list"] == pytest.approx(alone, rel=1e-12)
        for name, text in wanted.items():
            assert str(told[name]).startswith(text), (name, told[name])
        for name in ("seed of each", "unchecked", "list, shuffled", "sampler", "one short"):
            assert "the same list of batches, in the same order, without DistributedSampler" in told[name]
        refused = "NonFiniteError: batch 0" if rank else "NonFiniteError: process 1 refused its data or model"
        assert told["one refuses"].startswith(refused), told["one refuses"]
        broken = "IndexError" if rank else "DistributedError: process 1 refused its data or model"
        assert told["one breaks"].startswith(broken), told["one breaks"]
        part = slice(24 * rank, 24 * rank + 24)
        own = hd.diagonal(hd.Objective(model), [(x[part], y[part])], per_sample=True)
        assert told["of its own"] == pytest.approx([float(t.sum()) for t in own.total.values()], rel=1e-12)


STOPPED = """
import os, signal, sys
import hessdiag.measuring.loop as loop
loop.MEET_EVERY = 0.0
honest, seen = loop.Loop._after_batch, []
def told(self, batch, position):  # one process alone is told to stop, within a pass
    honest(self, batch, position)
    seen.append(self.known_done)
    if os.environ["RANK"] == "1" and seen.count(os.environ["WHEN"] == "rounds") == 2:
        os.kill(os.getpid(), signal.SIGTERM)
loop.Loop._after_batch = told
from hessdiag.cli import main
sys.argv = ["hessdiag", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
def test_told_to_stop_within_a_pass_all_stop_there_and_what_was_done_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    """SIGTERM to one of two, twice over: in the exact part and among the first replicates; one process then ends it."""
    state, whole, last = (tmp_path / name for name in ("r.st", "whole.json", "last.json"))
    args = arguments(checkpoint, "--batch-size", "5", "--min-replicates", "11", "--max-replicates", "11")[2:]
    alone = CliRunner().invoke(app, [*args, "--method", "propagation", "--json", str(whole)])
    assert alone.exit_code in (0, 1), alone.output
    content = json.loads(whole.read_text())
    assert content["plan"]["parts"]
    args += ["--plan", str(whole), "--resume", str(state)]
    places = []
    for when in ("known", "rounds"):
        group = pair(["-c", STOPPED, *args], WHEN=when)
        told = [process.communicate()[1] for process in group]
        assert [process.returncode for process in group] == [130, 130], told
        assert all(f"{state} holds what was done: the same command goes on from there" in text for text in told), told
        places.append(restore(state, identity=None)[1])
    assert not places[0]["known_done"]
    assert places[0]["position"] in (4, 6)  # of 12 batches: after the second turn of both, or after the next
    assert places[1]["known_done"]
    assert places[1]["partial"]
    assert places[1]["position"] in (4, 6)
    end = CliRunner().invoke(app, [*args, "--json", str(last)])
    assert end.exit_code in (0, 1), end.output
    assert_same(content, json.loads(last.read_text()))


def workers(parent: int) -> list[int]:
    """The processes that a torchrun started, by rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                for pair in (entry / "environ").read_bytes().split(b"\0"):
                    if pair.startswith(b"RANK="):
                        found[int(pair[5:])] = int(entry.name)
        except (OSError, ValueError, IndexError):
            continue
    return [found[rank] for rank in sorted(found)]


def kill_one(checkpoint: Path, tmp_path: Path, victim: int, processes: int = 2) -> None:
    """SIGKILL to one process in the middle of the work: an error of one line from each other, and an end."""
    state = tmp_path / "r.st"
    rounds = ("--method", "hutchinson", "--min-replicates", "60000", "--max-replicates", "60000")
    group = together(processes, arguments(checkpoint, *rounds, "--resume", str(state)))
    try:
        while not state.exists() and group.poll() is None:
            time.sleep(0.05)
        time.sleep(1.0)
        ranks = workers(group.pid)
        assert len(ranks) == processes, group.communicate()
        os.kill(ranks[victim], signal.SIGKILL)
        out, err = group.communicate()  # an end long before their timeout, or that of the test
    finally:
        if group.poll() is None:
            group.kill()
    assert group.returncode != 0
    assert out == ""
    told = [line for line in err.splitlines() if line.startswith("hessdiag (process ")]
    assert told and all("another" in line for line in told), err
    assert not any(f"(process {victim} " in line for line in told)
    assert 'File "' not in "".join(line for line in err.splitlines() if "/hessdiag/" in line), err


@pytest.mark.slow
def test_one_of_two_is_killed(checkpoint: Path, tmp_path: Path) -> None:
    kill_one(checkpoint, tmp_path, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "processes"), [(0, 2), (2, 4)])
def test_any_of_more_is_killed(checkpoint: Path, tmp_path: Path, victim: int, processes: int) -> None:
    kill_one(checkpoint, tmp_path, victim, processes)
