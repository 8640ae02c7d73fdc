"""Configurations: defaults as data, keys, refusals; and every recipe that comes along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.commands.options import RECIPES, assignments, configuration, load_recipe, recipe_names
from experiments.config import TrainConfig, load_toml
from experiments.fields import merged
from experiments.methods import METHODS
from experiments.sweep.keys import RunConfig, canonical
from experiments.sweep.settings import complete
from experiments.train import train
from hessdiag.errors import ConfigurationError, UnknownNameError

RESULTS = Path(__file__).resolve().parents[2] / "results"
# name -> method, network, epochs, lr, weight decay, eps, gamma of AWP, batch size
TABLE = {
    "trades_wrn": ("trades", "wrn28_10", 76, 0.1, 2e-4, "0.031", 0.0, 128),
    "trades_rn18": ("trades", "resnet18", 110, 0.1, 5e-4, "8/255", 0.0, 128),
    "mart_rn18": ("mart", "resnet18", 120, 0.01, 3.5e-3, "0.031", 0.0, 128),
    "awp_at": ("pgd_at", "preact_resnet18", 200, 0.1, 5e-4, "8/255", 0.01, 128),
    "trades_awp": ("trades", "wrn28_10", 200, 0.1, 5e-4, "8/255", 0.005, 128),
    "dajat_rn18_low": ("dajat", "resnet18", 200, 0.2, 5e-4, "8/255", 0.005, 128),
    "dajat_rn18_high": ("dajat", "resnet18", 200, 0.2, 5e-4, "8/255", 0.005, 128),
    "dajat_cifar100_rn18": ("dajat", "resnet18", 200, 0.2, 5e-4, "8/255", 0.005, 128),
    "dkl": ("dkl", "wrn28_10", 200, 0.2, 5e-4, "8/255", 0.005, 128),
    "pgd_at_rice": ("pgd_at", "preact_resnet18", 200, 0.1, 5e-4, "8/255", 0.0, 128),
    "fgsm_rs": ("fgsm_rs", "preact_resnet18", 15, 0.2, 5e-4, "8/255", 0.0, 128),
    "n_fgsm": ("n_fgsm", "preact_resnet18", 30, 0.2, 5e-4, "8/255", 0.0, 128),
    "standard": ("standard", "resnet18", 200, 0.1, 5e-4, "8/255", 0.0, 128),
    "digits_n_fgsm": ("n_fgsm", "small_resnet", 30, 0.2, 5e-4, "0.15", 0.0, 64),
    "digits_standard": ("standard", "small_resnet", 30, 0.2, 5e-4, "0.15", 0.0, 64),
}


def test_every_recipe_is_in_the_table_and_the_other_way_round() -> None:
    assert set(recipe_names()) == set(TABLE)
    assert {row[0] for row in TABLE.values()} == set(METHODS)


@pytest.mark.parametrize("name", sorted(TABLE))
def test_recipes_say_what_was_published_and_what_is_guessed(name: str) -> None:
    c, about = configuration(name, {}, [])
    found = (c.method, c.network, c.epochs, c.lr, c.weight_decay, c.eps, c.awp.gamma, c.batch_size)
    assert found == TABLE[name]
    assert len(about["source"]["title"]) > 20
    assert about["source"]["guessed"]
    assert TrainConfig.from_dict(c.to_dict()) == c
    assert TrainConfig.from_dict(c.to_dict()).key() == c.key()
    text = (RECIPES / f"{name}.toml").read_text()
    assert f"--recipe {name}" in text


def test_budgets_and_options_of_recipes() -> None:
    low, high = (configuration(f"dajat_rn18_{b}", {}, [])[0] for b in ("low", "high"))
    assert (low.attack.budget, high.attack.budget) == ("low", "as_coded")
    assert high.options == {"beta": 11.0, "js_weight": 2.0, "smoothing": 0.0, "auto_views": 2}
    hundred = configuration("dajat_cifar100_rn18", {}, [])[0]
    assert hundred.options["smoothing"] == 0.1
    assert hundred.options["beta"] == 9.0
    dkl = configuration("dkl", {}, [])[0]
    assert dkl.options == {"alpha": 4.0, "beta": 20.0, "temperature": 4.0, "attack_alpha": 1.0, "attack_beta": 0.0}
    assert (dkl.averaging.per, dkl.averaging.tau) == ("epoch", 0.9)
    assert configuration("awp_at", {}, [])[0].attack.bn == "train_but_first"
    assert configuration("trades_wrn", {}, [])[0].attack.step == "0.007"


def test_another_network_drops_the_recipes_options_for_its_own() -> None:
    c, _ = configuration("dkl", {"network": "resnet18"}, [])
    assert c.network == "resnet18"
    assert c.network_options == {}
    c, _ = configuration("dkl", {}, ["network_options.depth=28"])
    assert c.network_options == {"depth": 28, "widen": 10}


DIGITS = {"crop": 0, "pad": "zeros", "flip": False, "auto": "none"}
CIFAR = {"crop": 4, "pad": "zeros", "flip": True}


def test_augmentation_is_the_data_sets_unless_it_is_given() -> None:
    def augment(**table: Any) -> dict[str, Any]:
        return TrainConfig.from_dict(table).to_dict()["augment"]

    assert augment(method="n_fgsm") == augment(method="n_fgsm", data="cifar100") == {**CIFAR, "auto": "none"}
    assert augment(method="dajat") == {**CIFAR, "auto": "before"}
    for method in METHODS:
        for data in ("digits", "npz:images.npz", "folder:images"):
            assert {**augment(method=method, data=data), "pad": "zeros"} == DIGITS  # pad of no pixels
    given = {"crop": 1, "auto": "after"}
    assert augment(method="dajat", data="digits", augment=given) == {**DIGITS, **given}
    cifar = TrainConfig.from_dict({"method": "n_fgsm", "augment": {"crop": 2}})
    assert cifar.replace({"lr": 0.3}).augment == cifar.augment
    assert cifar.replace({"data": "digits"}).to_dict()["augment"] == DIGITS
    assert configuration("n_fgsm", {"data": "digits", "eps": "0.15"}, ["normalize=none"])[0].augment.crop == 0
    assert configuration("digits_n_fgsm", {}, [])[0].augment.crop == 1
    assert configuration("digits_n_fgsm", {}, ["data=cifar10"])[0].augment.crop == 4


def test_stored_configurations_keep_their_meaning_and_their_key() -> None:
    """Every default was written out; what the defaults are now changes nothing in them."""
    for path in sorted(RESULTS.glob("*/*.json")):
        content = json.loads(path.read_text())
        for run in content.get("runs", []):
            train = run["config"]["train"]
            assert TrainConfig.from_dict(train) == TrainConfig.from_dict(TrainConfig.from_dict(train).to_dict())
            assert canonical(TrainConfig.from_dict(train).to_dict()) == train, (path, run["key"])


def test_an_attack_that_cannot_reach_its_radius_is_refused(tmp_path: Path) -> None:
    weak = {"method": "trades", "data": "digits", "network": "small_resnet", "eps": "0.15"}
    with pytest.raises(ConfigurationError, match=r"10 steps of 0.007 reach 0\.07, not eps = 0\.15; raise"):
        TrainConfig.from_dict(weak).refuse_weak_attack()
    with pytest.raises(ConfigurationError, match=r"reach 0\.07"):
        train(TrainConfig.from_dict(weak), tmp_path)
    with pytest.raises(ConfigurationError, match=r"reach 0\.07"):
        complete(RunConfig({**weak, "activation": "relu"}))
    for attack in ({"step": "1/10 eps"}, {"steps": 22}, {"budget": "low"}, {"steps": 3, "step": "0.05"}):
        TrainConfig.from_dict({**weak, "attack": attack}).refuse_weak_attack()
    for name in recipe_names():
        configuration(name, {}, [])[0].refuse_weak_attack()
    for method in METHODS:
        TrainConfig.from_dict({"method": method}).refuse_weak_attack()


def test_keys_cover_everything_and_spell_meaning_once() -> None:
    base = TrainConfig.from_dict({"method": "trades"})
    changes: list[dict[str, Any]] = [
        {"seed": 1},
        {"options": {"beta": 5.0}},
        {"attack": {"steps": 9}},
        {"eps": "0.031"},
        {"activation": "rct:beta=1,curvature=7"},
        {"groups": [{"match": "bn", "lr": 2.0}]},
        {"control": {"as_alpha": 2.0}},
        {"watch": {"every": 2}},
        {"epochs": 77},
    ]
    keys = {base.key(), *(base.replace(change).key() for change in changes)}
    assert len(keys) == len(changes) + 1
    same = {"rct:beta=1,curvature=7", "rct:beta=1,alpha=14", "rct:alpha=14.0"}
    assert len({base.replace({"activation": spec}).key() for spec in same}) == 1
    assert base.replace({"lr": 1}).key() == base.replace({"lr": 1.0}).key()
    assert TrainConfig.from_dict({"method": "trades", "eps": 0.031}).key() == base.replace({"eps": "0.031"}).key()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "names its method"),
        ({"method": "trade"}, "did you mean 'trades'"),
        ({"method": "trades", "epoch": 3}, "'epoch'; did you mean 'epochs'"),
        ({"method": "trades", "attack": {"step_size": 1}}, r"'attack\.step_size'; did you mean 'step"),
        ({"method": "trades", "options": {"betta": 1}}, "no option 'betta'; did you mean 'beta'"),
        ({"method": "standard", "options": {"beta": 1}}, "it has none"),
        ({"method": "trades", "options": {"beta": "six"}}, "wrong type"),
        ({"method": "trades", "options": {"beta": -1}}, "negative"),
        ({"method": "trades", "eps": "8"}, r"\[0, 1\].*8/255"),
        ({"method": "trades", "eps": "9/8"}, r"\[0, 1\]"),
        ({"method": "trades", "eps": "a lot"}, "8/255"),
        ({"method": "trades", "network": "resnet19"}, "did you mean 'resnet18'"),
        ({"method": "trades", "activation": "rellu"}, "did you mean 'relu'"),
        ({"method": "trades", "attack": {"kind": "pdg"}}, "did you mean 'pgd'"),
        ({"method": "trades", "attack": {"kind": "none"}}, "crafted images"),
        ({"method": "standard", "attack": {"kind": "pgd"}}, "crafts no images"),
        ({"method": "trades", "attack": {"loss": "dkl"}}, "class means"),
        ({"method": "n_fgsm", "attack": {"loss": "kl"}}, "belongs to"),
        ({"method": "trades", "epochs": 0}, "at least 1"),
        ({"method": "trades", "epochs": 1.5}, "whole number"),
        ({"method": "trades", "lr": "fast"}, "a number"),
        ({"method": "trades", "lr": float("nan")}, "finite"),
        ({"method": "trades", "compile": 1}, "true or false"),
        ({"method": "trades", "select": "best"}, "held_out"),
        ({"method": "trades", "schedule": {"milestones": [5]}}, "1 milestones for 3 factors"),
        ({"method": "trades", "awp": {"gamma": -1}}, "negative"),
        ({"method": "trades", "groups": [{"lr": 1}]}, r"groups\[0\]\.match is not given"),
        ({"method": "trades", "augment": 3}, "must be a table"),
    ],
)
def test_refusals(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        TrainConfig.from_dict(table)
    assert "\n" not in str(caught.value)


def test_toml_and_words(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("method = ")
    with pytest.raises(ConfigurationError, match="not valid TOML"):
        load_toml(tmp_path / "a.toml")
    with pytest.raises(ConfigurationError, match="no such file"):
        load_recipe(str(tmp_path / "b.toml"))
    with pytest.raises(UnknownNameError, match="did you mean 'trades_rn18'"):
        load_recipe("trades_rn81")
    assert assignments(["attack.steps=7", "eps=8/255", "a.b.c=true"]) == {
        "attack": {"steps": 7},
        "eps": "8/255",
        "a": {"b": {"c": True}},
    }
    with pytest.raises(ConfigurationError, match="KEY=VALUE"):
        assignments(["epochs"])
    with pytest.raises(ConfigurationError, match="is for method 'trades'"):
        configuration("trades_rn18", {"method": "mart"}, [])
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}) == {"a": {"b": 1, "c": 3}}
