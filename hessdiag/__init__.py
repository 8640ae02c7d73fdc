"""Exact and stochastic Hessian diagonals of neural networks, and their norms with error bars.

Public names are imported when first used, so that a command's --help need not wait for torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import activations, networks
    from .activations import register_activation
    from .checkpoint import load_checkpoint, save_checkpoint
    from .diagonal import Diagonal
    from .errors import HessdiagError
    from .graph import register_layer, register_site
    from .measure import diagonal, measure
    from .measurement import Measurement
    from .methods import Method, Plan, Work, register_method
    from .objective import Objective

__all__ = [
    "Diagonal",
    "HessdiagError",
    "Measurement",
    "Method",
    "Objective",
    "Plan",
    "Work",
    "activations",
    "diagonal",
    "load_checkpoint",
    "measure",
    "networks",
    "register_activation",
    "register_layer",
    "register_method",
    "register_site",
    "save_checkpoint",
]

_HOMES = {
    "Diagonal": "diagonal.result",
    "HessdiagError": "errors",
    "Measurement": "measurement.result",
    "Method": "methods",
    "Objective": "objective",
    "Plan": "methods",
    "Work": "methods",
    "load_checkpoint": "checkpoint",
    "register_activation": "activations",
    "register_layer": "graph",
    "register_method": "methods",
    "register_site": "graph",
    "save_checkpoint": "checkpoint",
}


def _from_measure(name: str) -> property:
    """A function that shares its name with a submodule: importing the submodule must not put it in its place."""
    return property(lambda _: getattr(import_module("hessdiag.measure"), name), lambda _, submodule: None)


class _Package(ModuleType):
    measure = _from_measure("measure")
    diagonal = _from_measure("diagonal")

    def __getattr__(self, name: str) -> Any:
        if name in _HOMES:
            value = getattr(import_module(f"hessdiag.{_HOMES[name]}"), name)
        elif not name.startswith("_") and find_spec(f"hessdiag.{name}") is not None:
            return import_module(f"hessdiag.{name}")
        else:
            raise AttributeError(f"module 'hessdiag' has no attribute {name!r}")
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
