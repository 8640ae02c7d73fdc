"""Runs as a whole: repeatable, resumable after SIGKILL, stopped by name when they go wrong, safe on a full disk."""

from __future__ import annotations

import errno
import fcntl
import functools
import inspect
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiments.config import TrainConfig
from experiments.train import TrainResult, train
from experiments.trained import load_trained
from experiments.trainer import choosing, compiling, watch
from experiments.trainer.precision import Precision
from experiments.trainer.rig import pick_device
from hessdiag import data
from hessdiag.activations import RCTAF
from hessdiag.data.dataset import DataSet, make
from hessdiag.errors import CheckpointError, ConfigurationError, DataError, NonFiniteError, ResumeError
from hessdiag.problem import ascent, denormals

ROOT = Path(__file__).resolve().parents[2]


def table(**more: Any) -> dict[str, Any]:
    return {
        "method": "n_fgsm",
        "network": "small_resnet",
        "network_options": {"width": 4, "strides": [1]},
        "activation": "silu",
        "data": "digits",
        "train_samples": 160,
        "epochs": 3,
        "batch_size": 32,
        "eps": "0.15",
        "augment": {"crop": 1, "flip": False},
        "watch": {"samples": 32, "steps": 2},
        **more,
    }


def configuration(**more: Any) -> TrainConfig:
    return TrainConfig.from_dict(table(**more))


def bits(result: TrainResult) -> list[bytes]:
    return [v.detach().numpy().tobytes() for v in result.model.state_dict().values()]


def test_the_same_configuration_gives_the_same_bits_and_leaves_global_randomness_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = train(configuration())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert bits(first) == bits(train(configuration()))
    assert bits(first) != bits(train(configuration(seed=1)))
    assert not first.model.training
    assert first.epochs == 3


def test_denormal_numbers_taken_for_zero_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """At max|σ''| = 50 many an activation's value is below 1e-38; a user's own setting stands afterwards."""
    sharp = configuration(activation="rct:beta=1,curvature=50")
    seen: list[bool] = []
    small: list[bool] = []

    def noted(epoch: int, lr: float, network: torch.nn.Module) -> None:
        seen.append(denormals.are_zero())

    def values(module: torch.nn.Module, given: Any, out: torch.Tensor) -> None:
        small.append(bool(((out != 0.0) & (out.abs() < torch.finfo(torch.float32).tiny)).any()))

    with_zeros = train(sharp, look=noted)
    assert not denormals.are_zero()
    plain = inspect.unwrap(train)
    monkeypatch.setattr(ascent, "denormals_are_zero", nullcontext)
    as_they_are = plain(sharp, look=noted)
    assert bits(with_zeros) == bits(as_they_are)
    assert with_zeros.clean_loss == as_they_are.clean_loss
    assert seen[:3] in ([True] * 3, [False] * 3)  # what the processor cannot do
    assert seen[3:] == [False] * 3
    for module in as_they_are.model.modules():
        if isinstance(module, RCTAF):
            module.register_forward_hook(values)
    as_they_are.model(data.load("digits", split="test", samples=200).inputs)
    assert any(small)  # or nothing is shown


def test_what_a_run_writes(tmp_path: Path) -> None:
    result = train(configuration(), tmp_path / "run", save_seconds=0)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "state.pt",
        "last.pt",
        "result.json",
    }
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["eps"] == "0.15"
    assert record["key"] == result.key
    assert record["status"] == result.status
    assert record["clean_accuracy"] == result.clean_accuracy
    assert record["test_samples"] == 500
    assert torch.__version__.startswith(record["provenance"]["versions"]["torch"].split("+")[0])
    assert record["provenance"]["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", record["provenance"]["commit"])
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert {"loss", "lr", "eps", "clean", "fgsm", "pgd", "train_adversarial", "images_per_second"} <= rows[0].keys()
    found = load_trained(tmp_path / "run")
    x = data.load("digits", split="test", samples=20).inputs
    with torch.no_grad():
        assert torch.equal(found.model(x), result.model(x))
    assert found.training["method"] == "n_fgsm"
    assert found.epoch == 3


