"""Learning rates, radii and step counts against tables of the published schedules."""

from __future__ import annotations

import math

import pytest

from experiments.commands.options import configuration
from experiments.config import TrainConfig
from experiments.parts import Attack, Schedule, step_size
from experiments.schedules import Budget, attack_budget, lr_factor
from hessdiag.errors import ConfigurationError


def factor(schedule: Schedule, epoch: int, epochs: int, step: int = 0, n: int = 10) -> float:
    return lr_factor(schedule, epoch=epoch, step=step, steps_per_epoch=n, epochs=epochs)


def default(method: str) -> TrainConfig:
    return TrainConfig.from_dict({"method": method})


def test_trades_drops_at_the_seventy_fifth_epoch() -> None:
    config = default("trades")
    table = {1: 1.0, 74: 1.0, 75: 0.1, 76: 0.1}
    assert {e: factor(config.schedule, e, config.epochs) for e in table} == table


def test_mart_drops_three_times() -> None:
    config = default("mart")
    table = {74: 1.0, 75: 0.1, 89: 0.1, 90: 0.01, 99: 0.01, 100: 0.001, 120: 0.001}
    assert {e: factor(config.schedule, e, config.epochs) for e in table} == table


def test_the_step_of_rice_falls_within_the_epoch() -> None:
    config = default("pgd_at")
    # t = epoch - 1 + (step + 1)/n reaches 100 with the last step of epoch 100.
    assert factor(config.schedule, 100, 200, step=8) == 1.0
    assert factor(config.schedule, 100, 200, step=9) == 0.1
    assert factor(config.schedule, 150, 200, step=8) == 0.1
    assert factor(config.schedule, 150, 200, step=9) == 0.01


def test_cosines_of_dajat_and_dkl() -> None:
    dajat, dkl = default("dajat").schedule, default("dkl").schedule
    for t, value in {1: 1.0, 101: 0.5, 51: 0.5 * (1 + math.sqrt(0.5)), 200: 6.168e-5}.items():
        assert factor(dajat, t, 200) == pytest.approx(value, rel=1e-3)
    assert factor(dkl, 1, 200) == pytest.approx(0.5 * (1 + math.cos(math.pi / 201)))
    assert factor(dkl, 200, 200) == pytest.approx(0.5 * (1 + math.cos(200 * math.pi / 201)))
    assert 0 < factor(dkl, 200, 200) < factor(dkl, 1, 200) < 1


def test_the_triangle_goes_up_and_down_by_the_step() -> None:
    schedule = default("n_fgsm").schedule
    values = [factor(schedule, e, 2, step=i, n=5) for e in (1, 2) for i in range(5)]
    assert values == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_milestones_below_one_are_shares() -> None:
    schedule = Schedule("piecewise", (0.5,), (0.1,))
    assert [factor(schedule, e, 4) for e in (1, 2, 3, 4)] == [1.0, 0.1, 0.1, 0.1]


def test_budgets_of_dajat() -> None:
    eps = 8 / 255
    low = Attack(budget="low", ramp="linear")
    assert attack_budget(low, eps=eps, epoch=50, epochs=200) == Budget(eps / 4, 2, eps / 4)
    coded = Attack(budget="as_coded", ramp="linear")
    for epoch in (1, 50, 200):
        radius = eps * epoch / 200
        assert attack_budget(coded, eps=eps, epoch=epoch, epochs=200) == Budget(radius, 5, radius / 2)
    published = Attack(budget="as_published", ramp="linear")
    table = {1: (2, 1.0), 50: (2, 1.0), 51: (3, 2 / 3), 100: (3, 2 / 3), 101: (4, 0.5), 150: (4, 0.5)}
    for epoch, (steps, share) in (table | {151: (5, 0.5), 200: (5, 0.5)}).items():
        radius = eps * epoch / 200
        assert attack_budget(published, eps=eps, epoch=epoch, epochs=200) == Budget(radius, steps, share * radius)


def test_without_ramp_the_radius_stands() -> None:
    assert attack_budget(Attack(), eps=0.1, epoch=1, epochs=9) == Budget(0.1, 10, 2 / 255)


@pytest.mark.parametrize(
    ("text", "value"), [("2/255", 2 / 255), ("0.007", 0.007), ("eps", 0.1), ("1/2 eps", 0.05), ("1.25*eps", 0.125)]
)
def test_steps_are_absolute_or_relative(text: str, value: float) -> None:
    assert step_size(text, 0.1) == pytest.approx(value, rel=1e-15)


