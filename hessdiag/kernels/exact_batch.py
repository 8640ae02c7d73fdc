"""Exact diagonals of one linearised batch, by the site identity and forward-mode products.

    H_kk = sum_n [ (df_n/dtheta_k)^T (d2l_n/df2) (df_n/dtheta_k) + sum_j c_nj (dz_nj/dtheta_k)^2 ]

The Gauss-Newton part takes one backward pass per column of the loss's Hessian factor. The functional part
takes, layer by layer, one forward pass per neuron, per weight or per output position, whichever costs least
(see `directions`); chains of linear layers on vectors need no passes at all (see `chain`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from hessdiag.errors import BudgetError, UncoveredModelError
from hessdiag.graph import Layer, Linearisation, Site, edge_shape
from hessdiag.graph.layers import Way
from hessdiag.graph.layers.linear import input_of
from hessdiag.graph.moves import Cache
from hessdiag.graph.nodes import Edge
from hessdiag.graph.route import Route
from hessdiag.graph.tangents import Tangent
from hessdiag.kernels.chain import CACHED, Level, best_switch, find_chain, gauss_newton
from hessdiag.kernels.chain import functional as diagonal_along
from hessdiag.kernels.collector import Collector
from hessdiag.kernels.directions import Directions, Nowhere, Recorded, Shared, starts, ways_of
from hessdiag.kernels.price import Price, prices
from hessdiag.kernels.propagator import Propagator
from hessdiag.kernels.tensors import Tensors, accumulate, zeros
from hessdiag.signs import cpu_generator

Progress = Callable[[int, int], None]
MEMORY = 1 << 28
NODE = 1e5
"""Multiplications done in the time that it takes to pass a node with nothing to multiply (tens of microseconds)."""
DIGITS = 16
"""Samples are numbered in this base to tell them apart, a pass for each digit."""
CLOSE = 1 << 26  # bytes of tangents beyond which a processor waits for its memory
NEAR = 1 << 22  # bytes of those of several layers that share a pass


@dataclass(frozen=True)
class Cost:
    """What an exact diagonal of one batch takes: directions moved, multiplications, bytes at the peak, nodes passed."""

    passes: int
    flops: float
    bytes: int
    nodes: int = 0

    @property
    def effort(self) -> float:
        """Multiplications, each node passed counted as `NODE` more: what small layers cost in large number."""
        return self.flops + NODE * self.nodes


@dataclass(frozen=True)
class Choice:
    """How one layer's directions are chosen and how many go in one pass."""

    edge: Edge
    way: Way
    flops: float
    bytes_each: int
    count: int
    nodes: int


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
        chain = find_chain(batch)
        groups = [] if chain else _plan(batch, memory)
        price = _chain_price(batch, chain, memory) if chain else _price(batch, groups, memory)
        if budget is not None and price.flops > budget:
            raise BudgetError(
                f"an exact diagonal of this batch takes {price.flops:.2g} multiplications in "
                f"{price.passes} passes, more than the budget of {budget:.2g}; use method='propagation', "
                "fewer samples, or choose parameters"
            )
        functional = Collector(batch.objective.parameters, batch.samples, per_sample=per_sample)
        if chain:
            outer = Collector(batch.objective.parameters, batch.samples, per_sample=per_sample)
            _along_chain(batch, chain, outer, functional, memory)
            if progress:
                progress(price.passes, price.passes)
            turned = _turned(batch.layers)
            return outer.result(turned), functional.result(turned)
        check_separate(batch)
        if per_sample and batch.free:
            raise UncoveredModelError(
                "weights that are computed from parameters bend for all samples together; take one sample at a time"
            )
        done, total = 0, price.passes
        sites, cache = _bent(batch), dict[tuple[str, int, int], Any]()
        for group in groups:
            _move(batch, group, sites, cache, functional)
            done += sum(choice.way.passes for choice in group)
            if progress:
                progress(done, total)
        gauss_newton = _gauss_newton(batch, per_sample)
        if progress:
            progress(total, total)
        return gauss_newton, functional.result(_turned(batch.layers))


def cost(batch: Linearisation, *, memory: int = MEMORY) -> Cost:
    """What `batch_diagonal` would take, without doing it."""
    with torch.no_grad():
        chain = find_chain(batch)
        if chain:
            return _chain_price(batch, chain, memory)
        return _price(batch, _plan(batch, memory), memory)


def check_served(batch: Linearisation) -> None:
    """What `batch_diagonal` would refuse of this batch, before any work."""
    if not find_chain(batch):
        check_separate(batch)


