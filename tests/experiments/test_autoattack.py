"""The AutoAttack adapter: the package's own images byte for byte, no trace left, and a memory that survives a kill."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("pyautoattack", reason="AutoAttack needs pip install 'hessdiag[robust]'")

import pyautoattack
from pyautoattack import checks
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted

from experiments.attacks import STANDARD, autoattack, evaluate
from experiments.attacks.apgd import apgd
from experiments.attacks.borrowed import Budgets, Notes, Package, compose
from experiments.attacks.losses import dlr_targeted
from hessdiag.errors import (
    ConfigurationError,
    DataError,
    DtypeError,
    HessdiagError,
    NonFiniteError,
    ResumeError,
    StoreError,
    TargetError,
)
from hessdiag.problem.perturbation import cross_entropy

FEW = Budgets(apgd_steps=10, targets=3, fab_steps=4, square_queries=30)
EPS = 0.1


def digits_net(classes: int = 10) -> nn.Sequential:
    """A small conv net after thirty steps on digits: correct on most, robust on some."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(128, classes),
    )
    x, y = digits(slice(0, 600), classes)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(30):
        optimiser.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return net.eval()


def digits(part: slice, classes: int = 10) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images[part], dtype=torch.float32).unsqueeze(1) / 16
    return x, torch.tensor(data.target[part]) % classes


def plain(net: nn.Module, x: Tensor, y: Tensor, budgets: Budgets, batch_size: int) -> Tensor:
    """The images of pyautoattack called as its documentation shows, with smaller budgets put into its objects."""
    attack = pyautoattack.AutoAttack(net, eps=EPS, norm="Linf", seed=0, version="standard", device="cpu")
    if budgets != STANDARD:
        common = {"n_iter": budgets.apgd_steps, "eps": EPS, "seed": 0, "device": "cpu", "rho": 0.75}
        attack.apgd = APGDAttack(net, n_restarts=1, logger=attack.logger, **common)
        attack.apgd_targeted = APGDAttack_targeted(
            net, n_restarts=1, n_target_classes=budgets.targets, logger=attack.logger, **common
        )
        attack.fab.n_iter, attack.fab.n_target_classes = budgets.fab_steps, budgets.targets
        attack.square.n_queries = budgets.square_queries
    images, _ = attack.run_standard_evaluation(x, y, batch_size=batch_size)
    return images


def test_every_number_is_the_packages_own() -> None:
    """Attribute by attribute, what is composed here equals what AutoAttack 'standard' builds for itself."""
    net = digits_net()
    package, notes = Package(), Notes([])
    ours = compose(
        package,
        net,
        radius=0.3,
        seed=7,
        device=torch.device("cpu"),
        classes=10,
        budgets=STANDARD,
        notes=notes,
    )
    theirs = pyautoattack.AutoAttack(net, eps=0.3, norm="Linf", seed=7, version="standard", device="cpu")
    assert list(ours) == theirs.attacks_to_run
    theirs.fab.targeted = True  # which its loop sets before it runs fab-t
    pairs = {
        "apgd-ce": theirs.apgd,
        "apgd-t": theirs.apgd_targeted,
        "fab-t": theirs.fab,
        "square": theirs.square,
    }
    for name, other in pairs.items():
        mine = vars(ours[name].__self__)  # type: ignore[attr-defined]
        skipped = {"logger", "device"}
        assert {k: v for k, v in mine.items() if k not in skipped} == {
            k: v for k, v in vars(other).items() if k not in skipped
        }, name


@pytest.mark.parametrize("batch_size", [16, 5])
def test_images_are_byte_identical_to_the_package_called_plainly(batch_size: int) -> None:
    net, (x, y) = digits_net(), digits(slice(600, 616))
    expected = plain(net, x, y, FEW, batch_size)
    found = autoattack(net, x, y, eps=EPS, budgets=FEW, batch_size=batch_size)
    assert torch.equal(found.x_adv, expected)
    broken = (expected != x).flatten(1).any(1)
    assert 0 < int(broken.sum()) < 16
    assert torch.equal(found.clean & ~found.robust, broken)
    assert found.check.disagreements == 0
    assert found.check.max_distance <= EPS + 1e-6
    flags = list(found.per_attack.values())
    assert list(found.per_attack) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert all(bool((later <= sooner).all()) for sooner, later in pairwise(flags))
    assert torch.equal(flags[-1], found.robust)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("eps", [0.05, 0.15])
