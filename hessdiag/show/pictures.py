"""Which figure a name asks for, and the sentence that says why there is none."""

from __future__ import annotations

from hessdiag.errors import ConfigurationError, UnknownNameError, nearest
from hessdiag.measuring.result import Measurement
from hessdiag.show import plot
from hessdiag.show.histogram import histogram

NAMES = ("norms", "groups", "convergence", "parts", "diagonal")


def picture(m: Measurement, what: str) -> plot.Figure:
    """The figure `what` of a measurement."""
    if what not in NAMES:
        raise UnknownNameError(f"no picture {what!r}; {nearest(str(what), list(NAMES))}")
    if what == "diagonal":
        if m.diagonal is None:
            raise ConfigurationError("the diagonal was not kept: measure(..., keep_diagonal=True)")
        return histogram(m.diagonal.total, m.diagonal.standard_errors, exact=m.diagonal.status == "exact")
    content = m.to_dict()
    if what == "convergence":
        if not content["history"]:
            raise ConfigurationError("nothing converged: the diagonal is exact, or it was one pass")
        return plot.convergence(content["history"], confidence=content["confidence"], rtol=None)
    if what == "parts":
        figure = plot.parts(content["layers"])
        if figure is None:
            raise ConfigurationError("no parameter has both a Gauss-Newton and a functional part")
        return figure
    return plot.norms(content["layers" if what == "norms" else "groups"])
