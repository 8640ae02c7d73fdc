"""Where exact second derivatives are gathered, entry by entry, in float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Collector:
    """Float64 sums over samples (or values per sample) of second derivatives, each entry given once."""

    def __init__(self, parameters: Mapping[str, Tensor], samples: int, *, per_sample: bool) -> None:
        self.per_sample = per_sample
        self._parameters, self._samples = parameters, samples
        self._shapes = {name: p.shape for name, p in parameters.items()}
        self._flat: dict[str, Tensor] = {}

    def add(self, name: str, indices: slice, values: Tensor) -> None:
        """Second derivatives [k, N] of the entries `indices`."""
        self._sums(name)[indices] = values.double() if self.per_sample else values.double().sum(1)

    def outer(self, name: str, low: int, rows: Tensor, columns: Tensor) -> None:
        """Entries (low + a, i) of a matrix: sum over n of rows[a, n] columns[n, i]."""
        fan = columns.shape[1]
        if self.per_sample:
            values = (rows[:, None, :] * columns.T[None]).reshape(-1, columns.shape[0])
        else:
            values = (rows.to(columns.dtype) @ columns).flatten()
        if len(values) == self._shapes[name].numel():
            self._flat[name] = values.double()
        else:
            self._sums(name)[low * fan : (low + len(rows)) * fan] = values

    def scatter(self, name: str, places: Tensor, values: Tensor) -> None:
        """Second derivatives [k, N] of the entries `places` [k, N]."""
        sums, added = self._sums(name), values.double()
        if self.per_sample:
            sums.scatter_add_(0, places, added)
        else:
            sums.index_add_(0, places.reshape(-1), added.reshape(-1))

    def _sums(self, name: str) -> Tensor:
        """What there is of a parameter, zeros where nothing was added."""
        if name not in self._flat:
            p = self._parameters[name]
            shape = (p.numel(), self._samples) if self.per_sample else (p.numel(),)
            self._flat[name] = torch.zeros(shape, dtype=torch.float64, device=p.device)
        return self._flat[name]

    def result(self, turned: set[str]) -> dict[str, Tensor]:
        """Tensors shaped like the parameters (samples first if per sample); `turned` names matrices stored
        [in, out].
        """
        out = {}
        for name in self._parameters:
            flat = self._sums(name)
            values = flat.T if self.per_sample else flat
            lead, shape = list(values.shape[:-1]), list(self._shapes[name])
            if name in turned:
                out[name] = values.reshape(*lead, *shape[::-1]).transpose(-1, -2).contiguous()
            else:
                out[name] = values.reshape([*lead, *shape])
        return out
