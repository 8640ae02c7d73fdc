"""The sides of the comparison of exact diagonals: networks, their data, and the diagonal by ours and by each peer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from hessdiag import Objective, diagonal
from hessdiag.graph import Linearisation
from hessdiag.kernels import exact_batch as exact
from hessdiag.kernels.products import Products
from hessdiag.methods import reference

WIDTHS = {
    "784-128-128-10": (784, 128, 128, 10),
    "784-512-512-10": (784, 512, 512, 10),
    "784-256x4-10": (784, 256, 256, 256, 256, 10),
}
CURVES: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh}
CHUNK = 16


def mlp(widths: tuple[int, ...], curve: str) -> nn.Sequential:
    """Linear layers with one curve between them."""
    layers: list[nn.Module] = []
    for below, above in pairwise(widths):
        layers += [nn.Linear(below, above), CURVES[curve]()]
    return nn.Sequential(*layers[:-1])


def problem(widths: tuple[int, ...], samples: int) -> tuple[Tensor, Tensor]:
    """Random inputs and classes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(samples, widths[0], generator=generator)
    return x, torch.randint(0, widths[-1], (samples,), generator=generator)


def ours(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], dict[str, Tensor]]:
    """Total of the summed loss by name: forward pass, linearisation and both parts."""
    objective = Objective(model)

    def run() -> dict[str, Tensor]:
        gauss_newton, functional = exact.batch_diagonal(Linearisation(objective, x, y))
        return {name: value.add_(functional[name]) for name, value in gauss_newton.items()}

    return run


def public(model: nn.Module, x: Tensor, y: Tensor, *, checked: bool = True) -> Callable[[], dict[str, Tensor]]:
    """The total of the mean loss by the call that a user makes, with all its checks or without those that can be
    switched off.
    """
    objective = Objective(model)

    def run() -> dict[str, Tensor]:
        return dict(
            diagonal(objective, [(x, y)], method="exact", deterministic_check=checked, audit_model=checked).total
        )

    return run


def backpack(model: nn.Sequential, x: Tensor, y: Tensor) -> Callable[[], dict[str, Tensor]]:
    """The same by BackPACK's DiagHessian, forward and backward pass included."""
    from backpack import backpack as context
    from backpack import extend
    from backpack.extensions import DiagHessian

    net, loss = extend(model), extend(nn.CrossEntropyLoss(reduction="sum"))

    def run() -> dict[str, Tensor]:
        net.zero_grad()
        value = loss(net(x), y)
        with context(DiagHessian()):
            value.backward()
        return {name: p.diag_h for name, p in net.named_parameters()}

    return run


def products(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], dict[str, Tensor]]:
    """The same by one Hessian-vector product per parameter, CHUNK at a time."""
    objective = Objective(model)

    def run() -> dict[str, Tensor]:
        found = Products(objective, x, y, parts=False)
        out = {}
        for place, (name, p) in enumerate(objective.parameters.items()):
            rows = []
            for low in range(0, p.numel(), CHUNK):
                high = min(low + CHUNK, p.numel())
                units = torch.zeros(high - low, p.numel())
                units[torch.arange(high - low), torch.arange(low, high)] = 1
                rows.append(reference._own_entries(found, place, units.reshape(-1, *p.shape), low))
            out[name] = torch.cat(rows).reshape(p.shape)
        return out

    return run


def deviation(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest relative deviation of a tensor, in norm."""
    return max(float((found[n].double() - w.double()).norm() / w.double().norm()) for n, w in wanted.items())
