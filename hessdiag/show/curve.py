"""A small picture of sigma'' on a terminal."""

from __future__ import annotations

import math
from typing import Any

import torch
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from hessdiag import activations
from hessdiag.activations import Curvature
from hessdiag.activations.derivatives import Derivatives
from hessdiag.show.text import plain, value

ROWS, MOST = 9, 72
_EIGHTHS = " ▁▂▃▄▅▆▇█"


def print_curvature(
    out: Console, spec: str, function: Any, found: Curvature, *, half_width: float | None = None
) -> None:
    """The number, its places, and |sigma''| drawn over x."""
    out.print(Text(plain(_name(spec)), style="bold"))
    at = ", ".join(_place(x) for x in found.at[:8]) + (", ..." if len(found.at) > 8 else "")
    shown = "infinite (σ' jumps)" if math.isinf(found.value) else f"{found.value:.10g}"
    out.print(Text(f"  max|σ''| = {shown} at x = {at}"))
    width = max(20, min(out.width - 14, MOST))
    reach = half_width or _reach(found)
    bars, top = _sampled(function, reach, width)
    if top > 0:
        if math.isfinite(found.value):  # the scale is that of the number above, not of the points that fit
            top = max(top, found.value)
        for line in _picture(bars, top, unicode=out.encoding.lower().startswith("utf")):
            out.print(Text(line))
        out.print(Padding(Text(_axis(reach, width)), (0, 0, 0, 11), expand=False))
        cut = f"; the picture is cut at {value(top)}" if math.isinf(found.value) else ""
        out.print(Text(f"  |σ''| over x{cut}"))
    else:
        out.print(Text("  σ'' is 0 everywhere else"))
    out.print()


def _name(spec: str) -> str:
    """The canonical form, where the activation is a registered one: alpha of a wanted curvature shows here."""
    if ":" in spec and not spec.startswith("rct"):
        return spec
    try:
        canonical = activations.spec_of(activations.build(spec))
    except Exception:
        return spec
    return spec if canonical == spec else f"{spec} = {canonical}"


def _reach(found: Curvature) -> float:
    """Half the width of the picture: the places and as much again, scaled to the width of a transition."""
    far = max((abs(x) for x in found.at if math.isfinite(x)), default=0.0)
    bend = found.value if math.isfinite(found.value) and found.value > 0 else 1.0
    return max(2.5 * far, min(5.0 / bend, 8.0), 1e-3)


def _sampled(function: Any, reach: float, width: int) -> tuple[list[float], float]:
    module = activations.build(function) if isinstance(function, (str, torch.nn.Module, type)) else function
    if isinstance(module, torch.nn.Module):
        module = module.double().eval().requires_grad_(False)
    x = torch.linspace(-reach, reach, width, dtype=torch.float64)
    bend = Derivatives(module).bend(x)
    finite = bend[torch.isfinite(bend)]
    top = float(finite.max()) if len(finite) else 0.0
    return [top if not math.isfinite(b) else b for b in bend.tolist()], top


def _picture(bars: list[float], top: float, *, unicode: bool) -> list[str]:
    lines = []
    for row in range(ROWS, 0, -1):
        label = value(top * row / ROWS, 3) if row in (ROWS, (ROWS + 1) // 2) else ""
        cells = []
        for bar in bars:
            fill = bar / top * ROWS - (row - 1)
            if unicode:
                cells.append(_EIGHTHS[round(8 * min(max(fill, 0.0), 1.0))])
            else:
                cells.append("#" if fill >= 0.5 else " ")
        lines.append(f"{label:>9}  {''.join(cells)}".rstrip())
    return lines


def _axis(reach: float, width: int) -> str:
    left, right = value(-reach, 3), value(reach, 3)
    gap = width - len(left) - len(right) - 1
    half = gap // 2
    return left + " " * half + "0" + " " * (gap - half) + right


def _place(x: float) -> str:
    return f"{x:.6g}" if math.isfinite(x) else ("+inf" if x > 0 else "-inf")