def test_a_finished_run_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(configuration(), tmp_path)
    monkeypatch.setattr("experiments.trainer.step.Stepper.__call__", lambda *a, **k: pytest.fail("trained again"))
    again = train(configuration(), tmp_path)
    assert bits(first) == bits(again)
    assert again.clean_accuracy == first.clean_accuracy


def test_another_configuration_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    train(configuration(epochs=1), tmp_path)
    with pytest.raises(ResumeError, match=r"lr 0\.2 there, 0\.1 here"):
        train(configuration(epochs=1, lr=0.1), tmp_path)
    (tmp_path / "state.pt").write_bytes(b"rubbish")
    with pytest.raises(ResumeError, match=r"state\.pt: cannot be read"):
        train(configuration(epochs=1), tmp_path)


METHODS: dict[str, dict[str, Any]] = {
    "n_fgsm": {},
    "dkl": {"method": "dkl", "awp": {"start": 2}, "epochs": 4, "lr": 0.05},
    "averaged": {"averaging": {"per": "iteration", "tau": 0.9, "after": 0.5}, "epochs": 4},
    "best": {"select": "best", "held_out": 32},
}


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", sorted(METHODS))
def test_an_interrupted_run_goes_on_to_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of the third epoch, whatever state the method carries."""
    config = configuration(**METHODS[name])
    whole = train(config)
    from experiments.trainer.step import Stepper

    original = Stepper.__call__

    def interrupted(self: Stepper, *a: Any, **k: Any) -> None:
        if k["epoch"] == 3 and k["step"] == 2:
            raise Stop
        original(self, *a, **k)

    monkeypatch.setattr(Stepper, "__call__", interrupted)
    with pytest.raises(Stop):
        train(config, tmp_path, save_seconds=0)
    monkeypatch.setattr(Stepper, "__call__", original)
    resumed = train(config, tmp_path, save_seconds=0)
    assert bits(whole) == bits(resumed)
    assert whole.weights == resumed.weights
    strip = {"seconds", "images_per_second"}
    left, right = ([{k: v for k, v in r.items() if k not in strip} for r in t.history] for t in (whole, resumed))
    assert left == right


# The child ends itself: so long after an epoch is saved, in its own processor time, which no load on the machine moves.
# Nothing handles SIGPROF: it ends the process where it stands, as SIGKILL does.
SCRIPT = """
import json, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from experiments.config import TrainConfig
from experiments.train import train
from experiments.folder import Folder

save, (epoch, pause) = Folder.save, json.loads(sys.argv[3])

def save_and_end(folder, rig, standing):
    save(folder, rig, standing)
    if standing.epoch == epoch:
        signal.setitimer(signal.ITIMER_PROF, pause)

Folder.save = save_and_end
if epoch == 0:
    signal.setitimer(signal.ITIMER_PROF, pause)
