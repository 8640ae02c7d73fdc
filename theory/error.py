"""How far the paper's D is from the truth, layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from theory._refusals import refuse
from theory.net import Net, random_net
from theory.path_expansion import exact_recursion, paper_recursion
from theory.shapes import Shape


@dataclass(frozen=True)
class LayerError:
    """Relative error ‖D_paper - D‖/‖D‖ of layer l (all samples and neurons), at distance L - l from the
    output.
    """

    layer: int
    distance: int
    relative: float
    exact_norm: float


def error_by_layer(net: Net, x: Tensor, *, cotangent: Tensor | None = None) -> tuple[LayerError, ...]:
    """`LayerError` for l = 1..L-1; zero to rounding where L - l <= 2. A layer with D = 0 has error 0 or
    infinity.
    """
    exact = exact_recursion(net, x, cotangent=cotangent)
    paper = paper_recursion(net, x, cotangent=cotangent)
    rows = []
    for l, (a, b) in enumerate(zip(exact.values, paper.values), 1):
        norm, gap = float(a.norm()), float((a - b).norm())
        relative = gap / norm if norm > 0 else (0.0 if gap == 0 else float("inf"))
        rows.append(LayerError(l, net.depth - l, relative, norm))
    return tuple(rows)


@dataclass(frozen=True)
class ErrorStudy:
    """Relative error of the paper's D over random nets of one shape: mean and standard error over `nets` nets.

    `by_layer[l-1]` is the mean for layer l; `overall` pools the layers below the top two, ‖gaps‖/‖norms‖.
    """

    hidden: int
    width: int
    activation: str
    nets: int
    by_layer: tuple[float, ...]
    overall: float
    standard_error: float


def study(
    activation: Shape,
    *,
    hidden: int,
    width: int,
    generator: torch.Generator,
    nets: int = 10,
    samples: int = 32,
    outputs: int = 1,
    scale: float = 1.0,
) -> ErrorStudy:
    """Measured size of the error of E[28] = E[31] by depth (`hidden` layers), width and activation (α, β).

    Random nets as in `theory.net.random_net`, inputs and cotangents standard normal.
    """
    if hidden < 3 or nets < 2:
        refuse(f"an error below the top two layers needs hidden >= 3 and nets >= 2, got {hidden} and {nets}")
    layers, overall = [], []
    for _ in range(nets):
        net = random_net([width] * (hidden + 1) + [outputs], activation, generator=generator, scale=scale)
        x, g = (torch.randn(samples, n, generator=generator, dtype=torch.float64) for n in (width, outputs))
        rows = error_by_layer(net, x, cotangent=g)
        layers.append([row.relative for row in rows])
        below = [row for row in rows if row.distance > 2]
        gaps = math.fsum((row.relative * row.exact_norm) ** 2 for row in below)
        overall.append(math.sqrt(gaps / math.fsum(row.exact_norm**2 for row in below)))
    values = torch.tensor(overall, dtype=torch.float64)
    means = torch.tensor(layers, dtype=torch.float64).mean(0)
    return ErrorStudy(
        hidden,
        width,
        activation.name,
        nets,
        tuple(float(v) for v in means),
        float(values.mean()),
        float(values.std() / nets**0.5),
    )
