"""measure(): the norm of a loss's Hessian diagonal, with an interval narrow enough to be trusted."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import torch

from .diagonal import exact
from .diagonal.result import Diagonal
from .errors import (
    ConfigurationError,
    UnknownNameError,
    nearest,
)
from .graph import Linearisation
from .guard import as_it_was, memory_errors
from .measurement.audit import Audit
from .measurement.choose import EXACT_BUDGET, check_budget, check_given, decide, stored_plan
from .measurement.loop import Callback, Loop
from .measurement.plan import METHODS, SITE_METHODS, Plan
from .measurement.population import measure_population
from .measurement.provenance import provenance
from .measurement.result import Measurement
from .measurement.resume import identity_of
from .measurement.summary import summarise
from .measurement.until import run
from .measurement.world import World
from .norm.estimates import check_confidence
from .objective import Objective
from .progress import reporting
from .stream import Batches, Numbered, Survey, check_apart, check_deterministic, numbered, survey

ADVICE = "lower the batch size, choose fewer parameters (parameters=...), or a method that needs less (propagation)"


def measure(
    objective: Objective,
    batches: Batches,
    *,
    method: str = "auto",
    rtol: float = 0.05,
    confidence: float = 0.95,
    seed: int = 0,
    min_replicates: int = 10,
    max_replicates: int = 1000,
    max_seconds: float | None = None,
    target: str = "data",
    plan: Plan | None = None,
    budget: float | None = EXACT_BUDGET,
    deterministic_check: bool = True,
    audit_model: bool = True,
    keep_diagonal: bool = False,
    progress: Callback | bool | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> Measurement:
    """Measure ||diag H|| of the objective over the data, until the interval of `rms` is within `rtol` of it.

    `method`: "exact", "propagation", "hutchinson", "reference", or "auto" - exact where it is cheap, propagation
    where the site identity covers the model, Hutchinson where it does not; the status says which and why.
    `target`: "data" for the Hessian of the mean loss of these samples; "population" for that of the distribution they
    come from, replicates then being independent in data as well.
    `progress`: True for a bar on a terminal or a line in a notebook, or a function of an `Event`.
    Interrupted (Ctrl-C, `max_seconds`, `max_replicates`), the result is what is there, and its status says so.
    """
    begun = time.monotonic()
    _check_basics(objective, method, seed)
    _check_arguments(rtol, confidence, min_replicates, max_replicates, max_seconds, target)
    world = World.current()
    with as_it_was(objective.model), memory_errors(ADVICE), reporting(progress) as callback:
        objective.check_modes()
        facts, first = _look(objective, batches, plan.method if plan else method, deterministic_check)
        checked: Audit | None = None
        notes: list[str] = []
        path = None if resume is None else Path(resume)
        if plan is None and path is not None and path.exists():
            plan = stored_plan(path, method)
        if plan is None:
            plan, checked = decide(objective, first, facts, method, seed, audit_model, rtol=rtol)
        else:
            plan = replace(plan, deflate=0) if target == "population" else plan
            checked = check_given(objective, first, facts, plan, seed, audit_model)
        if world.size > 1:  # a pilot's clock may choose otherwise elsewhere
            told = world.text_from_first(json.dumps(plan.to_dict()), objective.device)
            plan = Plan.from_dict(json.loads(told))
        check_budget(objective, first, facts, plan, budget)
        if facts.shuffled:
            notes.append("the data come in another order in every pass")
        if target == "population":
            return measure_population(
                objective,
                batches,
                replace(plan, deflate=0),  # every sample is used once: nothing to spread the exact passes over
                facts,
                checked,
                seed=seed,
                confidence=confidence,
                begun=begun,
                progress=callback,
                replicates=max(min_replicates, 10),
                world=world,
            )
        identity = identity_of(objective, facts, plan, seed)
        loop = Loop(
            objective,
            batches,
            plan,
            facts,
            seed=seed,
            world=world,
            invariant=True,
            progress=callback,
            resume=path,
            identity=identity,
        )
        if path is not None and not path.exists():
            loop.save()  # the plan first: a pilot repeated might choose otherwise
        status = run(loop, rtol, confidence, min_replicates, max_replicates, max_seconds)
        loop.passes.forget()
        if loop.unsaved is not None:
            notes.append(loop.unsaved)
        return summarise(
            loop,
            first=first,
            audit=checked,
            status=status,
            notes=notes,
            confidence=confidence,
            seconds=time.monotonic() - begun,
            keep_diagonal=keep_diagonal,
            provenance=provenance(objective, facts, plan, seed=seed, target=target, world=world),
        )


def diagonal(
    objective: Objective,
    batches: Batches,
    *,
    method: str = "exact",
    seed: int = 0,
    replicates: int = 16,
    plan: Plan | None = None,
    per_sample: bool = False,
    budget: float | None = EXACT_BUDGET,
    deterministic_check: bool = True,
    audit_model: bool = True,
    progress: Callback | bool | None = None,
) -> Diagonal:
    """The diagonal itself: total, Gauss-Newton and functional part, by parameter name.

    Stochastic methods average `replicates` and come with per-entry standard errors. `per_sample` gives the
    diagonals of the single samples' losses (method "exact").
    """
    _check_basics(objective, method, seed)
    if not isinstance(replicates, int) or replicates < 2:
        raise ConfigurationError(f"replicates={replicates!r}: at least 2 are needed for an error")
    world = World.current()
    with as_it_was(objective.model), memory_errors(ADVICE), reporting(progress) as callback:
        objective.check_modes()
        facts, first = _look(objective, batches, plan.method if plan else method, deterministic_check)
        if plan is None:
            plan, _ = decide(objective, first, facts, method, seed, audit_model, replicates=replicates)
        else:
            check_given(objective, first, facts, plan, seed, audit_model)
        check_budget(objective, first, facts, plan, budget)
        if per_sample:
            return _per_sample(objective, batches, facts, plan)
        loop = Loop(
            objective,
            batches,
            plan,
            facts,
            seed=seed,
            world=world,
            invariant=False,
            progress=callback,
            resume=None,
            identity={},
        )
        loop.run_known()
        while loop.streams and loop.done < replicates:
            loop.run_round(min(plan.at_once, replicates - loop.done))
        return loop.diagonal(provenance(objective, facts, plan, seed=seed, target="data", world=world))


def _look(objective: Objective, batches: Batches, method: str, twice: bool) -> tuple[Survey, Numbered]:
    """What is known of the data before any method is chosen, and their first batch."""
    coverage = method in ("auto", *SITE_METHODS)
    if twice:
        facts = check_deterministic(objective, batches, coverage=coverage)
    else:
        facts = survey(objective, batches, coverage=coverage)
    first = next(iter(numbered(objective, batches)))
    if not twice:
        check_apart(objective, first)
    return facts, first


def _check_basics(objective: Objective, method: str, seed: int) -> None:
    if not isinstance(objective, Objective):
        raise ConfigurationError(f"an Objective(model, loss) is needed first, not a {type(objective).__name__}")
    if method != "auto" and method not in METHODS:
        raise UnknownNameError(f"unknown method {method!r}; {nearest(str(method), [*METHODS, 'auto'])}")
    if not isinstance(seed, int):
        raise ConfigurationError(f"seed={seed!r}: an integer is needed")


def _check_arguments(rtol: float, confidence: float, low: int, high: int, seconds: float | None, target: str) -> None:
    if not (isinstance(rtol, (int, float)) and 0.0 < rtol < float("inf")):
        raise ConfigurationError(f"rtol={rtol!r}: a positive number is needed, e.g. 0.05 for five per cent")
    check_confidence(confidence)
    whole = isinstance(low, int) and isinstance(high, int)
    if not whole or low < 2 or high < 2 or high < low:
        raise ConfigurationError(f"min_replicates={low}, max_replicates={high}: at least 2 probes, and min <= max")
    if seconds is not None and not seconds > 0:
        raise ConfigurationError(f"max_seconds={seconds!r} must be positive")
    if target not in ("data", "population"):
        raise UnknownNameError(f"unknown target {target!r}; {nearest(target, ['data', 'population'])}")


def _per_sample(objective: Objective, batches: Batches, facts: Survey, plan: Plan) -> Diagonal:
    if plan.method != "exact":
        raise ConfigurationError("per-sample diagonals come from method='exact'")
    outer: dict[str, list[torch.Tensor]] = {name: [] for name in objective.parameters}
    inner: dict[str, list[torch.Tensor]] = {name: [] for name in objective.parameters}
    for batch in numbered(objective, batches):
        linear = Linearisation(objective, batch.inputs, batch.targets, index=batch.index)
        g, f = exact.batch_diagonal(linear, per_sample=True)
        for name in objective.parameters:
            outer[name].append(g[name] + objective.l2)
            inner[name].append(f[name])
    gauss_newton = {name: torch.cat(parts) for name, parts in outer.items()}
    functional = {name: torch.cat(parts) for name, parts in inner.items()}
    total = {name: gauss_newton[name] + functional[name] for name in gauss_newton}
    errors = {name: torch.zeros_like(t) for name, t in total.items()}
    return Diagonal(total, gauss_newton, functional, errors, "exact", facts.samples, per_sample=True)
