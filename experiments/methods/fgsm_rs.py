"""FGSM from a random start, one gradient per image (Wong, Rice & Kolter 2020, arXiv 2001.03994)."""

from __future__ import annotations

from experiments.methods.base import Method
from experiments.methods.pgd_at import objective

METHOD = Method(
    name="fgsm_rs",
    source="Wong, Rice & Kolter 2020 (arXiv 2001.03994)",
    objective=objective,
    defaults={
        "epochs": 15,
        "lr": 0.2,
        "weight_decay": 5e-4,
        "schedule": {"name": "triangular", "peak": 0.5},
        "attack": {"kind": "fgsm_rs", "loss": "ce", "steps": 1, "step": "1.25 eps", "bn": "train"},
    },
)
