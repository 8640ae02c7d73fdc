"""A Hessian diagonal as a result: its parts by parameter name, its errors where it is an estimate, and a file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from safetensors.torch import save
from torch import Tensor

from hessdiag.errors import CheckpointError
from hessdiag.store.files import BadFileError, write_bytes

FORMAT = "hessdiag-diagonal/1"


@dataclass(frozen=True)
class Diagonal:
    """H_kk of the mean loss: `total` = `gauss_newton` + `functional`, tensors shaped like the parameters.

    `standard_errors` are those of `total`, entry by entry, zero for exact methods. With `per_sample` every tensor has
    the samples as first axis: the diagonals of the single losses. Where a method was asked for the total only, the
    parts are empty.
    """

    total: Mapping[str, Tensor]
    gauss_newton: Mapping[str, Tensor]
    functional: Mapping[str, Tensor]
    standard_errors: Mapping[str, Tensor]
    method: str
    samples: int
    replicates: int = 0
    per_sample: bool = False
    status: str = "exact"
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file to `path`: keys `PART|name`, total, gauss_newton, functional, standard_error."""
        tensors: dict[str, Tensor] = {}
        for label, part in (
            ("total", self.total),
            ("gauss_newton", self.gauss_newton),
            ("functional", self.functional),
            ("standard_error", self.standard_errors),
        ):
            tensors |= {f"{label}|{name}": tensor.detach().cpu().contiguous() for name, tensor in part.items()}
        facts = {
            "method": self.method,
            "samples": self.samples,
            "replicates": self.replicates,
            "per_sample": self.per_sample,
            "status": self.status,
            "provenance": dict(self.provenance),
        }
        try:
            write_bytes(path, save(tensors, metadata={"format": FORMAT, "facts": json.dumps(facts)}))
        except BadFileError as error:
            raise CheckpointError(f"{os.fspath(path)}: {error}") from None
