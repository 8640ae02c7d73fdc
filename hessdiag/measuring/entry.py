"""measure(): the norm of a loss's Hessian diagonal, with an interval narrow enough to be trusted."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hessdiag.errors import ConfigurationError, HessdiagError, UnknownNameError, nearest
from hessdiag.graph import Linearisation
from hessdiag.graph.reading import rounding_guard
from hessdiag.kernels.tensors import Tensors, hold_freed_memory
from hessdiag.measuring.agreement import agreed
from hessdiag.measuring.audit import SAMPLES, Audit
from hessdiag.measuring.choose import EXACT_BUDGET, check_budget, check_given, decide, stored_plan
from hessdiag.measuring.diagonal import Diagonal
from hessdiag.measuring.loop import Callback, Loop, first_states
from hessdiag.measuring.population import estimated, shards_of
from hessdiag.measuring.progress import reporting
from hessdiag.measuring.provenance import provenance
from hessdiag.measuring.ranks import World
from hessdiag.measuring.result import Measurement
from hessdiag.measuring.resume import restore
from hessdiag.measuring.stopping import run
from hessdiag.measuring.summary import (
    Course,
    effective,
    reports,
    reports_of_shards,
    summarise,
    underflow,
    underflown,
)
from hessdiag.methods import METHODS, Aim, Case, Plan, find
from hessdiag.methods.base import FUNCTIONAL, GAUSS_NEWTON, known
from hessdiag.methods.batches import (
    Batches,
    Longest,
    Numbered,
    Pass,
    Stamp,
    Survey,
    check_apart,
    check_deterministic,
    numbered,
    survey,
)
from hessdiag.norm.estimates import check_confidence
from hessdiag.norm.replicates import CAPACITY
from hessdiag.problem.compared import check_mended
from hessdiag.problem.handing_back import as_it_was, memory_errors
from hessdiag.problem.objective import Objective
from hessdiag.problem.persample import CallableLoss
from hessdiag.store.files import shown

POPULATION = "population"
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
    plan: Plan | Mapping[str, Any] | None = None,
    budget: float | None = EXACT_BUDGET,
    deterministic_check: bool = True,
    audit_model: bool = True,
    keep_diagonal: bool = False,
    progress: Callback | bool | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> Measurement:
    """Measure ||diag H|| of `objective` over `batches`, until the interval of `rms` is within `rtol` of it.

    `batches` is any re-iterable of (inputs, targets), a DataLoader or a list, or one such pair; the mean loss is over
    samples, however they are cut into batches.

    `method`: "exact", "propagation", "hutchinson", "reference", one that was registered, or "auto" - exact where it is
    cheap, propagation where the site identity covers the model, Hutchinson where it does not; the notes say which and
    why. `plan` gives method and all its choices, as an earlier measurement's `plan` does, or the table of it that a
    file holds (`read_result(path).content["plan"]`), in place of a pilot.

    Replicates are drawn by `seed` (the same seed, plan, dtype and number of threads give the same bits) until half the
    interval at `confidence` is within `rtol` of the norm: at least `min_replicates`, at most `max_replicates`, and none
    is begun after `max_seconds` (exact passes are finished). Stopped so, or by Ctrl-C, the result is what is there, and
    its status says so.

    `target`: "data" for the Hessian of the mean loss of these samples; "population" for that of the distribution they
    come from, replicates then being independent in data as well.

    `budget` refuses an exact method that takes more multiplications (None: none is refused). `deterministic_check`
    looks at the data twice and refuses what differs, `audit_model` holds method, model and derivatives against each
    other on two samples of the first batch, and two of that with the longest samples; either looks for samples that
    meet, in all batches or in the first. Switch them off only where model and data are known to be right.
    `keep_diagonal` keeps the diagonal in the result (of a population, its estimate and standard errors). `progress` is
    True for a bar on a terminal or a line in a notebook, or a function of an `Event`. `resume` names a file that the
    state is written to as it goes; started again with the same file, the measurement goes on from there to the same
    bits. A loader that shuffles is put back to where it was, if it draws from torch's, numpy's or python's random state
    or its own generator; if from elsewhere, the pass that was interrupted begins anew, and the bits are those of
    another order.
    """
    begun = time.monotonic()
    seed, plan = _basics(objective, method, seed, plan)
    check_arguments(rtol, confidence, min_replicates, max_replicates, max_seconds, target)
    min_replicates, max_replicates = int(min_replicates), int(max_replicates)
    if target == POPULATION and resume is not None:
        raise ConfigurationError("resume serves target='data' only: the population target is one pass")
    with as_it_was(objective.model) as told, memory_errors(ADVICE), reporting(progress) as callback:
        asked = plan.method if plan else method
        path, checked = None if resume is None else Path(resume), None
        stored = restore(path, identity=None)[1] if path is not None and path.exists() else None
        drawn = None if path is None else first_states(path, stored or {}, batches)
        case = _case(objective, batches, asked, seed, deterministic_check, audit_model, World.current())
        if plan is None and path is not None and stored is not None:
            plan = stored_plan(path, stored["plan"], method)
        if plan is None:
            plan, checked = decide(case, method, Aim(rtol), audit_model=audit_model)
        else:
            plan = replace(plan, deflate=0, probe_rank=0) if target == POPULATION else plan
            checked = check_given(case, plan, audit_model=audit_model)
        if target == POPULATION:  # every sample is used once, for a total: nothing to spread the exact passes over
            plan = replace(plan, deflate=0, probe_rank=0, parts=False)
        case.chosen = _everywhere(case, plan)
        check_budget(case, budget)
        found, unreached = effective(case)
        notes = [*_left_out(objective), *_unchecked(checked), *told]
        if case.survey.shuffled:
            notes.append("the data come in another order in every pass")
        course = Course(target, checked, "", notes, begun, found, unreached)
        if target == POPULATION:
            stream = shards_of(case, min_replicates)
            notes.insert(0, f"population target: {stream.count} shards of the data, {case.plan.method}")
            norms = reports_of_shards(objective, stream, confidence)
            kept = partial(estimated, case, stream) if keep_diagonal else None
            return summarise(case, norms, replace(course, status=norms.total.total.status, diagonal=kept))
        loop = Loop(case, progress=callback, resume=path, drawn=drawn)
        if path is not None and not path.exists():
            loop.save()  # the plan first: a pilot repeated might choose otherwise
        status = run(loop, rtol, confidence, min_replicates, max_replicates, max_seconds)
        loop.work.forget()
        if loop.unsaved is not None:
            notes.append(loop.unsaved)
        elif "interrupted" in status and loop.goes_on:
            notes.append(loop.goes_on)
        taken = loop.diagonal if keep_diagonal else None
        course = replace(course, status=status, history=tuple(loop.history), diagonal=taken)
        return summarise(case, reports(loop, confidence), course)


def diagonal(
    objective: Objective,
    batches: Batches,
    *,
    method: str = "exact",
    seed: int = 0,
    replicates: int = 16,
    plan: Plan | Mapping[str, Any] | None = None,
    per_sample: bool = False,
    budget: float | None = EXACT_BUDGET,
    deterministic_check: bool = True,
    audit_model: bool = True,
    progress: Callback | bool | None = None,
) -> Diagonal:
    """The diagonal itself of `objective` over `batches`: total, Gauss-Newton and functional part, by parameter name.

    `method` is one of those of `measure`, or "auto"; `plan` gives it with all its choices. Stochastic methods average
    `replicates` drawn by `seed` and come with per-entry standard errors. `per_sample` gives the diagonals of the single
    samples' losses (method "exact"), undivided: sums over a sample's places, times class weights, and l2 on each. Their
    mean is the diagonal only where every weight is 1. `budget`, `deterministic_check`, `audit_model` and `progress` are
    those of `measure`.
    """
    seed, plan = _basics(objective, method, seed, plan)
    if not isinstance(replicates, Integral) or not 2 <= replicates <= CAPACITY:
        raise ConfigurationError(f"replicates={replicates!r}: at least 2 are needed for an error, at most {CAPACITY}")
    replicates = int(replicates)
    with as_it_was(objective.model) as told, memory_errors(ADVICE), reporting(progress) as callback:
        world = World() if per_sample else World.current()  # samples one by one are nothing to share
        asked = plan.method if plan else method
        case = _case(objective, batches, asked, seed, deterministic_check, audit_model, world)
        if plan is None:
            plan, checked = decide(case, method, Aim(replicates=replicates), audit_model=audit_model)
        else:
            checked = check_given(case, plan, audit_model=audit_model)
        case.chosen = _everywhere(case, plan)
        check_budget(case, budget)
        notes = [*_left_out(objective), *_unchecked(checked), *told]
        if per_sample:
            return _per_sample(case, notes)
        loop = Loop(case, invariant=False, progress=callback)
        loop.run_known()
        while loop.streams and loop.done < replicates:
            loop.run_round(min(plan.at_once, replicates - loop.done))
        found = loop.diagonal(provenance(case, target="data") | _told(notes))
        squares = {name: float(t.flatten() @ t.flatten()) for name, t in found.total.items()}
        lost = underflown(objective, case.first, squares)
        if lost:
            facts = {**found.provenance, "underflow": lost}
            found = replace(found, status=underflow(found.status, lost, squares), provenance=facts)
        return found


def _case(
    objective: Objective, batches: Batches, method: str, seed: int, twice: bool, apart: bool, world: World
) -> Case:
    """What is known of the data before any method is chosen, and their first batch, linearised if that may be used.

    `twice` goes through the data again, `apart` holds at least the first batch against its parts, and functions that
    are mended against torch's. All processes of the `world` must find the same.
    """
    hold_freed_memory()
    sites = method not in METHODS or METHODS[method].sites
    found: list[tuple[Numbered, Tensor | None, Linearisation | HessdiagError | None, Stamp]] = []

    longest = Longest(SAMPLES)
    notice = longest if apart else None

    def look(first: Numbered) -> Tensor | None:
        outputs: Tensor | None = None
        read: Linearisation | HessdiagError | None = None
        try:
            with torch.enable_grad():
                outputs = objective.outputs(first.inputs, first.targets, index=first.index)
            if sites:
                read = Linearisation(objective, first.inputs, first.targets, index=first.index, outputs=outputs)
        except HessdiagError as error:  # told when it matters: what is wrong with data or model goes first
            read = error.with_traceback(None) if sites else None  # its frames hold the outputs
        if outputs is not None:
            _refuse_rounding(objective, outputs, first)
        found.append((first, outputs, read, Stamp(first)))
        return None if outputs is None else outputs.detach()

    def looked() -> Survey:
        if twice:
            facts = check_deterministic(objective, batches, coverage=sites, read=look, notice=notice)
        else:
            seen = Pass() if apart else None
            facts = survey(objective, batches, coverage=sites, read=look, keep=seen, notice=notice)
            if seen is not None:
                check_apart(objective, found[0][0], seen)
        if apart:
            check_mended(objective.model, found[0][0].few(2).inputs, objective.call)
        return facts

    facts = agreed(looked, world, objective, seed)
    first, outputs, read, stamp = found[0]
    return Case(objective, batches, facts, first, seed, world, outputs, stamp, read, longest.few)


def _refuse_rounding(objective: Objective, outputs: Tensor, first: Numbered) -> None:
    """For every method: between the chosen parameters and the outputs, and in a callable loss up to its values."""
    ends = outputs
    if isinstance(objective.loss, CallableLoss):
        with contextlib.suppress(HessdiagError), torch.enable_grad():  # what is wrong with the loss is told later
            ends = objective.loss.values(outputs, first.targets).sum()
    rounding_guard(ends, objective.parameters)


def _everywhere(case: Case, plan: Plan) -> Plan:
    """The first process's plan in all of them: a pilot's clock may choose otherwise elsewhere."""
    if case.world.size == 1:
        return plan
    told = case.world.text_from_first(json.dumps(plan.to_dict()), case.objective.device)
    return Plan.from_dict(json.loads(told))


def _basics(
    objective: Objective, method: str, seed: int, plan: Plan | Mapping[str, Any] | None
) -> tuple[int, Plan | None]:
    """(seed, plan) as they are used, whatever holds a whole number and a plan."""
    if not isinstance(objective, Objective):
        raise ConfigurationError(f"an Objective(model, loss) is needed first, not a {type(objective).__name__}")
    known(method)
    seed = whole_seed(seed)
    if plan is None or isinstance(plan, Plan):
        return seed, plan
    if not isinstance(plan, Mapping):
        raise ConfigurationError(
            f"plan is a {type(plan).__name__}: give the plan of a measurement, m.plan, or the table that a file holds, "
            "read_result(path).content['plan']"
        )
    try:
        return seed, Plan.from_dict(plan)
    except HessdiagError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigurationError(f"plan={shown(str(dict(plan)))} holds no plan ({error})") from None


def whole_seed(seed: Any) -> int:
    """A seed, whatever holds a whole number."""
    if not isinstance(seed, Integral):
        raise ConfigurationError(f"seed={seed!r}: an integer is needed")
    return int(seed)


def check_arguments(
    rtol: float,
    confidence: float = 0.95,
    low: int = 2,
    high: int = 2,
    seconds: float | None = None,
    target: str = "data",
) -> None:
    """Refuse what no measurement can aim at."""
    if not (isinstance(rtol, (int, float)) and 0.0 < rtol < float("inf")):
        raise ConfigurationError(f"rtol={rtol!r}: a positive number is needed, e.g. 0.05 for five per cent")
    check_confidence(confidence)
    whole = isinstance(low, Integral) and isinstance(high, Integral)
    if not whole or low < 2 or high < 2 or high < low:
        raise ConfigurationError(f"min_replicates={low}, max_replicates={high}: whole numbers from 2 on, min <= max")
    if low > CAPACITY:
        raise ConfigurationError(f"min_replicates={low}: a measurement counts at most {CAPACITY} replicates")
    if seconds is not None and not (isinstance(seconds, Real) and seconds > 0):
        raise ConfigurationError(f"max_seconds={seconds!r}: a positive number of seconds is needed, or None")
    if target not in ("data", POPULATION):
        raise UnknownNameError(f"unknown target {target!r}; {nearest(target, ['data', POPULATION])}")


def _left_out(objective: Objective) -> list[str]:
    """A note of frozen parameters, where nobody chose."""
    names = objective.frozen
    some = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return [f"frozen parameters are left out (requires_grad=False): {some}"] if names else []


def _unchecked(checked: Audit | None) -> list[str]:
    return [] if checked is None else checked.notes


def _told(notes: list[str]) -> dict[str, list[str]]:
    return {"notes": notes} if notes else {}


def _per_sample(case: Case, notes: list[str]) -> Diagonal:
    objective, method = case.objective, find(case.plan.method)
    if not method.singles:
        raise ConfigurationError("per-sample diagonals come from method='exact'")
    each: Callable[[Numbered], dict[str, Tensors]] = method.work(case).per_sample  # type: ignore[attr-defined]
    outer: dict[str, list[Tensor]] = {name: [] for name in objective.parameters}
    inner: dict[str, list[Tensor]] = {name: [] for name in objective.parameters}
    for batch in numbered(objective, case.batches):
        found = each(batch)
        for name in objective.parameters:
            outer[name].append(found[GAUSS_NEWTON][name] + objective.l2)
            inner[name].append(found[FUNCTIONAL][name])
    gauss_newton = {name: torch.cat(parts) for name, parts in outer.items()}
    functional = {name: torch.cat(parts) for name, parts in inner.items()}
    total = {name: gauss_newton[name] + functional[name] for name in gauss_newton}
    errors = {name: torch.zeros_like(t) for name, t in total.items()}
    return Diagonal(
        total, gauss_newton, functional, errors, case.plan.method, case.survey.samples,
        per_sample=True, provenance=_told(notes),
    )  # fmt: skip
