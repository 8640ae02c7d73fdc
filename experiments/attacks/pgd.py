"""Linf PGD with the variations that training methods ask for.

    x_0 = start(x);   x_{t+1} = Pi(x_t + step * sign grad l(f(x_t), target)),   t = 0 .. steps-1

Pi projects onto the eps-ball around x, then onto [0, 1]. Starts: "uniform" (x + U(-eps, eps), then the box:
Madry et al., arXiv 1706.06083), "gauss" (x + 0.001 N(0, 1), not clamped: TRADES), "none", or a
given tensor.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from experiments.attacks.inputs import Radius, number, radius
from experiments.attacks.losses import needs_clean_logits, resolve
from hessdiag.errors import ConfigurationError, UnknownNameError, nearest
from hessdiag.problem.ascent import (
    AttackLoss,
    Forward,
    Scalar,
    check_box,
    handed_back,
    linf_ascent,
    refuse_non_finite,
)
from hessdiag.problem.full_float32 import full_float32

STARTS = ["uniform", "gauss", "none"]
GAUSS_SCALE = 0.001


class Ascent(Protocol):
    """The inner loop of an attack: `hessdiag.problem.ascent.linf_ascent`, or the same compiled."""

    def __call__(
        self,
        forward: Forward,
        points: Tensor,
        centre: Tensor,
        targets: Any,
        *,
        eps: Scalar,
        step: Scalar,
        steps: int,
        loss: AttackLoss,
        autocast: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Final points, and per sample whether every loss and gradient was finite."""
        ...


def compiled_ascent(**options: Any) -> Ascent:
    """The whole attack loop under torch.compile(**options), for `pgd(..., ascent=)`.

    Where torch can trace autograd.grad (it must be told to), the loop is one graph; elsewhere it breaks there
    and the pieces are compiled. Pass eps and step as tensors where they change from call to call.
    """
    compiled = torch.compile(linf_ascent, **options)

    def ascent(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        with _traced_autograd():
            result: tuple[Tensor, Tensor] = compiled(*arguments, **keywords)
        return result

    return ascent


def _traced_autograd() -> AbstractContextManager[Any]:
    import torch._dynamo.config as dynamo  # heavy, and of no use to who does not compile

    if not hasattr(dynamo, "trace_autograd_ops"):
        return nullcontext()
    patch: AbstractContextManager[Any] = dynamo.patch(trace_autograd_ops=True)
    return patch


def uniform_noise(x: Tensor, scale: Scalar, generator: torch.Generator | None) -> Tensor:
    """U(-scale, scale), shaped like x."""
    draw = torch.rand(x.shape, generator=_needed(generator), device=x.device, dtype=x.dtype)
    return scale * (2.0 * draw - 1.0)


def starting_point(x: Tensor, start: str | Tensor, eps: Scalar, generator: torch.Generator | None) -> Tensor:
    """Where the attack begins; a tensor given as start is taken as it is."""
    if isinstance(start, Tensor):
        if start.shape != x.shape:
            raise ConfigurationError(f"the start has shape {list(start.shape)}, the images {list(x.shape)}")
        return start.detach()
    if start == "uniform":
        return (x + uniform_noise(x, eps, generator)).clamp(0.0, 1.0)
    if start == "gauss":
        draw = torch.randn(x.shape, generator=_needed(generator), device=x.device, dtype=x.dtype)
        return x + GAUSS_SCALE * draw
    if start == "none":
        return x
    raise UnknownNameError(f"unknown start {start!r}; {nearest(start, STARTS)}, or a tensor")


def clean_logits(
    model: object,
    x: Tensor,
    *,
    bn: str = "eval",
    autocast: torch.dtype | None = None,
    forward: Forward | None = None,
) -> Tensor:
    """The logits at the clean images as the attack would see them, without graph, in at least float32."""
    with handed_back(model, mode=bn):
        return plain_logits(logits_function(model, forward), x.detach(), autocast)


def pgd(
    model: object,
    x: Tensor,
    y: Any,
    *,
    eps: Radius,
    step: Radius,
    steps: int,
    start: str | Tensor = "uniform",
    loss: str | AttackLoss = "ce",
    generator: torch.Generator | None = None,
    bn: str = "eval",
    keep_statistics: bool = False,
    autocast: torch.dtype | None = None,
    forward: Forward | None = None,
    ascent: Ascent = linf_ascent,
    check: bool = True,
) -> Tensor:
    """Adversarial images for `x`, the model handed back as it came (mode, buffers, .grad, requires_grad).

    y: the target of the loss: labels, or for "kl" the cached clean logits (computed here when labels or None
    are given); a callable loss gets it unread, so it may be a tuple of tensors.
    bn: mode of the model while crafting, "eval", "train" or "as_is"; with keep_statistics the running
    statistics of a crafting in training mode stand.
    forward: what gives the logits, where it is not the model itself (a compiled model, one of two norms).
    ascent: the inner loop, see `compiled_ascent`.
    check: False leaves out the range and NaN checks, each of which waits for the device.
    """
    ball, length = radius(eps, look=check), number(step, "step")
    if steps < 1:
        raise ConfigurationError(f"steps must be at least 1, not {steps}")
    if check:
        check_box(x)
    objective, centre = resolve(loss), x.detach()
    begin = starting_point(centre, start, ball, generator)
    with handed_back(model, mode=bn, keep_statistics=keep_statistics):
        logits_of = logits_function(model, forward)
        target = plain_logits(logits_of, centre, autocast) if needs_clean_logits(loss, y) else y
        points, finite = ascent(
            logits_of,
            begin,
            centre,
            target,
            eps=ball,
            step=length,
            steps=steps,
            loss=objective,
            autocast=autocast,
        )
    if check:
        refuse_non_finite(finite, f"crafting PGD-{steps}")
    return points.detach()


def logits_function(model: object, forward: Forward | None) -> Forward:
    """`forward` if given, else the model itself."""
    chosen = model if forward is None else forward
    if not callable(chosen):
        raise ConfigurationError(f"the model must be callable, not {type(chosen).__name__}")
    return chosen


def plain_logits(forward: Forward, x: Tensor, autocast: torch.dtype | None = None) -> Tensor:
    """Logits without graph, in at least float32."""
    context = nullcontext() if autocast is None else torch.autocast(x.device.type, dtype=autocast)
    with torch.no_grad(), context:
        logits = forward(x)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def judged_logits(forward: Forward, x: Tensor) -> Tensor:
    """Logits that a verdict rests on: `plain_logits` in whole float32, where crafting may take TensorFloat-32."""
    with full_float32():
        return plain_logits(forward, x)


def _needed(generator: torch.Generator | None) -> torch.Generator:
    if generator is None:
        raise ConfigurationError("a random start needs generator=torch.Generator(device).manual_seed(...)")
    return generator
