"""Interrupted work: the state of a measurement in one file, replaced as a whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from hessdiag.errors import ResumeError
from hessdiag.methods import Case
from hessdiag.methods.base import find
from hessdiag.methods.batches import NEAR
from hessdiag.problem.sparse import stored
from hessdiag.store.files import BadFileError
from hessdiag.store.states import digest, read_state, write_state

FORMAT = "hessdiag-resume/3"
UNSAVED = "the resume file could not be written"
"""How the note of a measurement begins that went on without its resume file."""
MOST_REPLICATES = 1 << 40


def store(
    path: Path, *, identity: Mapping[str, Any], progress: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write identity (what is measured), progress (how far) and the accumulators."""
    try:
        write_state(path, FORMAT, {"identity": identity, "progress": progress, "tensors": tensors})
    except BadFileError as error:
        raise ResumeError(f"{path}: {error}; free space or choose another file to resume from") from None


def restore(
    path: Path, *, identity: Mapping[str, Any] | None, off: Mapping[str, float] = MappingProxyType({})
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """(identity, progress, tensors) of a file, which must be of the same measurement where `identity` is given.

    Sums over samples may differ from the file's by what is `off` in them: they may have come in another order.
    """
    try:
        content = read_state(path, FORMAT)
        found, progress, tensors = content["identity"], content["progress"], content["tensors"]
        _check_ranges(found, progress, tensors)
        found = {SAMPLE_GROUPS: progress["plan"]["sample_groups"], **found}  # which older files have there only
    except (BadFileError, KeyError, TypeError, AttributeError) as error:
        raise ResumeError(f"{path}: {error}; remove it or give another file to resume from") from None
    if identity is not None:
        found = {LOSS_OPTIONS: identity.get(LOSS_OPTIONS), **found}  # of older files the loss itself tells
        wanted = json.loads(json.dumps(identity, sort_keys=True))
        found = json.loads(json.dumps(found, sort_keys=True))
        for key in sorted(set(found) | set(wanted)):
            if found.get(key) != wanted.get(key) and not _near(found.get(key), wanted.get(key), off.get(key)):
                raise ResumeError(
                    f"{path}: was made with {key}={_short(found.get(key))}, now {_short(wanted.get(key))}; "
                    "remove it to start anew"
                )
    return found, progress, tensors


def _check_ranges(found: Mapping[str, Any], progress: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuse what no measurement writes, whatever its checksum says."""
    # A plan that sums samples cuts a batch in two at most.
    whole = {"done": MOST_REPLICATES, "position": 2 * found["batches"]}
    for key, most in whole.items():
        if type(progress[key]) is not int or not 0 <= progress[key] <= most:
            raise BadFileError(f"damaged: {key} is {_short(progress[key])}, not in 0 to {most}")
    if type(progress["known_done"]) is not bool or not isinstance(progress["partial"], list):
        raise BadFileError("damaged: it does not say what is done")
    if not isinstance(progress.get("trail", 0.0), float) or not isinstance(progress.get("random", {}), dict):
        raise BadFileError("damaged: it does not say which batches are in the sums")
    for row in progress["history"]:
        done, *norms = row
        if type(done) is not int or len(norms) != 3 or not all(math.isnan(x) or x >= 0 for x in norms):
            raise BadFileError("damaged: its history holds a norm below zero")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise BadFileError(f"damaged: {name} holds NaN or infinite values")


def _near(found: Any, wanted: Any, off: float | None) -> bool:
    return off is not None and isinstance(found, float) and isinstance(wanted, float) and abs(found - wanted) <= off


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


SAMPLE_GROUPS, LOSS_OPTIONS = "sample groups", "loss options"
DRAWN = 2
"""How signs are drawn, and products at outputs; what was drawn in another way cannot be taken up."""


def digest_of(state: Mapping[str, Any]) -> str:
    """SHA-256 of what tensors by name hold, sparse ones too, and of the names."""
    held = [part for tensor in state.values() if isinstance(tensor, Tensor) for part in stored(tensor)]
    return digest(*held, text=" ".join(state))


def identity_of(case: Case) -> dict[str, Any]:
    """What must agree for a resume file to be taken up."""
    objective, facts, plan = case.objective, case.survey, case.plan
    method = find(plan.method)
    identity: dict[str, Any] = {
        "seed": case.seed,
        "samples": facts.samples,
        "batches": facts.batches,
        "data": facts.data,
        "loss": facts.loss,
        "loss name": objective.loss.name,
        LOSS_OPTIONS: objective.loss.options,
        "l2": objective.l2,
        "parameters": list(objective.parameters),
        "weights": digest_of(objective.model.state_dict()),
        "method": plan.method,
        "gauss_newton": plan.gauss_newton,
        "parts": [*method.known(plan), "drawn", *method.streams(plan)],
        "groups": plan.groups,
        SAMPLE_GROUPS: dict(plan.sample_groups),
        "block": plan.block,
        "deflate": plan.deflate,
        "order": facts.order if plan.ordered else None,
        "largest batch": facts.largest,
        "balance": {str(n): lam for n, lam in plan.balance.items()} if plan.deflate else None,
    }
    if plan.probes:
        identity |= {"probes": dict(plan.probes), "probe rank": plan.probe_rank}
    if method.streams(plan):
        identity["way of drawing"] = DRAWN
    return identity


def off_by(case: Case) -> dict[str, float]:
    """What rounding may change of an identity where the samples come in another order."""
    size = NEAR * case.survey.data_size
    return {"data": size, "order": size, "loss": case.survey.loss_off}
