"""Where exact second derivatives are gathered, entry by entry, in float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Collector:
    """Float64 sums over samples (or values per sample) of second derivatives, entry by entry."""

    def __init__(self, parameters: Mapping[str, Tensor], samples: int, *, per_sample: bool) -> None:
        self.per_sample = per_sample
        self._shapes = {name: p.shape for name, p in parameters.items()}
        self._flat = {
            name: torch.zeros(
                p.numel(), *([samples] if per_sample else []), dtype=torch.float64, device=p.device
            )
            for name, p in parameters.items()
        }

    def add(self, name: str, indices: slice, values: Tensor) -> None:
        """Second derivatives [k, N] of the entries `indices`."""
        self._flat[name][indices] = values.double() if self.per_sample else values.double().sum(1)

    def outer(self, name: str, low: int, rows: Tensor, columns: Tensor) -> None:
        """Entries (low + a, i) of a matrix: sum over n of rows[a, n] columns[n, i]."""
        fan = columns.shape[1]
        place = self._flat[name][low * fan : (low + len(rows)) * fan]
        if self.per_sample:
            place.copy_((rows[:, None, :] * columns.T[None]).reshape(-1, columns.shape[0]))
        else:
            place.copy_((rows.to(columns.dtype) @ columns).flatten())

    def result(self, turned: set[str]) -> dict[str, Tensor]:
        """Tensors shaped like the parameters (samples first if per sample); `turned` names matrices stored
        [in, out].
        """
        out = {}
        for name, flat in self._flat.items():
            values = flat.T if self.per_sample else flat
            lead, shape = list(values.shape[:-1]), list(self._shapes[name])
            if name in turned:
                out[name] = values.reshape(*lead, *shape[::-1]).transpose(-1, -2).contiguous()
            else:
                out[name] = values.reshape([*lead, *shape])
        return out
