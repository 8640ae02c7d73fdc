"""Parameter groups by name or kind: factors on initial values, learning rate and weight decay."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from experiments.parts import Group
from experiments.splitnorm import plain_name
from hessdiag.errors import ConfigurationError, UnknownNameError, nearest

KINDS: Mapping[str, tuple[type[nn.Module], ...]] = {
    "bn": (nn.modules.batchnorm._BatchNorm,),
    "conv": (nn.modules.conv._ConvNd,),
    "linear": (nn.Linear,),
}
MATCHES = ["all", *[f"{kind}{leaf}" for kind in KINDS for leaf in ("", ".weight", ".bias")]]


@dataclass(frozen=True)
class Factors:
    """What multiplies a parameter's initial value, its learning rate and its weight decay."""

    init: float = 1.0
    lr: float = 1.0
    decay: float = 1.0

    def times(self, other: Factors) -> Factors:
        """Both together."""
        return Factors(self.init * other.init, self.lr * other.lr, self.decay * other.decay)


def kind_of(model: nn.Module, name: str) -> str:
    """What owns the parameter `name`: "bn", "conv", "linear" or "other"."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return next((kind for kind, classes in KINDS.items() if isinstance(owner, classes)), "other")


def matching(model: nn.Module, pattern: str) -> list[str]:
    """Names of the parameters that a group's `match` means; a pattern that hits nothing is refused as a typo."""
    names = [name for name, _ in model.named_parameters()]
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            raise ConfigurationError(f"group {pattern!r}: not a regular expression ({error})") from None
        found = [name for name in names if expression.search(name)]
    elif pattern not in MATCHES:
        raise UnknownNameError(f"unknown group {pattern!r}; {nearest(pattern, [*MATCHES, 're:EXPRESSION'])}")
    else:
        kind, _, leaf = pattern.partition(".")
        found = [
            name for name in names if kind in ("all", kind_of(model, name)) and leaf in ("", name.rpartition(".")[2])
        ]
    if not found:
        raise ConfigurationError(f"group {pattern!r} matches no parameter; the network has {', '.join(names[:8])}")
    return found


def factors_of(model: nn.Module, groups: Sequence[Group]) -> dict[str, Factors]:
    """The product of all groups' factors, for every parameter of the network."""
    table = {name: Factors() for name, _ in model.named_parameters()}
    for group in groups:
        for name in matching(model, group.match):
            table[name] = table[name].times(Factors(group.init, group.lr, group.decay))
    return table


def scale_initial_values(model: nn.Module, factors: Mapping[str, Factors]) -> None:
    """Multiply initial values in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if factors[name].init != 1.0:
                parameter.mul_(factors[name].init)


def optimiser_groups(model: nn.Module, factors: Mapping[str, Factors], *, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for SGD, one per pair of factors, in order of appearance; "lr_scale" is for the schedule to use."""
    table: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        own = factors[plain_name(name)]
        entry = table.setdefault(
            (own.lr, own.decay),
            {"params": [], "names": [], "lr_scale": own.lr, "weight_decay": weight_decay * own.decay},
        )
        entry["params"].append(parameter)
        entry["names"].append(name)
    return list(table.values())
