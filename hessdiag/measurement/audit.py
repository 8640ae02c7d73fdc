"""A measurement's own check, on a few samples and in float64 wherever the model can be copied.

Three comparisons, each relative to a scale that cancellation cannot shrink:
identity   u^T H u by one Hessian-vector product against sum c (J u)^2 + the loss term, u random in one layer's
           parameters, relative to sum |c| (J u)^2 + the Gauss-Newton term;
squares    the layer functions' per-sample gradients against autograd's, for two samples and random cotangents (a
           model that mixes samples, or uses a layer twice in parallel, fails here), relative to the tensor's norm;
entries    for the exact method, a few entries against Hessian-vector products, relative to the largest entry.
Hutchinson needs no identity; there the double backward itself is checked, by its symmetry v^T (H u) = u^T (H v) and by
difference quotients of the gradient. No comparison asks for more digits than autograd has (see `rounding`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..diagonal import exact
from ..diagonal.hutchinson import Products
from ..diagonal.parts import Tensors
from ..diagonal.propagation import Propagator
from ..errors import AuditError, HessdiagError
from ..objective import Objective
from ..signs import Signs, cpu_generator
from ..sites import Layer, Linearisation
from ..stream import Numbered
from .plan import as_double, double_copy
from .rounding import ROUNDINGS, difference, unit

SAMPLES = 2
LAYERS = 8
TOLERANCE = {torch.float64: 1e-8, torch.float32: 5e-3}
DIFFERENCE = 1e-2
"""Tolerance of difference quotients: what they are to catch is off by tens of per cent."""
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


@dataclass(frozen=True)
class Audit:
    """All comparisons of one measurement."""

    entries: tuple[AuditEntry, ...]
    samples: int
    dtype: str

    @property
    def passed(self) -> bool:
        """Whether every comparison agreed."""
        return all(entry.passed for entry in self.entries)

    @property
    def worst(self) -> AuditEntry:
        """The comparison that came nearest to (or went furthest beyond) its tolerance."""
        return max(
            self.entries,
            key=lambda e: float("inf") if e.deviation != e.deviation else e.deviation / e.tolerance,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        entries = [asdict(e) | {"passed": e.passed} for e in self.entries]
        return {"passed": self.passed, "samples": self.samples, "dtype": self.dtype, "entries": entries}

    def require(self) -> None:
        """Raise AuditError naming the layer, unless everything agreed."""
        if not self.passed:
            worst = self.worst
            why = "the model is not covered; use method='hutchinson'"
            if worst.check in ("symmetry", "difference"):
                why = (
                    "autograd's second derivatives are not the model's (a custom function without one, detach() or "
                    "a straight-through estimator, a hook on gradients), and no method here can do without them"
                )
            raise AuditError(
                f"the audit failed: {worst.check} of layer {worst.layer!r} is off by {worst.deviation:.2g} "
                f"(tolerance {worst.tolerance:.0e}): {why}"
            )


def audit(objective: Objective, first: Numbered, *, method: str, seed: int) -> Audit:
    """Check `method` on the first samples of the data."""
    keep = torch.arange(min(SAMPLES, len(first.targets)), device=first.targets.device)
    few = first.part(keep)
    twin, inputs, targets = objective, few.inputs, few.targets
    if objective.dtype != torch.float64:
        try:
            twin = double_copy(objective)
            inputs, targets = as_double(few.inputs), few.targets
            if targets.is_floating_point():
                targets = targets.double()
            with torch.no_grad():
                twin.summed_loss(inputs, targets, index=first.index)
        except (HessdiagError, RuntimeError, TypeError, NotImplementedError):
            twin, inputs, targets = objective, few.inputs, few.targets
    signs = Signs(seed, twin.device)
    tolerance = TOLERANCE[twin.dtype]
    needs_sites = method not in ("hutchinson", "reference")
    if needs_sites:
        linear = Linearisation(twin, inputs, targets, index=first.index)
    products = Products(twin, inputs, targets, index=first.index, parts=False)
    if not needs_sites:
        entries = [_symmetry(twin, products, signs, tolerance)]
        entries += _difference(objective, few, signs)
    else:
        chosen = choose_layers(linear, signs)
        entries = [_identity(linear, layer, products, signs, tolerance) for layer in chosen]
        entries += _squares(linear, signs, tolerance)
        if method == "exact":
            entries += _entries(linear, products, chosen, signs, tolerance)
    return Audit(tuple(entries), len(keep), str(twin.dtype).removeprefix("torch."))


def choose_layers(linear: Linearisation, signs: Signs) -> list[Layer]:
    """Every layer with no layer below it, every parameter outside the known kinds, the last, and a draw of the rest."""
    layers = linear.layers
    if len(layers) <= LAYERS:
        return layers
    first = [layer for layer in layers if linear.graph.is_first(layer)]
    odd = [layer for layer in layers if layer.kind in ("shift", "scale")]
    chosen = {id(layer): layer for layer in [*first, *odd, layers[-1]]}
    order = torch.randperm(len(layers), generator=cpu_generator(signs.seed), device="cpu").tolist()
    for number in order:
        if len(chosen) >= LAYERS:
            break
        chosen.setdefault(id(layers[number]), layers[number])
    return [layer for layer in layers if id(layer) in chosen]


def _direction(objective: Objective, names: list[str], signs: Signs) -> Tensors:
    return {
        name: signs.plain(parameter, _AUDIT, number) if name in names else torch.zeros_like(parameter)
        for number, (name, parameter) in enumerate(objective.parameters.items())
    }


def _identity(linear: Linearisation, layer: Layer, products: Products, signs: Signs, tolerance: float) -> AuditEntry:
    names = [name for name in (layer.weight, layer.bias) if name]
    u = _direction(linear.objective, names, signs)
    curved = products.hessian(u)
    left = sum(float((u[name].double() * curved[name].double()).sum()) for name in names)
    value, scale = _site_sums(linear, names, u)
    off = abs(left - value)
    if off > tolerance * scale:
        loose = unit(linear.objective, products.inputs, products.targets, 0)
        noise = ROUNDINGS * torch.finfo(linear.outputs.dtype).eps * _site_sums(loose, names, u)[1]
        off = max(off - noise, 0.0)
    return AuditEntry("identity", layer.name, off / scale if scale else off, tolerance)


def _site_sums(linear: Linearisation, names: list[str], u: Tensors) -> tuple[float, float]:
    """(sum c (J u)^2 + the loss term, the same of absolute values)."""
    pushed, output = push(linear, [linear.objective.parameters[n] for n in names], [u[n] for n in names])
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


def push(linear: Linearisation, wrt: list[Any], along: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Dz along a direction, for every site, and df: J u as the derivative of <J^T v, u> with respect to v."""
    with torch.enable_grad():
        seeds = [torch.zeros_like(site.c, requires_grad=True) for site in linear.sites]
        output = torch.zeros_like(linear.outputs, requires_grad=True)
        pulled = linear.backward(seeds, output, wrt, create_graph=True)
        pairs = [(p, u) for p, u in zip(pulled, along) if p is not None and p.requires_grad]
        if not pairs:
            return [torch.zeros_like(s) for s in seeds], torch.zeros_like(output)
        found = torch.autograd.grad(
            [p for p, _ in pairs],
            [*seeds, output],
            [u for _, u in pairs],
            allow_unused=True,
            retain_graph=True,
        )
    full = [torch.zeros_like(s) if f is None else f for s, f in zip([*seeds, output], found)]
    return full[:-1], full[-1]


