"""Steps that are recorded once and replayed: the same weights as steps made one by one.

Without a card a tape of our own stands in for CUDA's graphs: it remembers the function and does it again on the places
that were recorded. What CUDA itself makes of a step is tested where there is a card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from test_methods_steps import configuration as plain_configuration
from test_methods_steps import images
from torch import Tensor

from experiments.config import TrainConfig
from experiments.methods.base import Outcome
from experiments.train import train
from experiments.trainer import replay
from experiments.trainer.progress import Reporter
from experiments.trainer.replay import Given, Replays
from experiments.trainer.rig import Rig
from experiments.trainer.step import Stepper
from hessdiag.data.dataset import make

RECIPES: dict[str, dict[str, Any]] = {
    "standard": {},
    "n_fgsm": {},
    "pgd_at": {"attack": {"steps": 2, "step": "0.05"}},
    "trades": {"attack": {"steps": 2, "step": "0.05"}, "awp": {"gamma": 0.01, "start": 2}},
    "dkl": {"attack": {"steps": 2, "step": "0.05"}, "awp": {"gamma": 0.01, "start": 2}},
    "dajat": {"attack": {"steps": 2, "step": "0.05"}, "awp": {"gamma": 0.01, "start": 1}},
}


def configuration(method: str, **more: Any) -> TrainConfig:
    """Learning rates that float32 holds exactly."""
    own = {"activation": "rct:beta=1,curvature=7", "epochs": 3, "lr": 0.125, "dtype": "float32", **RECIPES[method]}
    return plain_configuration(method, **own | more)


class Remembered:
    """A tape that does the function itself: once in vain when it is recorded, then at each replay."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.times = rig, 0

    def fits(self) -> bool:
        return True

    def _touched(self) -> Iterator[Tensor]:
        yield from self.rig.model.state_dict().values()
        for state in self.rig.optimiser.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    def record(self, function: Callable[[], Outcome], generator: torch.Generator) -> Outcome:
        before = [(place, place.clone()) for place in self._touched()]
        self.rates = [group["lr"] for group in self.rig.optimiser.param_groups]
        self.function, self.outcome = function, function()
        with torch.no_grad():
            for place, value in before:
                place.copy_(value)
        return self.outcome

    def replay(self) -> None:
        """With the tensors that held the learning rates when it was recorded, as a graph has them."""
        self.times += 1
        groups = self.rig.optimiser.param_groups
        usual = [group["lr"] for group in groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate
        outcome = self.function()
        for group, rate in zip(groups, usual, strict=True):
            group["lr"] = rate
        for place, value in zip(self.outcome, outcome, strict=True):
            if place is not None:
                assert value is not None
                place.copy_(value)


class Broken(Remembered):
    """A tape on which nothing can be recorded; what ends a recording has words of its own, as torch's has."""

    def record(self, function: Callable[[], Outcome], generator: torch.Generator) -> Outcome:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        finally:
            raise RuntimeError("failed due to a previous error during capture")


class Small(Remembered):
    """A tape on a card that holds one step."""

    def fits(self) -> bool:
        return False


class Taped(NamedTuple):
    """A run and what replayed its steps."""

    run: Any
    steps: Replays
    tapes: list[Any]


def trained(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tape: Any = None) -> Taped:
    """The run, its steps on tapes where a tape is given."""
    made: list[Replays] = []
    tapes: list[Any] = []
    plain = Stepper.__init__

    def taped(self: Stepper, rig: Rig) -> None:
        plain(self, rig)

        def another(device: torch.device) -> Any:
            assert device.type == "cpu"
            tapes.append(tape(rig))
            return tapes[-1]

        made.append(Replays(self._move, rig.optimiser, torch.device("cpu"), tape=another))
        self.replays = None if tape is None else made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "__init__", taped)
        test = make(images(count=40).inputs, images(count=40).targets, name="noise", split="test")
        return Taped(train(config, sets=(images(count=40), test)), made[-1], tapes)


def same(first: Any, second: Any) -> bool:
    """Whether two runs have the same weights, statistics and history."""
    one, two = first.model.state_dict(), second.model.state_dict()
    plain = [[{k: v for k, v in row.items() if "second" not in k} for row in run.history] for run in (first, second)]
    return all(torch.equal(one[key], two[key]) for key in one) and plain[0] == plain[1]


