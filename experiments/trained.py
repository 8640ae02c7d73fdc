"""A trained network from the directory of its run, or from a checkpoint file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hessdiag import networks
from hessdiag.checkpoint import load_checkpoint
from hessdiag.checkpoint.document import FILE_BUDGET, open_document
from hessdiag.errors import CheckpointError
from hessdiag.store.files import BadFileError

NAMES = ("best.pt", "last.pt")


@dataclass(frozen=True, eq=False)
class Trained:
    """The network in eval mode; `training` is the configuration it was trained with, where the file says so."""

    model: nn.Module
    path: Path
    weights: str
    epoch: int | None
    training: Mapping[str, Any]
    notes: tuple[str, ...]
    sha256: str


def load_trained(path: Path | str, *, weights: str | None = None, **given: Any) -> Trained:
    """The network of a run's directory (the selected epoch, else the last) or of a checkpoint.

    `given` are facts that the file must agree with, or that public checkpoints do not tell: network, activation,
    num_classes, normalize. A BatchNorm eps that the control changed is put back, which `load_checkpoint` alone refuses
    to guess.
    """
    place = _file(Path(path))
    try:
        extra = open_document(place, budget=FILE_BUDGET).extra
    except BadFileError as reason:
        raise CheckpointError(f"{place}: {reason}") from None
    changed = extra.get("bn_eps") if isinstance(extra, Mapping) else None
    if isinstance(changed, Mapping) and changed:
        for key, value in given.items():
            told = extra["network"].get(key)
            if value is not None and value != told:
                raise CheckpointError(f"{place}: the file says {key} {told!r}, you asked for {value!r}")
        found = load_checkpoint(place, weights=weights, factory=lambda: _with_eps(extra["network"], changed))
    else:
        found = load_checkpoint(place, weights=weights, **given)
    training = extra.get("training")
    return Trained(
        model=found.model,
        path=place,
        weights=found.weights,
        epoch=found.epoch,
        training=training if isinstance(training, Mapping) else {},
        notes=found.notes,
        sha256=found.sha256,
    )


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in NAMES:
        if (path / name).is_file():
            return path / name
    raise CheckpointError(f"{path}: holds no checkpoint ({' or '.join(NAMES)}); give a run's directory or a file")


def _with_eps(config: Mapping[str, Any], changed: Mapping[str, float]) -> nn.Module:
    network = networks.build(**config)
    for name, eps in changed.items():
        network.get_submodule(name).eps = eps  # type: ignore[assignment]
    return network
