"""What a checkpoint file holds, told without building its network."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hessdiag.checkpoint import pretrained
from hessdiag.checkpoint.document import FILE_BUDGET, open_document, parameter_count
from hessdiag.checkpoint.guess import hint
from hessdiag.checkpoint.layout import split_normalisation
from hessdiag.errors import CheckpointError
from hessdiag.store.files import BadFileError, PathLike, path_text


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    weights: str  # "model" or "ema"


@dataclass(frozen=True)
class CheckpointSummary:
    """Format, contents and provenance of a checkpoint file."""

    path: str
    kind: str  # "torch zip", "TorchScript", "torch legacy" or "safetensors"
    layout: str  # "hessdiag/1", "bare state dict", "state dict under 'net'"
    sha256: str
    size: int
    config: Mapping[str, Any]
    epoch: int | None
    metrics: Mapping[str, Any]
    extra: Mapping[str, Any]
    tensors: tuple[TensorEntry, ...]
    parameters: int  # of the model's weights, without running statistics
    has_ema: bool
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        table = {name: getattr(self, name) for name in self.__dataclass_fields__}
        table["tensors"] = [dict(vars(entry), shape=list(entry.shape)) for entry in self.tensors]
        return {**table, "notes": list(self.notes)}


def inspect_checkpoint(
    path: PathLike, *, key: str | None = None, prefix: str | None = None, max_bytes: int = FILE_BUDGET
) -> CheckpointSummary:
    """Read what is inside with the same suspicion as load_checkpoint, and build nothing."""
    try:
        document = open_document(path, budget=max_bytes, key=key, prefix=prefix)
    except BadFileError as reason:
        raise CheckpointError(f"{path_text(path)}: {reason}") from None
    entries = tuple(
        TensorEntry(name, facts.shape, str(facts.dtype).removeprefix("torch."), facts.bytes, which)
        for which, table in document.weights.items()
        for name, facts in table.items()
    )
    notes = (*document.notes, *((f"also holds {', '.join(document.others)}",) if document.others else ()))
    if "network" not in document.config:
        weights, constants = split_normalisation(document.weights["model"])
        if constants is not None:
            notes = (*notes, f"holds normalisation constants {constants[0]}, {constants[1]}")
        notes = (*notes, f"does not name its network; {hint(weights)}{pretrained.advice(path)}")
    return CheckpointSummary(
        path=os.fsdecode(path),
        kind=document.kind,
        layout=document.layout,
        sha256=document.sha256,
        size=document.size,
        config=document.config,
        epoch=document.epoch,
        metrics=document.metrics,
        extra=document.extra,
        tensors=entries,
        parameters=parameter_count(document.weights["model"]),
        has_ema="ema" in document.weights,
        notes=notes,
    )
