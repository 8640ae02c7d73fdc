"""Imitating another alpha: a change of coordinates, so it acts through initialisation, step and decay alone.

RCT-AF obeys sigma_alpha(x) = sigma_1(alpha x)/alpha for every beta. Hence a network with activation sigma_a computes
the same function as one with sigma_b if, with c = b/a, these parameters of the first are those of the second times c:

    MLP               first layer's weight, every bias but the last; the last weight is divided by c
    post-activation   gain and bias of every BatchNorm; the classifier's weight is divided by c
    pre-activation    the same, and the stem convolution times c

and every BatchNorm that is fed by scaled activations (post-activation: all but the stem's; pre-activation: all) has
running_mean times c, running_var and eps times c^2. Under theta -> c theta a gradient is divided by c, so SGD with
momentum and weight decay follows the same trajectory if on those groups lr is multiplied by c^2 and decay divided by
c^2 (and conversely where the parameter is divided). `Control` switches on any part of this.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from experiments.groups import Factors, kind_of
from experiments.parts import Control
from hessdiag.activations import RCTAF
from hessdiag.errors import ConfigurationError, nearest


def exponents(model: nn.Module) -> dict[str, int]:
    """For each parameter the power of c that it carries: 1, 0 or -1."""
    return _rule(model)[0](model)


def scaled_norms(model: nn.Module) -> list[tuple[str, nn.modules.batchnorm._BatchNorm]]:
    """The BatchNorms whose inputs carry a factor c."""
    skip = _rule(model)[1]
    kinds = nn.modules.batchnorm._BatchNorm
    return [(name, m) for name, m in model.named_modules() if isinstance(m, kinds) and name not in skip]


def own_alpha(model: nn.Module) -> float:
    """The one alpha of the network's RCT-AF activations."""
    found = {(m.alpha, m.beta) for m in model.modules() if isinstance(m, RCTAF)}
    if len(found) != 1:
        what = "no RCT-AF activation" if not found else f"RCT-AF activations of different kinds {sorted(found)}"
        raise ConfigurationError(f"control.as_alpha needs a network with one RCT-AF throughout; this one has {what}")
    return next(iter(found))[0]


def factors_of(model: nn.Module, control: Control) -> dict[str, Factors]:
    """Factors that make the network train as one with alpha = control.as_alpha, as far as the switches allow."""
    names = [name for name, _ in model.named_parameters()]
    if control.as_alpha is None:
        return {name: Factors() for name in names}
    c = control.as_alpha / own_alpha(model)
    powers = exponents(model)
    table = {}
    for name in names:
        power = powers[name] if kind_of(model, name) in control.families else 0
        table[name] = Factors(
            init=c**power if "init" in control.factors else 1.0,
            lr=c ** (2 * power) if "lr" in control.factors else 1.0,
            decay=c ** (-2 * power) if "decay" in control.factors else 1.0,
        )
    return table


def scale_statistics(model: nn.Module, control: Control) -> None:
    """Running statistics and eps of the BatchNorms that scaled activations feed, in place."""
    if control.as_alpha is None or "statistics" not in control.factors:
        return
    c = control.as_alpha / own_alpha(model)
    with torch.no_grad():
        for _, norm in scaled_norms(model):
            norm.eps *= c * c
            if norm.running_mean is not None and norm.running_var is not None:
                norm.running_mean.mul_(c)
                norm.running_var.mul_(c * c)


Rule = Callable[[nn.Module], dict[str, int]]


def _post_activation(model: nn.Module) -> dict[str, int]:
    powers = {}
    for name, _ in model.named_parameters():
        kind = kind_of(model, name)
        classifier = kind == "linear" and name.endswith("weight")
        powers[name] = 1 if kind == "bn" else -1 if classifier else 0
    return powers


def _pre_activation(model: nn.Module) -> dict[str, int]:
    return {**_post_activation(model), "conv1.weight": 1}


def _mlp(model: nn.Module) -> dict[str, int]:
    names = [name for name, _ in model.named_parameters()]
    weights = [name for name in names if name.endswith("weight")]
    biases = [name for name in names if name.endswith("bias")]
    powers = dict.fromkeys(names, 0)
    if len(weights) > 1:
        powers |= dict.fromkeys(biases[:-1], 1) | {weights[0]: 1, weights[-1]: -1}
    return powers


_RULES: dict[str, tuple[Rule, frozenset[str]]] = {
    "mlp": (_mlp, frozenset()),
    "small_resnet": (_post_activation, frozenset({"bn1"})),
    "resnet18": (_post_activation, frozenset({"bn1"})),
    "preact_resnet18": (_pre_activation, frozenset()),
    "wrn28_10": (_pre_activation, frozenset()),
}


def _rule(model: nn.Module) -> tuple[Rule, frozenset[str]]:
    config = getattr(model, "config", None)
    name = config.get("network") if isinstance(config, dict) else None
    if name not in _RULES:
        raise ConfigurationError(f"no rescaling rule for network {name!r}; {nearest(str(name), list(_RULES))}")
    return _RULES[name]
