"""Linf attacks: PGD for training, APGD and AA-2 for sweeps, AutoAttack as the reference."""

from experiments.attacks.aa2 import aa2
from experiments.attacks.autoattack import autoattack
from experiments.attacks.borrowed import STANDARD, Budgets
from experiments.attacks.evaluate import ATTACKS, evaluate, pgd_accuracy
from experiments.attacks.fast import fgsm_rs, n_fgsm
from experiments.attacks.losses import LOSSES
from experiments.attacks.pgd import STARTS, clean_logits, compiled_ascent, pgd
from experiments.attacks.result import AttackResult, BallCheck
from experiments.attacks.worst import APGDResult, apgd_ce, apgd_t

__all__ = [
    "ATTACKS",
    "LOSSES",
    "STANDARD",
    "STARTS",
    "APGDResult",
    "AttackResult",
    "BallCheck",
    "Budgets",
    "aa2",
    "apgd_ce",
    "apgd_t",
    "autoattack",
    "clean_logits",
    "compiled_ascent",
    "evaluate",
    "fgsm_rs",
    "n_fgsm",
    "pgd",
    "pgd_accuracy",
]
