"""What is computed on one batch, by each method: the exact part, and one replicate of every stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..diagonal import exact, hutchinson, reference
from ..diagonal.deflation import Deflation
from ..diagonal.parts import Tensors, accumulate
from ..diagonal.propagation import Propagator
from ..errors import NotDeterministicError
from ..graph import Linearisation
from ..objective import Objective
from ..signs import Signs
from ..stream import Numbered, fingerprint
from .plan import KEEP_BYTES, Plan

Tell = Callable[[int, int], None]


class Passes:
    """A method at work; the graph of a batch serves all its replicates, for good if it is the only batch."""

    def __init__(self, objective: Objective, plan: Plan, signs: Signs, *, batches: int) -> None:
        self.objective, self.plan, self.signs, self.batches = objective, plan, signs, batches
        self._prepared: Any = None
        self._deflations: dict[int, tuple[Tensor, Deflation | None]] = {}  # by first sample, with its fingerprints

    def forget(self) -> None:
        """Let go of the graph that was kept."""
        self._prepared = None

    def known(self, batch: Numbered, tell: Tell) -> tuple[Tensors | None, Tensors]:
        """(Gauss-Newton part, functional part) as far as they are exact, summed over the batch."""
        plan = self.plan
        if plan.method == "reference":
            total, outer, _, _ = reference.batch_diagonal(
                self.objective,
                batch.inputs,
                batch.targets,
                index=batch.index,
                progress=tell,
            )
            return outer, {name: total[name] - outer[name] for name in total}
        linear = Linearisation(self.objective, batch.inputs, batch.targets, index=batch.index, balance=plan.balance)
        if plan.method == "exact":
            return exact.batch_diagonal(linear, progress=tell)
        exact.check_separate(linear)
        propagator = self._propagator(linear, batch)
        functional = propagator.direct()
        accumulate(functional, propagator.deflated())
        return (propagator.gauss_newton() if plan.gauss_newton == "exact" else None), functional

    def replicate(self, batch: Numbered, r: int) -> dict[str, Tensors]:
        """Replicate number `r` of every stream, summed over the batch."""
        if self.plan.method == "hutchinson":
            return self._hutchinson(batch, r)
        propagator = self._prepare(
            batch,
            lambda: self._propagator(
                Linearisation(
                    self.objective, batch.inputs, batch.targets, index=batch.index, balance=self.plan.balance
                ),
                batch,
            ),
        )
        functional: Tensors = propagator.functional(self.signs, r)
        if self.plan.gauss_newton == "exact":
            return {"functional": functional}
        outer = propagator.gauss_newton_signed(self.signs, r)
        return {
            "functional": functional,
            "gauss_newton": outer,
            "total": {name: functional[name] + outer[name] for name in outer},
        }

    def _hutchinson(self, batch: Numbered, r: int) -> dict[str, Tensors]:
        products = self._prepare(
            batch,
            lambda: hutchinson.Products(
                self.objective, batch.inputs, batch.targets, index=batch.index, parts=self.plan.parts
            ),
        )
        v = hutchinson.probe(self.objective, self.signs, r)
        total = {name: (v[name] * hv).double() for name, hv in products.hessian(v).items()}
        if not self.plan.parts:
            return {"total": total}
        outer = {name: (v[name] * gv).double() for name, gv in products.gauss_newton(v).items()}
        return {"total": total, "gauss_newton": outer, "functional": {n: total[n] - outer[n] for n in total}}

    def _propagator(self, linear: Linearisation, batch: Numbered) -> Propagator:
        keep = self.batches == 1 and _patch_bytes(linear) <= KEEP_BYTES
        propagator = Propagator(linear, start=batch.start, groups=self.plan.sample_groups, keep=keep)
        if self.plan.deflate:
            self._deflate(propagator, batch)
        if self.batches == 1:
            self._prepared = (batch.start, propagator)
        return propagator

    def _deflate(self, propagator: Propagator, batch: Numbered) -> None:
        """Give a propagator the directions that belong to its batch: what is exact of them was counted once."""
        marks = fingerprint(batch.inputs, batch.targets)
        if batch.start not in self._deflations:
            self._deflations[batch.start] = (marks, propagator.deflate(self.signs, self.plan.deflate))
        seen, propagator.deflation = self._deflations[batch.start]
        if not torch.allclose(seen, marks, rtol=1e-9, atol=1e-9 * float(seen.abs().max())):  # a sum's order may differ
            raise NotDeterministicError(
                f"batch {batch.index}: other samples than before; a plan with deflate={self.plan.deflate} needs the "
                "samples in one order: do not shuffle, or give a plan with deflate=0"
            )

    def _prepare(self, batch: Numbered, make: Callable[[], Any]) -> Any:
        """The graph of a batch, kept for all replicates of the batch (and for good if it is the only one)."""
        if self._prepared is None or self._prepared[0] != batch.start:  # one batch may have been cut in two
            self._prepared = None
            self._prepared = (batch.start, make())
        return self._prepared[1]


def _patch_bytes(batch: Linearisation) -> int:
    """Bytes that layers hold between passes, if told to keep them."""
    return sum(layer.kind.kept_bytes(layer) for layer in batch.layers)
