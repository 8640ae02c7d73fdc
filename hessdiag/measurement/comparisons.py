"""The single comparisons of an audit, each of two ways to one number.

Comparisons, each relative to a scale that cancellation cannot shrink:
identity   u^T H u by one Hessian-vector product against sum c (J u)^2 + the loss term, u random in one layer's
           parameters, relative to sum |c| (J u)^2 + the Gauss-Newton term;
squares    the layer functions' per-sample gradients against autograd's, for two samples and random cotangents (a
           model that mixes samples, or uses a layer twice in parallel, fails here), relative to the tensor's norm;
entries    for the exact method, a few entries against Hessian-vector products, relative to the largest entry.
closed     for propagation, two entries per parameter of a layer's closed share, and of its gradients without the sites
           that the closed share stands for, against forward products, relative to the sums of absolute contributions.
Hutchinson needs no identity; there the double backward is checked by its symmetry v^T (H u) = u^T (H v). Whatever the
method, autograd's derivatives are held against difference quotients (see `derivatives`). No comparison asks for more
digits than autograd has (see `rounding`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..diagonal import exact
from ..diagonal.hutchinson import Products
from ..diagonal.parts import Tensors
from ..diagonal.propagation import Propagator
from ..graph import Layer, Linearisation
from ..objective import Objective
from ..signs import Signs, cpu_generator
from ..stream import Numbered
from .derivatives import Moved
from .rounding import ROUNDINGS, unit

DIFFERENCE = 1e-2
"""Tolerance of difference quotients of the gradient: what they are to catch is off by tens of per cent."""
SLOPE = 1e-4
"""Tolerance of the slope, to which one tensor of many adds a hundredth."""
_AUDIT = 1 << 41  # sign streams of the audit


@dataclass(frozen=True)
class AuditEntry:
    """One comparison: `deviation` relative to the scale named in the module's docstring."""

    check: str
    layer: str
    deviation: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Within tolerance (NaN is not)."""
        return self.deviation <= self.tolerance


def one_hot(objective: Objective, name: str, k: int) -> Tensors:
    """The direction of one entry (in the order of the axes, however the parameter lies in memory)."""
    unit = {n: torch.zeros(p.shape, dtype=p.dtype, device=p.device) for n, p in objective.parameters.items()}
    unit[name].view(-1)[k] = 1
    return unit


def _direction(objective: Objective, names: list[str], signs: Signs) -> Tensors:
    return {
        name: signs.plain(parameter, _AUDIT, number) if name in names else torch.zeros_like(parameter)
        for number, (name, parameter) in enumerate(objective.parameters.items())
    }


def identity(
    linear: Linearisation, forward: Forward, layer: Layer, products: Products, signs: Signs, tolerance: float
) -> AuditEntry:
    """The site identity along one random direction of one layer; `forward` is that of all parameters."""
    names = [name for name in (layer.weight, layer.bias) if name]
    u = _direction(linear.objective, names, signs)
    curved = products.hessian(u)
    left = sum(float((u[name].double() * curved[name].double()).sum()) for name in names)
    everything = linear.objective.parameters
    value, scale = _site_sums(linear, forward, [u[n] if n in names else None for n in everything])
    off = abs(left - value)
    if off > tolerance * scale:
        loose = unit(linear.objective, products.inputs, products.targets, 0)
        alone = Forward(loose, [everything[n] for n in names])
        noise = ROUNDINGS * torch.finfo(linear.outputs.dtype).eps * _site_sums(loose, alone, [u[n] for n in names])[1]
        off = max(off - noise, 0.0)
    return AuditEntry("identity", layer.name, off / scale if scale else off, tolerance)


def _site_sums(linear: Linearisation, forward: Forward, u: Sequence[Tensor | None]) -> tuple[float, float]:
    """(sum c (J u)^2 + the loss term, the same of absolute values)."""
    pushed, output = forward.along(u)
    value = scale = 0.0
    for site, along in zip(linear.sites, pushed):
        weighted = site.c.double() * along.double().square()
        value += float(weighted.sum())
        scale += float(weighted.abs().sum())
    flat = output.double().reshape(linear.samples, -1)
    loss = (linear.curvature.factor * flat[None]).sum(2).square().sum(1) * linear.curvature.signs
    value += float(loss.sum())
    scale += float(loss.abs().sum())
    return value, scale


class Forward:
    """J u as the derivative of <J^T v, u> with respect to v: J^T v is recorded once, for any number of directions u."""

    def __init__(self, linear: Linearisation, wrt: Sequence[Any]) -> None:
        with torch.enable_grad():
            self._seeds = [torch.zeros_like(site.c, requires_grad=True) for site in linear.sites]
            self._output = torch.zeros_like(linear.outputs, requires_grad=True)
            self._pulled = linear.backward(self._seeds, self._output, wrt, create_graph=True)

    def along(self, u: Sequence[Tensor | None]) -> tuple[list[Tensor], Tensor]:
        """dz along a direction, for every site, and df; None where a parameter stays."""
        ends = [*self._seeds, self._output]
        pairs = [(p, d) for p, d in zip(self._pulled, u) if p is not None and p.requires_grad and d is not None]
        if not pairs:
            return [torch.zeros_like(s) for s in self._seeds], torch.zeros_like(self._output)
        roots, vectors = [p for p, _ in pairs], [d for _, d in pairs]
        found = torch.autograd.grad(roots, ends, vectors, allow_unused=True, retain_graph=True)
        full = [torch.zeros_like(s) if f is None else f for s, f in zip(ends, found)]
        return full[:-1], full[-1]


def push(linear: Linearisation, wrt: Sequence[Any], along: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """dz along one direction, for every site, and df."""
    return Forward(linear, wrt).along(along)


def squares(linear: Linearisation, signs: Signs, tolerance: float) -> list[AuditEntry]:
    """Every layer function's per-sample gradients, one entry of the audit per parameter."""
    propagator = Propagator(linear)
    seeds = [signs.plain(site.c, _AUDIT, 1, number) for number, site in enumerate(linear.sites)]
    output = signs.plain(linear.outputs, _AUDIT, 2)
    each = propagator.each(seeds, output)
    names = [name for layer in linear.layers for name in (layer.weight, layer.bias) if name]
    worst = dict.fromkeys(names, 0.0)
    for n in range(linear.samples):
        only = [_one(seed, n, linear.samples) for seed in seeds]
        own = [linear.objective.parameters[name] for name in names]
        found = linear.backward(only, _one(output, n, linear.samples), own)
        for name, truth in zip(names, found):
            mine = each[name][n] if name in each else torch.zeros_like(linear.objective.parameters[name])
            expected = torch.zeros_like(mine) if truth is None else truth
            size = float(expected.double().norm()) or float(mine.double().norm()) or 1.0
            worst[name] = max(worst[name], float((mine - expected).double().norm()) / size)
    return [AuditEntry("squares", name, deviation, tolerance) for name, deviation in worst.items()]


