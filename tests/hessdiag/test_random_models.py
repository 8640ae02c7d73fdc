"""Random models by seed, every method's numbers against one Hessian-vector product for each parameter.

What a model may hold is said in `random_models`; none of it is refused but for its named reasons. Blocks, chunks and
columns are forced small in every other model, since paths that switch with size are not seen on small ones otherwise.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from gate import one_hot
from random_models import Case, draw
from torch import Tensor

import hessdiag as hd
from hessdiag.errors import HessdiagError
from hessdiag.graph import Linearisation
from hessdiag.kernels import exact_batch as exact
from hessdiag.kernels.propagator import Propagator
from hessdiag.kernels.tensors import Tensors, accumulate, zeros
from hessdiag.methods import reference
from hessdiag.signs import Signs

torch.set_num_threads(1)

FEW, MANY = range(6), range(6, 150)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3}
"""float32: a LayerNorm of two entries loses three digits."""
ZERO = 1e-13
"""One number added to all logits bends nothing: both sides are rounding."""
ENTRIES = 100
"""Of sites, up to which every one-hot vector is tried."""
LARGE = 200
SIZES = {
    "hessdiag.graph.chunks.CHUNK": 64,
    "hessdiag.problem.persample.WRITTEN": 10,
    "hessdiag.kernels.entering.KEEP_ROOTS": 0,
    "hessdiag.kernels.exact_batch.CLOSE": 2000,
    "hessdiag.kernels.exact_batch.CACHED": 100,
    "hessdiag.kernels.price.BLOCK": 2,
    "hessdiag.graph.layers.conv.BANDED": 0,
}
TOGETHER: dict[int, dict[str, float]] = {
    1: {"hessdiag.kernels.exact_batch.NODE": 0.0},
    3: {"hessdiag.kernels.exact_batch.NODE": 1e12, "hessdiag.kernels.exact_batch.NEAR": 1 << 40},
}
"""By the seed modulo 4: no layers share a pass, or all that can."""


def cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if x.is_floating_point() else x


def near(what: str, found: Tensors, wanted: Tensors, size: Tensors, tolerance: float) -> None:
    """Entry by entry, relative to the largest of its tensor, or to a thousandth of the largest of all."""
    whole = max(float(s.abs().max()) for s in size.values())
    for name, truth in wanted.items():
        off = float((found[name].double() - truth).abs().max())
        scale = float(size[name].abs().max()) + 1e-3 * whole
        assert off <= tolerance * scale + ZERO, (what, name, off, scale)


def signed(propagator: Propagator) -> Tensors:
    """The Gauss-Newton part by signs, on average."""
    out, curvature = zeros(propagator.batch.objective.parameters), propagator.batch.curvature
    for column in range(len(curvature.signs)):
        unit = torch.zeros(len(curvature.signs), propagator.batch.samples, dtype=torch.float64)
        unit[column] = 1
        accumulate(out, propagator.gauss_newton_beyond(unit))
    accumulate(out, propagator.heads())
    return out


def in_groups(propagator: Propagator) -> Tensors:
    """Samples summed before they are squared: each entry of each sample alone."""
    out, batch = zeros(propagator.batch.objective.parameters), propagator.batch
    for place, site in enumerate(batch.sites):
        for entry in range(site.c.numel()):
            owners = [1 if number in batch.free else batch.samples for number in range(len(batch.sites))]
            unit = [torch.zeros(n, s.c.numel() // n, dtype=s.c.dtype) for n, s in zip(owners, batch.sites)]
            unit[place].view(-1)[entry] = 1
            accumulate(out, propagator.beyond(unit))
    for part in (propagator.direct(), propagator.gauss_newton()):
        accumulate(out, part)
    return out


def deflated(propagator: Propagator) -> Tensors:
    propagator.deflate(Signs(0), 3)
    out = one_hot(propagator)
    accumulate(out, propagator.deflated())
    return out


def compare(case: Case, batch: tuple[Any, Tensor], dtype: torch.dtype, seed: int) -> None:
    """Both methods on one batch, whole and in parts."""
    x, y = batch
    truth, outer, _, _ = reference.batch_diagonal(hd.Objective(copy.deepcopy(case.model), **case.options), x, y)
    inner = {name: truth[name] - outer[name] for name in truth}
    size = {name: outer[name].abs() + inner[name].abs() for name in truth}
    own = hd.Objective(copy.deepcopy(case.model).to(dtype), **case.options)
    linear, tolerance = Linearisation(own, cast(x, dtype), cast(y, dtype)), TOLERANCE[dtype]
    exact.check_separate(linear)
    for each in (False, True):
        if each and linear.free:
            continue
        parts = exact.batch_diagonal(linear, per_sample=each, memory=3000)
        for what, found, wanted in zip(("outer", "inner"), parts, (outer, inner)):
            summed = {name: t.sum(0) for name, t in found.items()} if each else found
            near(f"exact, {what}", summed, wanted, size, tolerance)
    near("signed", signed(Propagator(linear)), outer, size, tolerance)
    entries = [site.c.numel() // (1 if n in linear.free else linear.samples) for n, site in enumerate(linear.sites)]
    if sum(entries) <= (ENTRIES if dtype == torch.float64 else ENTRIES // 4):
        near("propagation", one_hot(Propagator(linear)), truth, size, tolerance)
        if dtype == torch.float64 and seed % 3 == 0:
            near("deflated", deflated(Propagator(linear, keep=True)), truth, size, 1e-7)
        if dtype == torch.float64 and seed % 5 == 0:
            groups = {layer.name: 2 for layer in linear.layers}
            near("in groups", in_groups(Propagator(linear, groups=groups)), truth, size, tolerance)


def check(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = draw(seed, samples=2 + seed % 2, longest=3 + seed % 4)
    if seed % 2:
        for name, size in (SIZES | TOGETHER[seed % 4]).items():
            monkeypatch.setattr(name, size)
    try:
        if seed % 4 == 1:  # some of the parameters alone: the rest are constants
            names = [name for name, p in case.model.named_parameters() if p.requires_grad]
            case.options["parameters"] = names[:: 2 if len(names) > 1 else 1]
        objective = hd.Objective(case.model, **case.options)
    except HessdiagError as error:
        assert "no parameters" in str(error)  # noqa: PT017
        return
    if objective.size > LARGE:
        return
    for batch in case.batches[: 2 if seed % 2 else 1]:
        compare(case, batch, torch.float64, seed)
    compare(case, case.batches[0], torch.float32, seed)
    if seed % 3 == 0:
        for dtype in TOLERANCE:
            own = hd.Objective(copy.deepcopy(case.model).to(dtype), **case.options)
            batches = [(cast(x, dtype), cast(y, dtype)) for x, y in case.batches]
            found, wanted = (hd.diagonal(own, batches, method=method).total for method in ("exact", "reference"))
            near(
                "all batches", found, wanted, {n: t + 0.1 * t.abs().max() for n, t in wanted.items()}, TOLERANCE[dtype]
            )
            assert hd.measure(own, batches, method="propagation", max_replicates=10).plan.method == "propagation"


@pytest.mark.parametrize("seed", FEW)
def test_random_models(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(seed, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("seed", MANY)
def test_many_random_models(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(seed, monkeypatch)