result = train(TrainConfig.from_dict(json.loads(sys.argv[1])), Path(sys.argv[2]), save_seconds=0)
"""


def child(config: dict[str, Any], folder: Path, when: tuple[int, float]) -> int:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, json.dumps(config), str(folder), json.dumps(when)]
    return subprocess.run(command, env=variables, cwd=folder.parent, check=False).returncode


def killed_and_resumed(config: dict[str, Any], folder: Path, kills: list[tuple[int, float]]) -> int:
    """Kill the run (epoch, pause): the pause after that epoch was saved. Then let it end; returns how many kills hit."""
    codes = [child(config, folder, when) for when in [*kills, (-1, 1.0)]]
    assert codes[-1] == 0
    return codes.count(-signal.SIGPROF)


def same_weights(a: Path, b: Path) -> None:
    left, right = (load_trained(p).model.state_dict() for p in (a, b))
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_sigkill(tmp_path: Path) -> None:
    config = table(epochs=20)
    torch.set_num_threads(1)
    train(TrainConfig.from_dict(config), tmp_path / "whole")
    assert killed_and_resumed(config, tmp_path / "killed", [(5, 0.01)]) == 1
    same_weights(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_sigkill_at_many_moments(tmp_path: Path) -> None:
    import random

    moments = random.Random(0)
    config = table(method="dkl", epochs=16, lr=0.05, awp={"start": 2})
    kills = [(epoch, moments.uniform(0.0, 0.1)) for epoch in sorted(moments.sample(range(12), 4))]
    torch.set_num_threads(1)
    train(TrainConfig.from_dict(config), tmp_path / "whole")
    hits = killed_and_resumed(config, tmp_path / "killed", kills)
    assert hits >= 3
    same_weights(tmp_path / "whole", tmp_path / "killed")


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration(epochs=4)
    whole = train(config)
    original, calls = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 15:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left.*last good checkpoint, of epoch \d.*same command"):
        train(config, tmp_path, save_seconds=0)
    monkeypatch.setattr(os, "fsync", original)
    assert not list(tmp_path.glob(".*.tmp"))
    epoch = load_trained(tmp_path).epoch
    assert epoch is not None
    assert 1 <= epoch < 4
    assert bits(train(config, tmp_path)) == bits(whole)


def test_nan_is_named_and_never_saved(tmp_path: Path) -> None:
    config = configuration(lr=1e20, schedule={"name": "constant"}, epochs=5)
    with pytest.raises(NonFiniteError, match=r"n_fgsm small_resnet silu.*NaN or Inf.*epoch \d.*Lower lr"):
        train(config, tmp_path, save_seconds=0)
    if (tmp_path / "last.pt").exists():
        assert all(v.isfinite().all() for v in load_trained(tmp_path).model.state_dict().values())


def test_nan_in_a_weight_is_named() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    assert watch.first_broken(net) is None
    net[1].running_var[0] = float("inf")
    assert watch.first_broken(net) == "1.running_var"
    with pytest.raises(NonFiniteError, match=r"1\.running_var holds NaN or Inf in epoch 3"):
        watch.refuse_broken(net, epoch=3, step=None, config=configuration(), saved=str)


def look(epoch: int, fgsm: float, pgd: float) -> dict[str, Any]:
    return {"epoch": epoch, "clean": 0.9, "fgsm": fgsm, "pgd": pgd}


def test_catastrophic_overfitting_is_told_from_an_ordinary_setback() -> None:
    before = [look(1, 0.5, 0.4), look(2, 0.6, 0.5)]
    reason = watch.overfitting([*before, look(3, 0.7, 0.2)], 0.2)
    assert reason is not None
    assert "epoch 3" in reason
    assert "0.50 (epoch 2) to 0.20" in reason
    assert watch.overfitting([*before, look(3, 0.25, 0.2)], 0.2) is None  # both fell: a bad step
    assert watch.overfitting([*before, look(3, 0.6, 0.35)], 0.2) is None  # within the margin
    assert watch.overfitting([*before, look(3, 0.7, 0.0)], 0.0) is None  # switched off
    gap = {"epoch": 2, "clean": None, "fgsm": None, "pgd": None}
    assert watch.overfitting([look(1, 0.6, 0.5), gap, look(3, 0.7, 0.2)], 0.2) is not None


def test_catastrophic_overfitting_stops_the_run_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([look(1, 0.5, 0.4), look(2, 0.9, 0.0)])

    def fake(*a: Any, **k: Any) -> dict[str, float]:
        return {key: value for key, value in next(looks).items() if key != "epoch"}

    monkeypatch.setattr("experiments.trainer.loop.watched", fake)
    result = train(configuration(epochs=5), tmp_path)
    assert result.status == "catastrophic_overfitting"
    assert result.epochs == 2
    assert result.reason is not None
    assert "PGD accuracy fell from 0.40" in result.reason
    again = train(configuration(epochs=5), tmp_path)  # stays stopped
    assert again.status == result.status
    assert again.reason == result.reason


class Wavy(torch.nn.Module):
    """The true class wins where cos(2 pi x/0.1) > 0: a step of 0.1 comes back to where it was, half a step does not."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = self.scale * torch.cos(2 * torch.pi * x.flatten(1).sum(1) / 0.1)
        return torch.stack([score, -score], 1)