def _one(seed: Tensor, sample: int, samples: int) -> Tensor:
    """The cotangent of one sample alone, whose rows of the first axis stand together."""
    rows = seed.reshape(samples, -1)
    out = torch.zeros_like(rows)
    out[sample] = rows[sample]
    return out.reshape(seed.shape)


def entries(
    linear: Linearisation, products: Products, layers: list[Layer], signs: Signs, tolerance: float
) -> list[AuditEntry]:
    """Two random entries of every parameter of `layers`, by the exact method."""
    outer, inner = exact.batch_diagonal(linear)
    generator = cpu_generator(signs.seed)
    entries = []
    for layer in layers:
        for name in (n for n in (layer.weight, layer.bias) if n):
            total = (outer[name] + inner[name]).reshape(-1)
            scale = float((outer[name].abs() + inner[name].abs()).max()) or 1.0
            worst = 0.0
            for k in torch.randint(0, total.numel(), (2,), generator=generator, device="cpu").tolist():
                truth = float(products.hessian(one_hot(linear.objective, name, k))[name].reshape(-1)[k])
                off = abs(truth - float(total[k]))
                if off > tolerance * scale:
                    off = max(off - _entry_noise(linear, products, name), 0.0)
                worst = max(worst, off / scale)
            entries.append(AuditEntry("entries", name, worst, tolerance))
    return entries


