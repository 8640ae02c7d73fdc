"""Linf gradient ascent in the pixel box [0, 1], and the care with which a model is borrowed for it.

    x <- Pi(x + a sign grad_x l(f(x), y)),   Pi = onto the ball |x - x_clean|_inf <= eps, then onto [0, 1]

(Madry et al., arXiv 1706.06083).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.errors import (
    ConfigurationError,
    DataError,
    EmptyDataError,
    NonFiniteError,
    UnknownNameError,
    nearest,
)
from hessdiag.problem.denormals import denormals_are_zero

Scalar = float | Tensor
Forward = Callable[[Tensor], Tensor]
AttackLoss = Callable[[Tensor, Any], Tensor]

MODES = ["eval", "train", "as_is"]


def check_box(inputs: Tensor, where: str = "the inputs") -> None:
    """Refuse inputs that are not finite floats in [0, 1]."""
    if len(inputs) == 0:
        raise EmptyDataError(f"{where}: no samples to perturb")
    if not inputs.is_floating_point():
        raise DataError(f"{where} must be floats in [0, 1], not {inputs.dtype}; divide bytes by 255 first")
    low, high = (float(bound) for bound in torch.aminmax(inputs.detach()))
    if not (low >= 0.0 and high <= 1.0):
        hint = "divide bytes by 255, and " if low >= 0.0 and 16.0 < high <= 255.0 else ""
        raise DataError(
            f"{where} must lie in [0, 1], found [{low:.4g}, {high:.4g}]; "
            f"{hint}normalise inside the model (normalize=..., --normalize)"
        )


def project_linf(points: Tensor, centre: Tensor, eps: Scalar) -> Tensor:
    """Onto the Linf ball of radius eps around `centre`, then onto the pixel box."""
    return torch.minimum(torch.maximum(points, centre - eps), centre + eps).clamp(0.0, 1.0)


def ascend_linf(points: Tensor, gradient: Tensor, centre: Tensor, eps: Scalar, step: Scalar) -> Tensor:
    """One projected step along the sign of the gradient; sign(NaN) is 0 in torch: look for NaN elsewhere."""
    return project_linf(points + step * gradient.sign(), centre, eps)


def input_gradient(
    forward: Forward, points: Tensor, targets: Any, loss: AttackLoss, autocast: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss per sample, gradient of their sum by the inputs, logits: in at least float32, detached.

    No .grad is touched. `autocast` (a dtype) concerns the forward pass alone.
    """
    points = points.detach().requires_grad_(True)
    context = nullcontext() if autocast is None else torch.autocast(points.device.type, dtype=autocast)
    with torch.enable_grad():
        with context:
            logits = forward(points)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        values = loss(logits, targets)
        if values.shape != points.shape[:1]:
            raise ConfigurationError(
                f"an attack loss must give one value per sample, [{len(points)}], not {list(values.shape)}"
            )
        (gradient,) = torch.autograd.grad(values.sum(), points)
    return values.detach(), gradient.detach(), logits.detach()


def linf_ascent(
    forward: Forward,
    points: Tensor,
    centre: Tensor,
    targets: Any,
    *,
    eps: Scalar,
    step: Scalar,
    steps: int,
    loss: AttackLoss,
    autocast: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`steps` projected steps; and per sample, whether all losses and gradients on the way were finite.

    Only tensor operations, no branch on data: fit for torch.compile as a whole.
    """
    finite = torch.ones(len(points), dtype=torch.bool, device=points.device)
    for _ in range(steps):
        values, gradient, _ = input_gradient(forward, points, targets, loss, autocast)
        finite = finite & values.isfinite() & gradient.flatten(1).isfinite().all(1)
        points = ascend_linf(points, gradient, centre, eps, step)
    return points, finite


def refuse_non_finite(finite: Tensor, doing: str) -> None:
    """NonFiniteError saying at how many samples, and which first, NaN or Inf came up."""
    if not bool(finite.all()):
        bad = torch.nonzero(~finite).flatten()
        raise NonFiniteError(
            f"NaN or Inf in the logits, the loss or its gradient at {len(bad)} of {len(finite)} samples "
            f"(first: {int(bad[0])}) while {doing}"
        )


@contextmanager
def handed_back(model: object, *, mode: str = "eval", keep_statistics: bool = False) -> Iterator[None]:
    """Craft with the model in `mode` ("eval", "train" or "as_is") and hand it back as it came.

    Restored: the mode of every submodule, every parameter's requires_grad (parameters are frozen meanwhile),
    and, where anything was in training mode, every buffer, unless `keep_statistics` lets the running
    statistics stand. Anything but an nn.Module is used as it is. Denormal numbers are zero meanwhile (`denormals`).
    """
    if mode not in MODES:
        raise UnknownNameError(f"unknown crafting mode {mode!r}; {nearest(mode, MODES)}")
    if not isinstance(model, nn.Module):
        with denormals_are_zero():
            yield
        return
    modes = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if mode != "as_is":
        model.train(mode == "train")
    buffers: list[tuple[nn.Module, str, Tensor, Tensor]] = []
    if not keep_statistics and any(module.training for module in model.modules()):
        for module in model.modules():
            own = ((name, buffer) for name, buffer in module._buffers.items() if buffer is not None)
            buffers += [(module, name, buffer, buffer.detach().clone()) for name, buffer in own]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with denormals_are_zero():
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                buffer.copy_(value)
                module._buffers[name] = buffer
