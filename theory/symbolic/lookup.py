"""From an equation number to its check in one step: `identities_for("E27")`, or `python -m theory E27`."""

from __future__ import annotations

from theory._refusals import refuse
from theory.symbolic import printed
from theory.symbolic.rct import Identity

DEFINITIONS = {
    "E1": "theory.symbolic.rct.rct",
    "E10": "theory.symbolic.one_hidden_layer.network",
    "E19": "theory.symbolic.deep.DeepNet.forward",
    "E21": "theory.symbolic.deep_identities.parameter_derivatives",
    "E25": "theory.symbolic.deep.DeepNet.forward",
}
"""Equations that fix notation, with the code that carries them out."""


def identities_for(equation: str, *, widths: tuple[int, ...] = (2, 2, 2)) -> tuple[Identity, ...]:
    """The sides of E[n] as displayed, subtracted, at every layer of a net with hidden `widths` where that matters."""
    if equation not in {f"E{n}" for n in range(1, 34)}:
        refuse(f"{equation!r} is no equation of the paper; E1 to E33 are", error="UnknownNameError")
    return printed.identities(equation, widths=widths)
