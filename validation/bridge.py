"""One net in three places: as theory's matrices, as the engine's network, and under plain autograd.

The reference here is a full Hessian by double backward, written out in this module: it shares no code with the engine
or with theory. Relative deviations are ‖a - b‖ over the norm of the largest part, since parts may cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessdiag as hd
from theory import shapes
from theory.hessian_diagonal import Entries
from theory.losses import Loss, cross_entropy, half_squared
from theory.net import Net, make_net
from theory.shapes import Shape

TOLERANCE = 1e-10
"""Float64 agreement asked of exact forms, relative to the norm."""

Tensors = Mapping[str, Tensor]


def rct_spec(alpha: float, beta: int) -> str:
    """The engine's name of a member of RCT-AF."""
    return f"rct:beta={beta},alpha={alpha!r}"


ACTIVATIONS: dict[str, Shape] = {
    **{rct_spec(a, b): shapes.rct(a, b) for a in (1.0, 7.0) for b in (0, 1, 2)},
    rct_spec(14.0, 1): shapes.rct(14.0, 1),
    rct_spec(30.0, 2): shapes.rct(30.0, 2),
    "tanh": shapes.tanh(),
    "gelu": shapes.triple(F.gelu, name="gelu"),
    "mish": shapes.triple(F.mish, name="mish"),
    "silu": shapes.triple(F.silu, name="silu"),
}
"""Engine's spec -> theory's triple; derivatives of the two sides are written independently."""


def as_model(net: Net, spec: str) -> nn.Module:
    """The engine's MLP with the weights of a theory net, float64, in eval mode."""
    widths = net.widths
    model = hd.networks.build(
        "mlp", activation=spec, num_classes=widths[-1], in_features=widths[0], widths=widths[1:-1], seed=0
    ).double()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for linear, w, b in zip(linears, net.weights, net.biases, strict=True):
            linear.weight.copy_(w)
            linear.bias.copy_(torch.zeros_like(linear.bias) if b is None else b)
    return model.eval()


def as_net(model: nn.Module, activation: Shape) -> Net:
    """The theory net of an engine MLP."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    weights = [m.weight.detach().double() for m in linears]
    return make_net(weights, [m.bias.detach().double() for m in linears], activation)


def theory_loss(name: str, targets: Tensor) -> Loss:
    """The theory's loss of the engine's name."""
    return cross_entropy(targets) if name == "cross_entropy" else half_squared(targets)


def plain_loss(name: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean loss in plain torch, for the reference."""
    if name == "cross_entropy":
        return F.cross_entropy(outputs, targets)
    return ((outputs - targets) ** 2).flatten(1).sum(1).mean() / 2


def engine_diagonal(
    model: nn.Module, x: Tensor, y: Tensor, loss: str, *, method: str = "exact", **options: Any
) -> hd.Diagonal:
    """The engine's diagonal on one batch."""
    objective = hd.Objective(model, loss)
    return hd.diagonal(objective, [(x, y)], method=method, deterministic_check=False, audit_model=False, **options)


def autograd_diagonal(
    model: nn.Module, x: Tensor, y: Tensor, loss: str | Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Diag H by p double backward passes, one entry at a time; knows of no layer and no site."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    outputs = model(x)
    value = plain_loss(loss, outputs, y) if isinstance(loss, str) else loss(outputs, y)
    gradients = torch.autograd.grad(value, parameters, create_graph=True)
    found = {}
    for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
        entries = torch.zeros(parameter.numel(), dtype=parameter.dtype)
        if gradient.requires_grad:
            for k in range(parameter.numel()):
                (row,) = torch.autograd.grad(gradient.reshape(-1)[k], parameter, retain_graph=True, allow_unused=True)
                entries[k] = 0.0 if row is None else row.reshape(-1)[k]
        found[name] = entries.reshape(parameter.shape)
    return found


def full_hessian(model: nn.Module, x: Tensor, y: Tensor, loss: str) -> Tensor:
    """The whole Hessian [p, p] of the mean loss, row by row."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(plain_loss(loss, model(x), y), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradients])
    rows = []
    for k in range(len(flat)):
        row = torch.autograd.grad(flat[k], parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([r.reshape(-1) for r in row]))
    return torch.stack(rows)


def gauss_newton_matrix(model: nn.Module, x: Tensor, y: Tensor, loss: str) -> Tensor:
    """(1/N) Σ Jᵀ ∇²ℓ J [p, p], from per-sample Jacobians of the outputs."""
    parameters = list(model.parameters())
    outputs = model(x)
    found = torch.zeros(sum(p.numel() for p in parameters), device=x.device, dtype=x.dtype)
    total = found[:, None] * found[None]
    curvature = theory_loss(loss, y)(outputs.detach()).hessian
    for n in range(len(x)):
        rows = []
        for c in range(outputs.shape[1]):
            row = torch.autograd.grad(outputs[n, c], parameters, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([r.reshape(-1) for r in row]))
        jacobian = torch.stack(rows)
        total = total + jacobian.T @ curvature[n] @ jacobian
    return total / len(x)


def vector(parts: Tensors | Sequence[Tensor]) -> Tensor:
    """All entries in the order of the parameters."""
    tensors = parts.values() if isinstance(parts, Mapping) else parts
    return torch.cat([t.detach().reshape(-1).double() for t in tensors])


def by_layer(entries: Entries) -> list[Tensor]:
    """Weight and bias entries of each layer in one vector."""
    return [
        torch.cat([w.reshape(-1), w.new_zeros(0) if b is None else b.reshape(-1)])
        for w, b in zip(entries.weights, entries.biases, strict=True)
    ]


def layers_of(parts: Tensors) -> list[Tensor]:
    """The same for the engine's dict of an MLP: weight, bias, weight, bias, ..."""
    tensors = [t.detach().reshape(-1).double() for t in parts.values()]
    return [torch.cat(tensors[i : i + 2]) for i in range(0, len(tensors), 2)]


def deviation(found: Tensor, truth: Tensor, *scales: Tensor) -> float:
    """‖found - truth‖ over the largest of ‖truth‖ and the norms of `scales`; 0 where both are zero."""
    gap = float((found - truth).norm())
    norm = max(float(t.norm()) for t in (truth, *scales))
    return 0.0 if gap == 0 else gap / norm if norm > 0 else float("inf")
