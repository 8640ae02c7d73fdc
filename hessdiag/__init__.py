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
    from hessdiag import activations, callbacks, networks
    from hessdiag.activations import register_activation
    from hessdiag.checkpoint import load_checkpoint, save_checkpoint
    from hessdiag.errors import HessdiagError
    from hessdiag.graph import register_layer, register_site
    from hessdiag.measuring import Measurement
    from hessdiag.measuring.diagonal import Diagonal
    from hessdiag.measuring.entry import diagonal, measure
    from hessdiag.methods import Method, Plan, Work, register_method
    from hessdiag.problem.objective import Objective
    from hessdiag.show.stored import read_result

__all__ = [
    "Diagonal",
    "HessdiagError",
    "Measurement",
    "Method",
    "Objective",
    "Plan",
    "Work",
    "activations",
    "callbacks",
    "diagonal",
    "load_checkpoint",
    "measure",
    "networks",
    "read_result",
    "register_activation",
    "register_layer",
    "register_method",
    "register_site",
    "save_checkpoint",
]

_HOMES = {
    "Diagonal": "measuring.diagonal",
    "HessdiagError": "errors",
    "Measurement": "measuring.result",
    "Method": "methods",
    "Objective": "problem.objective",
    "Plan": "methods",
    "Work": "methods",
    "diagonal": "measuring.entry",
    "load_checkpoint": "checkpoint",
    "measure": "measuring.entry",
    "read_result": "show.stored",
    "register_activation": "activations",
    "register_layer": "graph",
    "register_method": "methods",
    "register_site": "graph",
    "save_checkpoint": "checkpoint",
}


class _Package(ModuleType):
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
