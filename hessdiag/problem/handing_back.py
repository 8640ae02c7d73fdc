"""The user's model is handed back as it came, also after an error: modes, gradients, buffers, flags and hooks; and so
are the random states of torch, numpy and python, which a loader that shuffles or augments draws from.

Autocast is off meanwhile, around the model and where accelerate puts it around the model's forward (`mixed`). What is
measured is the function in the dtype of its parameters: under autocast it would be that of bfloat16, 2e-4 off for a
small net, and its casts are no part of the sites' allow-list. float32 has all its bits (`full_float32`), and denormal
numbers are zero (`denormals`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from hessdiag.errors import HessdiagError, OutOfMemoryError, UncoveredModelError, ran_out
from hessdiag.problem.denormals import denormals_are_zero
from hessdiag.problem.full_float32 import full_float32
from hessdiag.problem.mixed import without_mixed_precision
from hessdiag.problem.random_states import RandomStates
from hessdiag.problem.sparse import unchanged

AUTOCAST_OFF = "autocast was on and is switched off for the measurement: what is measured is not rounded to bfloat16"
MIXED_OFF = (
    "accelerate's mixed precision is taken off for the measurement: what is measured is the function of the weights in "
    "their own precision"
)


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[list[str]]:
    """Restore everything a measurement could touch; gives what the result's notes have to say of it."""
    modules, parameters = list(model.modules()), list(model.parameters())
    for parameter in parameters:
        if parameter.is_inference():
            name = next(name for name, p in model.named_parameters() if p is parameter)
            raise UncoveredModelError(
                f"parameter {name!r} was made under torch.inference_mode(), which forbids differentiating it; "
                "build or load the model outside of it"
            )
    modes = [(module, module.training) for module in modules]
    scripted = torch.jit.ScriptModule  # whose buffers cannot be bound anew
    bound = [(m._buffers, dict(m._buffers)) for m in modules if not isinstance(m, scripted)]
    gradients = [(p, p.grad, p.requires_grad) for p in parameters]
    values = [(b, b.detach().clone()) for b in model.buffers()]
    hooks = [(found, dict(found)) for found in _gradient_hooks(modules, parameters) if found]
    cards = {p.device for p in parameters if p.device.type == "cuda"}
    states, on_cards = RandomStates.now(), [(device, torch.cuda.get_rng_state(device)) for device in cards]
    try:
        for found, _ in hooks:  # they change gradients, hence the Hessian that autograd shows, not the loss
            found.clear()
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(denormals_are_zero())
            stack.enter_context(full_float32())
            rounded = autocast_on(model)
            for kind in rounded:
                stack.enter_context(torch.autocast(kind, enabled=False))
            mixed = stack.enter_context(without_mixed_precision(model))
            yield [note for note, given in ((AUTOCAST_OFF, rounded), (MIXED_OFF, mixed)) if given]
    finally:
        for found, before in hooks:
            found.update(before)
        for module, training in modes:
            module.training = training
        for present, buffers in bound:
            present.clear()
            present.update(buffers)
        for parameter, gradient, requires in gradients:
            parameter.grad = gradient
            parameter.requires_grad_(requires)
        for buffer, value in values:
            with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                if not unchanged(buffer, value):
                    buffer.copy_(value)
        states.put()
        for device, state in on_cards:
            torch.cuda.set_rng_state(state, device)


def autocast_on(model: nn.Module) -> list[str]:
    """The kinds of device, among those of the model, for which autocast is switched on here and now."""
    kinds = {p.device.type for p in model.parameters()}
    return [kind for kind in sorted(kinds) if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)]


def _gradient_hooks(modules: Iterable[nn.Module], parameters: Iterable[nn.Parameter]) -> Iterator[dict[int, Any]]:
    for parameter in parameters:
        yield parameter._backward_hooks or {}
    for module in modules:
        if not isinstance(module, torch.jit.ScriptModule):
            yield module._backward_hooks
            yield module._backward_pre_hooks
    yield nn.modules.module._global_backward_hooks  # of all modules, in whichever model
    yield nn.modules.module._global_backward_pre_hooks


@contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Turn the several ways of running out of memory into one exception that says what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, HessdiagError) or not ran_out(error):
            raise
        raise OutOfMemoryError(f"out of memory; {advice}") from error