@pytest.mark.parametrize("method", RECIPES)
def test_replayed_steps_are_the_steps(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five steps an epoch, of which a phase makes three as usual: the others are replayed."""
    config = configuration(method)
    usual, replayed = trained(config, monkeypatch).run, trained(config, monkeypatch, Remembered)
    assert same(usual, replayed.run)
    assert replayed.tapes
    assert sum(tape.times for tape in replayed.tapes) == 3 * 5 - 3 * len(replayed.tapes)
    assert (usual.steps, replayed.run.steps) == ("one by one", "replayed as a CUDA graph")


def test_learning_rates_batches_and_noise_reach_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups of parameters with factors of their own, and a rate that changes; a recording that missed one of
    these would end elsewhere.
    """
    more: dict[str, Any] = {"schedule": {"name": "piecewise", "milestones": [3], "factors": [0.5]}, "epochs": 4}
    more["groups"] = [{"match": "conv", "lr": 0.5}]
    config = configuration("n_fgsm", **more)
    usual = trained(config, monkeypatch).run
    assert len({group["lr_scale"] for group in trained(config, monkeypatch).steps.optimiser.param_groups}) == 2
    assert same(usual, trained(config, monkeypatch, Remembered).run)
    play = replay.Recording.play

    def without(what: str) -> Callable[..., Outcome]:
        def forgetful(self: Any, given: Given, rates: list[float], seed: int) -> Outcome:
            if what == "rates":
                rates = [float(rate) for rate in self.rates]
            given = self.given if what == "batch" else given
            return play(self, given, rates, 0 if what == "noise" else seed)

        return forgetful

    for what in ("rates", "batch", "noise"):
        with monkeypatch.context() as patch:
            patch.setattr(replay.Recording, "play", without(what))
            assert not same(usual, trained(config, monkeypatch, Remembered).run), what


def test_learning_rates_are_those_that_a_recording_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.1 is none of float32's numbers: the first steps have it rounded, too."""
    found = trained(configuration("standard", lr=0.1, epochs=1), monkeypatch, Broken)
    assert {group["lr"] for group in found.steps.optimiser.param_groups} == {float(np.float32(0.1))}


def test_a_kind_that_comes_once_an_epoch_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first step that is crafted in another mode, and a last batch that is smaller."""
    attack = {"steps": 2, "step": "0.05", "bn": "train_but_first"}
    config = configuration("pgd_at", attack=attack, batch_size=7, drop_last=False, epochs=6)
    usual, replayed = trained(config, monkeypatch).run, trained(config, monkeypatch, Remembered)
    assert same(usual, replayed.run)
    (tape,) = replayed.tapes
    assert tape.times == 6 * 6 - 3 - 2 * 6 + 1, "all but three as usual, the last of each epoch and the later firsts"


def test_a_recording_whose_radius_is_past_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration("pgd_at", attack={"steps": 2, "step": "0.05", "ramp": "linear"})
    usual = trained(config, monkeypatch).run
    held: list[int] = []
    move = Stepper._move

    def watched(self: Stepper, given: Given, noise: torch.Generator) -> Outcome:
        held.append(self.replays is not None and self.replays.kept is not None)
        return move(self, given, noise)

    monkeypatch.setattr(Stepper, "_move", watched)
    replayed = trained(config, monkeypatch, Remembered)
    assert same(usual, replayed.run)
    assert len(replayed.tapes) == 3, "one a radius"
    assert held.count(True) == 3 * 2, "steps as usual find nothing kept: only replays do"
    assert replayed.steps.kept is None, "nor does anything stay behind"


@pytest.mark.parametrize(
    ("tape", "reason"),
    [
        (Broken, "operation not permitted when stream is capturing"),
        (Small, "the card's memory does not hold two steps"),
    ],
)
def test_what_cannot_be_recorded_is_made_as_before_and_says_why(
    tape: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration("n_fgsm")
    usual, refused = trained(config, monkeypatch).run, trained(config, monkeypatch, tape)
    assert same(usual, refused.run)
    assert len(refused.tapes) == 1, "it is tried once"
    assert refused.run.steps == f"one by one: {reason}"
    assert refused.run.to_dict()["steps"] == refused.run.steps


def test_a_step_that_waits_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def said(device: torch.device) -> Iterator[list[str]]:
        yield [replay.WAITS]

    monkeypatch.setattr(replay, "waiting", said)
    found = trained(configuration("n_fgsm"), monkeypatch, Remembered)
    assert not found.tapes
    assert found.run.steps == "one by one: a step waits for the device"


def test_why_steps_are_made_one_by_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(Reporter, "note", lambda self, text: told.append(text))
    trained(configuration("n_fgsm"), monkeypatch, Small)
    assert told == ["steps are made one by one: the card's memory does not hold two steps"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize(
    "more", [{}, {"autocast": "bfloat16", "channels_last": True, "lr": 0.1}], ids=["float", "half"]
)
def test_a_card_replays_the_steps(method: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Within what its kernels' own order of sums leaves, which two runs of usual steps show."""
    sets = (images(count=40), make(images(count=40).inputs, images(count=40).targets, name="noise", split="test"))
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)

    def end() -> tuple[Tensor, str]:
        found = train(configuration(method, **more), device="cuda", sets=sets)
        return torch.cat([value.double().flatten() for value in found.model.parameters()]), found.steps

    replayed, how = end()
    assert how == "replayed as a CUDA graph"
    monkeypatch.setattr(replay, "USUAL", 10**6)
    usual, _ = end()
    assert float((replayed - usual).norm() / usual.norm()) < 1e-4


def test_an_epoch_too_short_for_a_recording_is_not_said_to_be_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained(configuration("standard", batch_size=20, epochs=1), monkeypatch, Remembered)
    assert not found.tapes
    assert found.run.steps == "one by one"
