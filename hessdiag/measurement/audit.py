"""A measurement's own check, on a few samples and in float64 wherever the model can be copied.

What is compared, and relative to what, stands in `comparisons`; here which comparisons a method needs, and the verdict.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..diagonal import exact
from ..diagonal.hutchinson import Products
from ..errors import AuditError, HessdiagError
from ..forward import InDouble
from ..graph import Layer, Linearisation
from ..graph.nodes import forward_order, is_leaf
from ..objective import Objective
from ..persample import CallableLoss
from ..signs import Signs, cpu_generator
from ..stream import Numbered
from . import comparisons
from .comparisons import AuditEntry
from .derivatives import Probe, loss_quotients
from .plan import SITE_METHODS, as_double, double_copy

SAMPLES = 2
LAYERS = 8
TOLERANCE = {torch.float64: 1e-8, torch.float32: 5e-3}


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
        if self.passed:
            return
        failed = [entry for entry in self.entries if not entry.passed]
        first = next((e for check in _DERIVATIVES for e in failed if e.check == check), None)
        worst = self.worst if first is None else max(
            (e for e in failed if e.check == first.check), key=lambda e: e.deviation / e.tolerance
        )
        why = _DERIVATIVES.get(worst.check, "the model is not covered; use method='hutchinson'")
        where = repr(worst.layer) if worst.check in _DERIVATIVES else f"layer {worst.layer!r}"
        raise AuditError(
            f"the audit failed: {worst.check} of {where} is off by {worst.deviation:.2g} "
            f"(tolerance {worst.tolerance:.0e}): {why}"
        )


_DERIVATIVES = {
    "cut off": "the loss depends on these parameters, but no gradient reaches them (detach() or no_grad() in the "
    "model); leave them out (parameters=...), or freeze them by requires_grad_(False)",
    "loss": "autograd's derivatives of the loss are not the loss's (detach() or a custom function in it), and no "
    "method here can do without them",
    "slope": "autograd's gradient is not the model's (detach(), no_grad(), a straight-through estimator, a custom "
    "function with another gradient), and no method here can do without it",
    "difference": "autograd's second derivatives are not the model's (a custom function without one, a detach() in its "
    "backward), and no method here can do without them",
    "symmetry": "autograd's second derivatives are not symmetric, so they are not the model's (torch's own slip in an "
    "operation, or a custom function), and no method here can do without them",
}
"""Checks of derivatives that every method rests on, those that explain the others first."""


@dataclass(frozen=True)
class _Twin:
    """What is audited: a copy in float64 where there can be one, and the arithmetic that keeps it in double."""

    objective: Objective
    few: Numbered
    arithmetic: Callable[[], AbstractContextManager[Any]]
    dtype: torch.dtype
    moved: tuple[Objective, Numbered] | None
    """A copy that runs in double, and samples for it: the parameters of a user's own model are not moved."""


def audit(objective: Objective, first: Numbered, *, method: str, seed: int) -> Audit:
    """Check `method` on the first samples of the data."""
    twin = _twin(objective, first.few(SAMPLES))
    with twin.arithmetic():
        entries = _entries(twin, method, Signs(seed, twin.objective.device))
    return Audit(tuple(entries), len(twin.few.targets), str(twin.dtype).removeprefix("torch."))


def _entries(twin: _Twin, method: str, signs: Signs) -> list[AuditEntry]:
    objective, few, tolerance = twin.objective, twin.few, TOLERANCE[twin.dtype]
    if method not in SITE_METHODS:
        products = Products(objective, few.inputs, few.targets, index=few.index, parts=False)
        entries = [comparisons.symmetry(objective, products, signs, tolerance)]
        outputs = products._outputs
    else:
        linear = Linearisation(objective, few.inputs, few.targets, index=few.index)
        exact.check_separate(linear)
        products = Products(objective, few.inputs, few.targets, index=few.index, parts=False)
        chosen, outputs = choose_layers(linear, signs), linear.outputs
        forward = comparisons.Forward(linear, list(objective.parameters.values()))
        entries = [comparisons.identity(linear, forward, layer, products, signs, tolerance) for layer in chosen]
        entries += comparisons.squares(linear, signs, tolerance)
        if method == "exact":
            entries += comparisons.entries(linear, products, chosen, signs, tolerance)
        else:
            entries += comparisons.closed(linear, forward, chosen, signs, tolerance)
    if isinstance(objective.loss, CallableLoss):
        off = loss_quotients(objective.loss, outputs, few.targets)
        entries.append(AuditEntry("loss", objective.loss.name, off, comparisons.DIFFERENCE))
    if twin.moved is not None:
        entries += comparisons.quotients(*twin.moved, signs)
    return entries


def _twin(objective: Objective, few: Numbered) -> _Twin:
    """The first of these that runs: in double throughout, in double with shorter parts, or the model as it is.

    Where only the loss insists on another dtype, derivatives of the model are still compared in double.
    """
    own = _Twin(objective, few, nullcontext, objective.dtype, None)
    try:
        copied = double_copy(objective)
        double = replace(few, inputs=as_double(few.inputs), targets=as_double(few.targets))
        probe = copy.copy(copied)
        probe.loss = Probe()
        shortest = _shortest(probe, double)
    except (HessdiagError, RuntimeError, TypeError, NotImplementedError):
        return own
    arithmetic: Callable[[], AbstractContextManager[Any]] = nullcontext
    if shortest != torch.float64:  # norms computed in float32, and the like
        with contextlib.suppress(HessdiagError, RuntimeError, TypeError), InDouble():  # type: ignore[no-untyped-call]
            shortest = _shortest(probe, double)
            arithmetic = InDouble
    moved = (probe, double) if shortest == torch.float64 else None
    try:
        with torch.no_grad():
            copied.summed_loss(double.inputs, double.targets, index=double.index)
    except (HessdiagError, RuntimeError, TypeError):
        return replace(own, moved=moved if arithmetic is nullcontext else None)
    return _Twin(copied, double, arithmetic, shortest, moved)


def _shortest(objective: Objective, few: Numbered) -> torch.dtype:
    """The shortest dtype among the nodes of a model's graph, float32 at the least."""
    with torch.enable_grad():
        outputs = objective.outputs(few.inputs, few.targets, index=few.index)
    inner = [node for node in forward_order(outputs.grad_fn) if not is_leaf(node)]
    found = {meta.dtype for node in inner for meta in node._input_metadata}
    return torch.float32 if found & {torch.float32, torch.float16, torch.bfloat16} else torch.float64


def choose_layers(linear: Linearisation, signs: Signs) -> list[Layer]:
    """Every layer with no layer below it, every parameter outside the known kinds, the last, and a draw of the rest."""
    layers = linear.layers
    if len(layers) <= LAYERS:
        return layers
    first = [layer for layer in layers if linear.graph.is_first(layer)]
    odd = [layer for layer in layers if layer.kind.always_audited]
    chosen = {id(layer): layer for layer in [*first, *odd, layers[-1]]}
    order = torch.randperm(len(layers), generator=cpu_generator(signs.seed), device="cpu").tolist()
    for number in order:
        if len(chosen) >= LAYERS:
            break
        chosen.setdefault(id(layers[number]), layers[number])
    return [layer for layer in layers if id(layer) in chosen]
