"""Networks: counts, keys, gradients, configurations, refusals."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessdiag.activations import RCTAF
from hessdiag.errors import ConfigurationError, UnknownNameError
from hessdiag.networks import NETWORKS, Normalize, build

SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"in_features": 64, "widths": (8, 5)},
    "small_resnet": {},
    "resnet18": {"width": 4},
    "preact_resnet18": {"width": 4},
    "wrn28_10": {"depth": 10, "widen": 2},
}


def images(network: str, samples: int = 4) -> Tensor:
    channels = 3 if network in ("resnet18", "preact_resnet18", "wrn28_10") else 1
    return torch.rand(samples, channels, 8, 8, generator=torch.Generator().manual_seed(1))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "network, parameters, activations",
    [("resnet18", 11_173_962, 17), ("preact_resnet18", 11_172_170, 17), ("wrn28_10", 36_479_194, 25)],
)
def test_published_networks(network: str, parameters: int, activations: int) -> None:
    """Parameter and activation counts for 10 classes; no parameter is dead; state-dict keys of the public code."""
    made: list[nn.Module] = []

    def make() -> nn.Module:
        made.append(nn.SiLU())
        return made[-1]

    model = build(network, activation=make, seed=0)
    placed = [m for m in model.modules() if isinstance(m, nn.SiLU)]
    assert count(model) == parameters
    assert len(placed) == activations
    assert len({id(m) for m in placed}) == activations
    assert {id(m) for m in placed} <= {id(m) for m in made}

    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    F.cross_entropy(model(x), torch.tensor([1, 7])).backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert dead == []

    some_keys = {
        "resnet18": "bn1.weight layer2.0.shortcut.0.weight layer3.0.shortcut.1.running_var linear.bias",
        "preact_resnet18": "layer1.0.bn1.weight layer4.0.shortcut.0.weight bn.num_batches_tracked linear.bias",
        "wrn28_10": "block1.layer.0.convShortcut.weight block3.layer.3.conv2.weight bn1.bias fc.weight",
    }[network].split()
    assert set(some_keys) <= set(model.state_dict())
    convolutions, norms = {"resnet18": (20, 20), "preact_resnet18": (20, 17), "wrn28_10": (28, 25)}[network]
    assert len(model.state_dict()) == convolutions + 5 * norms + 2  # weights; BatchNorms; the linear layer
    plain = build(network, activation=RCTAF(3.0, 2), normalize=((0.5,) * 3, (0.2,) * 3), seed=1)
    assert list(plain.state_dict()) == list(model.state_dict())


def test_small_defaults() -> None:
    model = build("small_resnet", seed=0)
    assert count(model) == 2_626
    strides = [m.stride for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert strides.count((2, 2)) == 2
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert build("small_resnet", in_channels=3, strides=(1, 2, 2))(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("network", ["resnet18", "preact_resnet18", "small_resnet"])
def test_the_stride_of_the_stem_alone_changes(network: str) -> None:
    """With stride 2 the stem's output is every other pixel of stride 1's; tensors and the rest are the same."""
    plain, strided = (build(network, activation="tanh", seed=0, **SMALL[network], stem_stride=s) for s in (1, 2))
    seen: list[Tensor] = []
    for model in (plain, strided):
        model.get_submodule("conv1").register_forward_hook(lambda _, __, output: seen.append(output))
        model.eval()(images(network))
    torch.testing.assert_close(seen[1], seen[0][:, :, ::2, ::2])
    differing = [
        (name, left.stride, right.stride)
        for (name, left), (_, right) in zip(plain.named_modules(), strided.named_modules())
        if isinstance(left, nn.Conv2d) and isinstance(right, nn.Conv2d) and str(left) != str(right)
    ]
    assert differing == [("conv1", (1, 1), (2, 2))]
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), strided.state_dict().values()))
    assert dict(strided.config)["stem_stride"] == 2  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="stem_stride must be a positive integer, got 0"):
        build(network, **SMALL[network], stem_stride=0)


@pytest.mark.parametrize("stem", [1, 2])
def test_resnet18_is_the_function_it_should_be(stem: int) -> None:
    """One forward pass written out with functional calls, from the state dict alone."""
    model = build("resnet18", activation="tanh", width=4, stem_stride=stem, seed=0).double()
    _shake(model)
    state = model.eval().state_dict()

    def bn(x: Tensor, name: str) -> Tensor:
        mean, var, w, b = (state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, w, b)

    x = images("resnet18").double()
    h = torch.tanh(bn(F.conv2d(x, state["conv1.weight"], stride=stem, padding=1), "bn1"))
    for stage, stride in zip((1, 2, 3, 4), (1, 2, 2, 2)):
        for block in (0, 1):
            at, s = f"layer{stage}.{block}", stride if block == 0 else 1
            out = torch.tanh(bn(F.conv2d(h, state[f"{at}.conv1.weight"], stride=s, padding=1), f"{at}.bn1"))
            out = bn(F.conv2d(out, state[f"{at}.conv2.weight"], padding=1), f"{at}.bn2")
            if f"{at}.shortcut.0.weight" in state:
                h = bn(F.conv2d(h, state[f"{at}.shortcut.0.weight"], stride=s), f"{at}.shortcut.1")
            h = torch.tanh(out + h)
    expected = F.linear(h.mean((2, 3)), state["linear.weight"], state["linear.bias"])
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("network", ["preact_resnet18", "wrn28_10"])
def test_preactivation_networks_are_the_functions_they_should_be(network: str) -> None:
    model = build(network, activation="tanh", **SMALL[network], seed=0).double()
    _shake(model)
    state = model.eval().state_dict()
    wide = network == "wrn28_10"

    def act(x: Tensor, name: str) -> Tensor:
        mean, var, w, b = (state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return torch.tanh(F.batch_norm(x, mean, var, w, b))

    x = images(network).double()
    h = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage, stride in zip((1, 2, 3) if wide else (1, 2, 3, 4), (1, 2, 2, 2)):
        for block in (0,) if wide else (0, 1):
            at = f"block{stage}.layer.{block}" if wide else f"layer{stage}.{block}"
            short = f"{at}.convShortcut.weight" if wide else f"{at}.shortcut.0.weight"
            s = stride if block == 0 else 1
            active = act(h, f"{at}.bn1")
            out = act(F.conv2d(active, state[f"{at}.conv1.weight"], stride=s, padding=1), f"{at}.bn2")
            out = F.conv2d(out, state[f"{at}.conv2.weight"], padding=1)
            h = out + (F.conv2d(active, state[short], stride=s) if short in state else h)
    last, head = ("bn1", "fc") if wide else ("bn", "linear")
    expected = F.linear(act(h, last).mean((2, 3)), state[f"{head}.weight"], state[f"{head}.bias"])
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def _shake(model: nn.Module) -> None:
    """BatchNorm statistics and gains that are not those of a new layer."""
    generator = torch.Generator().manual_seed(3)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight.data, m.bias.data, m.running_mean, m.running_var):
                assert t is not None
                t.copy_(0.5 + torch.rand(t.shape, generator=generator, dtype=t.dtype))


def test_initialisation() -> None:
    """He-normal in fan-out, zero linear bias in the wide net; elsewhere PyTorch's, within 1/sqrt(fan-in)."""
    wide = build("wrn28_10", depth=10, widen=8, seed=0)
    for name, p in wide.named_parameters():
        if p.ndim == 4:
            std = math.sqrt(2 / (p.shape[0] * p.shape[2] * p.shape[3]))
            # The deviation of n normals has relative error sqrt(1/2n): five of those, false alarm 6e-7 each.
            assert float(p.detach().std()) == pytest.approx(std, rel=5 * math.sqrt(0.5 / p.numel())), name
    assert not bool(wide.get_parameter("fc.bias").any())
    for network in ("resnet18", "preact_resnet18", "small_resnet"):
        for name, p in build(network, seed=0, **SMALL[network]).named_parameters():
            if p.ndim == 4:
                bound = 1 / math.sqrt(p[0].numel())
                assert 0.8 * bound < float(p.detach().abs().max()) <= bound, name


