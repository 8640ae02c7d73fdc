"""Activations from outside: a name, a function, its derivatives - admitted by test, never by trust.

A registered activation is one node of a model's graph, and its derivatives are those given here. So before it is
admitted they are held against difference quotients of the values, which know nothing of autograd; a custom autograd
Function must besides agree with its own formulas. This is done at the default options here, and at any others when a
module is given them, or a graph shows them. What a grid cannot see the audit of every measurement may, beyond its
tolerance: it compares autograd's derivatives of the whole model with difference quotients.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.activations.functions import CURVES, Curve
from hessdiag.activations.pointwise import Activation, Formula, PointwiseFunction, RegisteredActivation, label
from hessdiag.activations.quotients import FLOOR, grid
from hessdiag.activations.registry import Option, enter
from hessdiag.activations.supremum import supremum
from hessdiag.errors import ConfigurationError

DECLARED = 1e-3
"""Of a declared supremum with the one searched for."""


def register_activation(
    name: str,
    value: Formula,
    *,
    first: Formula | None = None,
    second: Formula | None = None,
    options: Mapping[str, Option] | None = None,
    max_curvature: float | Callable[..., float] | None = None,
    function: type[torch.autograd.Function] | None = None,
) -> type[nn.Module]:
    """Add an activation that can be built by `name` and measured by every method; returns its module class.

    `value`, `first` and `second` are sigma, sigma' and sigma'' of a tensor, entry by entry; a derivative that is not
    given is taken from autograd. `options` are keyword arguments of all three with their defaults: "name:alpha=3" sets
    one. `max_curvature` is sup |sigma''|, as a number or a function of the options; searched for where it is not given.

    `function` is a custom autograd Function that `value` applies, for models which use it themselves: its node, which
    must save its input and carry the options as attributes of the same names, is then known wherever the graph shows
    it. Without it the activation is made one node here.

    >>> import torch
    >>> module = register_activation(
    ...     "arsinh", torch.asinh, first=lambda x: (1 + x * x) ** -0.5, second=lambda x: -x * (1 + x * x) ** -1.5
    ... )
    >>> module()
    arsinh()
    """
    options = dict(options or {})
    _check_names(name, options)
    if first is None:
        first = _by_autograd(value)
    if second is None:
        second = _by_autograd(first)
    declared = max_curvature if max_curvature is None or callable(max_curvature) else _constant(float(max_curvature))
    activation = Activation(name, value, first, second, declared, function)
    activation.check(options)
    curve = None if function is None else _of_function(activation, function, options)
    kind: type[RegisteredActivation] = type(
        name, (RegisteredActivation,), {"activation": activation, "defaults": options, "__doc__": f"Activation {name}."}
    )
    if declared is not None:
        found, told = supremum(kind()).value, declared(**options)
        if not (found == told or abs(found - told) <= DECLARED * abs(told)):
            raise ConfigurationError(
                f"activation {name!r}: max_curvature is {told:.6g}, but |sigma''| reaches {found:.6g}"
            )
    enter(name, kind, options)
    if function is not None and curve is not None:
        CURVES[function] = curve
    return kind


def _check_names(name: str, options: Mapping[str, Option]) -> None:
    if not (isinstance(name, str) and re.fullmatch("[a-z][a-z0-9_]*", name)):
        raise ConfigurationError(f"the name of an activation is lower-case letters, digits and _, not {name!r}")
    for key, default in options.items():
        if not (isinstance(key, str) and key.isidentifier() and not hasattr(nn.Module, key)):
            raise ConfigurationError(f"activation {name!r}: an option cannot be called {key!r}")
        if not isinstance(default, (bool, int, float, str)):
            raise ConfigurationError(f"activation {name!r}: option {key!r} must be a number or a string")


def _constant(value: float) -> Callable[..., float]:
    return lambda **options: value


def _by_autograd(formula: Formula) -> Formula:
    """D formula / dx, entry by entry."""

    def derivative(x: Tensor, **options: Option) -> Tensor:
        if torch._C._are_functorch_transforms_active():
            inner: Tensor = torch.func.grad(lambda z: formula(z, **options).sum())(x)
            return inner
        with torch.enable_grad():
            z = x if x.requires_grad else x.detach().requires_grad_()
            y = formula(z, **options)
            if not y.requires_grad:
                return torch.zeros_like(x)
            (slope,) = torch.autograd.grad(y.sum(), z, create_graph=True, materialize_grads=True)
        return slope if torch.is_grad_enabled() else slope.detach()

    return derivative


def _of_function(
    activation: Activation, function: type[torch.autograd.Function], options: Mapping[str, Option]
) -> Curve:
    """What the node of a custom Function says, having looked at one."""
    name = activation.name
    if not (isinstance(function, type) and issubclass(function, torch.autograd.Function)):
        raise ConfigurationError(f"activation {name!r}: `function` is a class derived from torch.autograd.Function")
    if function in CURVES:
        raise ConfigurationError(f"activation {name!r}: {function.__name__} is registered already")
    x = grid().requires_grad_()
    y = activation.value(x, **options)
    node: Any = y.grad_fn
    if getattr(node, "_forward_cls", None) is not function:
        raise ConfigurationError(f"activation {name!r}: what the function returns is no node of {function.__name__}")
    place = next((i for i, kept in enumerate(node.saved_tensors) if torch.equal(kept, x)), None)
    if place is None:
        raise ConfigurationError(
            f"activation {name!r}: {function.__name__} does not save its input, without which no derivative is known; "
            "save it, or leave `function` out"
        )
    for key, default in options.items():
        if getattr(node, key, None) != default:
            raise ConfigurationError(
                f"activation {name!r}: the node of {function.__name__} does not carry {key!r}; set ctx.{key}"
            )
    _check_backward(activation, function, x, y, options)

    def told(node: Any) -> dict[str, Option]:
        return {key: getattr(node, key) for key in options}

    @lru_cache(maxsize=1024, typed=True)
    def admitted(*values: Option) -> None:
        here, z = dict(zip(options, values)), grid().requires_grad_()
        activation.check(here)
        with torch.enable_grad():
            _check_backward(activation, function, z, activation.value(z, **here), here)

    def derivatives(node: Any) -> tuple[Tensor, Tensor]:
        admitted(*told(node).values())
        z = node.saved_tensors[place]
        return activation.first(z, **told(node)), activation.second(z, **told(node))

    return Curve(derivatives, lambda node: label(name, told(node)), lambda node: largest(activation, told(node)))


def _check_backward(
    activation: Activation, function: type, x: Tensor, y: Tensor, options: Mapping[str, Option]
) -> None:
    try:
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        bend = torch.zeros_like(x)
        if slope.requires_grad:
            (bend,) = torch.autograd.grad(slope.sum(), x, materialize_grads=True)
    except RuntimeError as error:
        raise ConfigurationError(
            f"activation {activation.name!r}: {function.__name__} cannot be differentiated twice "
            f"({str(error).splitlines()[0]}); leave `function` out"
        ) from error
    for what, formula, mine in (("first", activation.first, slope), ("second", activation.second, bend)):
        with torch.no_grad():
            wanted = formula(x.detach(), **options)
        scale = wanted.abs().clamp(min=max(FLOOR * float(wanted.abs().max()), 1e-9))
        if bool(((mine.detach() - wanted).abs() > 1e-6 * scale).any()):
            raise ConfigurationError(
                f"activation {label(activation.name, options)!r}: the {what} derivative by {function.__name__}'s "
                "backward is another than the one given"
            )


def largest(activation: Activation, options: Mapping[str, Option]) -> float:
    """sup |sigma''|: as declared, or searched for."""
    if activation.max_curvature is not None:
        return float(activation.max_curvature(**options))
    return supremum(lambda x: activation.value(x, **options)).value


def _of_pointwise(node: Any) -> tuple[Tensor, Tensor]:
    (x,) = node.saved_tensors
    return node.activation.first(x, **node.options), node.activation.second(x, **node.options)


CURVES[PointwiseFunction] = Curve(
    _of_pointwise,
    lambda node: label(node.activation.name, node.options),
    lambda node: largest(node.activation, node.options),
    lambda node: node.order == 0,
)
