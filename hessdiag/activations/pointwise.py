"""An activation given as a function and its two derivatives, as one autograd node that saves its input alone.

The derivatives are held against difference quotients on a grid at the options of every module, once for each set of
options that is new.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hessdiag.activations.derivatives import check_elementwise
from hessdiag.activations.quotients import AGREE, deviation, grid
from hessdiag.activations.registry import Option
from hessdiag.errors import ConfigurationError

Formula = Callable[..., Tensor]
"""Of a tensor and the activation's options as keyword arguments; entry by entry."""


@dataclass(frozen=True)
class Activation:
    """What is known of a registered activation."""

    name: str
    value: Formula
    first: Formula
    second: Formula
    max_curvature: Callable[..., float] | None
    function: type[torch.autograd.Function] | None

    def check(self, options: Mapping[str, Option]) -> None:
        """Refuse derivatives that are not the function's at these options, or no finite value for each entry."""
        _check(self, *options.items())


@lru_cache(maxsize=1024, typed=True)
def _check(activation: Activation, *items: tuple[str, Option]) -> None:
    """sigma' against quotients of sigma, sigma'' against quotients of sigma': numbers, wherever the module is built."""
    options = dict(items)
    who = label(activation.name, options)
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        x = grid()
        check_elementwise(lambda x: activation.value(x, **options))
        for what, formula, of in (
            ("first", activation.first, activation.value),
            ("second", activation.second, activation.first),
        ):
            told = _called(who, what, formula, x, options)
            off = deviation(told, lambda at, of=of: of(at, **options), x)  # type: ignore[misc]
            if bool((off > AGREE).any()):
                at = int(off.argmax())
                raise ConfigurationError(
                    f"activation {who!r}: the {what} derivative is not that of "
                    f"{'the function' if what == 'first' else 'the first'}: at x = {float(x[at]):.4g} "
                    f"it gives {float(told[at]):.6g}"
                )


def _called(who: str, what: str, formula: Formula, x: Tensor, options: Mapping[str, Option]) -> Tensor:
    found = formula(x, **options)
    if not isinstance(found, Tensor) or found.shape != x.shape or found.dtype != x.dtype:
        raise ConfigurationError(f"activation {who!r}: the {what} derivative of a tensor is not one of the same shape")
    if not bool(torch.isfinite(found).all()):
        at = x[~torch.isfinite(found)][0]
        raise ConfigurationError(f"activation {who!r}: the {what} derivative is not finite at x = {float(at):.4g}")
    return found


def label(name: str, options: Mapping[str, Option]) -> str:
    """A spec string."""
    return name + (":" if options else "") + ",".join(f"{key}={value}" for key, value in options.items())


class PointwiseFunction(torch.autograd.Function):
    """sigma (order 0) or sigma' (order 1) of an activation; the node carries it, its options and its order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, activation: Activation, options: Mapping[str, Option], order: int) -> Tensor:
        """The formula at x."""
        formula = activation.first if order else activation.value
        return formula(x, **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep x and whose value this is."""
        ctx.save_for_backward(inputs[0])
        _, ctx.activation, ctx.options, ctx.order = inputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """Incoming gradient times the next derivative; sigma'' as plain operations, which autograd goes on from."""
        (x,), (g,) = ctx.saved_tensors, grad_outputs
        if ctx.order:
            return g * ctx.activation.second(x, **ctx.options), None, None, None
        slope: Tensor = PointwiseFunction.apply(x, ctx.activation, ctx.options, 1)  # type: ignore[no-untyped-call]
        return g * slope, None, None, None


class RegisteredActivation(nn.Module):
    """Base of the classes that `register_activation` makes: options are plain attributes, not buffers."""

    activation: ClassVar[Activation]
    defaults: ClassVar[Mapping[str, Option]]

    def __init__(self, **options: Option) -> None:
        super().__init__()
        vars(self).update({key: options.get(key, default) for key, default in self.defaults.items()})
        self.activation.check(self.options)

    def __setattr__(self, key: str, value: Any) -> None:
        """An option that is changed is one that the derivatives must be right for."""
        super().__setattr__(key, value)
        if key in self.defaults:
            self.activation.check(self.options)

    @property
    def options(self) -> dict[str, Option]:
        """Options by name."""
        return {key: getattr(self, key) for key in self.defaults}

    def forward(self, x: Tensor) -> Tensor:
        """sigma(x), as one node."""
        if self.activation.function is not None:
            return self.activation.value(x, **self.options)
        result: Tensor = PointwiseFunction.apply(x, self.activation, self.options, 0)  # type: ignore[no-untyped-call]
        return result

    def extra_repr(self) -> str:
        """Shown by `print(module)`."""
        return ", ".join(f"{key}={value}" for key, value in self.options.items())