def check_separate(batch: Linearisation) -> None:
    """Refuse a model in which samples of a batch reach one another or change places.

    Seeds at the sites and outputs of a random half must vanish at the layers of all other samples, and the other way
    round; and with each sample's seeds times a power of two, exact in any sum, each must find its own at the layers.
    """
    samples, layers = batch.samples, [*batch.layers, *batch.shared]
    if samples == 1 or not layers or batch.separate:
        return
    order = torch.randperm(samples, generator=cpu_generator(samples), device="cpu")
    half = (order < (samples + 1) // 2).to(batch.outputs)
    sizes = [check_unseen(batch, _pulled(batch, some), some) for some in (half, 1 - half)]
    numbers, digit = torch.arange(samples, device=half.device), 1
    while digit < samples and samples > 2:
        times = torch.pow(2.0, (numbers // digit % DIGITS).to(half.dtype))
        for layer, size, *parts in zip(layers, _sizes(batch, _pulled(batch, times)), *sizes):
            assert size is not None
            own = sum(parts)
            if float((size / times - own).norm()) > torch.finfo(half.dtype).eps ** 0.5 * float(own.norm()):
                raise UncoveredModelError(
                    f"above layer {layer.name!r} the samples of a batch change places (a turn over the first axis); "
                    "use method='hutchinson'"
                )
        digit *= DIGITS
    batch.separate = True


def check_laid_out(batch: Linearisation) -> None:
    """Refuse sites whose entries do not lie sample by sample."""
    for number, site in enumerate(batch.sites):
        if number not in batch.free and site.c.numel() % batch.samples:
            raise UncoveredModelError(
                f"{site.name}: {list(site.c.shape)} is not laid out by samples; use method='hutchinson'"
            )


def check_unseen(batch: Linearisation, gradients: Sequence[Tensor | None], some: Tensor) -> list[Tensor]:
    """Refuse a model whose gradients at the layers, from sites and outputs of `some` samples, reach the others.

    [N] by layer: the largest of each sample.
    """
    found = []
    for layer, size in zip([*batch.layers, *batch.shared], _sizes(batch, gradients)):
        if size is None or bool(size[some == 0].any()):
            raise UncoveredModelError(
                f"above layer {layer.name!r} the samples of a batch meet, or have no axis of their own (a mean or a "
                "turn over the first axis, a loop over samples); use method='hutchinson'"
            )
        found.append(size)
    return found


def _pulled(batch: Linearisation, times: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients at the layers from all sites and outputs, each sample's seeds times a number of its own."""
    check_laid_out(batch)
    samples, layers = batch.samples, [*batch.layers, *batch.shared]
    seeds: list[Tensor | None] = []
    for number, site in enumerate(batch.sites):
        rows = times.to(site.c.dtype)[:, None].expand(-1, site.c.numel() // samples)
        seeds.append(None if number in batch.free else rows.reshape(site.c.shape))
    top = times.reshape(-1, *(1,) * (batch.outputs.ndim - 1)).expand(batch.outputs.shape)
    return batch.backward(seeds, top, [layer.edge for layer in layers], above=True)


def _sizes(batch: Linearisation, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """[N] by layer: the largest entry of each sample; None where the samples do not divide the layer's output."""
    samples, found = batch.samples, list[Tensor | None]()
    for gradient in gradients:
        if gradient is None:
            found.append(torch.zeros(samples, dtype=batch.outputs.dtype, device=batch.outputs.device))
        elif gradient.numel() % samples:
            found.append(None)
        else:
            found.append(gradient.detach().reshape(samples, -1).abs().amax(1))
    return found


def _bent(batch: Linearisation) -> list[tuple[int, Site]]:
    """Sites that bend, with their numbers."""
    return [(number, site) for number, site in enumerate(batch.sites) if bool(site.c.any())]


def _plan(batch: Linearisation, memory: int) -> list[list[Choice]]:
    """How the directions of everything that reaches a site are moved, thought out once; those of a list share a pass.

    They do where to pass the nodes takes longer than to multiply, as far as memory allows: of a net of many small
    layers time is then that of one pass, not the square of their number.
    """
    groups: list[list[Choice]] = batch.kept.setdefault(f"plan {memory}", [])
    begins, room = [] if groups else starts(batch), 0
    for start, price in zip(begins, prices(batch.graph, begins, [site for _, site in _bent(batch)])):
        if not price.sites:
            continue
        choice = _choose(start, ways_of(batch, start), price, batch, memory)
        count, passes = min(choice.count, NEAR // choice.bytes_each), choice.way.passes
        small = choice.way.together == 1 and choice.flops < NODE * choice.nodes and passes <= count
        room = min(room, count) - passes
        if not (small and room >= 0 and groups):
            groups.append([])
            room = count - passes if small else 0
        groups[-1].append(choice)
    return groups


def _move(
    batch: Linearisation, group: list[Choice], sites: list[tuple[int, Site]], cache: Cache, into: Collector
) -> None:
    """The directions of one layer, some at a time, or those of several in one pass."""
    route = Route(batch.graph, [choice.edge for choice in group], sites, cache)
    directions = Directions(batch, route)
    if len(group) == 1:
        group[0].way.run(directions, into, group[0].count)
        return
    recorded = []
    for choice in group:
        recorded.append(Recorded(batch.samples))
        choice.way.run(recorded[-1], Nowhere(), choice.way.passes)
    shapes = [edge_shape(choice.edge) for choice in group]
    seeds = [Tangent(torch.cat([s.dense(shape) for s in one.seeds])) for one, shape in zip(recorded, shapes)]
    totals = iter(torch.split(directions.total(*seeds), [len(s.value) for one in recorded for s in one.seeds]))
    for choice, one in zip(group, recorded):
        one.totals = totals
        choice.way.run(one, into, choice.way.passes)


def _choose(start: Layer | Shared, ways: list[Way], price: Price, batch: Linearisation, memory: int) -> Choice:
    """The way that costs least of those whose directions fit into memory together."""
    each = 3 * price.entries * batch.outputs.element_size()
    on_processor = batch.outputs.device.type == "cpu"
    count = max((min(memory, CLOSE) if on_processor else memory) // each, 1)
    fitting = [way for way in ways if way.together <= count]
    flops, best = min(((price.work * way.passes + way.extra(price.sites), way) for way in fitting), key=lambda p: p[0])
    return Choice((start.node, 0), best, flops, each, count, price.nodes * -(-best.passes // count))


def _price(batch: Linearisation, groups: list[list[Choice]], memory: int) -> Cost:
    choices = [choice for group in groups for choice in group]
    passes = sum(choice.way.passes for choice in choices)
    needed = max((min(memory, choice.bytes_each * choice.way.passes) for choice in choices), default=0)
    nodes = sum(max(choice.nodes for choice in group) for group in groups)
    return Cost(passes, sum(choice.flops for choice in choices), needed + 16 * batch.objective.size, nodes)


def _chain_price(batch: Linearisation, levels: list[Level], memory: int) -> Cost:
    work, _, entries = best_switch(levels)
    size, samples = batch.outputs.element_size(), batch.samples
    columns = batch.columns
    small = float(sum(level.weight.numel() for level in levels)) * (columns + 3)
    held = max(min(memory, max(4 * entries * size * samples, 0)), 4 * entries * size)
    return Cost(len(levels), (work + small) * samples, held + 16 * batch.objective.size)


def _along_chain(
    batch: Linearisation, levels: list[Level], outer: Collector, functional: Collector, memory: int
) -> None:
    """Both parts of a chain: q level by level, then H_ab = sum_n q_na x_nb^2."""
    squares = {
        place: input_of(level.node).square()
        for place, level in enumerate(levels)
        if level.layer is not None and level.layer.weight
    }
    sums: dict[int, Tensor] = {}
    for columns, signs in batch.curvature.blocks():
        for place, q in gauss_newton(levels, columns, signs):
            sums[place] = sums[place].add_(q) if place in sums else q
    for place, q in sums.items():
        _gather(outer, levels[place], q, squares.get(place))
    _, switch, entries = best_switch(levels)
    each = 4 * entries * batch.outputs.element_size()
    step = min(max(min(memory, CACHED) // max(each, 1), 1), batch.samples)
    found: list[list[Tensor]] = [[] for _ in levels]
    for low in range(0, batch.samples, step):
        for place, part in diagonal_along(levels, low, min(low + step, batch.samples), switch=switch):
            if part is not None:
                found[place].append(part)
    for place, parts in enumerate(found):
        if parts:
            _gather(functional, levels[place], parts[0] if len(parts) == 1 else torch.cat(parts), squares.get(place))


def _gather(into: Collector, level: Level, q: Tensor, squares: Tensor | None) -> None:
    if level.layer is None:
        return
    if level.layer.weight and squares is not None:
        into.outer(level.layer.weight, 0, q.T, squares)
    if level.layer.bias:
        into.add(level.layer.bias, slice(0, level.width), q.T)


def _gauss_newton(batch: Linearisation, per_sample: bool) -> Tensors:
    if not per_sample:
        return Propagator(batch).gauss_newton() if batch.shared else _all_columns(batch)
    propagator = Propagator(batch)
    blank: list[Any] = [None] * len(batch.sites)
    device, curvature = batch.outputs.device, batch.curvature
    out = {
        name: torch.zeros(batch.samples, *p.shape, dtype=torch.float64, device=device)
        for name, p in batch.objective.parameters.items()
    }
    for column, sign in curvature.each():
        for name, gradient in propagator.each(blank, column).items():
            out[name].add_(gradient.double().square().reshape(out[name].shape), alpha=sign)
    return out


def _all_columns(batch: Linearisation) -> Tensors:
    """The same for layers alone, which take the cotangents of several columns together."""
    out = zeros(batch.objective.parameters)
    layers, blank = [layer.on(batch.samples) for layer in batch.layers], [None] * len(batch.sites)
    edges = [layer.edge for layer in batch.layers]
    size = sum(edge_shape((layer.node, 0)).numel() for layer in batch.layers) * batch.outputs.element_size()
    count = CLOSE // max(size, 1)
    if count < 2:  # each layer's as soon as it is there, none kept
        return Propagator(batch).gauss_newton()
    columns = batch.curvature.each()
    while some := list(islice(columns, count)):
        passes = [batch.backward(blank, column, edges) for column, _ in some]
        for layer, deltas in zip(layers, zip(*passes)):
            if deltas[0] is not None:
                accumulate(out, layer.over(deltas, [sign for _, sign in some]))
    return out


def _turned(layers: list[Layer]) -> set[str]:
    return {layer.weight for layer in layers if layer.transposed and layer.weight}
