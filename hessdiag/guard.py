"""The user's model is handed back as it came, also after an error: modes, gradients, buffers, requires_grad."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .errors import OutOfMemoryError


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Restore everything a measurement could touch."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    buffers = [(b, b.detach().clone(), b._version) for b in model.buffers()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, gradient, requires in gradients:
            parameter.grad = gradient
            parameter.requires_grad_(requires)
        with torch.no_grad():
            for buffer, value, version in buffers:
                if buffer._version != version:
                    buffer.copy_(value)


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