def test_own_apgd_takes_the_packages_steps_from_the_same_start(eps: float, seed: int) -> None:
    """Bit for bit with the cross-entropy, 100 iterations; with DLR but for the documented first comparison."""
    net, (x, y) = digits_net().requires_grad_(False), digits(slice(600, 640))
    right = net(x).argmax(1) == y
    x, y = x[right], y[right]
    aim = net(x).argsort(1)[:, -2]
    start = x + eps * (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) - 1)
    start = start.clamp(0, 1)
    common = {"n_iter": 100, "eps": eps, "device": "cpu", "rho": 0.75}
    untargeted, targeted = APGDAttack(net, loss="ce", **common), APGDAttack_targeted(net, **common)
    targeted.y_target = aim
    for theirs, loss, target, agree in (
        (untargeted, cross_entropy, y, 1.0),
        (targeted, dlr_targeted, (y, aim), 0.9),
    ):
        theirs.init_hyperparam(x)
        best, standing, best_loss, last = theirs.attack_single_run(x.clone(), y.clone(), x_init=start)
        ours = apgd(net, x, start, y, target, eps=eps, steps=100, loss=loss)
        assert torch.equal(ours.fooled, ~standing.bool())
        same = ((ours.best == best) & (ours.last == last)).flatten(1).all(1)
        assert same.double().mean() >= agree
        assert torch.equal(ours.best_loss[same], best_loss[same])


@pytest.mark.slow
def test_images_are_byte_identical_with_the_full_budgets() -> None:
    net, (x, y) = digits_net(), digits(slice(600, 608))
    found = evaluate(net, x, y, attack="aa", eps=EPS)
    assert torch.equal(found.x_adv, plain(net, x, y, STANDARD, 250))
    assert found.settings["square_queries"] == 5000
    assert found.settings["apgd_steps"] == found.settings["fab_steps"] == 100
    assert found.settings["targets"] == 9


def test_nothing_global_and_nothing_of_the_model_is_changed() -> None:
    net, (x, y) = digits_net(), digits(slice(600, 606))
    net.train()
    net[1].eval()
    net[0].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(123)
    state, calls = torch.get_rng_state(), []

    def tracer(frame: object, event: str, argument: object) -> None:
        calls.append(event)

    old, logger = sys.gettrace(), logging.getLogger("auto-attack")
    level = logger.level
    checks.funcs["grad"] = 3
    sys.settrace(tracer)
    try:
        autoattack(net, x, y, eps=EPS, budgets=replace(FEW, apgd_steps=2, fab_steps=1, square_queries=2))
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(old)
        counted, checks.funcs["grad"] = checks.funcs["grad"], 0
    assert counted == 3
    assert logger.level == level
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net.modules()] == [True, True, False, True, True, True]
    assert [p.requires_grad for p in net.parameters()] == [True, False] + [True] * 4
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_everything_is_put_back_when_it_fails() -> None:
    net, (x, y) = digits_net().train(), digits(slice(600, 606))
    state, old = torch.get_rng_state(), sys.gettrace()
    with pytest.raises(KeyboardInterrupt):
        autoattack(net, x, y, eps=EPS, budgets=FEW, progress=interrupt_at("apgd-t"))
    assert torch.equal(torch.get_rng_state(), state)
    assert sys.gettrace() is old
    assert net.training
    assert checks.funcs["grad"] == 0


def interrupt_at(name: str, batch: int = 1):  # type: ignore[no-untyped-def]
    seen = []

    def progress(attack: str, done: int, total: int, robust: int) -> None:
        seen.append(attack)
        if seen.count(name) == batch:
            raise KeyboardInterrupt

    return progress


