"""A measurement's own check, on a few samples and in float64 wherever the model runs so, copied or lent (see `copies`).

What is compared, and relative to what, stands in `comparisons`; here which comparisons a method needs, and the verdict.
What could not be compared does not pass: it is named in the result's notes, and refuses nothing.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hessdiag.errors import AuditError, HessdiagError, ran_out
from hessdiag.graph import Layer, Linearisation
from hessdiag.kernels.products import Products
from hessdiag.kernels.tensors import Tensors
from hessdiag.measuring import comparisons
from hessdiag.measuring.autograd_check import Moved, Probe, WritesError, loss_quotients
from hessdiag.measuring.comparisons import AuditEntry
from hessdiag.measuring.copies import come_from, copied, is_scripted, lent, set_apart
from hessdiag.measuring.ranks import World
from hessdiag.measuring.rounding import shortest, uneven
from hessdiag.methods import Aim, Case, Method, find
from hessdiag.methods.batches import Numbered, survey
from hessdiag.problem.forward import in_double, mapped
from hessdiag.problem.objective import Objective
from hessdiag.problem.persample import CallableLoss
from hessdiag.signs import Signs, cpu_generator

SAMPLES = 2
LAYERS = 8
TOLERANCE = {torch.float64: 1e-8, torch.float32: 5e-3}


@dataclass(frozen=True)
class Audit:
    """All comparisons of one measurement."""

    entries: tuple[AuditEntry, ...]
    samples: int
    dtype: str
    cramped: bool = False
    """Whether the model in double did not fit in memory, so that all was compared in its own precision."""

    @property
    def passed(self) -> bool:
        """Whether every comparison could be made, and agreed."""
        return all(entry.passed for entry in self.entries)

    def and_of(self, other: Audit) -> Audit:
        """This one and that of other samples."""
        dtype = min(self.dtype, other.dtype)  # float32 before float64
        entries, samples = self.entries + other.entries, self.samples + other.samples
        return Audit(entries, samples, dtype, cramped=self.cramped or other.cramped)

    @property
    def worst(self) -> AuditEntry:
        """The comparison that came nearest to (or went furthest beyond) its tolerance; of those that were made."""
        return max(self.entries, key=lambda e: -1.0 if e.deviation is None else e.beyond)

    @property
    def left_out(self) -> tuple[AuditEntry, ...]:
        """What could not be compared."""
        return tuple(entry for entry in self.entries if entry.deviation is None)

    @property
    def notes(self) -> list[str]:
        """What a result has to say of it, besides."""
        names = [f"{entry.check} of {entry.layer!r}" for entry in self.left_out if entry.check != "loss"]
        some = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        why = "nothing of it runs in float64, and float32 leaves it open"
        told = [f"not compared with difference quotients: {some} ({why})"] if names else []
        told += [
            f"not compared with difference quotients: the loss {entry.layer!r} (it does not run at outputs moved a "
            "little; if these are probabilities, let the model give logits, and name the loss: cross_entropy, bce)"
            for entry in self.left_out
            if entry.check == "loss"
        ]
        if self.cramped:
            told.append(f"audited in {self.dtype}: the model in float64 did not fit in memory")
        return told

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        entries = [asdict(e) | {"passed": e.passed} for e in self.entries]
        return {"passed": self.passed, "samples": self.samples, "dtype": self.dtype, "entries": entries}

    def require(self) -> None:
        """Raise AuditError naming the layer, unless everything that could be compared agreed."""
        failed = [entry for entry in self.entries if not entry.passed and entry.deviation is not None]
        if not failed:
            return
        first = next((e for check in _DERIVATIVES for e in failed if e.check == check), None)
        worst = (
            self.worst if first is None else max((e for e in failed if e.check == first.check), key=lambda e: e.beyond)
        )
        why = (_DERIVATIVES | _METHOD).get(worst.check, "the model is not covered; use method='hutchinson'")
        where = f"layer {worst.layer!r}" if worst.check not in _DERIVATIVES | _METHOD else repr(worst.layer)
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
_METHOD = {
    "own": "what the method gives are not the entries of the Hessian's diagonal; the method is wrong, or this model "
    "is not one for it"
}
"""Of a method by its own numbers."""


Arithmetic = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class _Twin:
    """What is audited: the model in float64 where it runs so, and the arithmetic that keeps it in double.

    Its parameters stand a little off the model's (see `autograd_check`), so that one forward pass serves all
    comparisons.
    """

    objective: Objective
    few: Numbered
    arithmetic: Arithmetic
    dtype: torch.dtype
    moved: Moved | None = None
    """Of a twin, whose quotients are taken in the arithmetic `lifted`; None where there is no twin."""
    lifted: Arithmetic = nullcontext
    outputs: Tensor | None = None
    """Of the twin, with their graph; None where the model itself is looked at."""
    cramped: bool = False


class Checks:
    """The comparisons that a method may ask for, on one linearisation and one graph of the gradient."""

    def __init__(self, twin: _Twin, seed: int) -> None:
        self.objective, self.few, self.seed = twin.objective, twin.few, seed
        self.signs = Signs(seed, twin.objective.device)
        self.tolerance = TOLERANCE[twin.dtype]
        self._twin = twin

    @cached_property
    def _read(self) -> tuple[Linearisation, list[AuditEntry]]:
        few, outputs = self.few, self._twin.outputs
        linear = Linearisation(self.objective, few.inputs, few.targets, index=few.index, outputs=outputs)
        return linear, comparisons.squares(linear, self.signs, self.tolerance)

    @property
    def linear(self) -> Linearisation:
        """The few samples, linearised, which do not meet."""
        return self._read[0]

    @cached_property
    def products(self) -> Products:
        """Hessian-vector products of the few samples."""
        few, outputs = self.few, self._twin.outputs
        return Products(self.objective, few.inputs, few.targets, index=few.index, parts=False, outputs=outputs)

    @cached_property
    def forward(self) -> comparisons.Forward:
        """Products J u with directions of all parameters."""
        return comparisons.Forward(self.linear, list(self.objective.parameters.values()))

    @cached_property
    def directions(self) -> Tensors:
        """One random direction of all parameters; the comparisons of derivatives, which come last, use it up."""
        moved = self._twin.moved
        if moved is None or self._twin.outputs is None:
            return random_directions(self.objective, self.signs)
        return moved.directions

    @cached_property
    def layers(self) -> list[Layer]:
        """The layers that are looked at."""
        return choose_layers(self.linear, self.signs)

    @property
    def outputs(self) -> Tensor:
        """The model's outputs for the few samples, from whichever graph there is."""
        return self.products.outputs if self._twin.outputs is None else self._twin.outputs

    def symmetry(self) -> AuditEntry:
        """Of the double backward."""
        return comparisons.symmetry(self.objective, self.products, self.signs, self.tolerance)

    def identity(self) -> list[AuditEntry]:
        """The site identity, layer by layer."""
        given = self.linear, self.forward, self.products, self.directions, self.tolerance
        return [comparisons.identity(layer, *given) for layer in self.layers]

    def squares(self) -> list[AuditEntry]:
        """The layers' per-sample gradients."""
        return self._read[1]

    def sums(self) -> list[AuditEntry]:
        """The squares that signed passes add up."""
        return comparisons.sums(self.linear, self.signs, self.tolerance)

    def closed(self) -> list[AuditEntry]:
        """Closed shares of the functional part."""
        return comparisons.closed(self.linear, self.forward, self.layers, self.signs, self.tolerance)

    def heads(self) -> list[AuditEntry]:
        """Closed shares of the Gauss-Newton part."""
        return comparisons.heads(self.linear, self.forward, self.layers, self.signs, self.tolerance)

    def entries(self, diagonal: Callable[[Linearisation], tuple[Tensors, Tensors]]) -> list[AuditEntry]:
        """Entries of a diagonal that a linearisation gives, in its two parts."""
        return comparisons.entries(self.linear, self.products, self.layers, self.signs, self.tolerance, diagonal)

    def own_entries(self, method: Method) -> list[AuditEntry]:
        """Entries of what `method` itself gives for the few samples, whatever it rests on."""
        pair = [(self.few.inputs, self.few.targets)]
        case = Case(self.objective, pair, survey(self.objective, pair), replace(self.few, start=0), self.seed, World())
        case.chosen = method.plan(case, Aim(replicates=comparisons.OWN_REPLICATES), "audit")
        return comparisons.own(case, method, self.products, self.signs, max(self.tolerance, method.tolerance))