def _squares(linear: Linearisation, signs: Signs, tolerance: float) -> list[AuditEntry]:
    propagator = Propagator(linear)
    seeds = [signs.plain(site.c, _AUDIT, 1, number) for number, site in enumerate(linear.sites)]
    output = signs.plain(linear.outputs, _AUDIT, 2)
    each = propagator.each(seeds, output)
    names = [name for layer in linear.layers for name in (layer.weight, layer.bias) if name]
    worst = dict.fromkeys(names, 0.0)
    for n in range(linear.samples):
        only = [_one(seed, n) for seed in seeds]
        found = linear.backward(only, _one(output, n), [linear.objective.parameters[name] for name in names])
        for name, truth in zip(names, found):
            mine = each[name][n] if name in each else torch.zeros_like(linear.objective.parameters[name])
            expected = torch.zeros_like(mine) if truth is None else truth
            size = float(expected.double().norm()) or float(mine.double().norm()) or 1.0
            worst[name] = max(worst[name], float((mine - expected).double().norm()) / size)
    return [AuditEntry("squares", name, deviation, tolerance) for name, deviation in worst.items()]


def _one(seed: Tensor, sample: int) -> Tensor:
    """The cotangent of one sample alone."""
    out = torch.zeros_like(seed)
    out[sample] = seed[sample]
    return out


