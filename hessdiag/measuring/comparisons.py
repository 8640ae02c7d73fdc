"""The single comparisons of an audit, each of two ways to one number.

Comparisons, each relative to a scale that cancellation cannot shrink:
identity   u^T H u by one Hessian-vector product against sum c (J u)^2 + the loss term, u random in one layer's
           parameters, relative to sum |c| (J u)^2 + the Gauss-Newton term;
squares    the layer functions' per-sample gradients against autograd's, for two samples and random cotangents (a
           model that mixes samples, or uses a layer twice in parallel, fails here), relative to the tensor's norm;
sums       for propagation, the squares of these gradients as signed passes add them up against their own sum, half of
           the relative difference;
entries    for the exact method, a few entries against Hessian-vector products, relative to the largest entry;
closed     for propagation, two entries per parameter of a layer's closed share, and of its gradients without the sites
           that the closed share stands for, against forward products, relative to the sums of absolute contributions;
heads      for propagation, weighted squares of a layer that feeds the outputs against its gradients from single
           outputs, half of the relative difference; two entries of its share of the Gauss-Newton part against forward
           products, which must reach one output of each place alone;
own        for a method from outside, a few entries of what it gives against Hessian-vector products, those of a
           stochastic method beyond eight standard errors of the mean of its replicates.
Hutchinson needs no identity; there the double backward is checked by its symmetry v^T (H u) = u^T (H v). Whatever the
method, autograd's derivatives are held against difference quotients (see `autograd_check`); what cannot be is an entry
without a deviation, and does not pass. No comparison asks for more digits than autograd has (see `rounding`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hessdiag.graph import Layer, Linearisation
from hessdiag.kernels.exact_batch import check_laid_out, check_unseen
from hessdiag.kernels.products import Products, one_hot
from hessdiag.kernels.propagator import Propagator
from hessdiag.kernels.tensors import Tensors, accumulate_new
from hessdiag.measuring.autograd_check import Moved
from hessdiag.measuring.rounding import ROUNDINGS, Uncancelled, length, uncancelled, uneven, unit
from hessdiag.methods.base import Method
from hessdiag.methods.case import Case
from hessdiag.problem.objective import Objective
from hessdiag.signs import Signs, cpu_generator

DIFFERENCE = 1e-2
"""Tolerance of difference quotients of the gradient: what they are to catch is off by tens of per cent."""
SLOPE = 1e-4
"""Tolerance of the slope, to which one tensor of many adds a hundredth."""
AUDIT = 1 << 41  # sign streams of the audit


@dataclass(frozen=True)
class AuditEntry:
    """One comparison: `deviation` relative to the scale named in the module's docstring, None if it was not made."""

    check: str
    layer: str
    deviation: float | None
    tolerance: float

    @property
    def passed(self) -> bool:
        """Compared, and within tolerance (NaN is not)."""
        return self.deviation is not None and self.deviation <= self.tolerance

    @property
    def beyond(self) -> float:
        """The deviation in tolerances; infinite where it is NaN or not known."""
        off = math.nan if self.deviation is None else self.deviation / self.tolerance
        return off if off == off else math.inf


def identity(
    layer: Layer, linear: Linearisation, forward: Forward, products: Products, directions: Tensors, tolerance: float
) -> AuditEntry:
    """The site identity along one random direction of one layer; `forward` is that of all parameters."""
    names = list(layer.own)
    everything = linear.objective.parameters
    u = {name: directions[name] for name in names}
    curved = products.hessian(u)
    left = sum(float(torch.linalg.vecdot(u[n].double().flatten(), curved[n].double().flatten())) for n in names)
    value, scale = _site_sums(linear, forward, [u.get(n) for n in everything])
    off = abs(left - value)
    if off > tolerance * scale:
        loose = unit(linear.objective, products.inputs, products.targets, 0)
        alone = Forward(loose, [everything[n] for n in names])
        noise = ROUNDINGS * torch.finfo(linear.outputs.dtype).eps * _site_sums(loose, alone, [u[n] for n in names])[1]
        off = max(off - noise, 0.0)
    if off > tolerance * scale:
        whole = Uncancelled(products.outputs, {name: everything[name] for name in names})
        off = max(off - whole.noise(whole.curved(u)), 0.0)
    return AuditEntry("identity", layer.name, off / scale if scale else off, tolerance)