def audit(objective: Objective, first: Numbered, *, method: str, seed: int) -> Audit:
    """Check `method` on the first samples of the data."""
    few, signs = first.few(SAMPLES), Signs(seed, objective.device)
    with ExitStack() as held:
        twin = _twin(objective, few, signs, held)
        with twin.arithmetic():
            checks = Checks(twin, seed)
            entries = list(find(method).audit(checks))
            if isinstance(objective.loss, CallableLoss):
                off = loss_quotients(objective.loss, checks.outputs, twin.few.targets)
                entries.append(AuditEntry("loss", objective.loss.name, off, comparisons.DIFFERENCE))
            del checks  # with its graphs
        if twin.moved is not None:
            with twin.lifted():
                entries += comparisons.quotients(twin.moved)
    if twin.moved is None:
        entries += _where_it_stands(objective, few, signs)
    dtype = str(twin.dtype).removeprefix("torch.")
    return Audit(tuple(entries), len(twin.few.targets), dtype, cramped=twin.cramped)


_FAILURES = (HessdiagError, RuntimeError, TypeError, NotImplementedError)


def _twin(objective: Objective, few: Numbered, signs: Signs, held: ExitStack) -> _Twin:
    """The first of these that runs: a copy in double, the model itself lent in double, the model as it is.

    Conversions to float32 and constants of it, in the model or in a loss of the user's own, are lifted where that is
    what they need to be in double. Where only the loss insists on another dtype, or a copy shares no graph with the
    model (scripted code), derivatives of the model are still compared in double. `held` gives the model back.
    """
    own = _Twin(objective, few, nullcontext, objective.dtype)
    double = replace(few, inputs=_as_double(few.inputs), targets=_as_double(few.targets))
    originals, cramped = list(objective.model.parameters()), False
    for way in (copied, lent):
        with ExitStack() as stack:
            try:
                doubled = stack.enter_context(way(objective))
                probe = copy.copy(doubled)
                probe.loss = Probe()
                moved = Moved(probe, double, random_directions(doubled, signs))
                with moved.staying():
                    ran = _run_in_double(probe, double)
            except WritesError:
                raise
            except (*_FAILURES, MemoryError) as error:
                cramped |= ran_out(error)
                continue
            if ran is None or come_from(ran[0], originals):
                continue
            held.push(stack.pop_all())
            moved.outputs, lifted = ran
            found = None if is_scripted(objective.model) else _of_loss(doubled, double, ran[0], lifted)
            if found is None:
                return replace(own, moved=moved, lifted=lifted)
            arithmetic, lossy = found
            dtype = min(lossy, shortest(moved.outputs), key=lambda one: one.itemsize)
            return _Twin(doubled, double, arithmetic, dtype, moved, lifted, moved.outputs)
    return replace(own, cramped=cramped)


