"""From an equation number to its check in one step: `identities_for("E27")`, or `python -m theory E27`."""

from __future__ import annotations

from theory._refusals import refuse
from theory.symbolic import deep_identities as deep
from theory.symbolic import one_hidden_layer as shallow
from theory.symbolic import rct
from theory.symbolic.norm import left_side, ratio, right_side
from theory.symbolic.rct import Identity

DEFINITIONS = {"E10": "theory.symbolic.one_hidden_layer.network", "E19": "theory.symbolic.deep.DeepNet.forward"}
"""Equations that only fix notation, with the code that carries them out."""


def norm_identity(parameters: int = 4) -> Identity:
    """E[8]: right side minus left side for p symbols; never zero for p > 1, the ratio is √p."""
    import sympy as sp

    h = sp.symbols(f"h1:{parameters + 1}", positive=True)
    statement = f"right over left is {ratio(parameters)} with p = {parameters}"
    return Identity("E8", statement, sp.simplify(right_side(h) - left_side(h)))


def identities_for(equation: str, *, widths: tuple[int, ...] = (2, 2, 2)) -> tuple[Identity, ...]:
    """Derived minus printed for E[n], at every layer of a net with hidden `widths` where that matters.

    Definitions (E[10], E[19]) have nothing to subtract and give an empty tuple; E[7] is E[33].
    """
    known = [f"E{n}" for n in range(1, 34)]
    if equation not in known:
        refuse(f"{equation!r} is no equation of the paper; E1 to E33 are", error="UnknownNameError")
    number = int(equation[1:])
    if number == 8:
        return (norm_identity(),)
    if number <= 6:
        rows: tuple[Identity, ...] = rct.identities()
    elif number == 7 or number >= 20:
        rows = (*deep.recursion_identities(widths), *deep.parameter_identities(widths))
    else:
        rows = shallow.identities()
    wanted = "E33" if number == 7 else equation
    return tuple(row for row in rows if row.equation == wanted)
