"""The user's model is handed back as it came, also after an error: modes, gradients, buffers, flags and hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import OutOfMemoryError, UncoveredModelError


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Restore everything a measurement could touch."""
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise UncoveredModelError(
                f"parameter {name!r} was made under torch.inference_mode(), which forbids differentiating it; "
                "build or load the model outside of it"
            )
    modes = [(module, module.training) for module in model.modules()]
    scripted = torch.jit.ScriptModule  # whose buffers cannot be bound anew
    bound = [(m._buffers, dict(m._buffers)) for m in model.modules() if not isinstance(m, scripted)]
    gradients = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    values = [(b, b.detach().clone()) for b in model.buffers()]
    hooks = [(found, dict(found)) for found in _gradient_hooks(model) if found]
    states = _random_states(model)
    try:
        for found, _ in hooks:  # they change gradients, hence the Hessian that autograd shows, not the loss
            found.clear()
        with torch.inference_mode(False):
            yield
    finally:
        for found, kept in hooks:
            found.update(kept)
        for module, training in modes:
            module.training = training
        for present, before in bound:
            present.clear()
            present.update(before)
        for parameter, gradient, requires in gradients:
            parameter.grad = gradient
            parameter.requires_grad_(requires)
        for buffer, value in values:
            with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        torch.set_rng_state(states[0])
        for device, state in states[1]:
            torch.cuda.set_rng_state(state, device)


def _gradient_hooks(model: nn.Module) -> Iterator[dict[int, Any]]:
    for parameter in model.parameters():
        yield parameter._backward_hooks or {}
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            yield module._backward_hooks
            yield module._backward_pre_hooks


def _random_states(model: nn.Module) -> tuple[Tensor, list[tuple[torch.device, Tensor]]]:
    """Global random states, which a shuffling loader or the model itself may draw from."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    return torch.get_rng_state(), [(device, torch.cuda.get_rng_state(device)) for device in devices]


@contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Turn the several ways of running out of memory into one exception that says what to lower."""
    try:
        yield
    except (MemoryError, torch.cuda.OutOfMemoryError) as error:
        if isinstance(error, OutOfMemoryError):
            raise
        raise OutOfMemoryError(f"out of memory; {advice}") from error
    except RuntimeError as error:
        if "allocate memory" in str(error) or "out of memory" in str(error):
            raise OutOfMemoryError(f"out of memory; {advice}") from error
        raise