def _site_sums(linear: Linearisation, forward: Forward, u: Sequence[Tensor | None]) -> tuple[float, float]:
    """(sum c (J u)^2 + the loss term, the same of absolute values)."""
    pushed, output = forward.along(u)
    value = scale = 0.0
    for site, (left, right) in zip(linear.sites, pushed):
        weighted = site.c.double() * left.double() * right.double()
        value += float(weighted.sum())
        scale += float(weighted.abs().sum())
    flat = output.double().reshape(linear.samples, -1)
    loss = linear.curvature.columns.against(flat).square().sum(1) * linear.curvature.signs
    value += float(loss.sum())
    scale += float(loss.abs().sum())
    return value, scale


class Forward:
    """J u as the derivative of <J^T v, u> with respect to v: J^T v is recorded once, for any number of directions u.

    It is linear in v, so any will do; some of torch's own (logcumsumexp) have no derivative at zero.
    """

    def __init__(self, linear: Linearisation, wrt: Sequence[Any]) -> None:
        with torch.enable_grad():
            self._seeds = [torch.ones_like(site.c, requires_grad=True) for site in linear.sites]
            self._others = [
                torch.ones_like(site.c, requires_grad=True) if site.right else None for site in linear.sites
            ]
            self._output = torch.ones_like(linear.outputs, requires_grad=True)
            self._pulled = linear.backward(self._seeds, self._output, wrt, right=self._others, create_graph=True)

    def along(self, u: Sequence[Tensor | None]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """dz along a direction, twice, or dz and dw of a pair, for every site; and df. None where a parameter stays."""
        others = [other for other in self._others if other is not None]
        ends = [*self._seeds, *others, self._output]
        pairs = [(p, d) for p, d in zip(self._pulled, u) if p is not None and p.requires_grad and d is not None]
        found: Sequence[Tensor | None] = [None] * len(ends)
        if pairs:
            roots, vectors = [p for p, _ in pairs], [d for _, d in pairs]
            found = torch.autograd.grad(roots, ends, vectors, allow_unused=True, retain_graph=True)
        full = [torch.zeros_like(s) if f is None else f for s, f in zip(ends, found)]
        count = len(self._seeds)
        halves = iter(full[count:-1])
        rights = [dz if other is None else next(halves) for dz, other in zip(full[:count], self._others)]
        return list(zip(full[:count], rights)), full[-1]


def push(
    linear: Linearisation, wrt: Sequence[Any], along: Sequence[Tensor]
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """What `Forward.along` gives for one direction."""
    return Forward(linear, wrt).along(along)


def squares(linear: Linearisation, signs: Signs, tolerance: float) -> list[AuditEntry]:
    """Every layer function's per-sample gradients, one entry of the audit per parameter.

    One backward pass from the sites and outputs of each sample by itself, which is refused where it reaches another
    sample's layers.
    """
    check_laid_out(linear)
    seeds = [
        None if number in linear.free else signs.plain(site.c, AUDIT, 1, number)
        for number, site in enumerate(linear.sites)
    ]
    output = signs.plain(linear.outputs, AUDIT, 2)
    names = [name for layer in linear.graph.owners() for name in layer.own]
    edges = [layer.edge for layer in (*linear.layers, *linear.shared)]
    targets: list[GradientEdge | Tensor] = [*edges, *(linear.objective.parameters[name] for name in names)]
    deltas: list[Tensor | None] = [None] * len(edges)
    truths: list[dict[str, Tensor | None]] = []
    for n in range(linear.samples):
        only = [None if seed is None else _one(seed, n, linear.samples) for seed in seeds]
        found = linear.backward(only, _one(output, n, linear.samples), targets)
        if linear.samples > 1:
            check_unseen(linear, found[: len(edges)], torch.arange(linear.samples, device=output.device) == n)
        truths.append(dict(zip(names, found[len(edges) :])))
        deltas = [b if a is None else a if b is None else a + b for a, b in zip(deltas, found)]
    linear.separate = True
    sizes = [{name: 0.0 if g is None else length(g) for name, g in truth.items()} for truth in truths]
    floors = [_floor(linear, max(known.values(), default=0.0)) for known in sizes]
    worst = {}
    for name, each in Propagator(linear).each_of(deltas, seeds):
        sides = list(zip([truth.pop(name) for truth in truths], [known[name] for known in sizes], floors))
        apart = [_apart(mine, *side) for mine, side in zip(each, sides)]
        if max(apart) > tolerance:
            floor = _floor(linear, uncancelled(edges, deltas, linear.objective.parameters[name]))
            apart = [0.0 if 0.0 < off * size <= floor else off for off, (_, size, _) in zip(apart, sides)]
        worst[name] = max(apart)
    for name in truths[0]:  # what no layer gives
        worst[name] = max(0.0 if known[name] <= floor else 1.0 for known, floor in zip(sizes, floors))
    return [AuditEntry("squares", name, worst[name], tolerance) for name in names]


def sums(linear: Linearisation, signs: Signs, tolerance: float) -> list[AuditEntry]:
    """What signed passes add up, `summed` of every layer, beside the squares of its per-sample gradients."""
    worst: dict[str, float] = {}
    for number, layer in enumerate(Propagator(linear).squares):
        delta = signs.plain(linear.outputs.new_empty(layer.out), AUDIT, 7, number)
        mine = layer.summed(delta.clone())
        for name, each in layer.each(delta).items():
            square = each.square_().sum(0)
            off = _apart(mine.get(name), square, length(square), 0.0) / 2.0  # as an error of the gradient
            worst[name] = max(worst.get(name, 0.0), off)
    return [AuditEntry("sums", name, off, tolerance) for name, off in worst.items()]


def _apart(mine: Tensor | None, truth: Tensor | None, size: float, floor: float) -> float:
    """|mine - truth| relative to `size`, that of the truth, None being zero; 0 up to `floor`. `mine` is used up."""
    own = 0.0 if mine is None or size else length(mine)
    off = own if truth is None else size if mine is None else length(mine.sub_(truth))
    if off <= floor:
        return 0.0
    return off / (size or own) if off == off else float("inf")


def _floor(linear: Linearisation, whole: float) -> float:
    """What is zero beside the largest: a bias that a softmax takes off has nothing but rounding on either side."""
    return float(ROUNDINGS * torch.finfo(linear.outputs.dtype).eps * whole)


def _one(seed: Tensor, sample: int, samples: int) -> Tensor:
    """The cotangent of one sample alone, whose rows of the first axis stand together."""
    out = torch.zeros_like(seed)
    out.view(samples, -1)[sample] = seed.reshape(samples, -1)[sample]
    return out


def entries(
    linear: Linearisation,
    products: Products,
    layers: list[Layer],
    signs: Signs,
    tolerance: float,
    diagonal: Callable[[Linearisation], tuple[Tensors, Tensors]],
) -> list[AuditEntry]:
    """Two random entries of every parameter of `layers`, as `diagonal` gives its two parts."""
    outer, inner = diagonal(linear)
    generator = cpu_generator(signs.seed)
    entries, floor = [], None
    for layer in layers:
        for name in layer.own:
            first, second = outer[name].reshape(-1), inner[name].reshape(-1)
            scale = max(abs(float(end)) for part in (first, second) for end in torch.aminmax(part)) or 1.0
            worst = 0.0
            places = torch.randint(0, first.numel(), (2,), generator=generator, device="cpu").tolist()
            for k, truth in zip(places, products.entries(name, places)):
                off = abs(truth - float(first[k] + second[k]))
                if off > tolerance * scale:
                    floor = _rounding(linear, outer, inner) if floor is None else floor
                    off = 0.0 if off <= floor else max(off - _entry_noise(linear, products, name, diagonal), 0.0)
                if off > tolerance * scale:
                    parameter = linear.objective.parameters[name]
                    whole = Uncancelled(products.outputs, {name: parameter})
                    off = max(off - whole.noise(whole.curved(one_hot(parameter, name, k))), 0.0)
                worst = max(worst, off / scale)
            entries.append(AuditEntry("entries", name, worst, tolerance))
    return entries


def _rounding(linear: Linearisation, outer: Tensors, inner: Tensors) -> float:
    """What is zero beside the largest entry."""
    return _floor(linear, max(float((outer[name] + inner[name].abs()).max()) for name in outer))


def closed(
    linear: Linearisation, forward: Forward, layers: list[Layer], signs: Signs, tolerance: float
) -> list[AuditEntry]:
    """Entries of the closed shares and of the remote gradients of `layers`, by the propagation method."""
    propagator = Propagator(linear)
    places = [place for place in sorted({*linear.direct, *linear.rowed}) if linear.layers[place] in layers]
    if not places:
        return []
    shares, generator = propagator.direct(), cpu_generator(signs.seed)
    seeds: list[Tensor | None] = [signs.plain(s.c, AUDIT, 6, n) for n, s in enumerate(linear.sites)]
    deltas = linear.backward(seeds, None, [layer.edge for layer in linear.layers], above=True)
    taken, found = linear.own(linear.pull(seeds, seeds, above=True), halves=False), []
    for place in places:
        layer, delta = linear.layers[place], deltas[place]
        closed_sites = set(linear.rowed[place].sites if place in linear.rowed else ())
        closed_sites |= {linear.direct[place].site} if place in linear.direct else set()
        remote = {}
        if delta is not None:
            rest = linear.remote(place, delta.detach(), seeds)
            remote = propagator.squares[place].each(rest - taken[place] if place in taken else rest)
        for name in layer.own:
            parameter, worst = linear.objective.parameters[name], 0.0
            for k in torch.randint(0, parameter.numel(), (2,), generator=generator, device="cpu").tolist():
                u = one_hot(parameter, name, k)
                pushed, _ = forward.along([u.get(n) for n in linear.objective.parameters])
                own = [linear.sites[site].c.double() * pushed[site][0].double().square() for site in closed_sites]
                off = abs(float(shares[name].reshape(-1)[k]) - sum(float(part.sum()) for part in own))
                worst = max(worst, off / (sum(float(part.abs().sum()) for part in own) or 1.0) if off else 0.0)
                sides = [left + right if one.right else left for one, (left, right) in zip(linear.sites, pushed)]
                pairs = [(n, s, p) for n, (s, p) in enumerate(zip(seeds, sides)) if s is not None]
                terms = [(s * p).double() for n, s, p in pairs if n not in closed_sites]
                if name in remote:
                    size = sum(float((s * p).double().abs().sum()) for s, p in zip(seeds, sides) if s is not None)
                    mine = float(remote[name].double().sum(0).reshape(-1)[k])
                    off = abs(mine - sum(float(t.sum()) for t in terms))
                    worst = max(worst, off / (size or 1.0) if off else 0.0)
            found.append(AuditEntry("closed", name, worst, tolerance))
    return found


HEAD_ENTRIES = 2
"""Entries of a layer's output that bear weights at once."""


def heads(
    linear: Linearisation, forward: Forward, layers: list[Layer], signs: Signs, tolerance: float
) -> list[AuditEntry]:
    """Shares of the Gauss-Newton part that layers have in the outputs themselves, known without a pass."""
    propagator, generator, worst = Propagator(linear), cpu_generator(signs.seed), dict[str, float]()
    own = {name for layer in layers for name in layer.own}
    places = [p for p in linear.heads if own & set([*linear.layers, *linear.shared][p].own)]
    for place in places:
        layer = propagator.layer(place)
        c = linear.outputs.new_zeros(layer.out)
        chosen = torch.randperm(c.numel(), generator=generator, device="cpu")[:HEAD_ENTRIES].tolist()
        truth: Tensors = {}
        for number, entry in enumerate(chosen):
            unit = torch.zeros_like(c)
            unit.view(-1)[entry] = 1.0
            c.view(-1)[entry] = 1.0 + number
            accumulate_new(truth, {n: g.square().sum(0) for n, g in layer.each(unit).items()}, 1.0 + number)
        mine = layer.weighted(c)
        for name in layer.layer.own:
            off = _apart(mine.get(name), truth[name], length(truth[name]), 0.0) / 2.0  # as an error of the gradient
            worst[name] = max(worst.get(name, 0.0), off)
    shares, columns = propagator.heads() if places else {}, linear.curvature.columns
    for name in [n for place in places if place < len(linear.layers) for n in linear.layers[place].own]:
        parameter = linear.objective.parameters[name]
        for k in torch.randint(0, parameter.numel(), (2,), generator=generator, device="cpu").tolist():
            u = one_hot(parameter, name, k)
            _, output = forward.along([u.get(n) for n in linear.objective.parameters])
            terms = columns.diagonal() * output.double().reshape(linear.samples, -1).square()
            off, size = abs(float(shares[name].reshape(-1)[k]) - float(terms.sum())), float(terms.abs().sum())
            touched = (output != 0).reshape(-1, *columns.places).sum(1)
            worst[name] = max(worst[name], off / size if size else off, math.inf if bool((touched > 1).any()) else 0.0)
    return [AuditEntry("heads", name, off, tolerance) for name, off in worst.items()]


OWN_REPLICATES = 256
OWN_ENTRIES = 8
OWN_ERRORS = 8.0
"""Standard errors of a mean of replicates within which a stochastic method is right."""


def own(case: Case, method: Method, products: Products, signs: Signs, tolerance: float) -> list[AuditEntry]:
    """Two random entries of every parameter as the method itself gives them, or means of replicates of a few more.

    Means are looked at one by one, and all together: sum_k h_k d_k against sum_k h_k^2, h by Hessian-vector products.
    """
    work, batch, parts, streams = method.work(case), case.first, method.known(case.plan), method.streams(case.plan)
    known = work.known_parts(batch, lambda done, total: None) if parts else {}
    stream = "total" if "total" in streams else "functional"
    drawn = [work.drawn_streams(batch, r)[stream] for r in range(OWN_REPLICATES)] if streams else []
    generator, found = cpu_generator(signs.seed), []
    pooled, square = torch.zeros(max(len(drawn), 1), dtype=torch.float64, device="cpu"), 0.0
    for name, parameter in case.objective.parameters.items():
        count = OWN_ENTRIES if drawn else 2
        places = torch.randint(0, parameter.numel(), (count,), generator=generator, device="cpu")
        truth = torch.tensor(products.entries(name, places.tolist()), dtype=torch.float64, device="cpu")
        exact = torch.zeros_like(parameter, dtype=torch.float64, requires_grad=False)
        for part in parts:
            exact += known[part][name]
        rows = torch.stack([one[name].double() for one in drawn]) if drawn else torch.zeros_like(exact)[None]
        rows = (rows + exact).reshape(len(rows), -1)
        scale, chosen = float(rows.mean(0).abs().max()) or 1.0, rows[:, places.to(rows.device)].cpu()
        off = chosen.mean(0) - truth
        found.append(AuditEntry("own", name, _beyond(off, chosen, scale), tolerance))
        pooled += ((chosen - truth) * truth).sum(1)
        square += float(truth.square().sum())
    if drawn:
        found.append(AuditEntry("own", "the whole model", _beyond(pooled.mean(), pooled, square or 1.0), tolerance))
    return found


def _beyond(off: Tensor, rows: Tensor, scale: float) -> float:
    """The largest deviation of a mean of rows, beyond what their spread allows; infinite where there is none."""
    spread = rows.std(0) / len(rows) ** 0.5 if len(rows) > 1 else torch.zeros_like(off)
    worst = float((off.abs() - OWN_ERRORS * spread).max() / scale)
    return max(worst, 0.0) if worst == worst else float("inf")


def _entry_noise(
    linear: Linearisation,
    products: Products,
    name: str,
    diagonal: Callable[[Linearisation], tuple[Tensors, Tensors]],
) -> float:
    outer, inner = diagonal(unit(linear.objective, products.inputs, products.targets, 0))
    return ROUNDINGS * torch.finfo(linear.outputs.dtype).eps * float((outer[name] + inner[name].abs()).max())


def quotients(moved: Moved) -> list[AuditEntry]:
    """Autograd's derivatives of the model against difference quotients (see `autograd_check`)."""
    found = moved.run(slope=SLOPE, difference=DIFFERENCE)
    what, where = ("cut off", ", ".join(found.apart)) if found.apart else ("slope", "the whole model")
    entries = [AuditEntry(what, where, found.slope, SLOPE)]
    return entries + [AuditEntry("difference", name, off, DIFFERENCE) for name, off in found.difference.items()]


def symmetry(objective: Objective, products: Products, signs: Signs, tolerance: float) -> AuditEntry:
    """Of the double backward: v^T (H u) against u^T (H v)."""
    u = {n: uneven(signs.plain(p, AUDIT, 3, i)) for i, (n, p) in enumerate(objective.parameters.items())}
    v = {n: uneven(signs.plain(p, AUDIT, 4, i)) for i, (n, p) in enumerate(objective.parameters.items())}
    hu, hv = products.hessian(u), products.hessian(v)
    left = sum(float((v[n].double() * hu[n].double()).sum()) for n in u)
    right = sum(float((u[n].double() * hv[n].double()).sum()) for n in u)
    size = sum(float((v[n].double() * hu[n].double()).abs().sum()) for n in u) or 1.0
    off = abs(left - right)
    if off > tolerance * size:
        whole = Uncancelled(products.outputs, objective.parameters)
        off = max(off - whole.noise(whole.curved(u)), 0.0)
    return AuditEntry("symmetry", "the whole model", off / size, tolerance)
