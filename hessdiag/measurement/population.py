"""The population target: the norm for the distribution that the samples come from, not for these samples.

Replicates must then be independent in data as well. The samples are dealt at random (keyed by the seed) into as many
disjoint shards as there are replicates; each shard gives one diagonal of its own mean loss, its Gauss-Newton part and
functional part together, and the unbiased norm of `hessdiag.norm` is taken over shards. The mean of all shards is
still the diagonal of the data.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from ..diagonal import exact
from ..diagonal.hutchinson import Products, probe
from ..diagonal.parts import Tensors, accumulate, zeros
from ..diagonal.propagation import Propagator
from ..errors import ConfigurationError
from ..graph import Linearisation
from ..norm import Replicates, estimate, trace
from ..objective import Objective
from ..signs import Signs, cpu_generator
from ..stream import Batches, Numbered, Survey, numbered
from .audit import Audit
from .plan import Plan
from .provenance import provenance
from .result import Measurement, NormSummary
from .summary import parameter_groups
from .world import World

SHARDS = 16


def deal(samples: int, shards: int, seed: int) -> torch.Tensor:
    """Shard of every sample: a random deal into shards of equal size (to one sample)."""
    order = torch.randperm(samples, generator=cpu_generator(seed), device="cpu")
    shard = torch.empty(samples, dtype=torch.long, device="cpu")
    shard[order] = torch.arange(samples, device="cpu") % shards
    return shard


def measure_population(
    objective: Objective,
    batches: Batches,
    plan: Plan,
    survey: Survey,
    audit: Audit | None,
    *,
    seed: int,
    confidence: float,
    begun: float,
    progress: Callable[[Any], None] | None,
    replicates: int,
    world: World,
) -> Measurement:
    """One pass; a replicate per shard."""
    if world.size > 1:
        raise ConfigurationError("target='population' runs in one process")
    shards = max(replicates, SHARDS)
    if survey.samples < 2 * shards:
        raise ConfigurationError(
            f"target='population' needs at least {2 * shards} samples for {shards} independent replicates, "
            f"not {survey.samples}"
        )
    parameters = objective.parameters
    shard = deal(survey.samples, shards, seed)
    signs = Signs(seed, objective.device)
    sums = [zeros(parameters) for _ in range(shards)]
    weights, seen = [0.0] * shards, [0] * shards
    for batch in numbered(objective, batches):
        here = shard[batch.start : batch.start + len(batch.targets)].to(objective.device)
        for number in sorted(set(here.tolist())):
            part = batch.part(here == number)
            diagonal, weight = _shard_part(objective, part, plan, signs, number, seen[number])
            seen[number] += len(part.targets)
            accumulate(sums[number], diagonal)
            weights[number] += weight
    squares = {name: p.detach().square() for name, p in parameters.items()}
    stream = Replicates(
        parameters, groups=max(plan.groups, 4), weights=squares, target="population", device=objective.device
    )
    for number, (total, weight) in enumerate(zip(sums, weights)):
        stream.add({name: t / weight + objective.l2 for name, t in total.items()}, number)
    groups = parameter_groups(objective)
    report = estimate(stream, groups=groups, confidence=confidence)
    invariant = estimate(stream, weighted=True, groups=groups, confidence=confidence)

    def alone(e: Any) -> NormSummary:
        return NormSummary(e, None, None, None, None)

    return Measurement(
        norm=alone(report.total),
        layers={n: alone(e) for n, e in report.tensors.items()},
        groups={n: alone(e) for n, e in report.groups.items()},
        invariant=invariant.total,
        invariant_groups=invariant.groups,
        trace=trace(stream, confidence=confidence),
        effective_curvature=(),
        audit=audit,
        status=report.total.status,
        notes=(f"population target: {shards} shards of the data, {plan.method}",),
        plan=plan,
        loss=survey.mean_loss,
        samples=survey.samples,
        parameters=objective.size,
        seconds=time.monotonic() - begun,
        history=(),
        provenance=provenance(objective, survey, plan, seed=seed, target="population", world=world),
    )


def _shard_part(
    objective: Objective, part: Numbered, plan: Plan, signs: Signs, shard: int, seen: int
) -> tuple[Tensors, float]:
    """Diagonal summed over the samples of one shard in one batch, and their weight."""
    if plan.method in ("hutchinson", "reference"):
        products = Products(objective, part.inputs, part.targets, index=part.index, parts=False)
        v = probe(objective, signs, shard)
        return {name: (v[name] * hv).double() for name, hv in products.hessian(v).items()}, products.weight
    linear = Linearisation(objective, part.inputs, part.targets, index=part.index, balance=plan.balance)
    if plan.method == "exact":
        outer, inner = exact.batch_diagonal(linear)
    else:
        # Signs keyed by the shard and the place in it: every sample is in one shard only, and used once.
        propagator = Propagator(linear, start=seen, groups=plan.sample_groups)
        inner = propagator.functional(signs, shard)
        accumulate(inner, propagator.direct())
        outer = (
            propagator.gauss_newton() if plan.gauss_newton == "exact" else propagator.gauss_newton_signed(signs, shard)
        )
    return {name: outer[name] + inner[name] for name in outer}, linear.weight
