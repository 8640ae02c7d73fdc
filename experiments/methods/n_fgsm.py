"""N-FGSM: FGSM around strong noise, never clipped to the ball (de Jorge et al. 2022, arXiv 2202.01181)."""

from __future__ import annotations

from experiments.methods.base import Method
from experiments.methods.pgd_at import objective

METHOD = Method(
    name="n_fgsm",
    source="de Jorge et al. 2022 (arXiv 2202.01181)",
    objective=objective,
    defaults={
        "epochs": 30,
        "lr": 0.2,
        "weight_decay": 5e-4,
        "schedule": {"name": "triangular", "peak": 0.5},
        "attack": {"kind": "n_fgsm", "loss": "ce", "steps": 1, "step": "eps", "noise": 2.0, "bn": "train"},
    },
)
