"""Several processes must ask one question of one data set: batches are dealt out by their place, so that each process
goes through all of them, and takes its share.

What every process found is compared before any work, in one sum of a few numbers. A `DistributedSampler`, or a loader
that shuffles by a seed of each process, would leave some samples out and count others twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from hessdiag import errors
from hessdiag.errors import ConfigurationError, DistributedError, HessdiagError, NotDeterministicError
from hessdiag.measuring.ranks import World
from hessdiag.measuring.resume import digest_of
from hessdiag.methods.batches import NEAR, Survey
from hessdiag.problem.objective import Objective
from hessdiag.store.states import digest

SAME_BATCHES = (
    "give every process the same list of batches, in the same order, without DistributedSampler and without shuffle "
    "(e.g. list(DataLoader(dataset, batch_size=...))): batches are dealt out here"
)
SAME_MODEL = "load the same weights and buffers everywhere, or send those of process 0 (torch.distributed.broadcast)"
SAME_CALL = "call it with the same arguments in every process"


class _Fact(NamedTuple):
    """A number that must be that of process 0 to within `off`; `advice` is for where it is not."""

    name: str
    value: float
    off: float
    advice: str


def agreed(look: Callable[[], Survey], world: World, objective: Objective, seed: int) -> Survey:
    """What `look` finds of the data, the same in every process: else refused, as is an order that changes.

    Where one process refuses its data or model by itself, the others end as well, instead of waiting for it, with an
    error of its kind: what is tried again is so in all.
    """
    if world.size == 1:
        return look()
    try:
        facts = look()
    except Exception as error:
        kind = next((kind for kind in _KINDS if kind is type(error)), DistributedError)
        with suppress(DistributedError):
            world.gather([_REFUSED + _KINDS.index(kind), *[0.0] * 2 * _COUNT], objective.device)
        raise
    own = _facts(objective, facts, seed)
    assert len(own) == _COUNT
    state = _SHUFFLED if facts.shuffled else _FOUND
    rows = world.gather([state, *(fact.value for fact in own), *(fact.off for fact in own)], objective.device)
    states = [state for state, *_ in rows]
    for rank, state in enumerate(states):
        if state >= _REFUSED:
            kind = _KINDS[int(state - _REFUSED)]
            raise kind(f"process {rank} refused its data or model, and says why; the others end with it")
    if _SHUFFLED in states:
        raise NotDeterministicError(
            f"the data come in another order in every pass, which {world.size} processes cannot share; {SAME_BATCHES}"
        )
    for place, fact in enumerate(own, 1):
        first, off = rows[0][place], min(row[place + _COUNT] for row in rows)
        for rank, row in enumerate(rows):
            if not abs(row[place] - first) <= off:
                told = f" ({first:.17g} and {row[place]:.17g})" if fact.advice is SAME_BATCHES else ""
                raise ConfigurationError(f"{fact.name} differ between processes 0 and {rank}{told}; {fact.advice}")
    return facts


_FOUND, _SHUFFLED, _REFUSED = 0.0, 1.0, 2.0
_KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, HessdiagError)]
_COUNT = 11
"""Of facts, which one that refuses does not have."""


def _facts(objective: Objective, facts: Survey, seed: int) -> list[_Fact]:
    """Those of the data to rounding, all others exactly."""
    state = {**dict(objective.model.named_parameters()), **dict(objective.model.named_buffers())}
    question = [objective.loss.name, objective.loss.options, objective.l2]
    size = NEAR * facts.data_size
    return [
        _Fact("seeds", _number(json.dumps(seed)), 0.0, SAME_CALL),
        _Fact("the names of the chosen parameters", _number(json.dumps(list(objective.parameters))), 0.0, SAME_CALL),
        _Fact("the losses' names or options, or l2", _number(json.dumps(question)), 0.0, SAME_CALL),
        _Fact("the models", _number(digest_of(state)), 0.0, SAME_MODEL),
        _Fact("the numbers of samples", facts.samples, 0.0, SAME_BATCHES),
        _Fact("the numbers of batches", facts.batches, 0.0, SAME_BATCHES),
        _Fact("the sizes of the largest batch", facts.largest, 0.0, SAME_BATCHES),
        _Fact("the samples themselves", facts.data, size, SAME_BATCHES),
        _Fact("the orders of the samples", facts.order, size, SAME_BATCHES),
        _Fact("the sums of weights", facts.weight, NEAR * abs(facts.weight), SAME_BATCHES),
        _Fact("the losses", facts.loss, facts.loss_off, SAME_CALL),
    ]


def _number(text: str) -> float:
    """48 bits of a digest, which a float64 holds exactly."""
    return float(int(digest(text=text)[:12], 16))
