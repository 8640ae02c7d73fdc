"""What each method would cost, before any of it is run: passes, memory, time.

Only the first batch is touched: forward passes of it, three of them timed, and the linearisation that exact needs in
order to count. Counts are exact; bytes are those of the graph and of the accumulators; seconds are the counts times
the timed pass, with the factors in the methods' files, and good to a factor of two or three. Propagation's are with
directions taken out of the signs as far as memory allows; a pilot leaves them in where they are quiet.
"""

from __future__ import annotations

import time
from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.errors import UncoveredModelError
from hessdiag.kernels.tensors import wait
from hessdiag.measuring.ranks import World
from hessdiag.methods import METHODS, Case, FirstPass, Forecast
from hessdiag.methods.batches import Batches, Numbered, Survey, numbered
from hessdiag.problem.forward import forward
from hessdiag.problem.objective import Objective
from hessdiag.problem.sparse import stored


def forecast(objective: Objective, batches: Batches) -> tuple[Forecast, ...]:
    """One forecast per method, from the first batch and the number of batches."""
    objective.check_modes()
    count = len(batches) if isinstance(batches, Sized) else sum(1 for _ in batches)
    first = next(iter(numbered(objective, batches)))
    size = len(first.targets)
    counted = Survey(size * count, count, size, 1.0, 0.0, 0.0, 0.0, 0.0, size * count)
    case = Case(objective, batches, counted, first, 0, World())
    base = _look(objective, first)
    return tuple(method.cost(case, base) for method in METHODS.values())


MEMORY = 3e9
"""Bytes that a measurement is to fit in where nobody says how many samples go at once."""
MOST = 128
OF_SAMPLE, OF_PARAMETER, OF_PROGRAM = 5.0, 128.0, 3e8  # of what a pass saves; bytes of sums; torch itself


def fitting(objective: Objective, inputs: Any, targets: Tensor) -> int:
    """How many samples at once, a power of two up to MOST, a measurement by propagation holds in about MEMORY.

    From what the forward pass of the few samples given here saves, and the sums that it keeps for every parameter: the
    same on every machine, since batches are part of what a resumed measurement must find again.
    """
    held: dict[int, int] = {}
    with torch.enable_grad(), _holding(held):
        outputs = objective.outputs(inputs, targets, index=0)
    own = {part.untyped_storage().data_ptr() for p in objective.model.parameters() for part in stored(p.detach())}
    each = OF_SAMPLE * sum(size for key, size in held.items() if key not in own) / len(targets)
    del outputs
    room = MEMORY - OF_PROGRAM - OF_PARAMETER * objective.size
    count = MOST
    while count > 8 and count * each > room:
        count //= 2
    return count


def _holding(held: dict[int, int]) -> torch.autograd.graph.saved_tensors_hooks:
    """Fill in the bytes of every storage that autograd saves."""

    def keep(tensor: Tensor) -> Tensor:
        for storage in (part.untyped_storage() for part in stored(tensor)):
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)


def _look(objective: Objective, first: Numbered) -> FirstPass:
    held: dict[int, int] = {}
    work = _Work(objective.model)
    with torch.enable_grad(), _holding(held), work:
        outputs = objective.outputs(first.inputs, first.targets, index=first.index)
    try:
        columns = objective.loss.curvature(outputs.detach(), first.targets).columns.count
    except UncoveredModelError:  # whichever method needs them says so itself
        columns = outputs[0].numel()
    del outputs
    return FirstPass(_timed(objective, first), sum(held.values()), max(work.total, 1.0), columns)


def _timed(objective: Objective, first: Numbered) -> float:
    """Seconds of a forward pass: the shortest of three, or the only one where it takes long."""
    shortest = float("inf")
    with torch.no_grad():
        for _ in range(3):
            wait(objective.device)
            begun = time.perf_counter()
            forward(objective.model, first.inputs, objective.call)
            wait(objective.device)
            shortest = min(shortest, time.perf_counter() - begun)
            if shortest > 1.0:
                break
    return shortest


class _Work:
    """Counts the multiplications of a forward pass in convolutions and linear layers."""

    def __init__(self, model: nn.Module) -> None:
        self.total = 0.0
        self._model = model
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> None:
        for module in self._model.modules():
            if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                self._handles.append(module.register_forward_hook(self._count))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _count(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and isinstance(module.weight, Tensor) and len(module.weight):
            self.total += float(output.numel() * module.weight[0].numel())
