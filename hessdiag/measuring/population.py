"""The population target: the norm for the distribution that the samples come from, not for these samples.

Replicates must then be independent in data as well. The samples are dealt at random (keyed by the seed) into as many
disjoint shards as there are replicates, and a shard i of n_i samples gives a pair of means,

    Y_i = (1/n_i) sum of its samples' second derivatives (Gauss-Newton and functional part together),
    v_i = (1/n_i) sum of its samples' weights.

The diagonal of the population is d = E[Y] / E[v] + l2, the ratio of two means: a mean of ratios Y_i / v_i is another
number where weights differ (class weights, tokens that are ignored, sequences of several lengths). The replicates are
therefore the pseudo-values of the ratio sum Y / sum v (`hessdiag.norm.jackknife.ratio_pseudo_values`), whose spread
holds that of the weights too, and the unbiased norm of `hessdiag.norm` is taken over them; with equal weights they are
Y_i / v_i.

Samples without a loss, of which all targets are ignored, say nothing of d: those that have one are dealt, so that no
shard is empty.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hessdiag.errors import ConfigurationError, EmptyDataError, NotDeterministicError
from hessdiag.kernels.tensors import Tensors, accumulate, zeros
from hessdiag.measuring.diagonal import Diagonal
from hessdiag.methods import Case, Work, find
from hessdiag.methods.base import FUNCTIONAL, GAUSS_NEWTON, TOTAL
from hessdiag.methods.batches import Numbered, numbered, watch
from hessdiag.norm import Replicates
from hessdiag.norm.jackknife import Array, ratio_pseudo_values
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
    objective, samples, counted = case.objective, case.survey.samples, case.survey.counted
    shards = max(replicates, SHARDS)
    if counted < 2 * shards:
        have = f"not {samples}"
        if counted < samples:
            have = f"and only {counted} of these {samples} have targets that count"
        raise ConfigurationError(
            f"target='population' needs at least {2 * shards} samples for {shards} independent replicates, {have}"
        )
    shard = deal(counted, shards, case.seed)
    work = find(case.plan.method).work(case)
    sums = [zeros(objective.parameters) for _ in range(shards)]
    weights, seen, place = np.zeros(shards), [0] * shards, 0
    for batch in watch(case.survey, numbered(objective, case.batches)):
        with_loss = objective.loss.counted(batch.targets).nonzero()[:, 0]
        here = shard[place : place + len(with_loss)].to(objective.device)
        place += len(with_loss)
        for number in sorted(set(here.tolist())):
            # Signs are keyed by the shard and the place in it: every sample is in one shard only, and used once.
            part = replace(batch.part(with_loss[: len(here)][here == number]), start=seen[number])
            accumulate(sums[number], _whole(case, work, part, number))
            seen[number] += len(part.targets)
            weights[number] += _weight(case, part)
    if place != counted:
        raise NotDeterministicError(
            f"the data changed during the measurement: {place} samples have targets that count, not {counted}; pass a "
            "fixed set of batches"
        )
    if not weights.all():
        number = int(weights.argmin())
        raise EmptyDataError(
            f"shard {number} of {shards}: its {seen[number]} samples are all of classes of weight zero; "
            "target='population' needs more samples" + (", or fewer replicates" if shards > SHARDS else "")
        )
    for total, count in zip(sums, seen):
        for tensor in total.values():
            tensor /= count
    squares = {name: p.detach().square() for name, p in objective.parameters.items()}
    stream = Replicates(
        objective.parameters,
        groups=max(case.plan.groups, 4),
        weights=squares,
        target="population",
        device=objective.device,
    )
    add_pairs(stream, sums, weights / seen, l2=objective.l2)
    return stream


def add_pairs(stream: Replicates, sums: list[Tensors], weights: Array, *, l2: float) -> None:
    """The pseudo-values of the ratio of Y_i, in `sums`, and v_i, in `weights`, as replicates; `sums` is used up."""
    mean = {name: sum(pair[name] for pair in sums) / float(weights.sum()) for name in sums[0]}
    for number, (own, other) in enumerate(zip(*(x.tolist() for x in ratio_pseudo_values(weights)))):
        stream.add({name: own * t + (other * mean[name] + l2) for name, t in sums[number].items()}, number)
        sums[number] = {}


def estimated(case: Case, stream: Replicates, facts: dict[str, Any]) -> Diagonal:
    """The diagonal of the population as the shards estimate it, with the standard errors of its entries."""
    return Diagonal(
        stream.mean(), {}, {}, stream.standard_error(), case.plan.method, case.survey.samples, stream.count,
        status="estimate", provenance=facts,
    )  # fmt: skip


def _whole(case: Case, work: Work, part: Numbered, shard: int) -> Tensors:
    """One unbiased diagonal summed over the samples of one shard in one batch: what is known and what is drawn."""
    method = find(case.plan.method)
    work.forget()
    found = work.known_parts(part, lambda done, total: None) if method.known(case.plan) else {}
    if method.streams(case.plan):
        for stream, drawn in work.drawn_streams(part, shard).items():
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
