"""Interrupted work: the state of a measurement in one safetensors file, replaced as a whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import ResumeError
from ..files import BadFileError, read_bytes, write_bytes
from ..objective import Objective
from ..stream import Survey
from ..tensorfiles import looks_like, read_header, read_tensors
from .plan import Plan

FORMAT = "hessdiag-resume/1"
BUDGET = 1 << 36


def store(
    path: Path, *, identity: Mapping[str, Any], progress: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write identity (what is measured), progress (how far) and the accumulators."""
    meta = {
        "format": FORMAT,
        "identity": json.dumps(identity, sort_keys=True),
        "progress": json.dumps(progress),
    }
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata=meta)
    try:
        write_bytes(path, content)
    except BadFileError as error:
        raise ResumeError(f"{path}: {error}; free space or choose another file to resume from") from None


def restore(
    path: Path, *, identity: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """(identity, progress, tensors) of a file, which must be of the same measurement where `identity` is given."""
    try:
        data = read_bytes(path, budget=BUDGET, accepts=looks_like)
        _, meta = read_header(data)
        if meta.get("format") != FORMAT:
            raise BadFileError("no resume file of this program")
        found, progress = json.loads(meta["identity"]), json.loads(meta["progress"])
        tensors = read_tensors(data)
    except (BadFileError, KeyError, ValueError) as error:
        raise ResumeError(f"{path}: {error}; remove it or give another file to resume from") from None
    if identity is not None:
        wanted = json.loads(json.dumps(identity, sort_keys=True))
        for key in sorted(set(found) | set(wanted)):
            if found.get(key) != wanted.get(key):
                raise ResumeError(
                    f"{path}: was made with {key}={_short(found.get(key))}, now {_short(wanted.get(key))}; "
                    "remove it to start anew"
                )
    return found, progress, tensors


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def identity_of(objective: Objective, facts: Survey, plan: Plan, seed: int) -> dict[str, Any]:
    """What must agree for a resume file to be taken up."""
    digest = hashlib.sha256()
    for name, tensor in objective.model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {
        "seed": seed,
        "samples": facts.samples,
        "batches": facts.batches,
        "data": facts.data,
        "loss": facts.loss,
        "loss name": objective.loss.name,
        "l2": objective.l2,
        "parameters": list(objective.parameters),
        "weights": digest.hexdigest(),
        "method": plan.method,
        "groups": plan.groups,
        "deflate": plan.deflate,
        "order": facts.order if plan.deflate else None,
        "largest batch": facts.largest,
        "balance": {str(n): lam for n, lam in plan.balance.items()} if plan.deflate else None,
    }
