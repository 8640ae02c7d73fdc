"""Custom autograd Functions of strangers that are activations: admitted by test, never by trust.

The graph shows such a Function as one node, and its class can be applied anew where its arguments are known: one
tensor, and numbers that the node carries under the names of `forward`. On a grid of both signs it must act entry by
entry; its backward must be the derivative of its values, and the derivative of its backward that of the backward, by
difference quotients, where all are finite. Then the node's own backward gives sigma' and sigma'' of its input.
"""

from __future__ import annotations

import inspect
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hessdiag.activations.derivatives import check_elementwise
from hessdiag.activations.functions import CURVES, Curve
from hessdiag.activations.quotients import AGREE, deviation, grid
from hessdiag.activations.supremum import supremum
from hessdiag.errors import ConfigurationError

_EXAMINED: WeakKeyDictionary[type, dict[tuple[Any, ...], Curve | str]] = WeakKeyDictionary()
"""By class and further arguments: what it is, or why it is none."""


def curve_of(node: Any) -> Curve | None:
    """The function behind a node of a custom Function: by its name, or by test."""
    kind = getattr(node, "_forward_cls", None)
    if kind is None:
        return None
    if kind in CURVES:
        return CURVES[kind] if CURVES[kind].serves(node) else None
    found = _examined(node, kind)
    return found if isinstance(found, Curve) else None


def refusal_of(node: Any) -> str:
    """Why a custom Function is not admitted."""
    kind = node._forward_cls
    found = "it is the derivative of an activation" if kind in CURVES else _examined(node, kind)
    return f"a custom autograd Function that is no known activation: {found}"


def _examined(node: Any, kind: type[torch.autograd.Function]) -> Curve | str:
    further = _arguments(node, kind)
    if isinstance(further, str):
        return further
    known = _EXAMINED.setdefault(kind, {})
    if further not in known:
        known[further] = _tested(kind, further)
    return known[further]


def _arguments(node: Any, kind: type[torch.autograd.Function]) -> tuple[Any, ...] | str:
    """What `forward` was given after its tensor, as the node carries it."""
    named = list(inspect.signature(kind.forward).parameters.values())
    if kind.setup_context is torch.autograd.Function.setup_context:
        named = named[1:]  # ctx
    if not named or any(one.kind not in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) for one in named):
        return "what its forward takes is not told one by one"
    if len(node.next_functions) != 1:
        return "it takes several tensors"
    values = []
    for one in named[1:]:
        value = getattr(node, one.name, None)
        if not isinstance(value, (bool, int, float, str)):
            return (
                f"its node does not carry {one.name!r} (set ctx.{one.name}, or give register_activation the function)"
            )
        values.append(value)
    return tuple(values)


def _tested(kind: type[torch.autograd.Function], further: tuple[Any, ...]) -> Curve | str:
    """The Function put to the test."""

    def value(x: Tensor) -> Tensor:
        out: Tensor = kind.apply(x.clone(), *further)  # type: ignore[no-untyped-call]
        return out

    def slope(x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x.detach().clone().requires_grad_()
            return torch.autograd.grad(value(z).sum(), z)[0]

    x = grid()
    try:
        check_elementwise(value)
        first, second = slope(x), _second(value, x)
        for what, told, of in (("first", first, value), ("second", second, slope)):
            with torch.no_grad():
                off = deviation(told, of, x)
            known = torch.isfinite(told) & torch.isfinite(off)
            if int(known.sum()) * 2 < len(x):
                return f"its {what} derivative is not finite"
            if bool((off[known] > AGREE).any()):
                at = float(x[known][off[known].argmax()])
                return f"its backward is not its {what} derivative, at {at:.3g} for one"
    except (ConfigurationError, RuntimeError, TypeError, ValueError) as error:
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    label = kind.__name__.strip("_").lower()
    return Curve(_derivatives, lambda node: label, lambda node: supremum(value).value)


def _second(value: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        z = x.detach().clone().requires_grad_()
        (first,) = torch.autograd.grad(value(z).sum(), z, create_graph=True)
        if not first.requires_grad:
            return torch.zeros_like(x)
        (second,) = torch.autograd.grad(first.sum(), z, materialize_grads=True)
        return second


def _derivatives(node: Any) -> tuple[Tensor, Tensor]:
    """(sigma', sigma'') at the node's input, by its own backward."""
    meta = node._input_metadata[0]
    with torch.enable_grad():
        pulled = node.apply(torch.ones(tuple(meta.shape), dtype=meta.dtype, device=meta.device))
        first = pulled[0] if isinstance(pulled, tuple) else pulled
        second = torch.zeros_like(first)
        if first.requires_grad:
            edge = GradientEdge(*node.next_functions[0])
            (found,) = torch.autograd.grad(
                [first], [edge], [torch.ones_like(first)], retain_graph=True, allow_unused=True
            )
            second = second if found is None else found
    return first.detach(), second.detach()
