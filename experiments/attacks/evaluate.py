"""An attack by name: "aa2", "aa", or a PGD spelled out ("pgd:eps=8/255,steps=20")."""

from __future__ import annotations

import os
import time
from fractions import Fraction

import torch
from torch import Tensor

from experiments.attacks.aa2 import aa2
from experiments.attacks.autoattack import autoattack
from experiments.attacks.inputs import check_labels, check_samples, home, plain_radius
from experiments.attacks.pgd import logits_function
from experiments.attacks.result import (
    AttackResult,
    Progress,
    all_logits,
    check_batch_size,
    predictions,
    verify,
)
from hessdiag.errors import ConfigurationError, UnknownNameError, nearest
from hessdiag.problem.ascent import handed_back
from hessdiag.problem.perturbation import PGDSpec, keyed_pgd, parse_pgd

ATTACKS = ("aa", "aa2", "pgd")
PGD_STEPS = 20


def evaluate(
    model: object,
    x: Tensor,
    y: Tensor,
    *,
    attack: str,
    eps: float | str | Fraction | None = None,
    seed: int = 0,
    batch_size: int = 250,
    directory: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> AttackResult:
    """Run the attack of that name with its published budget; `directory` is where "aa" keeps its standing.

    "pgd" alone is PGD-20 with steps of 5/2 eps/20; a spelled-out PGD brings its own eps and seed.
    """
    name, _, rest = attack.partition(":")
    if name not in ATTACKS:
        raise UnknownNameError(f"unknown attack {name!r}; {nearest(name, list(ATTACKS))}")
    if name == "pgd" and rest:
        return pgd_accuracy(model, x, y, spec=parse_pgd(attack), batch_size=batch_size, progress=progress)
    if rest:
        raise ConfigurationError(f"{name!r} takes no options, found {attack!r}; its budget is part of its name")
    if eps is None:
        raise ConfigurationError(f"attack {name!r} needs eps, such as '8/255'")
    if name == "aa2":
        return aa2(model, x, y, eps=eps, batch_size=batch_size, seed=seed, progress=progress)
    if name == "aa":
        return autoattack(
            model, x, y, eps=eps, batch_size=batch_size, seed=seed, directory=directory, progress=progress
        )
    _, text = plain_radius(eps)
    spec = parse_pgd(f"pgd:eps={text},steps={PGD_STEPS},seed={seed}")
    return pgd_accuracy(model, x, y, spec=spec, batch_size=batch_size, progress=progress)


def pgd_accuracy(
    model: object,
    x: Tensor,
    y: Tensor,
    *,
    spec: PGDSpec,
    batch_size: int = 250,
    progress: Progress | None = None,
) -> AttackResult:
    """Accuracy at the last iterate of one PGD, its start keyed by (seed, sample); the model in eval mode."""
    began = time.perf_counter()
    y = check_samples(x, y)
    check_batch_size(batch_size)
    device = home(model, x)
    with handed_back(model):
        function = logits_function(model, None)
        logits = all_logits(function, x, batch_size=batch_size, device=device)
        check_labels(y, logits.shape[1])
        clean = logits.argmax(1).eq(y)
        robust, x_adv = clean.clone(), x.detach().clone()
        alive = torch.nonzero(clean).flatten()
        for start in range(0, len(alive), batch_size):
            chosen = alive[start : start + batch_size]
            images, labels = x[chosen].to(device), y[chosen].to(device)
            points = keyed_pgd(function, images, labels, chosen.tolist(), spec)
            verdict = predictions(function, points, batch_size=batch_size, device=device).to(y.device)
            fooled = verdict != y[chosen]
            robust[chosen[fooled]] = False
            x_adv[chosen[fooled]] = points.to(x_adv.device)[fooled.to(x_adv.device)]
            if progress is not None:
                progress("pgd", start + len(chosen), len(alive), int(robust.sum()))
        check, notes = verify(function, x, y, x_adv, robust, radius=spec.radius, batch_size=batch_size, device=device)
    return AttackResult(
        attack=str(spec),
        eps=spec.eps,
        seed=spec.seed,
        clean=clean,
        robust=robust,
        x_adv=x_adv,
        per_attack={"pgd": robust.clone()},
        settings={"steps": spec.steps, "step": spec.step, "batch_size": batch_size},
        warnings=notes,
        check=check,
        seconds=time.perf_counter() - began,
    )
