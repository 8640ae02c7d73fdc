"""A measurement's own check, on a few samples and in float64 wherever the model can be copied.

What is compared, and relative to what, stands in `comparisons`; here which comparisons a method needs, and the verdict.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.errors import AuditError, HessdiagError, UncoveredModelError
from hessdiag.graph import Layer, Linearisation
from hessdiag.kernels.products import Products
from hessdiag.kernels.tensors import Tensors
from hessdiag.measuring import comparisons
from hessdiag.measuring.autograd_check import Moved, Probe, loss_quotients
from hessdiag.measuring.comparisons import AuditEntry
from hessdiag.measuring.ranks import World
from hessdiag.measuring.rounding import shortest, uneven
from hessdiag.methods import Aim, Case, Method, find
from hessdiag.methods.batches import Numbered, survey
from hessdiag.problem.forward import InDouble, mapped
from hessdiag.problem.objective import Objective
from hessdiag.problem.persample import CallableLoss
from hessdiag.problem.sparse import is_dense
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
        worst = (
            self.worst
            if first is None
            else max((e for e in failed if e.check == first.check), key=lambda e: e.deviation / e.tolerance)
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


@dataclass(frozen=True)
class _Twin:
    """What is audited: a copy in float64 where there can be one, and the arithmetic that keeps it in double.

    The copy's parameters stand a little off the model's (see `autograd_check`), so that one forward pass serves all
    comparisons.
    """

    objective: Objective
    few: Numbered
    arithmetic: Callable[[], AbstractContextManager[Any]]
    dtype: torch.dtype
    moved: Moved | None = None
    """A copy that runs in double: the parameters of a user's own model are not moved."""
    outputs: Tensor | None = None
    """Of the copy, with their graph."""


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
    twin = _twin(objective, first.few(SAMPLES), Signs(seed, objective.device))
    with twin.arithmetic():
        checks = Checks(twin, seed)
        entries = list(find(method).audit(checks))
        if isinstance(objective.loss, CallableLoss):
            off = loss_quotients(objective.loss, checks.outputs, twin.few.targets)
            entries.append(AuditEntry("loss", objective.loss.name, off, comparisons.DIFFERENCE))
        del checks  # with its graphs
        if twin.moved is not None:
            entries += comparisons.quotients(twin.moved)
    return Audit(tuple(entries), len(twin.few.targets), str(twin.dtype).removeprefix("torch."))


def _twin(objective: Objective, few: Numbered, signs: Signs) -> _Twin:
    """The first of these that runs: in double throughout, in double with shorter parts, or the model as it is.

    Conversions to float32, in the model or in a loss of the user's own, are lifted where that is what they need to be
    in double. Where only the loss insists on another dtype, derivatives of the model are still compared in double.
    """
    own = _Twin(objective, few, nullcontext, objective.dtype)
    try:
        copied = double_copy(objective)
        double = replace(few, inputs=_as_double(few.inputs), targets=_as_double(few.targets))
        probe = copy.copy(copied)
        probe.loss = Probe()
        moved = Moved(probe, double, random_directions(copied, signs))
        outputs = _run(probe, double)
    except (HessdiagError, RuntimeError, TypeError, NotImplementedError):
        return own
    dtype = shortest(outputs)
    ways: list[Callable[[], AbstractContextManager[Any]]] = [nullcontext, InDouble]
    if dtype != torch.float64:  # norms computed in float32, and the like
        ways = [nullcontext]
        with contextlib.suppress(HessdiagError, RuntimeError, TypeError), InDouble():  # type: ignore[no-untyped-call]
            outputs = _run(probe, double)
            dtype = shortest(outputs)
            ways = [InDouble]
    moved.outputs = outputs
    compared = moved if dtype == torch.float64 else None
    found = _of_loss(copied, double, outputs, ways)
    if found is None:
        return replace(own, moved=None if ways == [InDouble] else compared)
    arithmetic, lossy = found
    return _Twin(copied, double, arithmetic, dtype if lossy == torch.float64 else lossy, compared, outputs)


def _of_loss(
    copied: Objective, double: Numbered, outputs: Tensor, ways: list[Callable[[], AbstractContextManager[Any]]]
) -> tuple[Callable[[], AbstractContextManager[Any]], torch.dtype] | None:
    """The first of `ways` in which the loss of double outputs is computed in double, or else in which it runs at all.

    A loss known by name is computed in the dtype of what it is given; of a callable's the graph says what it rounds.
    """
    found, recorded = None, isinstance(copied.loss, CallableLoss)
    for way in ways:
        with contextlib.suppress(HessdiagError, RuntimeError, TypeError), way(), torch.set_grad_enabled(recorded):
            copied.loss.check(outputs, double.targets)
            losses, _ = copied.summed_losses(
                outputs.detach().requires_grad_(recorded), double.targets, index=double.index
            )
            dtype = shortest(losses)
            found = found or (way, dtype)
            if dtype == torch.float64:
                return way, dtype
    return found


PERIOD = 4099
"""Random signs of a direction, after which they come again: a prime, so that no two rows of a matrix are alike."""


def random_directions(objective: Objective, signs: Signs) -> Tensors:
    """Random signs for all parameters, each entry of another size: see `uneven`."""
    found = {}
    for number, (name, p) in enumerate(objective.parameters.items()):
        drawn = uneven(signs.plain(p.new_empty(min(p.numel(), PERIOD)), comparisons.AUDIT, number))
        found[name] = drawn.repeat(-(-p.numel() // PERIOD))[: p.numel()].reshape(p.shape)
    return found


def double_copy(objective: Objective) -> Objective:
    """The same objective on a float64 copy of the model, for checks at float64 accuracy."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in objective.model.modules()):
        raise UncoveredModelError("a copy of scripted code is compiled anew, and shares no graph with the original")
    twin = copy.copy(objective)
    # Handed to deepcopy in double, so that nothing is copied twice.
    known: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().double()) for p in objective.model.parameters() if _plain(p)
    }
    known |= {id(b): b.detach().clone() for b in objective.model.buffers() if not is_dense(b)}  # some have no deepcopy
    twin.model = copy.deepcopy(objective.model, known).double()
    everything = dict(twin.model.named_parameters())
    twin.parameters = {name: everything[name] for name in objective.parameters}
    twin.dtype = torch.float64
    return twin


def _plain(parameter: nn.Parameter) -> bool:
    return type(parameter) is nn.Parameter and parameter.dtype == torch.float32 and parameter.requires_grad


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
