"""The norm of a model in training, as the numbers of one epoch: always of the same samples, and never a reason to stop.

    watch = Watch(batches)
    for epoch in range(epochs):
        ...                      # train
        log(watch(model))        # {"hessian_rms": ..., "hessian_rms_low": ..., "hessian_rms_high": ..., ...}

The model is measured in eval mode and handed back as it came (`hessdiag.problem.handing_back`). What is refused, or
fails, is warned of, each reason once; the numbers are then missing and training goes on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from hessdiag.errors import AuditError, ConfigurationError, EmptyDataError, HessdiagError, UncoveredModelError
from hessdiag.feed import Fed, batches
from hessdiag.measuring.entry import check_arguments, measure, whole_seed
from hessdiag.measuring.result import Measurement
from hessdiag.methods import Plan
from hessdiag.methods.base import known
from hessdiag.problem.forward import mapped
from hessdiag.problem.handing_back import as_it_was
from hessdiag.problem.objective import Objective
from hessdiag.problem.random_states import RandomStates

Pair = tuple[Any, Tensor]
SHARDS = ("DTensor", "FlatParameter")
"""Types of parameters of which a process holds a part: FSDP's."""


@dataclass(eq=False)
class Watch:
    """Called with a model, the norm of its Hessian's diagonal and its interval, under names for a logger.

    `data`: batches, a Dataset or a pair of arrays, as `hessdiag.feed.batches` takes them. Its first `samples` are kept,
    the same ones for every epoch (None: all of them, read anew each time); with several processes they must be the
    same in each, and the work is dealt out. `objective` makes what is differentiated of the model that is called with:
    `lambda m: Objective(m.net, "mse")`. `targets` is the key of the targets in dictionaries. `every` is in epochs, of
    the callbacks. `method`, `rtol`, `seed` and `max_seconds` are those of `measure`; the plan of the first measurement
    serves the later ones, so that only one of them needs a pilot.
    """

    data: Any
    objective: Callable[[Any], Objective] = Objective
    samples: int | None = 128
    every: int = 1
    targets: str | None = None
    method: str = "auto"
    rtol: float = 0.1
    seed: int = 0
    max_seconds: float | None = 60.0
    name: str = "hessian"

    def __post_init__(self) -> None:
        """Refuse now what would otherwise be warned of after the first epoch."""
        batches(self.data)
        for label, value in (("samples", self.samples), ("every", self.every)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigurationError(f"{label}={value!r}: a whole number from 1 on is needed")
        if not callable(self.objective):
            raise ConfigurationError(
                "objective is a function of the model that is watched, e.g. lambda model: Objective(model, 'mse'), and "
                f"not of type {type(self.objective).__name__}"
            )
        known(self.method)
        check_arguments(self.rtol, seconds=self.max_seconds)
        whole_seed(self.seed)
        self.last: Measurement | None = None
        """The whole of the last measurement."""
        self._kept: list[Pair] | None = None
        self._plan: Plan | None = None
        self.notes: tuple[str, ...] = ()
        """What every measurement is to say besides its own notes."""
        self._told: set[str] = set()

    def due(self, epoch: int) -> bool:
        """Whether the epoch of this number, the first being 1, is one of those to measure."""
        return epoch % self.every == 0

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Measure the model as it stands; nothing where that cannot be done, with a warning that says why."""
        try:
            with as_it_was(model) as told, unmoved(self.data):
                model.eval()
                found = self._measured(self.objective(model), model)
        except Exception as error:  # whatever it is, hours of training are worth more
            self._tell(f"not measured: {error if isinstance(error, HessdiagError) else repr(error)}")
            return {}
        if "interrupted" in found.status:  # measure gives what is there; here the training is meant
            raise KeyboardInterrupt
        if found.status not in ("ok", "exact"):
            self._tell(f"measured, but {found.status}")
        self.last, self._plan = replace(found, notes=(*found.notes, *told, *self.notes)), found.plan
        values = {"rms": found.rms, "rms_low": found.interval[0], "rms_high": found.interval[1]}
        return {f"{self.name}_{key}": value for key, value in (values | {"seconds": found.seconds}).items()}

    def settled(self, objective: Objective, model: nn.Module, fed: Fed) -> Objective:
        """The objective to measure, once the data are there: for who knows what the model is trained on."""
        return objective

    def _measured(self, objective: Objective, model: nn.Module) -> Measurement:
        for name, parameter in objective.parameters.items():
            if type(parameter).__name__ in SHARDS:
                raise UncoveredModelError(f"parameter {name!r} is spread over processes; measure a whole checkpoint")
        if self._kept is None and self.samples is not None:
            self._kept = list(first(batches(self.data, targets=self.targets, dtype=objective.dtype), self.samples))
        source = self.data if self._kept is None else self._kept
        fed = batches(source, targets=self.targets, device=objective.device, dtype=objective.dtype)
        objective = self.settled(objective, model, fed)
        if self._plan is not None:
            try:
                return self._run(objective, fed, self._plan)
            except (AuditError, ConfigurationError, UncoveredModelError):
                pass  # what has changed since may need another plan
        return self._run(objective, fed, None)

    def _run(self, objective: Objective, fed: Fed, plan: Plan | None) -> Measurement:
        rtol, seed, seconds = self.rtol, self.seed, self.max_seconds
        return measure(objective, fed, method=self.method, rtol=rtol, seed=seed, max_seconds=seconds, plan=plan)

    def _tell(self, words: str, *, depth: int = 3) -> None:
        if words not in self._told:
            self._told.add(words)
            warnings.warn(f"the Hessian's diagonal was {words}; training goes on", stacklevel=depth)


class Callback(Watch):
    """A Watch among the callbacks of a trainer, who asks for every hook it knows: those not written do nothing."""

    def __getattr__(self, hook: str) -> Callable[..., None]:
        """Such a hook."""
        if hook.startswith("on_") or hook in ("setup", "teardown"):
            return _nothing
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {hook!r}")


def _nothing(*_given: Any, **_named: Any) -> None:
    """What there is to do at most events."""


@contextmanager
def unmoved(data: Any) -> Iterator[None]:
    """Random states as they were, a loader's own too: the order of the epochs to come does not change."""
    states = RandomStates.now(data)
    try:
        yield
    finally:
        states.put(data)


def first(source: Fed, samples: int) -> Iterator[Pair]:
    """The batches that hold the first `samples` samples, the last of them cut."""
    left = samples
    for inputs, targets in source:
        yield mapped((inputs, targets), partial(_cut, held=len(targets), wanted=left))
        left -= len(targets)
        if left <= 0:
            return
    if left == samples:
        raise EmptyDataError("the data to watch hold no samples")


def _cut(value: Tensor, held: int, wanted: int) -> Tensor:
    """The first `wanted` of `held` samples; what is no tensor of samples stays."""
    of_samples = value.ndim > 0 and len(value) == held
    return value[:wanted] if of_samples and held > wanted else value