def test_a_bad_step_is_refused() -> None:
    for text in ("fast", "1/0", "-1/255", "0"):
        with pytest.raises(ConfigurationError):
            Attack(step=text)


def test_defaults_are_the_published_ones() -> None:
    table = {
        "trades": (76, 0.1, 2e-4, 10, "0.007", "kl", "eval"),
        "mart": (120, 0.01, 3.5e-3, 10, "0.007", "ce", "eval"),
        "pgd_at": (200, 0.1, 5e-4, 10, "2/255", "ce", "train"),
        "fgsm_rs": (15, 0.2, 5e-4, 1, "1.25 eps", "ce", "train"),
        "n_fgsm": (30, 0.2, 5e-4, 1, "eps", "ce", "train"),
    }
    for name, expected in table.items():
        c = default(name)
        found = (c.epochs, c.lr, c.weight_decay, c.attack.steps, c.attack.step, c.attack.loss, c.attack.bn)
        assert found == expected
    dajat, dkl = default("dajat"), default("dkl")
    assert (dajat.awp.gamma, dajat.awp.start, dajat.averaging.per, dajat.averaging.after) == (0.005, 10, "run", 0.75)
    assert dajat.averaging.tau == pytest.approx(0.9996 ** (50 * 391), rel=0.01)  # the published average, see below
    assert (dkl.awp.gamma, dkl.averaging.per, dkl.averaging.tau) == (0.005, "epoch", 0.9)
    assert all(default(name).eps == "8/255" for name in (*table, "dajat", "dkl", "standard"))


@pytest.mark.parametrize(("epochs", "start"), [(200, 10), (100, 5), (110, 6), (30, 2), (10, 1), (1, 1)])
def test_weight_perturbation_begins_at_the_same_share_of_training(epochs: int, start: int) -> None:
    for method in ("dajat", "dkl"):
        assert TrainConfig.from_dict({"method": method, "epochs": epochs}).awp.start == start
        given = TrainConfig.from_dict({"method": method, "epochs": epochs, "awp": {"start": epochs}})
        assert given.awp.start == epochs  # what is given stands
    with pytest.raises(ConfigurationError, match="after the last of"):
        TrainConfig.from_dict({"method": "dkl", "epochs": epochs, "awp": {"start": epochs + 1}})


@pytest.mark.parametrize("recipe", ["trades_awp", "awp_at"])
def test_a_recipe_with_fewer_epochs_perturbs_from_the_same_share_on(recipe: str) -> None:
    whole, _ = configuration(recipe, {}, [])
    tenth, _ = configuration(recipe, {"epochs": whole.epochs // 10}, [])
    set_so, _ = configuration(recipe, {}, [f"epochs={whole.epochs // 10}", "awp.start=3"])
    assert tenth.awp.start == max(1, whole.awp.start // 10)
    assert set_so.awp.start == 3


@pytest.mark.parametrize("method", ["trades", "mart"])
@pytest.mark.parametrize("epochs", [1, 2, 10, 30, 100, 300])
def test_the_rate_drops_at_the_same_share_of_training(method: str, epochs: int) -> None:
    """Epochs counted with fractions: whenever the published training has dropped, so has one of any length."""
    whole = TrainConfig.from_dict({"method": method})
    other = TrainConfig.from_dict({"method": method, "epochs": epochs})
    for epoch in range(1, epochs + 1):
        passed = [
            factor
            for milestone, factor in zip(whole.schedule.milestones, whole.schedule.factors)
            if epoch * whole.epochs >= milestone * epochs
        ]
        found = lr_factor(other.schedule, epoch=epoch, step=0, steps_per_epoch=7, epochs=epochs)
        assert found == (passed[-1] if passed else 1.0)
    last = lr_factor(other.schedule, epoch=epochs, step=0, steps_per_epoch=7, epochs=epochs)
    assert last == lr_factor(whole.schedule, epoch=whole.epochs, step=0, steps_per_epoch=7, epochs=whole.epochs) < 1


def test_milestones_of_a_recipe_move_with_its_epochs_and_given_ones_stand() -> None:
    """110 epochs with drops at 100 and 105, twice as long; and drops that were asked for."""
    twice, _ = configuration("trades_rn18", {"epochs": 220}, [])
    assert twice.schedule.milestones == (200.0, 210.0)
    given, _ = configuration("trades_rn18", {"epochs": 220}, ["schedule.milestones=[100, 105]"])
    assert given.schedule.milestones == (100, 105)
    table = {"method": "trades", "epochs": 30, "schedule": {"milestones": [7, 8, 9]}}
    assert TrainConfig.from_dict(table).schedule.milestones == (7, 8, 9)
