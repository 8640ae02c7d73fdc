"""On a CUDA card a step is recorded once and replayed as one graph: launching its thousands of kernels one by one takes
longer than they do.

Steps of one kind (sizes of the batch, radius of the attack, ...) that follow one another are made as usual a few times,
so that every library has chosen its kernels, and then recorded: what changes from step to step, images, labels, class
means, learning rates and the seed of the noise, is written into the places that the recording reads. A replay computes
what the step itself would have, kernel by kernel. Learning rates are in float32 either way, as a recording holds them.
A kind that comes once in an epoch, as its short last batch does, is never recorded, and one whose radius is past is
given up: a recording holds the memory of a step. A step that waits for the device, or of which two do not fit into its
memory, is made as before; `how` says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from experiments.methods.base import Outcome
from experiments.schedules import Budget

USUAL = 3  # steps of one kind in a row that are made as usual before one is recorded
ONE_BY_ONE, REPLAYED = "one by one", "replayed as a CUDA graph"  # how steps are made
WAITS = "called a synchronizing CUDA operation"  # what torch says of it, where it is asked to


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
        return sizes, self.prior is None, self.first, *self.phase

    @property
    def phase(self) -> tuple[object, ...]:
        """What lasts for an epoch at least: kinds of another phase do not come again."""
        return self.budget, self.perturbs


Move = Callable[[Given, torch.Generator], Outcome]


class Tape(Protocol):
    """Records what a function does to tensors, and does it again."""

    def fits(self) -> bool:
        """Whether a step and the recording of one have room beside each other."""
        ...

    def record(self, function: Callable[[], Outcome], generator: torch.Generator) -> Outcome:
        """The tensors that every replay writes to; nothing is computed yet."""
        ...

    def replay(self) -> None:
        """All of it once more, with what its tensors hold now."""
        ...


class CudaTape:
    """A CUDA graph on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.graph = torch.cuda.CUDAGraph()

    def fits(self) -> bool:
        """By the most that was ever allocated beyond what is now."""
        held, most = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
        free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device) - held
        return free > 2 * (most - held)

    def record(self, function: Callable[[], Outcome], generator: torch.Generator) -> Outcome:
        """See `Tape`. Torch leaves its stream in place of the caller's where a recording fails, hence the outer one."""
        self.graph.register_generator_state(generator)
        with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.current_stream(self.device)):
            own: Any = torch.cuda.Stream  # untyped
            with torch.cuda.graph(self.graph, stream=own()):
                outcome = function()
        return outcome

    def replay(self) -> None:
        """See `Tape`."""
        with torch.cuda.device(self.device):
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
    """Makes steps by `move`, and by replaying one of them where that goes."""

    def __init__(
        self,
        move: Move,
        optimiser: torch.optim.Optimizer,
        device: torch.device,
        *,
        tape: Callable[[torch.device], Tape] = CudaTape,
    ) -> None:
        self.move, self.optimiser, self.device, self.tape = move, optimiser, device, tape
        self.kind: tuple[object, ...] = ()
        self.in_a_row = 0  # steps of this kind, so far
        self.kept: Recording | None = None
        self.refused: str | None = None  # why steps are not recorded
        self.how = ONE_BY_ONE
        """In a few words; a run may end before anything is recorded."""

    def __call__(self, given: Given, noise: torch.Generator) -> Outcome:
        """One step, with the learning rates that the optimiser has now; `noise` is as it was seeded."""
        for group in self.optimiser.param_groups:
            group["lr"] = float(np.float32(group["lr"]))
        self.in_a_row = self.in_a_row + 1 if given.kind == self.kind else 1
        self.kind = given.kind
        if self.kept is not None and self.kept.given.phase != given.phase:
            self.forget()
        if self.refused is None and self.in_a_row > USUAL and not self._known(given):
            self._record(given)
        if self.kept is not None and self._known(given):
            return self.kept.play(given, [group["lr"] for group in self.optimiser.param_groups], noise.initial_seed())
        if self.refused is not None or self.in_a_row != USUAL:
            return self.move(given, noise)
        with waiting(self.device) as waits:
            outcome = self.move(given, noise)
        if waits:
            self._refuse("a step waits for the device")
        return outcome

    def forget(self) -> None:
        """Give up what is recorded, and the memory that it holds."""
        self.kept = None

    def _known(self, given: Given) -> bool:
        return self.kept is not None and self.kept.given.kind == given.kind

    def _refuse(self, reason: str) -> None:
        self.forget()
        self.refused, self.how = reason, f"{ONE_BY_ONE}: {reason}"

    def _record(self, given: Given) -> None:
        """This kind of step in place of what was recorded before; refused from then on where it cannot be."""
        self.forget()
        tape = self.tape(self.device)
        if not tape.fits():
            self._refuse("the card's memory does not hold two steps")
            return
        places = given._replace(
            views=[view.clone() for view in given.views],
            labels=given.labels.clone(),
            prior=None if given.prior is None else given.prior.clone(),
        )
        groups: list[dict[str, Any]] = self.optimiser.param_groups
        usual = [group["lr"] for group in groups]
        rates = [torch.tensor(rate, dtype=torch.float32, device=self.device) for rate in usual]
        noise = torch.Generator(self.device)
        try:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            outcome = tape.record(lambda: self.move(places, noise), noise)
        except RuntimeError as error:
            cause = error.__context__ or error  # the end of a recording fails with words of its own
            self._refuse(str(cause).splitlines()[0] if str(cause) else type(cause).__name__)
            return
        finally:
            for group, rate in zip(groups, usual, strict=True):
                group["lr"] = rate
        self.kept, self.how = Recording(tape, places, rates, noise, outcome), REPLAYED


def _tensors(given: Given) -> list[Tensor]:
    return [*given.views, given.labels, *([] if given.prior is None else [given.prior])]


@contextmanager
def waiting(device: torch.device) -> Iterator[list[str]]:
    """A list that holds, once this is over, what torch said of operations that waited for a card."""
    found: list[str] = []
    if device.type != "cuda":
        yield found
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in heard:
        if WAITS in str(warning.message):
            found.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
