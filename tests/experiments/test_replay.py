"""Steps that are recorded once and replayed: the same weights as steps made one by one.

Without a card a tape of our own stands in for CUDA's graphs: it remembers the function and does it again on the places
that were recorded. What CUDA itself makes of a step is tested where there is a card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.config import TrainConfig
from experiments.methods.base import Outcome
from experiments.train import train
from experiments.trainer import replay
from experiments.trainer.loop import Loop
from experiments.trainer.replay import Replays
from experiments.trainer.rig import Rig
from experiments.trainer.step import Stepper
from hessdiag.data.dataset import DataSet, make

RECIPES: dict[str, dict[str, Any]] = {
    "standard": {},
    "n_fgsm": {},
    "pgd_at": {"attack": {"steps": 2, "step": "0.05"}},
    "trades": {"attack": {"steps": 2, "step": "0.05"}, "awp": {"gamma": 0.01, "start": 2}},
    "dkl": {"attack": {"steps": 2, "step": "0.05"}, "awp": {"gamma": 0.01, "start": 2}},
    "dajat": {"attack": {"steps": 2, "step": "0.05"}, "awp": {"gamma": 0.01, "start": 1}},
}


def images(count: int = 40) -> DataSet:
    g = torch.Generator().manual_seed(5)
    x = torch.randint(256, (count, 3, 8, 8), generator=g, dtype=torch.uint8)
    return make(x, torch.arange(count) % 4, name="noise", split="train", num_classes=4)


def configuration(method: str, **more: Any) -> TrainConfig:
    """Learning rates that float32 holds exactly."""
    table = {
        "method": method,
        "network": "small_resnet",
        "network_options": {"width": 4, "strides": [1]},
        "activation": "rct:beta=1,curvature=7",
        "data": "digits",
        "epochs": 3,
        "batch_size": 8,
        "lr": 0.125,
        "weight_decay": 0.01,
        "schedule": {"name": "constant", "milestones": [], "factors": []},
        "eps": "0.1",
        "watch": {"every": 0},
        "seed": 3,
        **RECIPES[method],
    }
    return TrainConfig.from_dict(table | more)


class Remembered:
    """A tape that does the function itself: once in vain when it is recorded, then at each replay."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig

    def _touched(self) -> Iterator[Tensor]:
        yield from self.rig.model.state_dict().values()
        for state in self.rig.optimiser.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    def record(self, function: Callable[[], Outcome], generator: torch.Generator) -> Outcome:
        before = [(place, place.clone()) for place in self._touched()]
        self.function, self.outcome = function, function()
        with torch.no_grad():
            for place, value in before:
                place.copy_(value)
        return self.outcome

    def replay(self) -> None:
        for place, value in zip(self.outcome, self.function(), strict=True):
            if place is not None:
                assert value is not None
                place.copy_(value)


class Broken:
    """A tape on which nothing can be recorded."""

    def record(self, function: Callable[[], Outcome], generator: torch.Generator) -> Outcome:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    def replay(self) -> None:
        raise AssertionError("nothing was recorded")


def trained(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tape: Any = None) -> tuple[Any, list[Replays]]:
    """The run, its steps on tapes where a tape is given, and what replayed them."""
    made: list[Replays] = []
    plain = Stepper.__init__

    def taped(self: Stepper, rig: Rig, *, replay: bool = True) -> None:
        plain(self, rig, replay=False)
        if tape is not None:
            self.replays = Replays(self._move, rig.optimiser, torch.device("cpu"), tape=lambda: tape(rig))
            made.append(self.replays)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "__init__", taped)
        return train(config, sets=(images(), make(images().inputs, images().targets, name="noise", split="test"))), made


def same(first: Any, second: Any) -> bool:
    """Whether two runs have the same weights, statistics and history."""
    one, two = first.model.state_dict(), second.model.state_dict()
    plain = [[{k: v for k, v in row.items() if "second" not in k} for row in run.history] for run in (first, second)]
    return all(torch.equal(one[key], two[key]) for key in one) and plain[0] == plain[1]


@pytest.mark.parametrize("method", RECIPES)
def test_replayed_steps_are_the_steps(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration(method)
    usual, _ = trained(config, monkeypatch)
    replayed, (steps,) = trained(config, monkeypatch, Remembered)
    assert same(usual, replayed)
    assert steps.note is None and len(steps.kept) >= 1
    assert sum(steps.seen.values()) < 3 * 5, "some steps were replayed"


def test_learning_rates_and_noise_reach_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording that kept the first learning rate, batch or seed would end elsewhere."""
    config = configuration("n_fgsm", epochs=4, schedule={"name": "piecewise", "milestones": [3], "factors": [0.5]})
    usual, _ = trained(config, monkeypatch)
    assert same(usual, trained(config, monkeypatch, Remembered)[0])

    def forgetful(self: Any, given: Any, rates: list[float], seed: int) -> Outcome:
        self.noise.manual_seed(0)
        self.tape.replay()
        return self.outcome  # type: ignore[no-any-return]

    monkeypatch.setattr(replay.Recording, "play", forgetful)
    assert not same(usual, trained(config, monkeypatch, Remembered)[0])


def test_steps_of_other_kinds_are_recorded_apart_and_the_oldest_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A radius that grows by the epoch, and a last batch that is smaller."""
    config = configuration(
        "pgd_at", attack={"steps": 2, "step": "0.05", "ramp": "linear"}, batch_size=9, drop_last=False, epochs=5
    )
    usual, _ = trained(config, monkeypatch)
    replayed, (steps,) = trained(config, monkeypatch, Remembered)
    assert same(usual, replayed)
    assert len(steps.kept) == replay.KEPT < len({kind for kind, count in steps.seen.items() if count >= replay.USUAL})


def test_what_cannot_be_recorded_is_made_as_before_and_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration("n_fgsm")
    usual, _ = trained(config, monkeypatch)
    told: list[str] = []
    epoch = Loop._epoch
    monkeypatch.setattr(Loop, "_epoch", lambda self, n: (epoch(self, n), told.append(str(self.stepper.note)))[0])
    replayed, (steps,) = trained(config, monkeypatch, lambda rig: Broken())
    assert same(usual, replayed)
    assert not steps.kept
    assert steps.note == "steps are not replayed as a graph: operation not permitted when stream is capturing"
    assert told[-1] == steps.note


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("method", RECIPES)
def test_a_card_replays_the_steps(method: str) -> None:
    """Within what its kernels' own order of sums leaves, which two runs of usual steps show."""
    ends = []
    sets = (images(), make(images().inputs, images().targets, name="noise", split="test"))
    plain = Stepper.__init__
    for replayed in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Stepper, "__init__", lambda self, rig, r=replayed, **_: plain(self, rig, replay=r))
            patch.setattr(torch.backends.cudnn, "deterministic", True)
            found = train(configuration(method), device="cuda", sets=sets)
        ends.append(torch.cat([value.double().flatten() for value in found.model.parameters()]))
    assert float((ends[0] - ends[1]).norm() / ends[0].norm()) < 1e-4
