"""On a CUDA card a step is recorded once and replayed as one graph: launching its thousands of kernels one by one takes
longer than they do.

A step of a kind (sizes of its batch, radius of its attack, ...) is made as usual a few times, so that every library has
chosen its kernels, and then recorded: what changes from step to step, images, labels, learning rates and the seed of
the noise, is written into the places that the recording reads. A replay computes what the step itself would have,
kernel by kernel; learning rates reach it in float32. A step that cannot be recorded, one that waits for the device say,
is made as before: a `note` says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from experiments.methods.base import Outcome
from experiments.schedules import Budget

USUAL = 3  # steps of a kind that are made as usual before one is recorded
KEPT = 2  # recordings that are kept, each of which holds a step's memory


class Given(NamedTuple):
    """What a step is made of: tensors, and what decides which operations it consists of."""

    views: list[Tensor]
    labels: Tensor
    prior: Tensor | None
    budget: Budget
    first: bool
    perturbs: bool

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for steps of the same operations."""
        sizes = tuple(tuple(view.shape) for view in self.views)
        return sizes, self.prior is None, self.budget, self.first, self.perturbs


Move = Callable[[Given, torch.Generator], Outcome]


class Tape(Protocol):
    """Records what a function does to tensors, and does it again."""

    def record(self, function: Callable[[], Outcome], generator: torch.Generator) -> Outcome:
        """The tensors that every replay writes to; nothing is computed yet."""
        ...

    def replay(self) -> None:
        """All of it once more, with what its tensors hold now."""
        ...


class CudaTape:
    """A CUDA graph."""

    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph()

    def record(self, function: Callable[[], Outcome], generator: torch.Generator) -> Outcome:
        """See `Tape`."""
        self.graph.register_generator_state(generator)
        with torch.cuda.graph(self.graph):
            return function()

    def replay(self) -> None:
        """See `Tape`."""
        self.graph.replay()


@dataclass(frozen=True, eq=False)
class Recording:
    """A tape and the places it reads and writes."""

    tape: Tape
    given: Given
    rates: list[Tensor]
    noise: torch.Generator
    outcome: Outcome

    def play(self, given: Given, rates: list[float], seed: int) -> Outcome:
        """The step with these tensors."""
        for place, value in zip(_tensors(self.given), _tensors(given), strict=True):
            place.copy_(value)
        for place, rate in zip(self.rates, rates, strict=True):
            place.fill_(rate)
        self.noise.manual_seed(seed)
        self.tape.replay()
        return self.outcome


class Replays:
    """Makes steps by `move`, and by replaying it where that goes."""

    def __init__(
        self, move: Move, optimiser: torch.optim.Optimizer, device: torch.device, *, tape: Callable[[], Tape] = CudaTape
    ) -> None:
        self.move, self.optimiser, self.device, self.tape = move, optimiser, device, tape
        self.seen: Counter[object] = Counter()
        self.kept: dict[object, Recording] = {}
        self.note: str | None = None  # why steps are no longer recorded

    def __call__(self, given: Given, seed: int) -> Outcome:
        """One step, with the learning rates that the optimiser has now and noise from this seed."""
        found = self.kept.get(given.kind)
        if found is None and self.note is None and self.seen[given.kind] >= USUAL:
            found = self._recorded(given)
        if found is not None:
            return found.play(given, [group["lr"] for group in self.optimiser.param_groups], seed)
        self.seen[given.kind] += 1
        return self.move(given, torch.Generator(self.device).manual_seed(seed))

    def _recorded(self, given: Given) -> Recording | None:
        """This kind of step on a tape of its own, the oldest of too many given up; None where it cannot be."""
        places = given._replace(
            views=[view.clone() for view in given.views],
            labels=given.labels.clone(),
            prior=None if given.prior is None else given.prior.clone(),
        )
        groups: list[dict[str, Any]] = self.optimiser.param_groups
        usual = [group["lr"] for group in groups]
        rates = [torch.tensor(rate, dtype=torch.float32, device=self.device) for rate in usual]
        noise, tape = torch.Generator(self.device), self.tape()
        while len(self.kept) >= KEPT:
            del self.kept[next(iter(self.kept))]
        try:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            outcome = tape.record(lambda: self.move(places, noise), noise)
        except RuntimeError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.note = f"steps are not replayed as a graph: {reason}"
            return None
        finally:
            for group, rate in zip(groups, usual, strict=True):
                group["lr"] = rate
        self.kept[given.kind] = Recording(tape, places, rates, noise, outcome)
        return self.kept[given.kind]


def _tensors(given: Given) -> list[Tensor]:
    return [*given.views, given.labels, *([] if given.prior is None else [given.prior])]
