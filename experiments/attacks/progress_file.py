"""How far an AutoAttack run has come, on disk: whoever is killed goes on where the file ends.

Each batch of each attack starts from the same seed, so nothing but flags and images needs keeping.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.errors import ResumeError, StoreError
from hessdiag.store.files import BadFileError
from hessdiag.store.states import digest, read_state, write_state

FORMAT = "hessdiag-autoattack/2"
FILE = "autoattack.pt"
LOGIT_TOLERANCE = 1e-4


@dataclass
class Standing:
    """Flags and images so far; `current` is the attack under way, `alive` its samples, `batch` the next."""

    clean: Tensor
    robust: Tensor
    x_adv: Tensor
    logits: Tensor
    per_attack: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    current: str = ""
    alive: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    batch: int = 0


def model_digest(model: object) -> str:
    """SHA-256 of parameters and buffers; what they leave open (activations) the clean logits must tell."""
    if not isinstance(model, nn.Module):
        return "no parameters"
    return digest(*model.parameters(), *model.buffers())


def save(directory: Path, standing: Standing, identity: dict[str, Any]) -> None:
    """Write the file in one step; a full disk leaves the last one and is a StoreError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_state(directory / FILE, FORMAT, {"identity": identity, **vars(standing)})
    except (BadFileError, OSError) as error:
        raise StoreError(f"{directory / FILE}: {error}; free some space or choose another directory") from None


def restore(directory: Path, identity: dict[str, Any], logits: Tensor, device: torch.device) -> Standing | None:
    """The standing of the same evaluation, None if there is no file; another's is a ResumeError."""
    path = directory / FILE
    if not path.exists():
        return None
    remedy = "choose another directory, or delete the file to begin anew"
    try:
        found = read_state(path, FORMAT, device=device)
        theirs = found.pop("identity")
        standing = Standing(**found)
        if not standing.clean.shape == standing.robust.shape == standing.x_adv.shape[:1] or standing.batch < 0:
            raise BadFileError("its flags are not those of its images")
    except (BadFileError, KeyError, TypeError, AttributeError) as error:
        raise ResumeError(f"{path} cannot be read ({error}); {remedy}") from None
    for key, value in identity.items():
        if theirs.get(key) != value:
            raise ResumeError(f"{path} is of another run: {key} was {theirs.get(key)}, is {value}; {remedy}")
    if standing.logits.shape != logits.shape or not torch.allclose(
        standing.logits, logits, rtol=LOGIT_TOLERANCE, atol=LOGIT_TOLERANCE
    ):
        raise ResumeError(f"{path} is of another run: the model's clean logits differ; {remedy}")
    return standing
