"""What each method would cost, before any of it is run: passes, memory, time.

Only the first batch is touched: forward passes of it, three of them timed, and the linearisation that exact needs in
order to count. Counts are exact; bytes are those of the graph and of the accumulators; seconds are the counts times
the timed pass, with the factors below, and good to a factor of two or three. Propagation's are with directions taken
out of the signs as far as memory allows; a pilot leaves them in where they are quiet.
"""

from __future__ import annotations

import time
from collections.abc import Sized
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..diagonal import exact
from ..errors import HessdiagError, UncoveredModelError
from ..forward import forward
from ..graph import Linearisation
from ..objective import Objective
from ..stream import Batches, Numbered, numbered
from .pilot import affordable_rank, direction_bytes
from .plan import EXACT_COLUMNS, METHODS, replicate_groups

# In forward passes of the batch, measured on one CPU core for a residual network, an MLP and a ResNet-18 of width 16.
LINEARISE, DIRECT, COLUMN, SIGNED, PRODUCTS, HESSIAN, OUTER, ENTRY = 6.0, 5.0, 4.0, 10.0, 8.0, 6.0, 5.0, 1.0
DEFLATED = 2.3 * SIGNED


@dataclass(frozen=True)
class Forecast:
    """The cost of one method. Passes are backward passes over a batch (of exact: directions moved forward)."""

    method: str
    refusal: str | None
    """Why the method does not serve, or None."""
    batches: int
    passes_once: int
    """Per batch, whatever the number of replicates."""
    passes_each: int
    """Per batch and replicate; 0 where nothing is random."""
    multiplications: float | None
    """Of exact, over all data."""
    bytes: int
    seconds_once: float
    seconds_each: float

    def seconds(self, replicates: int) -> float:
        """Time with so many replicates."""
        return self.seconds_once + self.seconds_each * replicates

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Base:
    """What the methods' costs are computed from."""

    objective: Objective
    batches: int
    seconds: float
    graph: int
    work: float
    columns: int
    linear: Linearisation | None
    refusal: str | None

    @property
    def vector(self) -> int:
        """Bytes of one float64 vector of all parameters."""
        return 8 * self.objective.size


def forecast(objective: Objective, batches: Batches) -> tuple[Forecast, ...]:
    """One forecast per method, from the first batch and the number of batches."""
    objective.check_modes()
    count = len(batches) if isinstance(batches, Sized) else sum(1 for _ in batches)
    base = _look(objective, next(iter(numbered(objective, batches))), count)
    kinds = {"exact": _exact, "propagation": _propagation, "hutchinson": _hutchinson, "reference": _reference}
    return tuple(kinds[method](base) for method in METHODS)


def _look(objective: Objective, first: Numbered, batches: int) -> _Base:
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    work = _Work(objective.model)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), work:
        outputs = objective.outputs(first.inputs, first.targets, index=first.index)
    columns = len(objective.loss.curvature(outputs.detach(), first.targets).signs)
    del outputs
    seconds = _timed(objective, first)
    linear, refusal = None, None
    try:
        linear = Linearisation(objective, first.inputs, first.targets, index=first.index)
    except UncoveredModelError as error:
        refusal = str(error)
    graph = sum(held.values())
    return _Base(objective, batches, seconds, graph, max(work.total, 1.0), columns, linear, refusal)


def _timed(objective: Objective, first: Numbered) -> float:
    """Seconds of a forward pass: the shortest of three, or the only one where it takes long."""
    shortest = float("inf")
    with torch.no_grad():
        for _ in range(3):
            _wait(objective.device)
            begun = time.perf_counter()
            forward(objective.model, first.inputs, objective.call)
            _wait(objective.device)
            shortest = min(shortest, time.perf_counter() - begun)
            if shortest > 1.0:
                break
    return shortest


def _exact(base: _Base) -> Forecast:
    if base.linear is None:
        return _refused("exact", base)
    try:
        price = exact.cost(base.linear)
    except HessdiagError as error:
        return _refused("exact", base, str(error))
    flops = price.flops * base.batches
    seconds = price.flops * base.seconds / base.work + (LINEARISE + COLUMN * base.columns) * base.seconds
    held = price.bytes + 3 * base.graph + 4 * base.vector
    passes = price.passes + base.columns
    return Forecast("exact", None, base.batches, passes, 0, flops, held, seconds * base.batches, 0.0)


def _propagation(base: _Base) -> Forecast:
    if base.linear is None:
        return _refused("propagation", base)
    taken = base.columns <= EXACT_COLUMNS
    rank = affordable_rank(base.linear, base.linear.samples * base.batches)
    once = LINEARISE + DIRECT + (COLUMN * base.columns if taken else 0.0) + rank * DEFLATED
    each = SIGNED * (1.0 if taken else 2.0) + (LINEARISE / 8 if base.batches > 1 else 0.0)
    streams = 1 if taken else 3
    held = 3 * base.graph + (streams * (replicate_groups(base.objective.size) + 1) + 3) * base.vector
    held += 2 * rank * int(direction_bytes(base.linear, base.linear.samples * base.batches))
    time_ = base.seconds * base.batches
    passes = (base.columns if taken else 0) + 4 * rank  # a direction is found in two passes and squared in two
    return Forecast(
        "propagation", None, base.batches, passes, 2 if taken else 4, None, held, once * time_, each * time_
    )


def _hutchinson(base: _Base) -> Forecast:
    groups = replicate_groups(base.objective.size)
    held = 4 * base.graph + 3 * (groups + 2) * base.vector
    time_ = base.seconds * base.batches
    each = HESSIAN + OUTER + (PRODUCTS / 8 if base.batches > 1 else 0.0)
    return Forecast("hutchinson", None, base.batches, 2, 3, None, held, PRODUCTS * time_, each * time_)


def _reference(base: _Base) -> Forecast:
    size, time_ = base.objective.size, base.seconds * base.batches
    held = 64 * base.graph + 4 * base.vector
    seconds = (PRODUCTS + ENTRY * size) * time_
    return Forecast("reference", None, base.batches, 2 * size + 2, 0, None, held, seconds, 0.0)


def _refused(method: str, base: _Base, reason: str | None = None) -> Forecast:
    return Forecast(method, reason or base.refusal, base.batches, 0, 0, None, 0, 0.0, 0.0)


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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