@pytest.mark.parametrize("network", NETWORKS)
def test_config_rebuilds_the_network(network: str) -> None:
    channels = 1 if network in ("mlp", "small_resnet") else 3
    statistics = ((0.5,) * channels, (0.25,) * channels)
    model = build(network, activation="rct:curvature=7", num_classes=3, normalize=statistics, seed=5, **SMALL[network])
    config: dict[str, Any] = json.loads(json.dumps(model.config))  # plain values survive a text format
    assert config == model.config
    assert (config["network"], config["activation"]) == (network, "rct:beta=1,alpha=14")
    again = build(**config)
    assert again.config == model.config
    assert str(again) == str(model)
    again.load_state_dict(model.state_dict())
    x = images(network)
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert model(x).shape == (4, 3)


@pytest.mark.parametrize("network", NETWORKS)
def test_no_activation_works_in_place(network: str) -> None:
    """Each activation's input is unchanged after the forward pass, whatever the module asked for."""
    model = build(network, activation=nn.LeakyReLU(0.3, inplace=True), seed=0, **SMALL[network])
    seen: list[tuple[Tensor, Tensor]] = []
    for m in model.modules():
        if isinstance(m, nn.LeakyReLU):
            assert not m.inplace
            m.register_forward_hook(lambda _, args, __: seen.append((args[0], args[0].clone())))
    model(images(network)).sum().backward()
    assert seen
    assert all(torch.equal(a, b) for a, b in seen)


