"""The methods: one file each, in a table that is open."""

from .base import METHODS, Aim, FirstPass, Forecast, Method, Work, find, register_method
from .case import Case
from .exact import Exact
from .hutchinson import Hutchinson
from .plan import Plan
from .propagation import Propagation
from .reference import Reference

for _method in (Exact(), Propagation(), Hutchinson(), Reference()):
    register_method(_method)

__all__ = [
    "METHODS",
    "Aim",
    "Case",
    "FirstPass",
    "Forecast",
    "Method",
    "Plan",
    "Work",
    "find",
    "register_method",
]
