"""Exact and stochastic Hessian diagonals of neural networks, and their norms with error bars."""

__version__ = "0.1.0"

from . import activations, networks
from .checkpoint import load_checkpoint, save_checkpoint
from .diagonal import Diagonal
from .errors import HessdiagError
from .measure import diagonal, measure
from .measurement import Measurement, Plan
from .objective import Objective

__all__ = [
    "Diagonal",
    "HessdiagError",
    "Measurement",
    "Objective",
    "Plan",
    "activations",
    "diagonal",
    "load_checkpoint",
    "measure",
    "networks",
    "save_checkpoint",
]