def test_the_watch_sees_a_net_that_only_fgsm_believes_in() -> None:
    x = torch.tensor([0.51, 0.61, 0.71]).view(-1, 1, 1, 1)
    y = torch.zeros(3, dtype=torch.long)
    net = Wavy().train()
    config = configuration(eps="0.1", watch={"steps": 10})
    seen = watch.watched(net, net, x, y, config, epoch=1)
    assert seen == {"clean": 1.0, "fgsm": 1.0, "pgd": 0.0}
    assert net.training
    assert net.scale.grad is None


def test_the_best_epoch_is_the_one_kept(tmp_path: Path) -> None:
    config = configuration(select="best", held_out=40, epochs=4)
    result = train(config, tmp_path, save_seconds=0)
    assert result.weights == "best"
    scores = [row["held_out_pgd"] for row in result.history]
    assert load_trained(tmp_path).path.name == "best.pt"
    assert load_trained(tmp_path).epoch == 1 + scores.index(max(scores))


def test_data_that_cannot_be_trained_on() -> None:
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8) % 2
    good = make(x, y, name="good", split="train", num_classes=2)
    cases: list[tuple[DataSet, dict[str, Any], str]] = [
        (make(3 * x, y, name="raw", split="train", num_classes=2), {}, r"\[0, 1\].*normalize"),
        (make(x, y.double(), name="reals", split="train"), {}, "class labels"),
        (make(x.flatten(1), y, name="flat", split="train", num_classes=2), {}, "images"),
        (good, {"augment": {"auto": "before"}}, "uint8"),
        (good, {"augment": {"crop": 8, "pad": "reflect"}}, "reflect"),
        (good, {"batch_size": 9, "drop_last": True}, "batch_size"),
    ]
    for bad, more, message in cases:
        with pytest.raises(DataError, match=message):
            train(configuration(**{"batch_size": 4, **more}), sets=(bad, bad))
    with pytest.raises(ConfigurationError, match="held_out"):
        train(configuration(held_out=8), sets=(good, good))


def test_missing_data_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="hessdiag data cifar10"):
        train(configuration(data="cifar10"), root=tmp_path)


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ConfigurationError, match="cannot be used"):
        pick_device("cuda:99")
    assert pick_device("cpu").type == "cpu"


