"""An activation given as a function and its two derivatives, as one autograd node that saves its input alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hessdiag.activations.registry import Option

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
        for key, default in self.defaults.items():
            setattr(self, key, options.get(key, default))

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
