"""Training methods by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from experiments.methods import dajat, dkl, fgsm_rs, mart, n_fgsm, pgd_at, standard, trades
from experiments.methods.base import Batch, Forward, Method, Outcome, View

METHODS: Mapping[str, Method] = MappingProxyType(
    {module.METHOD.name: module.METHOD for module in (standard, pgd_at, fgsm_rs, n_fgsm, trades, mart, dkl, dajat)}
)

__all__ = ["METHODS", "Batch", "Forward", "Method", "Outcome", "View"]
