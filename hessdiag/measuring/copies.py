"""The model that an audit looks at, in float64: a copy, or where there can be none the user's own, lent and given back.

In either, tensors that are plain attributes of modules (in lists, tuples and dictionaries, too; neither parameters nor
buffers, so that `.double()` passes them by) are in double as well. What a forward pass left behind with its graph is
None: it has no copy, and would be of other parameters.

A model that cannot be copied (it holds a lock, or a handle) is lent: parameters, buffers and such tensors are bound to
doubles in its modules, and at the end, also after an exception, to the very tensors they were, which nothing changes.
Scripted code can be copied, but not lent.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.errors import UncoveredModelError, ran_out
from hessdiag.graph.nodes import forward_order, is_leaf
from hessdiag.problem.objective import Objective
from hessdiag.problem.sparse import is_dense


def is_scripted(model: nn.Module) -> bool:
    """Whether any of it is scripted code, whose copy is compiled anew and shares no graph with the original."""
    return any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())


@contextmanager
def copied(objective: Objective) -> Iterator[Objective]:
    """The same objective on a float64 copy of the model, for checks at float64 accuracy."""
    twin = copy.copy(objective)
    # Handed to deepcopy in double, so that nothing is copied twice.
    known: dict[int, Any] = {}
    for parameter in objective.model.parameters():
        if type(parameter) is nn.Parameter and parameter.dtype == torch.float32 and parameter.requires_grad:
            known[id(parameter)] = nn.Parameter(parameter.detach().double())
    known |= {id(b): b.detach().clone() for b in objective.model.buffers() if not is_dense(b)}  # some have no deepcopy
    for value in _attributes(objective.model):
        _doubled(value, known)
    try:
        with torch.no_grad():  # a copy of scripted code clones its tensors, and remembers of which
            twin.model = copy.deepcopy(objective.model, known)
            shared = _share(twin.model, objective.model)
            if not shared:  # else what is written to the copy is written to the model
                twin.model.double()
    except Exception as error:
        if ran_out(error):
            raise
        raise UncoveredModelError(f"the model has no copy: {type(error).__name__}: {error}") from error
    if shared:
        raise UncoveredModelError("the model has no copy: a module's __deepcopy__ gives its own parameters or buffers")
    everything = dict(twin.model.named_parameters())
    for name, parameter in objective.model.named_parameters():
        everything[name].requires_grad_(parameter.requires_grad)
    twin.parameters = {name: everything[name] for name in objective.parameters}
    twin.dtype = torch.float64
    yield twin


@contextmanager
def lent(objective: Objective) -> Iterator[Objective]:
    """The same objective on the model itself, its tensors in float64 as long as this lasts."""
    model = objective.model
    if is_scripted(model):
        raise UncoveredModelError("tensors of scripted code cannot be bound anew")
    modules = list(model.modules())
    held = [(own, dict(own)) for m in modules for own in (m.__dict__, m._parameters, m._buffers)]
    twin = copy.copy(objective)
    try:
        known: dict[int, Any] = {}
        for parameter in model.parameters():
            double = parameter.detach().to(torch.float64, copy=True)
            known[id(parameter)] = nn.Parameter(double, requires_grad=parameter.requires_grad)
        for own, before in held:
            own.update({key: _doubled(value, known) for key, value in before.items() if key not in _OF_MODULES})
        twin.parameters = {name: known[id(p)] for name, p in objective.parameters.items()}
        twin.dtype = torch.float64
        yield twin
    finally:
        for own, before in held:
            own.clear()
            own.update(before)


@contextmanager
def set_apart(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Their numbers in other memory, to be moved there: that of their own is not written to, and is theirs again."""
    held = [(p, p.data) for p in parameters.values()]
    try:
        for p, own in held:
            p.data = own.clone()
        yield
    finally:
        for p, own in held:
            p.data = own


def come_from(outputs: Tensor, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether any of these are leaves of the outputs' graph: of a twin those of the model itself, kept by a closure."""
    wanted = {id(p) for p in parameters}
    return any(id(node.variable) in wanted for node in forward_order(outputs.grad_fn) if is_leaf(node))


def _share(one: nn.Module, other: nn.Module) -> bool:
    """Whether a parameter or a buffer of one lies in memory of the other's, or a module is both's."""
    if set(map(id, one.modules())) & set(map(id, other.modules())):
        return True
    places = [{_place(t) for t in (*m.parameters(), *m.buffers())} - {0} for m in (one, other)]
    return bool(places[0] & places[1])


def _place(tensor: Tensor) -> int:
    """Where its numbers lie; 0 where they have no place of their own."""
    return tensor.untyped_storage().data_ptr() if is_dense(tensor) else 0


_OF_MODULES = frozenset(nn.Module().__dict__)
"""What every module has: its tables of parameters, buffers, hooks and children."""


def _attributes(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            yield from (value for key, value in module.__dict__.items() if key not in _OF_MODULES)


def _doubled(value: Any, known: dict[int, Any]) -> Any:
    """A structure with its floating-point tensors in double, those in `known` as they are there; fills it in."""
    if isinstance(value, Tensor):
        if type(value) is Tensor and id(value) not in known:
            if value.grad_fn is not None:
                known[id(value)] = None
            elif value.is_floating_point():
                double = value.detach().to(torch.float64, copy=True)
                known[id(value)] = double.requires_grad_(value.requires_grad)
        return known.get(id(value), value)
    if type(value) in (list, tuple):
        found = [_doubled(one, known) for one in value]
        return value if all(a is b for a, b in zip(found, value)) else type(value)(found)
    if type(value) is dict:
        pairs = {key: _doubled(one, known) for key, one in value.items()}
        return value if all(pairs[key] is value[key] for key in value) else pairs
    return value
