"""The population target: the norm for the distribution that the samples come from, not for these samples.

Replicates must then be independent in data as well. The samples are dealt at random (keyed by the seed) into as many
disjoint shards as there are replicates; each shard gives one diagonal of its own mean loss, its Gauss-Newton part and
functional part together, and the unbiased norm of `hessdiag.norm` is taken over shards. The mean of all shards is
still the diagonal of the data.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from hessdiag.errors import ConfigurationError
from hessdiag.kernels.tensors import Tensors, accumulate, zeros
from hessdiag.methods import Case, Work, find
from hessdiag.methods.base import FUNCTIONAL, GAUSS_NEWTON, TOTAL
from hessdiag.methods.batches import Numbered, numbered
from hessdiag.norm import Replicates
from hessdiag.signs import cpu_generator

SHARDS = 16


def deal(samples: int, shards: int, seed: int) -> torch.Tensor:
    """Shard of every sample: a random deal into shards of equal size (to one sample)."""
    order = torch.randperm(samples, generator=cpu_generator(seed), device="cpu")
    shard = torch.empty(samples, dtype=torch.long, device="cpu")
    shard[order] = torch.arange(samples, device="cpu") % shards
    return shard


def shards_of(case: Case, replicates: int) -> Replicates:
    """One pass; a replicate per shard, of the total with weight decay."""
    if case.world.size > 1:
        raise ConfigurationError("target='population' runs in one process")
    objective, samples = case.objective, case.survey.samples
    shards = max(replicates, SHARDS)
    if samples < 2 * shards:
        raise ConfigurationError(
            f"target='population' needs at least {2 * shards} samples for {shards} independent replicates, "
            f"not {samples}"
        )
    shard = deal(samples, shards, case.seed)
    work = find(case.plan.method).work(case)
    sums = [zeros(objective.parameters) for _ in range(shards)]
    weights, seen = [0.0] * shards, [0] * shards
    for batch in numbered(objective, case.batches):
        here = shard[batch.start : batch.start + len(batch.targets)].to(objective.device)
        for number in sorted(set(here.tolist())):
            # Signs are keyed by the shard and the place in it: every sample is in one shard only, and used once.
            part = replace(batch.part(here == number), start=seen[number])
            accumulate(sums[number], _whole(case, work, part, number))
            seen[number] += len(part.targets)
            weights[number] += _weight(case, part)
    squares = {name: p.detach().square() for name, p in objective.parameters.items()}
    stream = Replicates(
        objective.parameters,
        groups=max(case.plan.groups, 4),
        weights=squares,
        target="population",
        device=objective.device,
    )
    for number, (total, weight) in enumerate(zip(sums, weights)):
        stream.add({name: t / weight + objective.l2 for name, t in total.items()}, number)
    return stream


def _whole(case: Case, work: Work, part: Numbered, shard: int) -> Tensors:
    """One unbiased diagonal summed over the samples of one shard in one batch: what is known and what is drawn."""
    method = find(case.plan.method)
    work.forget()
    found = dict(work.known(part, lambda done, total: None)) if method.known(case.plan) else {}
    if method.streams(case.plan):
        for stream, drawn in work.replicate(part, shard).items():
            if stream in found:
                drawn = {name: drawn[name] + t for name, t in found[stream].items()}
            found[stream] = drawn
    work.forget()
    if GAUSS_NEWTON in found and FUNCTIONAL in found:
        return {name: t + found[FUNCTIONAL][name] for name, t in found[GAUSS_NEWTON].items()}
    return found[TOTAL]


def _weight(case: Case, part: Numbered) -> float:
    """What the samples add to the divisor of the mean."""
    return float(case.objective.loss.weights(part.targets, part.targets).sum())  # of outputs only the device counts
