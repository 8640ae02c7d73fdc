"""Exact diagonals of one linearised batch, by the site identity and forward-mode products.

    H_kk = sum_n [ (df_n/dtheta_k)^T (d2l_n/df2) (df_n/dtheta_k) + sum_j c_nj (dz_nj/dtheta_k)^2 ]

The Gauss-Newton part takes one backward pass per column of the loss's Hessian factor. The functional part
takes, layer by layer, one forward pass per neuron, per weight or per output position, whichever costs least
(see `directions`); chains of linear layers on vectors need no passes at all (see `chain`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BudgetError, UncoveredModelError
from ..sites import Layer, Linearisation
from ..sites.graph import Edge
from .collector import Collector
from .directions import Directions
from .noderules import Cache
from .parts import Tensors
from .propagation import Propagator
from .pushforward import Route

Progress = Callable[[int, int], None]
MEMORY = 1 << 28


@dataclass(frozen=True)
class Cost:
    """What an exact diagonal of one batch takes: directions moved, multiplications, bytes at the peak."""

    passes: int
    flops: float
    bytes: int


@dataclass(frozen=True)
class Step:
    """One layer's share: how its directions are chosen and how many go in one pass."""

    directions: Directions
    mode: str
    passes: int
    flops: float
    bytes_each: int
    count: int


def batch_diagonal(
    batch: Linearisation,
    *,
    progress: Progress | None = None,
    memory: int = MEMORY,
    budget: float | None = None,
    per_sample: bool = False,
) -> tuple[Tensors, Tensors]:
    """(Gauss-Newton, functional) diagonals summed over one batch, in float64; with the samples as first axis
    if `per_sample`.

    `memory` bounds the bytes of the tangents alive at once; `budget` the multiplications (see `cost`), beyond
    which the work is refused. `progress(done, total)` counts directions.
    """
    with torch.no_grad():
        steps = _plan(batch, memory)
        price = _price(batch, steps, memory)
        if budget is not None and price.flops > budget:
            raise BudgetError(
                f"an exact diagonal of this batch takes {price.flops:.2g} multiplications in "
                f"{price.passes} passes, more than the budget of {budget:.2g}; use method='propagation', "
                "fewer samples, or choose parameters"
            )
        check_separate(batch)
        functional = Collector(batch.objective.parameters, batch.samples, per_sample=per_sample)
        done, total = 0, price.passes
        for step in steps:
            step.directions.run(step.mode, functional, step.count)
            done += step.passes
            if progress:
                progress(done, total)
        gauss_newton = _gauss_newton(batch, per_sample)
        if progress:
            progress(total, total)
        return gauss_newton, functional.result(_turned(batch.layers))


def cost(batch: Linearisation, *, memory: int = MEMORY) -> Cost:
    """What `batch_diagonal` would take, without doing it."""
    return _price(batch, _plan(batch, memory), memory)


def check_separate(batch: Linearisation) -> None:
    """Refuse a model in which samples of a batch reach one another or change places: half of them must not
    see the rest.

    One backward pass from every site and output of a random half; the gradients at the other half's layers
    must vanish.
    """
    samples = batch.samples
    if samples == 1:
        return
    generator = torch.Generator().manual_seed(samples)
    half = (torch.randperm(samples, generator=generator) < (samples + 1) // 2).to(batch.outputs.device)
    seeds: list[Tensor | None] = []
    for site in batch.sites:
        if site.c.numel() % samples:
            raise UncoveredModelError(
                f"{site.name}: {list(site.c.shape)} is not laid out by samples; use method='hutchinson'"
            )
        rows = half.to(site.c.dtype)[:, None].expand(-1, site.c.numel() // samples)
        seeds.append(rows.reshape(site.c.shape))
    top = (
        half.to(batch.outputs.dtype).reshape(-1, *(1,) * (batch.outputs.ndim - 1)).expand(batch.outputs.shape)
    )
    found = batch.backward(seeds, top, [layer.edge for layer in batch.layers])
    for layer, gradient in zip(batch.layers, found):
        if gradient is None:
            continue
        if gradient.numel() % samples or bool(gradient.reshape(samples, -1)[~half].any()):
            raise UncoveredModelError(
                f"above layer {layer.name!r} the samples of a batch meet (a mean or a turn over the "
                "first axis); use method='hutchinson'"
            )


def _plan(batch: Linearisation, memory: int) -> list[Step]:
    sites = [site for site in batch.sites if bool(site.c.any())]
    cache: Cache = {}
    steps = []
    for layer in batch.layers:
        edge: Edge = (layer.node, 0)
        route = Route(batch.graph, edge, sites, cache)
        if route.sites:
            steps.append(_step(Directions(batch, layer, route), memory))
    return steps


def _step(directions: Directions, memory: int) -> Step:
    work, entries = directions.route.cost()
    each = 3 * entries * directions.batch.outputs.element_size()
    count = max(memory // each, 1)
    sites = sum(site.c.numel() for _, site in directions.route.sites)
    best: tuple[float, str, int] | None = None
    for mode, passes in directions.modes().items():
        flops = work * passes
        if mode == "positions":
            shape = directions.shape
            if shape.positions > count:
                continue
            flops += (
                passes
                * (sites + directions.samples * shape.fan * shape.positions)
                * 1.0
                * shape.positions
                / 8
            )
        if best is None or flops < best[0]:
            best = flops, mode, passes
    assert best is not None
    flops, mode, passes = best
    return Step(directions, mode, passes, flops, each, count)


def _price(batch: Linearisation, steps: list[Step], memory: int) -> Cost:
    passes = sum(step.passes for step in steps)
    needed = max((min(memory, step.bytes_each * step.passes) for step in steps), default=0)
    out = 16 * batch.objective.size
    return Cost(passes, sum(step.flops for step in steps), needed + out)


def _gauss_newton(batch: Linearisation, per_sample: bool) -> Tensors:
    propagator = Propagator(batch)
    if not per_sample:
        return propagator.gauss_newton()
    blank: list[Any] = [None] * len(batch.sites)
    device, curvature = batch.outputs.device, batch.curvature
    out = {
        name: torch.zeros(batch.samples, *p.shape, dtype=torch.float64, device=device)
        for name, p in batch.objective.parameters.items()
    }
    for column, sign in zip(curvature.factor, curvature.signs.tolist()):
        for name, gradient in propagator.each(blank, column).items():
            out[name].add_(gradient.double().square().reshape(out[name].shape), alpha=sign)
    return out


def _turned(layers: list[Layer]) -> set[str]:
    return {layer.weight for layer in layers if layer.kind == "linear" and layer.transposed and layer.weight}
