"""Results of given seeds and plans, so that work on the engine which leaves the mathematics alone leaves them alone.

The numbers are this project's own, of torch 2.13 on one CPU: they say that nothing changed, not that anything is right.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from models import ELEMENTWISE, Function, Residual, Tokens, seeded

import hessdiag as hd
from hessdiag.measurement import Plan

torch.set_num_threads(1)

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (2, 8, 8)),
    "tokens": (Tokens, (4, 5)),
    "glu": (lambda: Function(ELEMENTWISE["glu"]), (5,)),
    "two curves": (lambda: Function(ELEMENTWISE["two curves"]), (5,)),
}
PLANS: dict[str, dict[str, Any]] = {
    "plain": {},
    "groups": {"sample_groups": {"c2": 3, "c3": 16}},
    "signs": {"gauss_newton": "signs"},
    "deflate": {"deflate": 4},
}
RMS: dict[tuple[str, str], float] = {
    ("residual", "plain"): 0.037351898305390444,
    ("residual", "groups"): 0.05468062926589134,
    ("residual", "signs"): 0.03756843506905614,
    ("residual", "deflate"): 0.029573664737767343,
    ("tokens", "plain"): 0.033004761758718804,
    ("tokens", "signs"): 0.03297837336252542,
    ("tokens", "deflate"): 0.033008435213788025,
    ("glu", "plain"): 0.03768884004498714,
    ("glu", "signs"): 0.03743801730890265,
    ("glu", "deflate"): 0.03768063954698857,
    ("two curves", "plain"): 0.05424886420323573,
    ("two curves", "signs"): 0.054090923612131685,
    ("two curves", "deflate"): 0.05426332326210851,
}


@pytest.mark.parametrize(("model", "plan"), RMS)
def test_a_seed_gives_what_it_gave(model: str, plan: str) -> None:
    assert measured(model, plan) == pytest.approx(RMS[model, plan], rel=1e-5 if plan == "deflate" else 1e-9)


def measured(model: str, plan: str) -> float:
    """The rms of two batches after ten replicates."""
    build, shape = MODELS[model]
    net = seeded(build, 4)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(20, *shape, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (20,), generator=generator)
    given = Plan("propagation", **PLANS[plan])
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    found = hd.measure(hd.Objective(net), batches, plan=given, seed=7, max_replicates=10, rtol=1e-9, audit_model=False)
    return found.rms