class WithGrad(nn.Module):
    """A harmless model whose forward calls a function named as the package's check for dynamic defences expects."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        def grad(value: Tensor) -> Tensor:
            return value

        return grad(self.net(x))


class Softmax(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).softmax(1)


def test_warnings_are_fields_and_do_not_stick_to_the_next_model() -> None:
    net, (x, y) = digits_net(), digits(slice(600, 606))
    quick = replace(FEW, apgd_steps=2, fab_steps=1, square_queries=2)
    logging.disable(logging.CRITICAL)
    try:
        flagged = autoattack(WithGrad(net), x, y, eps=EPS, budgets=quick)
        probabilities = autoattack(Softmax(net), x, y, eps=EPS, budgets=quick)
    finally:
        logging.disable(logging.NOTSET)
    assert any("dynamic defense" in text for text in flagged.warnings)
    assert any("probability distribution" in text for text in probabilities.warnings)
    assert not any("dynamic defense" in text for text in probabilities.warnings)
    clean = autoattack(net, x, y, eps=EPS, budgets=quick)
    assert clean.warnings == ()
    assert clean.to_dict()["warnings"] == []


@pytest.mark.parametrize(
    ("name", "batch"), [("apgd-ce", 1), ("apgd-ce", 2), ("apgd-t", 1), ("fab-t", 1), ("square", 1)]
)
def test_interrupted_anywhere_it_ends_with_the_same_images(
    name: str, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["experiments.attacks.autoattack"]  # the package's attribute is the function
    monkeypatch.setattr(module, "SAVE_EVERY", 0.0)  # keep the standing after each batch
    net, (x, y) = digits_net(), digits(slice(600, 616))
    whole = autoattack(net, x, y, eps=EPS, budgets=FEW, batch_size=5)
    with pytest.raises(KeyboardInterrupt):
        autoattack(
            net,
            x,
            y,
            eps=EPS,
            budgets=FEW,
            batch_size=5,
            directory=tmp_path,
            progress=interrupt_at(name, batch),
        )
    seen: list[str] = []
    found = autoattack(
        net,
        x,
        y,
        eps=EPS,
        budgets=FEW,
        batch_size=5,
        directory=tmp_path,
        progress=lambda attack, *_: seen.append(attack),
    )
    assert torch.equal(found.x_adv, whole.x_adv)
    assert torch.equal(found.robust, whole.robust)
    assert all(torch.equal(found.per_attack[key], whole.per_attack[key]) for key in whole.per_attack)
    order = list(whole.per_attack)
    assert set(seen) <= set(order[order.index(name) :])
    again = autoattack(
        net,
        x,
        y,
        eps=EPS,
        budgets=FEW,
        batch_size=5,
        directory=tmp_path,
        progress=interrupt_at("apgd-ce"),
    )
    assert torch.equal(again.x_adv, whole.x_adv)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_autoattack as t
net, (x, y) = t.digits_net(), t.digits(slice(600, 616))

def progress(attack, done, total, robust):
    if attack == "fab-t":
        os.kill(os.getpid(), signal.SIGKILL)

t.autoattack(net, x, y, eps=t.EPS, budgets=t.FEW, batch_size=5, directory={folder!r}, progress=progress)
"""


@pytest.mark.slow
def test_killed_it_ends_with_the_same_images(tmp_path: Path) -> None:
    script = textwrap.dedent(KILLED).format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-500:]
    assert (tmp_path / "autoattack.pt").exists()
    net, (x, y) = digits_net(), digits(slice(600, 616))
    seen: list[str] = []
    found = autoattack(
        net,
        x,
        y,
        eps=EPS,
        budgets=FEW,
        batch_size=5,
        directory=tmp_path,
        progress=lambda attack, *_: seen.append(attack),
    )
    assert set(seen) <= {"fab-t", "square"}
    assert torch.equal(found.x_adv, autoattack(net, x, y, eps=EPS, budgets=FEW, batch_size=5).x_adv)


