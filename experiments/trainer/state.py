"""What a run needs to go on from the end of an epoch, in one file that is whole or absent."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from experiments.trainer.rig import Rig
from hessdiag.errors import CheckpointError, ResumeError
from hessdiag.store import states
from hessdiag.store.files import BadFileError

FORMAT = "experiments/state/2"


@dataclass
class Standing:
    """Where a run stands: epochs done, what was seen, seconds spent, the best epoch so far."""

    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    best: dict[str, Any] | None = None
    reason: str | None = None  # why training stopped before its last epoch


def write_state(path: Path, rig: Rig, standing: Standing) -> None:
    """Save; a failure leaves the previous file as it was and is a CheckpointError."""
    content = {
        "format": FORMAT,
        "key": rig.config.key(),
        "epoch": standing.epoch,
        "history": standing.history,
        "seconds": standing.seconds,
        "best": standing.best,
        "reason": standing.reason,
        "threads": torch.get_num_threads(),
        "model": rig.model.state_dict(),
        "optimiser": rig.optimiser.state_dict(),
        "average": rig.average.state,
        "means": None if rig.means is None else rig.means.rows,
    }
    try:
        states.write_state(path, FORMAT, content)
    except BadFileError as reason:
        raise CheckpointError(f"{path}: {reason}") from None


def read_state(path: Path, rig: Rig) -> Standing | None:
    """Put the rig where the file says; None without a file; ResumeError if it is another run's or unreadable."""
    if not path.exists():
        return None
    device = next(rig.model.parameters()).device
    try:
        content = states.read_state(path, FORMAT, device=device)
        key = content["key"]
    except (BadFileError, KeyError, TypeError) as error:
        raise ResumeError(f"{path}: cannot be read ({error}); delete it to start again") from None
    if key != rig.config.key():
        raise ResumeError(f"{path}: of another configuration ({key}); use another directory")
    try:
        epoch, seconds, history = content["epoch"], content["seconds"], content["history"]
        if type(epoch) is not int or not 0 <= epoch <= rig.config.epochs or len(history) > epoch or not seconds >= 0:
            raise ValueError(f"epoch {epoch} of {rig.config.epochs} after {seconds} s")
        rig.model.load_state_dict(content["model"])
        rig.optimiser.load_state_dict(content["optimiser"])
        rig.average.load(content["average"])
        if rig.means is not None:
            rig.means.rows = content["means"]
        return Standing(epoch, history, seconds, content["best"], content["reason"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ResumeError(f"{path}: not the state of such a run ({reason}); delete it to start again") from None