def timings(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> list[str]:
    """Steps take these seconds by a clock of their own; returns the names of the candidates as they are timed."""
    now, timed = [0.0], []

    class Step:
        def __init__(self, config: Any, images: Any, sampler: Any, precision: Precision) -> None:
            self.name, self.stepper = precision.name, SimpleNamespace(forget=lambda: None)

        def __call__(self) -> None:
            timed.append(self.name)
            now[0] += seconds[self.name]

    monkeypatch.setattr(choosing, "_Step", Step)
    monkeypatch.setattr(choosing.time, "perf_counter", lambda: now[0])
    return timed


AUTO = {"autocast": "auto", "channels_last": "auto"}
STEPS = {
    "float, contiguous": 1.0,
    "float, channels_last": 1.2,
    "bfloat16, contiguous": 0.99,
    "bfloat16, channels_last": 0.7,
}


def test_precision_is_chosen_once_by_a_timed_step_and_kept_when_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration(**AUTO)
    assert config.key() != configuration().key()
    timed = timings(monkeypatch, STEPS)
    from experiments.trainer.step import Stepper

    original = Stepper.__call__

    def interrupted(self: Stepper, *a: Any, **k: Any) -> None:
        if k["epoch"] == 3:
            raise Stop
        original(self, *a, **k)

    monkeypatch.setattr(Stepper, "__call__", interrupted)
    with pytest.raises(Stop):
        train(config, tmp_path, save_seconds=0, progress=True)
    assert timed[:4] == list(STEPS)  # candidates take turns
    assert "bfloat16, channels_last: a step took float, contiguous 1000 ms" in capsys.readouterr().err
    monkeypatch.setattr(Stepper, "__call__", original)
    count = len(timed)
    timings(monkeypatch, {**STEPS, "float, channels_last": 0.1})  # what a quieter machine would choose now
    resumed = train(config, tmp_path)
    assert len(timed) == count
    assert (resumed.precision.autocast, resumed.precision.channels_last) == ("bfloat16", True)
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["key"] == config.key()
    assert record["config"]["autocast"] == "auto"
    assert record["precision"] == {
        "weights": "float32",
        "training": "bfloat16 autocast",
        "evaluation": "float32",
        "channels_last": True,
        "step_seconds": STEPS,
    }
    assert bits(resumed) == bits(train(configuration(autocast="bfloat16", channels_last=True)))


def test_a_candidate_must_be_clearly_faster_than_plain_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    timings(monkeypatch, {**STEPS, "bfloat16, channels_last": 0.96})
    assert train(configuration(**AUTO, epochs=1)).precision.name == "float, contiguous"
    half = timings(monkeypatch, {**STEPS, "bfloat16, contiguous": 1.0})
    assert train(configuration(autocast="bfloat16", channels_last="auto", epochs=1)).precision.channels_last
    assert set(half) == {"bfloat16, contiguous", "bfloat16, channels_last"}
    none = timings(monkeypatch, STEPS)
    train(configuration(autocast="bfloat16", epochs=1))
    assert none == []
    layouts = timings(monkeypatch, STEPS)
    train(configuration(**AUTO, dtype="float64", epochs=1))
    assert set(layouts) == {"float, contiguous", "float, channels_last"}  # autocast leaves float64 alone


def test_timing_moves_nothing_of_the_run() -> None:
    """Whatever is faster here, the run is that of a configuration which says so outright."""
    before = torch.get_rng_state()
    found = train(configuration(**AUTO))
    assert torch.equal(torch.get_rng_state(), before)
    assert set(found.precision.step_seconds) == set(STEPS)
    assert all(seconds > 0 for seconds in found.precision.step_seconds.values())
    chosen = {"autocast": found.precision.autocast, "channels_last": found.precision.channels_last}
    assert bits(found) == bits(train(configuration(**chosen)))


def test_the_short_batch_is_left_out_where_it_would_be_compiled_for_alone() -> None:
    auto = configuration(drop_last="auto")
    assert not auto.drops_last
    assert auto.replace({"compile": True}).drops_last
    assert not auto.replace({"compile": True, "drop_last": False}).drops_last
    assert configuration(drop_last=True).drops_last
    with pytest.raises(ConfigurationError, match="drop_last must be true, false or 'auto', not 'sometimes'"):
        configuration(drop_last="sometimes")
    with pytest.raises(ConfigurationError, match="channels_last must be true, false or 'auto', not 1"):
        configuration(channels_last=1)


def counted_compiler(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """torch.compile without inductor: graphs run as they were traced; the list holds how many were run."""
    compile_, runs = torch.compile, [0]

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*arguments: Any) -> Any:
            runs[0] += 1
            return graph.forward(*arguments)

        return run

    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=backend, **options))
    return runs