def test_the_standing_of_another_run_is_refused(tmp_path: Path) -> None:
    net, (x, y) = digits_net(), digits(slice(600, 606))
    quick = replace(FEW, apgd_steps=2, fab_steps=1, square_queries=2)

    def run(model: nn.Module = net, images: Tensor = x, **change: object) -> None:
        autoattack(model, images, y, **{"eps": EPS, "budgets": quick, "directory": tmp_path, **change})

    run()
    for says, change in {
        "eps was 0.1, is 0.2": {"eps": 0.2},
        "seed was 0, is 1": {"seed": 1},
        "batch_size was 250, is 3": {"batch_size": 3},
        "budgets was": {"budgets": FEW},
        "data was": {"images": 1 - x},
        "model was": {"model": nn.Sequential(*digits_net(), nn.Linear(10, 10))},
    }.items():
        with pytest.raises(ResumeError, match=says):
            run(**change)
    # An activation has no parameters: only the logits tell that this is another network.
    other = nn.Sequential(net[0], net[1], nn.GELU(), net[3], net[4])
    with pytest.raises(ResumeError, match="clean logits differ"):
        run(other)
    (tmp_path / "autoattack.pt").write_bytes(b"not a file of ours")
    with pytest.raises(ResumeError, match=r"cannot be read.*delete the file"):
        run()
    (tmp_path / "autoattack.pt").unlink()
    run()


def test_an_unwritable_directory_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    net, (x, y) = digits_net(), digits(slice(600, 604))
    with pytest.raises(StoreError, match="choose another directory"):
        autoattack(
            net,
            x,
            y,
            eps=EPS,
            budgets=replace(FEW, apgd_steps=1, fab_steps=1, square_queries=1),
            directory=tmp_path / "taken",
        )


def test_small_class_counts() -> None:
    for classes in (2, 3):
        x, y = digits(slice(600, 606), classes)
        with pytest.raises(ConfigurationError, match=f"at least 4 classes, the model has {classes}"):
            autoattack(digits_net(classes), x, y, eps=EPS)
    x, y = digits(slice(600, 606), 5)
    quick = replace(STANDARD, apgd_steps=2, fab_steps=1, square_queries=2)
    found = autoattack(digits_net(5), x, y, eps=EPS, budgets=quick)
    assert found.settings["targets"] == 4
    assert found.warnings[0] == "9 target classes cut to 4: the model has 5 classes"


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, y) = digits_net(), digits(slice(600, 604))
    with monkeypatch.context() as patch:
        patch.setattr(pyautoattack, "__version__", "0.3.0")
        with pytest.raises(ConfigurationError, match=r"not 0\.3\.0: pip install"):
            autoattack(net, x, y, eps=EPS)
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'hessdiag\[robust\]'"):
        autoattack(net, x, y, eps=EPS)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"eps": 8.0}, ConfigurationError, "[0, 1]"),
        ({"eps": 0.0}, ConfigurationError, "attacks nothing"),
        ({"batch_size": 0}, ConfigurationError, "batch_size"),
        ({"x": lambda x: x * 255}, DataError, "normalise inside"),
        ({"x": lambda x: x.double()}, DtypeError, "float64"),
        ({"x": lambda x: x.flatten(1)}, ConfigurationError, "[N, C, H, W]"),
        ({"y": lambda y: y + 10}, TargetError, "out of range"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(change: dict, error: type, says: str) -> None:
    net, (x, y) = digits_net(), digits(slice(600, 604))
    change = dict(change)
    x, y = change.pop("x", lambda v: v)(x), change.pop("y", lambda v: v)(y)
    with pytest.raises(error) as caught:
        autoattack(net, x, y, **{"eps": EPS, "budgets": FEW, **change})
    assert isinstance(caught.value, HessdiagError)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nan_under_attack_is_an_error_and_not_a_success() -> None:
    net, (x, y) = digits_net(), digits(slice(600, 604))

    class Breaks(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            known = (z[:, None] == x[None]).flatten(2).all(2).any(1)
            return net(z) * torch.where(known, 1.0, torch.nan)[:, None]

    with pytest.raises(NonFiniteError, match="during apgd-ce"):
        autoattack(Breaks(), x, y, eps=EPS, budgets=FEW)
    with pytest.raises(NonFiniteError, match="4 of 4 samples during the checks"):
        autoattack(nn.Sequential(net, nn.Threshold(1e9, float("nan"))), x, y, eps=EPS, budgets=FEW)
