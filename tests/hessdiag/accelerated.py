"""A stand-in for what accelerate does to a model that it prepares for mixed precision, under the names it does it with."""

from __future__ import annotations

from types import MethodType, ModuleType

import torch
from torch import nn

_SOURCE = """
import functools

class Converted:
    def __init__(self, function):
        functools.update_wrapper(self, function)
        self.function = function

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs).float()

def converting(function):
    inner = Converted(function)
    def forward(*args, **kwargs):
        return inner(*args, **kwargs)
    forward.__wrapped__ = inner
    return forward
"""
operations = ModuleType("accelerate.utils.operations")
exec(_SOURCE, operations.__dict__)


def prepared(model: nn.Module, *, bound: bool = True) -> nn.Module:
    """Its forward under autocast, with outputs in float32; the weights stay what they are."""
    under = torch.autocast("cpu", dtype=torch.bfloat16)
    model._original_forward = model.forward  # type: ignore[assignment]
    if bound:
        inner = MethodType(under(model.forward.__func__), model)  # type: ignore[attr-defined]
        model.forward = MethodType(operations.converting(inner.__func__), model)
    else:
        model.forward = operations.converting(under(model.forward))
    return model
