"""Another alpha by rescaling: the same trajectory in float64, every network kind, and each factor by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from experiments import control, groups
from experiments.config import TrainConfig
from experiments.parts import Control, Group
from experiments.train import train
from experiments.trained import load_trained
from experiments.trainer.rig import build_network, factors
from hessdiag.data.dataset import DataSet, make
from hessdiag.errors import CheckpointError, ConfigurationError, UnknownNameError

NETWORKS = {
    "mlp": {"widths": [12, 9, 7]},
    "small_resnet": {"width": 4, "strides": [1, 2]},
    "preact_resnet18": {"width": 2},
    "wrn28_10": {"depth": 10, "widen": 2},
}


def blobs() -> DataSet:
    g = torch.Generator().manual_seed(0)
    y = torch.arange(40) % 4
    centres = torch.rand(4, 1, 8, 8, generator=g)
    x = (centres[y] + 0.3 * torch.randn(40, 1, 8, 8, generator=g)).clamp(0, 1)
    return make(x, y, name="blobs", split="train", num_classes=4)


def configuration(network: str, alpha: float, beta: int = 1, **more: Any) -> TrainConfig:
    return TrainConfig.from_dict(
        {
            "method": "standard",
            "network": network,
            "network_options": NETWORKS[network],
            "activation": f"rct:beta={beta},alpha={alpha:g}",
            "data": "digits",
            "epochs": 5,
            "batch_size": 10,
            "lr": 0.02,
            "momentum": 0.9,
            "weight_decay": 0.01,
            "schedule": {"name": "cosine"},
            "dtype": "float64",
            "augment": {"crop": 1, "flip": False},
            "watch": {"every": 0},
            **more,
        }
    )


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("network", sorted(NETWORKS))
@pytest.mark.parametrize("beta", [0, 1, 2])
def test_the_imitation_follows_the_same_trajectory(network: str, beta: int) -> None:
    """20 steps of SGD with momentum, weight decay and a moving rate: logits of the final networks, in eval mode."""
    # A power of two scales without rounding: the deep net, whose training amplifies rounding, needs that.
    data, alpha = blobs(), 8.0 if network == "preact_resnet18" else 7.0
    original = train(configuration(network, alpha, beta), sets=(data, data), device="cpu").model
    imitation = configuration(network, 1.0, beta, control={"as_alpha": alpha})
    copy = train(imitation, sets=(data, data), device="cpu").model
    x = data.inputs.double()
    with torch.no_grad():
        assert gap(copy(x), original(x)) < 1e-10
        powers = control.exponents(copy)
        for (name, a), b in zip(copy.named_parameters(), original.parameters()):
            scale = float(b.abs().max()) * alpha ** powers[name]
            assert float((a - b * alpha ** powers[name]).abs().max()) < 1e-10 * max(scale, 1.0)


@pytest.mark.parametrize("missing", ["init", "lr", "decay", "statistics"])
def test_every_factor_is_needed(missing: str) -> None:
    data = blobs()
    original = train(configuration("small_resnet", 7.0), sets=(data, data), device="cpu").model
    rest = [factor for factor in ("init", "lr", "decay", "statistics") if factor != missing]
    some = configuration("small_resnet", 1.0, control={"as_alpha": 7.0, "factors": rest})
    copy = train(some, sets=(data, data), device="cpu").model
    x = data.inputs.double()
    with torch.no_grad():
        assert gap(copy(x), original(x)) > 1e-6


def test_one_factor_on_one_family_touches_nothing_else() -> None:
    config = configuration("small_resnet", 1.0, control={"as_alpha": 7.0, "factors": ["decay"], "families": ["bn"]})
    net = build_network(config, (1, 8, 8), 4)
    plain = build_network(configuration("small_resnet", 1.0), (1, 8, 8), 4)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), plain.state_dict().values()))
    for name, own in factors(config, net).items():
        expected = groups.Factors(decay=7.0**-2) if groups.kind_of(net, name) == "bn" else groups.Factors()
        assert own == expected


def test_at_the_start_the_functions_are_equal_and_the_eps_is_changed() -> None:
    config = configuration("small_resnet", 2.0, control={"as_alpha": 6.0})
    net, other = (build_network(c, (1, 8, 8), 4).eval() for c in (config, configuration("small_resnet", 6.0)))
    x = blobs().inputs.double()
    with torch.no_grad():
        assert gap(net(x), other(x)) < 1e-12
    assert net.get_submodule("blocks.0.bn1").eps == pytest.approx(9e-5)
    assert net.get_submodule("bn1").eps == 1e-5


def test_a_network_with_changed_eps_is_not_misread(tmp_path: Any) -> None:
    from hessdiag.checkpoint import load_checkpoint

    data = blobs()
    config = configuration("small_resnet", 1.0, control={"as_alpha": 7.0}, epochs=1)
    result = train(config, tmp_path / "run", sets=(data, data), device="cpu")
    with pytest.raises(CheckpointError, match="names no network"):
        load_checkpoint(tmp_path / "run" / "last.pt")
    found = load_trained(tmp_path / "run").model
    x = data.inputs.double()
    with torch.no_grad():
        assert torch.equal(found(x), result.model(x))
    with pytest.raises(CheckpointError, match="network"):
        load_trained(tmp_path / "run", network="resnet18")


def test_refusals_of_the_control() -> None:
    with pytest.raises(ConfigurationError, match="no RCT-AF"):
        build_network(
            configuration("mlp", 1.0).replace({"activation": "relu", "control": {"as_alpha": 2}}), (1, 8, 8), 4
        )
    with pytest.raises(UnknownNameError, match="decay"):
        Control(as_alpha=2.0, factors=("deacy",))
    with pytest.raises(ConfigurationError, match="positive"):
        Control(as_alpha=0.0)


def test_groups_by_kind_leaf_and_expression() -> None:
    net = build_network(configuration("small_resnet", 1.0), (1, 8, 8), 4)
    table = groups.factors_of(net, [Group("bn.weight", init=3.0), Group("re:^blocks", lr=2.0), Group("all", decay=0.5)])
    assert table["blocks.0.bn1.weight"] == groups.Factors(3.0, 2.0, 0.5)
    assert table["bn1.bias"] == groups.Factors(1.0, 1.0, 0.5)
    assert table["linear.weight"] == groups.Factors(1.0, 1.0, 0.5)
    with pytest.raises(ConfigurationError, match="matches no parameter"):
        groups.factors_of(net, [Group("re:layer9")])
    with pytest.raises(UnknownNameError, match=r"bn\.weight"):
        groups.factors_of(net, [Group("bn.wieght")])
    with pytest.raises(ConfigurationError, match="regular expression"):
        groups.factors_of(net, [Group("re:(")])


def test_groups_reach_the_optimiser() -> None:
    config = configuration("small_resnet", 1.0, groups=[{"match": "bn", "lr": 0.0, "decay": 0.0}])
    data = blobs()
    before = build_network(config, (1, 8, 8), 4)
    after = train(config, sets=(data, data), device="cpu").model
    for (name, a), b in zip(before.named_parameters(), after.parameters()):
        assert torch.equal(a, b) == (groups.kind_of(before, name) == "bn"), name