@pytest.mark.slow
def test_a_worker_compiles_every_run_anew_and_never_falls_back_to_eager_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten activations in one process: torch keeps eight variants of a function, and runs a ninth eager in silence."""
    runs = counted_compiler(monkeypatch)
    counts = []
    for curvature in range(1, 11):
        spec = f"rct:beta=1,curvature={curvature}"
        config = configuration(activation=spec, compile=True, epochs=1, watch={"every": 0})
        before = runs[0]
        compiled = train(config)
        counts.append(runs[0] - before)
        eager = train(configuration(activation=spec, epochs=1, watch={"every": 0}))
        assert compiled.history[-1]["loss"] == pytest.approx(eager.history[-1]["loss"], rel=1e-3)
    assert len(set(counts)) == 1
    assert counts[0] >= 2 * 160 // 32  # every step's crafting and loss


def test_a_trained_network_is_contiguous_whatever_it_was_trained_in() -> None:
    """A measurement reads the graph of a contiguous network; channels_last kernels leave strided views in it."""
    model = train(configuration(channels_last=True, epochs=1)).model
    assert all(value.is_contiguous() for value in model.state_dict().values())


def test_too_many_variants_within_a_run_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo import config as dynamo

    if not any(hasattr(dynamo, name) for name in compiling.LIMITS):
        pytest.skip("this torch cannot fail where it stops compiling")
    counted_compiler(monkeypatch)
    limit = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"
    with dynamo.patch({limit: 1}), pytest.raises(ConfigurationError, match="torch would go on uncompiled"):
        train(configuration(compile=True, epochs=1, train_samples=40))  # a second variant for the short batch


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_reduced_precision_and_channels_last_stay_close(autocast: str) -> None:
    plain = train(configuration())
    fast = train(configuration(autocast=autocast, channels_last=True))
    assert abs(fast.history[-1]["loss"] - plain.history[-1]["loss"]) < (0.05 if autocast == "bfloat16" else 1e-3)
    assert all(v.dtype == torch.float32 for v in fast.model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pgd_at", "n_fgsm", "trades", "dajat"])
def test_compiled_training_agrees_with_eager(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs, gradients and running statistics; DAJAT's many graphs without the code generator, which takes minutes."""
    if method == "dajat":
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    g = torch.Generator().manual_seed(0)
    x = torch.randint(256, (32, 3, 8, 8), generator=g, dtype=torch.uint8)
    pool = make(x, torch.arange(32) % 4, name="noise", split="train", num_classes=4)
    more = {"method": method, "network_options": {"width": 4, "strides": [1]}, "epochs": 2, "batch_size": 16}
    more |= {"dtype": "float64", "watch": {"every": 0}, "lr": 0.05, "awp": {"gamma": 0.005, "start": 2}}
    if method != "dajat":
        more["attack"] = {"steps": 2, "step": "1/2 eps"} if method != "n_fgsm" else {}
    eager = train(configuration(**more), sets=(pool, pool))
    compiled = train(configuration(**more, compile=True), sets=(pool, pool))
    for a, b in zip(eager.model.parameters(), compiled.model.parameters()):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)


def test_a_damaged_state_is_refused_never_finished_with(tmp_path: Path) -> None:
    """A flipped bit by the checksum; an epoch out of range, or another network's weights, even with the right one."""
    from experiments.trainer.state import FORMAT
    from hessdiag.store.states import read_state, write_state

    whole = train(configuration(epochs=1), tmp_path, save_seconds=0)
    path = tmp_path / "state.pt"
    data = path.read_bytes()
    for place in range(8, len(data), len(data) // 20):
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        with pytest.raises(ResumeError, match=r"state\.pt: cannot be read"):
            train(configuration(epochs=1), tmp_path)
    changes: tuple[dict[str, Any], ...] = (
        {"epoch": 7},
        {"epoch": -1},
        {"seconds": -1.0},
        {"model": {}},
        {"optimiser": 3},
    )
    for change in changes:
        path.write_bytes(data)
        write_state(path, FORMAT, read_state(path, FORMAT) | change)
        with pytest.raises(ResumeError, match="not the state of such a run"):
            train(configuration(epochs=1), tmp_path)
    path.write_bytes(data)
    assert bits(train(configuration(epochs=1), tmp_path)) == bits(whole)


def test_two_runs_in_one_folder_leave_each_other_s_files(tmp_path: Path) -> None:
    """What another process writes at this moment is not swept away by the one that starts."""
    at_work = tmp_path / ".last.pt.0123456789ab.tmp"
    with at_work.open("wb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)  # as whoever writes holds it
        writer.write(b"half of a network")
        writer.flush()
        train(configuration(epochs=1), tmp_path)
        assert at_work.read_bytes() == b"half of a network"
    train(configuration(epochs=1), tmp_path)
    assert not at_work.exists()
