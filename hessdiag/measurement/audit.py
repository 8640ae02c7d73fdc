"""A measurement's own check, on a few samples and in float64 wherever the model can be copied.

What is compared, and relative to what, stands in `comparisons`; here which comparisons a method needs, and the verdict.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..diagonal.hutchinson import Products
from ..errors import AuditError, HessdiagError
from ..objective import Objective
from ..signs import Signs, cpu_generator
from ..sites import Layer, Linearisation
from ..stream import Numbered
from . import comparisons
from .comparisons import AuditEntry
from .plan import as_double, double_copy

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
    few = first.few(SAMPLES)
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
        entries = [comparisons.symmetry(twin, products, signs, tolerance)]
        entries += comparisons.quotients(objective, few, signs)
    else:
        chosen = choose_layers(linear, signs)
        entries = [comparisons.identity(linear, layer, products, signs, tolerance) for layer in chosen]
        entries += comparisons.squares(linear, signs, tolerance)
        if method == "exact":
            entries += comparisons.entries(linear, products, chosen, signs, tolerance)
    return Audit(tuple(entries), len(few.targets), str(twin.dtype).removeprefix("torch."))


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
