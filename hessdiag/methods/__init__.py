"""The methods: one file each, in a table that is open."""

from hessdiag.methods.base import METHODS, Aim, FirstPass, Forecast, Method, Work, find, register_method
from hessdiag.methods.case import Case
from hessdiag.methods.exact import Exact
from hessdiag.methods.hutchinson import Hutchinson
from hessdiag.methods.plan import Plan
from hessdiag.methods.propagation import Propagation
from hessdiag.methods.reference import Reference

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