def test_a_seed_is_reproducible_and_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    a, b, c = (build("small_resnet", seed=s).get_parameter("conv1.weight") for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        assert torch.equal(build("small_resnet").get_parameter("conv1.weight"), a)


def test_an_activation_instance_is_copied_to_each_place() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.level = nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.level * x)

    gate = Gate()
    model = build("mlp", activation=gate, in_features=3, widths=(4, 4, 4))
    placed = [m for m in model.modules() if isinstance(m, Gate)]
    assert len({id(m.level) for m in [*placed, gate]}) == 4
    assert model.config["activation"].startswith("custom:")
    with pytest.raises(UnknownNameError, match="pass the module"):
        build(**model.config)
    assert build(**{**model.config, "activation": gate}).config == model.config


def test_mlp_of_any_widths() -> None:
    x = torch.rand(6, 2, 5, generator=torch.Generator().manual_seed(0))
    linear = build("mlp", in_features=10, widths=(), num_classes=4)
    assert [type(m) for m in linear.layers] == [nn.Linear]  # type: ignore[union-attr]
    assert linear(x).shape == (6, 4)
    scalar = build("mlp", in_features=10, widths=(3,), num_classes=1)
    assert scalar(x).shape == (6, 1)
    assert build("mlp", in_features=10, widths=[3], num_classes=1, squeeze=True)(x).shape == (6,)
    bare = build("mlp", in_features=10, widths=(7, 3), bias=False)
    assert count(bare) == 70 + 21 + 30
    kinds = [type(m) for m in build("mlp", in_features=2, widths=(3, 3), activation="tanh").layers]  # type: ignore
    assert kinds == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]


def test_normalisation_inside() -> None:
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    plain = build("resnet18", width=4, seed=0).eval()
    inside = build("resnet18", width=4, seed=0, normalize=(mean, std)).eval()
    x = images("resnet18")
    outside = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(inside(x), plain(outside))
    assert count(inside) == count(plain)
    assert not any("normalize" in key for key in inside.state_dict())
    assert inside.double()(x.double()).dtype == torch.float64
    vectors = Normalize([1.0], [2.0])
    assert torch.equal(vectors(torch.full((2, 5), 3.0)), torch.ones(2, 5))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"network": "resnet"}, UnknownNameError, "did you mean"),
        ({"network": "mlp"}, ConfigurationError, "in_features"),
        ({"network": "mlp", "in_features": 4, "width": 3}, UnknownNameError, "did you mean 'widths'"),
        ({"network": "mlp", "in_features": 4, "widths": (3, 0)}, ConfigurationError, "positive"),
        ({"network": "mlp", "in_features": 4, "widths": 3}, ConfigurationError, "sequence"),
        ({"network": "mlp", "in_features": 4, "bias": 1}, ConfigurationError, "True or False"),
        ({"network": "mlp", "in_features": 4, "squeeze": True}, ConfigurationError, "num_classes=1"),
        ({"network": "resnet18", "num_classes": 0}, ConfigurationError, "num_classes"),
        ({"network": "resnet18", "num_classes": True}, ConfigurationError, "num_classes"),
        ({"network": "resnet18", "activation": "rleu"}, UnknownNameError, "did you mean 'relu'"),
        ({"network": "resnet18", "normalize": 3}, ConfigurationError, "normalize"),
        ({"network": "resnet18", "normalize": ((0.5,), (0.1, 0.2))}, ConfigurationError, "per channel"),
        ({"network": "resnet18", "normalize": ((0.5,), (0.0,))}, ConfigurationError, "positive"),
        ({"network": "resnet18", "normalize": ((float("nan"),), (1.0,))}, ConfigurationError, "finite"),
        ({"network": "resnet18", "normalize": (("a",), (1.0,))}, ConfigurationError, "normalize"),
        ({"network": "small_resnet", "strides": ()}, ConfigurationError, "strides"),
        ({"network": "wrn28_10", "depth": 27}, ConfigurationError, "depth"),
        ({"network": "wrn28_10", "widen": 1}, ConfigurationError, "widen"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(**arguments)
