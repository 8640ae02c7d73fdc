"""The loss that a model computes itself where it is given labels, as those of transformers do, and whether ours is it.

    own = model(**inputs, labels=targets).loss

A causal language model compares each place with the next token, a head of one output takes squared errors, one of many
labels the binary cross-entropy: the cross-entropy of the logits is then a loss that nobody trained, however exactly it
is measured. The two means over one batch come of the same logits, so that they agree to rounding or not at all.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hessdiag.errors import HessdiagError, ran_out
from hessdiag.problem.forward import forward
from hessdiag.problem.objective import Objective

Key = TypeVar("Key")
SAME = 2e-5
"""Relative difference of two means that are the same loss in float32, summed in other orders."""


def own_loss(objective: Objective, inputs: Any, targets: Tensor) -> float | None:
    """The model's own loss of a batch, called as `objective` calls it; None where it computes none of such targets."""
    model = objective.model
    if not takes_labels(model):
        return None
    returned: list[Any] = []
    hooks = [
        model.register_forward_pre_hook(lambda _m, args, named: (args, {**named, "labels": targets}), with_kwargs=True),
        model.register_forward_hook(lambda _m, _args, out: returned.append(out)),
    ]
    try:
        with torch.no_grad():
            forward(model, inputs, objective.call)
    except Exception as error:  # its own, about labels that are none for it
        if ran_out(error):
            raise
        return None
    finally:
        for hook in hooks:
            hook.remove()
    out = returned[-1] if returned else None
    return number(out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None))


def takes_labels(model: nn.Module) -> bool:
    """Whether its forward has an argument of that name."""
    try:
        return "labels" in inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return False


def number(loss: Any) -> float | None:
    """A single finite number, if it is one."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        return None
    value = float(loss.detach())
    return value if math.isfinite(value) else None


def batch_mean(objective: Objective, inputs: Any, targets: Tensor) -> float | None:
    """The objective's mean loss of a batch, without weight decay; None where it refuses the batch."""
    try:
        with torch.no_grad():
            total, weight = objective.summed_loss(inputs, targets)
    except HessdiagError:
        return None
    value = float(total.double() / weight)
    return value if math.isfinite(value) else None


def alike(own: float, means: Mapping[Key, float | None]) -> Key | None:
    """Which of several means is of the model's own loss; None where none is."""
    gaps = {key: abs(mean - own) for key, mean in means.items() if mean is not None}
    best = min(gaps, key=gaps.__getitem__, default=None)
    return best if best is not None and gaps[best] <= max(SAME * abs(own), 1e-7) else None
