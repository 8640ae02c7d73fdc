"""Mixed precision that accelerate puts around a model's forward, taken off meanwhile.

`Accelerator(mixed_precision=...).prepare(model)`, and so the Trainer of transformers with `bf16=True`, keeps
`model._original_forward` and sets in its place a function that calls it under autocast and converts what it returns to
float32. The weights stay float32, and what is measured is their function: that of autocast outside the model is
switched off in the same way (see `handing_back`). Only these wrappers are taken off, each known by the module that made
it; where anybody else stands between them and the forward, the function may be another one, and all stays in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

WRAPPERS = ("torch.amp.autocast_mode", "accelerate.utils.operations")
"""Modules that make autocast's decorator, and the conversion of outputs."""


@contextmanager
def without_mixed_precision(model: nn.Module) -> Iterator[bool]:
    """Every forward in `model` as it was before; gives whether there was anything to take off."""
    found = [(module, below) for module in model.modules() if (below := _below(module)) is not None]
    before = [(vars(module), vars(module)["forward"]) for module, _ in found]
    try:
        for module, below in found:
            vars(module)["forward"] = below
        yield bool(found)
    finally:
        for own, forward in before:
            own["forward"] = forward


def _below(module: nn.Module) -> Callable[..., Any] | None:
    """The forward that was kept, if nothing but `WRAPPERS` stands around it."""
    kept, here = vars(module).get("_original_forward"), vars(module).get("forward")
    if kept is None or here is None:
        return None
    wanted, link = _function(kept), _function(here)
    seen = set()
    while link is not wanted:
        made_by = getattr(link, "__globals__", {}).get("__name__", type(link).__module__)
        if made_by not in WRAPPERS or not hasattr(link, "__wrapped__"):
            return None
        seen.add(made_by)
        link = _function(link.__wrapped__)
    return kept if WRAPPERS[0] in seen else None


def _function(method: Any) -> Any:
    return getattr(method, "__func__", method)