def _entries(
    linear: Linearisation, products: Products, layers: list[Layer], signs: Signs, tolerance: float
) -> list[AuditEntry]:
    outer, inner = exact.batch_diagonal(linear)
    generator = cpu_generator(signs.seed)
    entries = []
    for layer in layers:
        for name in (n for n in (layer.weight, layer.bias) if n):
            total = (outer[name] + inner[name]).reshape(-1)
            scale = float((outer[name].abs() + inner[name].abs()).max()) or 1.0
            worst = 0.0
            for k in torch.randint(0, total.numel(), (2,), generator=generator, device="cpu").tolist():
                unit = {n: torch.zeros_like(p) for n, p in linear.objective.parameters.items()}
                unit[name].reshape(-1)[k] = 1
                truth = float(products.hessian(unit)[name].reshape(-1)[k])
                off = abs(truth - float(total[k]))
                if off > tolerance * scale:
                    off = max(off - _entry_noise(linear, products, name), 0.0)
                worst = max(worst, off / scale)
            entries.append(AuditEntry("entries", name, worst, tolerance))
    return entries


def _entry_noise(linear: Linearisation, products: Products, name: str) -> float:
    outer, inner = exact.batch_diagonal(unit(linear.objective, products.inputs, products.targets, 0))
    return ROUNDINGS * torch.finfo(linear.outputs.dtype).eps * float((outer[name] + inner[name].abs()).max())


def _difference(objective: Objective, few: Numbered, signs: Signs) -> list[AuditEntry]:
    """Nothing where the model cannot be copied or run in float64."""
    try:
        moved = double_copy(objective)
        inputs, targets = as_double(few.inputs), as_double(few.targets)
        with torch.no_grad():
            moved.summed_loss(inputs, targets, index=few.index)
    except (HessdiagError, RuntimeError, TypeError, NotImplementedError):
        return []
    off = difference(moved, inputs, targets, few.index, signs, _AUDIT, 5)
    return [AuditEntry("difference", "the whole model", off, DIFFERENCE)]


def _symmetry(objective: Objective, products: Products, signs: Signs, tolerance: float) -> AuditEntry:
    u = {n: signs.plain(p, _AUDIT, 3, i) for i, (n, p) in enumerate(objective.parameters.items())}
    v = {n: signs.plain(p, _AUDIT, 4, i) for i, (n, p) in enumerate(objective.parameters.items())}
    hu, hv = products.hessian(u), products.hessian(v)
    left = sum(float((v[n].double() * hu[n].double()).sum()) for n in u)
    right = sum(float((u[n].double() * hv[n].double()).sum()) for n in u)
    size = sum(float((v[n].double() * hu[n].double()).abs().sum()) for n in u) or 1.0
    return AuditEntry("symmetry", "the whole model", abs(left - right) / size, tolerance)
