"""What every attack asks of its arguments before it starts."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor, nn

from hessdiag.errors import ConfigurationError, TargetError
from hessdiag.problem.ascent import Scalar, check_box
from hessdiag.problem.perturbation import fraction

Radius = float | str | Fraction | Tensor


def number(value: Radius, what: str) -> Scalar:
    """A float, or the tensor itself; text ("8/255") and fractions become floats."""
    if isinstance(value, Tensor):
        return value
    return float(fraction(value, what)) if isinstance(value, str) else float(value)


def radius(eps: Radius, *, look: bool = True) -> Scalar:
    """Eps as `number` gives it, refused outside [0, 1]; `look=False` leaves a tensor on its device unread."""
    value = number(eps, "eps")
    if isinstance(value, Tensor) and not look:
        return value
    worst = float(value.max()) if isinstance(value, Tensor) else value
    if not 0.0 <= worst <= 1.0:
        raise ConfigurationError(f"eps must lie in [0, 1], since pixels lie in [0, 1], not {worst}")
    return value


def plain_radius(eps: float | str | Fraction) -> tuple[float, str]:
    """Eps of an evaluation as a float and as the text it was given in."""
    value = radius(eps)
    if isinstance(value, Tensor):
        raise ConfigurationError("the eps of an evaluation must be one number, such as '8/255', not a tensor")
    return value, eps if isinstance(eps, str) else str(eps)


def check_samples(x: Tensor, y: Tensor) -> Tensor:
    """Images in [0, 1] and one integer label each; returns the labels as int64 beside the images."""
    check_box(x)
    if not isinstance(y, Tensor) or y.ndim != 1 or len(y) != len(x):
        shape = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise TargetError(f"labels must have shape [{len(x)}], one per image, not {shape}")
    if y.is_floating_point() or y.dtype == torch.bool:
        raise TargetError(f"labels must be integers, not {y.dtype}")
    return y.to(device=x.device, dtype=torch.int64)


def check_labels(y: Tensor, classes: int) -> None:
    """Labels within 0 .. classes-1, the number of logits the model was seen to give."""
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise TargetError(f"label {wrong} is out of range: the model gives {classes} logits")


def check_dlr(classes: int) -> None:
    """The targeted DLR loss divides by z_(1) - (z_(3) + z_(4))/2."""
    if classes < 4:
        raise ConfigurationError(
            f"the targeted DLR loss needs at least 4 classes, the model has {classes}; use PGD or APGD-CE"
        )


def home(model: object, x: Tensor) -> torch.device:
    """The device on which the model lives; that of the images where it has no parameter."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return x.device if parameter is None else parameter.device
