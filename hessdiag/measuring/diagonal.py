"""A Hessian diagonal as a result: its parts by parameter name, its errors where it is an estimate, and a file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from safetensors.torch import save
from torch import Tensor

from hessdiag.errors import CheckpointError
from hessdiag.store.files import BadFileError, write_bytes

FORMAT = "hessdiag-diagonal/1"


SHOWN = 8
"""Tensors that a repr tells of."""


@dataclass(frozen=True, repr=False)
class Diagonal:
    """H_kk of the mean loss: `total` = `gauss_newton` + `functional`, tensors shaped like the parameters.

    `standard_errors` are those of `total`, entry by entry, zero for exact methods. With `per_sample` every tensor has
    the samples as first axis: the diagonals of the single losses, not divided by weights, l2 on each. Where a method
    was asked for the total only, the parts are empty.
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

    def __repr__(self) -> str:
        count = sum(tensor.numel() for tensor in self.total.values())
        drawn = f", {self.replicates} replicates" if self.replicates else ""
        each = ", sample by sample" if self.per_sample else ""
        found = [f"Diagonal of {count:,} entries{each}: {self.method}, {self.samples} samples{drawn}, {self.status}"]
        for name, tensor in list(self.total.items())[:SHOWN]:
            noise = f", of which noise {_rms(self.standard_errors[name]):.4g}" if self.replicates else ""
            found.append(f"  {name} {list(tensor.shape)}: rms {_rms(tensor):.4g}{noise}")
        if len(self.total) > SHOWN:
            found.append(f"  and {len(self.total) - SHOWN} more")
        return "\n".join([*found, "  more in   .total .gauss_newton .functional .standard_errors .rows() .save(path)"])

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary of plain numbers for each parameter: `pandas.DataFrame(d.rows())` is a table.

        `rms`, `trace`, `smallest` and `largest` of its entries as they stand; `noise` is the rms of their standard
        errors, so that rms^2 - noise^2 is what is left without it; `gauss_newton` and `functional` are the rms of the
        parts, NaN where they were not taken.
        """
        found: list[dict[str, Any]] = []
        for name, tensor in self.total.items():
            parts = {"gauss_newton": self.gauss_newton.get(name), "functional": self.functional.get(name)}
            found.append(
                {
                    "parameter": name,
                    "entries": tensor.numel(),
                    "rms": _rms(tensor),
                    "noise": _rms(self.standard_errors[name]) if name in self.standard_errors else math.nan,
                    "trace": float(tensor.double().sum()),
                    "smallest": float(tensor.min()),
                    "largest": float(tensor.max()),
                    **{key: math.nan if part is None else _rms(part) for key, part in parts.items()},
                }
            )
        return found

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


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())
