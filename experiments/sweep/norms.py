"""One measurement of a sweep: the settings of a run's configuration, and a refusal to keep what Ctrl-C cut short."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import hessdiag
from hessdiag.problem.objective import Objective
from hessdiag.problem.perturbation import parse_pgd, perturb_batches


def crafted(model: torch.nn.Module, batches: Any, *, loss: str, eps: str, steps: int, seed: int) -> Any:
    """The batches of a loss: as they are, or their PGD images, crafted once and held fixed."""
    if loss == "clean":
        return batches
    return perturb_batches(model, batches, parse_pgd(f"pgd:eps={eps},steps={steps},seed={seed}"))


def estimated(goal: Objective, batches: Any, settings: Mapping[str, Any]) -> hessdiag.Measurement:
    """The norm as `settings` say; KeyboardInterrupt where it was cut short: no record of this run."""
    names = ("method", "rtol", "confidence", "seed", "min_replicates", "max_replicates")
    found = hessdiag.measure(goal, batches, **{name: settings[name] for name in names})
    if "interrupted" in found.status:
        raise KeyboardInterrupt
    return found