def closed(
    linear: Linearisation, forward: Forward, layers: list[Layer], signs: Signs, tolerance: float
) -> list[AuditEntry]:
    """Entries of the closed shares and of the remote gradients of `layers`, by the propagation method."""
    propagator = Propagator(linear)
    places = [place for place in linear.direct if linear.layers[place] in layers]
    if not places:
        return []
    shares, generator = propagator.direct(), cpu_generator(signs.seed)
    seeds: list[Tensor | None] = [signs.plain(s.c, _AUDIT, 6, n) for n, s in enumerate(linear.sites)]
    deltas = linear.backward(seeds, None, [layer.edge for layer in linear.layers])
    found = []
    for place in places:
        layer, site, delta = linear.layers[place], linear.direct[place].site, deltas[place]
        remote = {} if delta is None else propagator.squares[place].each(linear.remote(place, delta.detach(), seeds))
        for name in (n for n in (layer.weight, layer.bias) if n):
            parameter, worst = linear.objective.parameters[name], 0.0
            for k in torch.randint(0, parameter.numel(), (2,), generator=generator, device="cpu").tolist():
                u = one_hot(linear.objective, name, k)
                pushed, _ = forward.along([u[n] if n == name else None for n in linear.objective.parameters])
                own = linear.sites[site].c.double() * pushed[site].double().square()
                off = abs(float(shares[name].reshape(-1)[k]) - float(own.sum()))
                worst = max(worst, off / (float(own.abs().sum()) or 1.0) if off else 0.0)
                terms = [(s * p).double() for n, (s, p) in enumerate(zip(seeds, pushed)) if s is not None and n != site]
                if name in remote:
                    size = sum(float((s * p).double().abs().sum()) for s, p in zip(seeds, pushed) if s is not None)
                    mine = float(remote[name].double().sum(0).reshape(-1)[k])
                    off = abs(mine - sum(float(t.sum()) for t in terms))
                    worst = max(worst, off / (size or 1.0) if off else 0.0)
            found.append(AuditEntry("closed", name, worst, tolerance))
    return found


def _entry_noise(linear: Linearisation, products: Products, name: str) -> float:
    outer, inner = exact.batch_diagonal(unit(linear.objective, products.inputs, products.targets, 0))
    return ROUNDINGS * torch.finfo(linear.outputs.dtype).eps * float((outer[name] + inner[name].abs()).max())


def quotients(movable: Objective, few: Numbered, signs: Signs) -> list[AuditEntry]:
    """Autograd's derivatives of the model against difference quotients (see `derivatives`)."""
    found = Moved(movable, few.inputs, few.targets, few.index, signs, _AUDIT, 5).run(slope=SLOPE, difference=DIFFERENCE)
    what, where = ("cut off", ", ".join(found.apart)) if found.apart else ("slope", "the whole model")
    entries = [AuditEntry(what, where, found.slope, SLOPE)]
    return entries + [AuditEntry("difference", name, off, DIFFERENCE) for name, off in found.difference.items()]


def symmetry(objective: Objective, products: Products, signs: Signs, tolerance: float) -> AuditEntry:
    """Of the double backward: v^T (H u) against u^T (H v)."""
    u = {n: signs.plain(p, _AUDIT, 3, i) for i, (n, p) in enumerate(objective.parameters.items())}
    v = {n: signs.plain(p, _AUDIT, 4, i) for i, (n, p) in enumerate(objective.parameters.items())}
    hu, hv = products.hessian(u), products.hessian(v)
    left = sum(float((v[n].double() * hu[n].double()).sum()) for n in u)
    right = sum(float((u[n].double() * hv[n].double()).sum()) for n in u)
    size = sum(float((v[n].double() * hu[n].double()).abs().sum()) for n in u) or 1.0
    return AuditEntry("symmetry", "the whole model", abs(left - right) / size, tolerance)