def _run_in_double(probe: Objective, double: Numbered) -> tuple[Tensor, Arithmetic] | None:
    """Outputs with their graph, fit for two derivatives, and the arithmetic: the first in which all of it is in double,
    or else in which it runs at all.
    """
    found = None
    for arithmetic in (nullcontext, in_double):  # norms computed in float32, and the like
        try:
            with arithmetic():
                outputs = _run(probe, double)
        except _FAILURES as error:
            if ran_out(error):
                raise
            continue
        if shortest(outputs) == torch.float64:
            return outputs, arithmetic
        found = found or (outputs, arithmetic)
    return found


def _of_loss(
    doubled: Objective, double: Numbered, outputs: Tensor, lifted: Arithmetic
) -> tuple[Arithmetic, torch.dtype] | None:
    """How the loss of double outputs is computed in double, or else how it runs at all.

    A loss known by name is computed in the dtype of what it is given; of a callable's the graph says what it rounds.
    """
    found, recorded = None, isinstance(doubled.loss, CallableLoss)
    for way in dict.fromkeys((lifted, in_double)):
        with contextlib.suppress(*_FAILURES), way(), torch.set_grad_enabled(recorded):
            doubled.loss.check(outputs, double.targets)
            losses, _ = doubled.summed_losses(
                outputs.detach().requires_grad_(recorded), double.targets, index=double.index
            )
            dtype = shortest(losses)
            found = found or (way, dtype)
            if dtype == torch.float64:
                return way, dtype
    return found


def _where_it_stands(objective: Objective, few: Numbered, signs: Signs) -> list[AuditEntry]:
    """Quotients of the model itself, whose parameters are moved and put back; what cannot be compared, as such."""
    probe = copy.copy(objective)
    probe.loss = Probe()
    try:
        with set_apart(objective.parameters):
            moved = Moved(probe, few, random_directions(objective, signs), whole=True)
            with moved.staying():
                moved.outputs = _run(probe, few)
            return comparisons.quotients(moved)
    except WritesError:
        raise
    except _FAILURES:
        pass
    names = ["the whole model", *objective.parameters]
    tolerances = [comparisons.SLOPE] + [comparisons.DIFFERENCE] * len(objective.parameters)
    checks = ["slope"] + ["difference"] * len(objective.parameters)
    return [AuditEntry(check, name, None, most) for check, name, most in zip(checks, names, tolerances)]


PERIOD = 4099
"""Random signs of a direction, after which they come again: a prime, so that no two rows of a matrix are alike."""


def random_directions(objective: Objective, signs: Signs) -> Tensors:
    """Random signs for all parameters, each entry of another size: see `uneven`."""
    found = {}
    for number, (name, p) in enumerate(objective.parameters.items()):
        drawn = uneven(signs.plain(p.new_empty(min(p.numel(), PERIOD)), comparisons.AUDIT, number))
        found[name] = drawn.repeat(-(-p.numel() // PERIOD))[: p.numel()].reshape(p.shape)
    return found


def _as_double(value: Any) -> Any:
    """Floating-point tensors of a structure in float64."""
    return mapped(value, lambda x: x.double() if x.is_floating_point() else x)


def _run(objective: Objective, few: Numbered) -> Tensor:
    """Outputs with their graph, fit for two derivatives."""
    with torch.enable_grad():
        return objective.outputs(few.inputs, few.targets, index=few.index)


def choose_layers(linear: Linearisation, signs: Signs) -> list[Layer]:
    """Every layer with no layer below it, every parameter outside the known kinds, the last, and a draw of the rest."""
    layers = linear.graph.owners()
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
