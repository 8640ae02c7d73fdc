"""Section 3's change of coordinates on the engine's own networks: build, rescale, train, measure.

σ_{α,β}(x) = σ_{1,β}(αx)/α, so `counterpart` makes the network with another α that computes the same function, running
statistics and eps included. Everything is float64.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessdiag as hd
from theory import rescaling
from theory.rescaling import Rule
from validation.bridge import rct_spec

KINDS = ("mlp", "small_resnet", "resnet18", "preact_resnet18")
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def build(kind: str, alpha: float, beta: int, *, seed: int = 0) -> nn.Module:
    """A small member of each architecture, with generic parameters, running statistics and an eps that matters."""
    spec = rct_spec(alpha, beta)
    if kind == "mlp":
        model = hd.networks.build("mlp", activation=spec, num_classes=3, in_features=16, widths=(5, 4, 4), seed=seed)
    else:
        width = {"small_resnet": 3}.get(kind, 1)
        model = hd.networks.build(kind, activation=spec, num_classes=3, in_channels=1, width=width, seed=seed)
    model = model.double()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in model.state_dict().items():
            if t.is_floating_point():
                fan = t[0].numel() if t.ndim > 1 else 4
                t.copy_(torch.randn(t.shape, generator=g, dtype=t.dtype) / fan**0.5)
            if name.endswith("running_var"):
                t.copy_(t.abs() + 0.1)
    for module in model.modules():
        if isinstance(module, _NORMS):
            module.weight.data += 1.0
            module.eps = 0.03
    return model.eval()


def rule_of(kind: str, model: nn.Module) -> Rule:
    """How each entry of the state dict goes with α."""
    names = list(model.state_dict())
    if kind == "mlp":
        return rescaling.mlp_rule(names, [n for n, m in model.named_modules() if isinstance(m, nn.Linear)])
    if kind == "preact_resnet18":
        return rescaling.preact_rule(names, stem="conv1", classifier="linear")
    return rescaling.resnet_rule(names, stem="bn1", classifier="linear")


def counterpart(
    kind: str, model: nn.Module, alpha: float, other: float, beta: int, *, eps: bool = True, statistics: bool = True
) -> nn.Module:
    """The network with α = `other` that computes what `model` (with α = `alpha`) computes.

    `eps=False` and `statistics=False` leave those alone, which breaks the equality.
    """
    rule = rule_of(kind, model)
    factor = alpha / other
    state = rescaling.rescale(model.state_dict(), rule, factor)
    if not statistics:
        state |= {name: t for name, t in model.state_dict().items() if "running" in name}
    twin = build(kind, other, beta)
    twin.load_state_dict(state)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _NORMS)}
    new = rescaling.rescale_eps({n: m.eps for n, m in norms.items()}, rule, factor)
    for name, module in twin.named_modules():
        if isinstance(module, _NORMS):
            module.eps = new[name] if eps else norms[name].eps
    return twin.eval()


def feeds(model: nn.Module) -> dict[str, str]:
    """BatchNorm -> the convolution that feeds it alone, in the post-activation networks here."""
    norms = [n for n, m in model.named_modules() if isinstance(m, _NORMS)]
    return {n: n.replace("shortcut.1", "shortcut.0").replace("bn", "conv") for n in norms}


def rescaled(model: nn.Module, rule: Rule, factor: float) -> nn.Module:
    """A copy of the same network, activation included, in the coordinates of a rule."""
    twin = copy.deepcopy(model)
    twin.load_state_dict(rescaling.rescale(model.state_dict(), rule, factor))
    norms = {n: m for n, m in twin.named_modules() if isinstance(m, _NORMS)}
    for name, eps in rescaling.rescale_eps({n: m.eps for n, m in norms.items()}, rule, factor).items():
        norms[name].eps = eps
    return twin.eval()


def batch(kind: str, samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs 8x8 (4x4 values for the MLP) and classes."""
    g = torch.Generator().manual_seed(seed)
    shape = (samples, 1, 4, 4) if kind == "mlp" else (samples, 1, 8, 8)
    return torch.randn(shape, generator=g, dtype=torch.float64), torch.randint(3, (samples,), generator=g)


@dataclass(frozen=True)
class Steps:
    """Options of SGD: those of the original, per parameter where rescaled."""

    lr: float = 0.005
    momentum: float = 0.9
    weight_decay: float = 5e-3
    steps: int = 20


def trajectory(
    kind: str, model: nn.Module, options: Steps, groups: list[dict[str, object]] | None = None
) -> list[Tensor]:
    """Losses of SGD in training mode (batch statistics), in place; `groups` are the optimiser's."""
    plain: list[dict[str, object]] = [{"params": list(model.parameters())}]
    optimiser = torch.optim.SGD(
        groups or plain, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
    )
    model.train()
    losses = []
    for step in range(options.steps):
        x, y = batch(kind, 16, seed=1000 + step)
        loss = F.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(loss.detach())
    model.eval()
    return losses


def rescaled_groups(model: nn.Module, rule: Rule, factor: float, options: Steps) -> list[dict[str, object]]:
    """One group per parameter: lr × c², weight decay ÷ c²."""
    sizes = rescaling.rescale_optimizer(rule, factor, lr=options.lr, weight_decay=options.weight_decay)
    return [
        {"params": [p], "lr": sizes[name].lr, "weight_decay": sizes[name].weight_decay}
        for name, p in model.named_parameters()
    ]


def state_gap(model: nn.Module, twin: nn.Module, rule: Rule, factor: float) -> float:
    """Largest relative difference between the rescaled state of `model` and the state of `twin`, per tensor."""
    wanted, found = rescaling.rescale(model.state_dict(), rule, factor), twin.state_dict()
    gaps = [
        float((found[n] - t).norm() / t.norm())
        for n, t in wanted.items()
        if t.is_floating_point() and float(t.norm()) > 0
    ]
    return max(gaps)
