"""Networks by name; `build(**network.config)` rebuilds what `build` made."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from hessdiag import activations
from hessdiag.errors import ConfigurationError, UnknownNameError, nearest
from hessdiag.networks.mlp import MLP
from hessdiag.networks.normalize import Statistics, layer
from hessdiag.networks.preact_resnet import PreActResNet18
from hessdiag.networks.resnet import ResNet18, SmallResNet
from hessdiag.networks.wide_resnet import WideResNet

NETWORKS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {
        "mlp": MLP,
        "small_resnet": SmallResNet,
        "resnet18": ResNet18,
        "preact_resnet18": PreActResNet18,
        "wrn28_10": WideResNet,
    }
)


def build(
    network: str,
    *,
    activation: activations.Spec = "relu",
    num_classes: int = 10,
    normalize: Statistics | None = None,
    seed: int | None = None,
    **options: Any,
) -> nn.Module:
    """A new `network` for `num_classes`, its activations made by a factory, one at each place and never in place.

    `activation` is a spec string, a module (copied to each place) or a factory. `normalize` is (mean, std)
    per channel: a layer without parameters inside the network. `seed` makes the initial weights reproducible
    and leaves torch's global generator as it was; without it that generator is used. The options are those
    of the network's class.

    The result carries `config`, plain values from which `build(**config)` makes the same architecture; an
    activation outside the registry stands there as "custom:CLASS" and has to be given again.
    """
    kind = _known(network)
    defaults = defaults_of(kind)
    for key in options:
        if key not in defaults:
            raise UnknownNameError(f"network {network!r} has no option {key!r}; {nearest(key, [*defaults])}")
    chosen = {key: _plain(network, key, options.get(key, value), value) for key, value in defaults.items()}
    _positive(network, "num_classes", num_classes)
    make = activations.factory(activation)
    spec = activations.describe(make())
    with _seeded(seed):
        model = kind(make, num_classes, layer(normalize), **chosen)
    config: dict[str, Any] = {"network": network, "activation": spec, "num_classes": num_classes}
    config["normalize"] = None if normalize is None else [[float(v) for v in part] for part in normalize]
    model.config = config | chosen  # type: ignore[assignment]
    return model


def _known(name: str) -> Callable[..., nn.Module]:
    if not isinstance(name, str) or name not in NETWORKS:
        raise UnknownNameError(f"unknown network {name!r}; {nearest(str(name), [*NETWORKS])}")
    return NETWORKS[name]


def defaults_of(kind: Callable[..., nn.Module]) -> dict[str, Any]:
    """The keyword-only options of a network with their defaults (`Parameter.empty` where required)."""
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _plain(network: str, key: str, value: Any, default: Any) -> Any:
    """The option as a plain value of its default's type: a bool, a positive int or a list of such."""
    if value is inspect.Parameter.empty:
        raise ConfigurationError(f"network {network!r} needs {key}=, the size of one flattened input")
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ConfigurationError(f"network {network!r}: {key} must be True or False, got {value!r}")
        return value
    if isinstance(default, tuple):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigurationError(
                f"network {network!r}: {key} must be a sequence of positive integers, got {value!r}"
            )
        return [_positive(network, key, item) for item in value]
    return _positive(network, key, value)


def _positive(network: str, key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"network {network!r}: {key} must be a positive integer, got {value!r}")
    return value


@contextlib.contextmanager
def _seeded(seed: int | None) -> Any:
    """Layers draw from torch's global generator: seed a fork of it, so that the caller's stays untouched."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
