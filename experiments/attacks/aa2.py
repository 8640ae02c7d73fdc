"""AA-2: APGD-CE, then APGD-T on what still stands: the first two of AutoAttack's four attacks."""

from __future__ import annotations

import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

from experiments.attacks.apgd import RHO, STEPS
from experiments.attacks.inputs import check_dlr, check_labels, check_samples, home, plain_radius
from experiments.attacks.pgd import logits_function
from experiments.attacks.result import (
    AttackResult,
    Progress,
    check_batch_size,
    class_count,
    predictions,
    verify,
)
from experiments.attacks.worst import TARGETS, APGDResult, Noise, apgd_ce, apgd_t
from hessdiag.problem.ascent import Forward, handed_back
from hessdiag.problem.perturbation import keyed_uniform


def aa2(
    model: object,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str | Fraction,
    steps: int = STEPS,
    targets: int = TARGETS,
    batch_size: int = 500,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> AttackResult:
    """The worst case of APGD-CE and APGD-T, in eval mode, each from one start keyed by (seed, target,
    sample).

    So neither batch size nor order has a say, but for the rounding of the forward pass. Images may stay on
    the CPU: each batch is moved to the model's device. With `autocast` the attacks run in that precision,
    and a sample counts as fooled only if it is misclassified without. progress(attack, done, total, robust)
    is called per batch.
    """
    began = time.perf_counter()
    radius, text = plain_radius(eps)
    y = check_samples(x, y)
    check_batch_size(batch_size)
    device = home(model, x)
    with handed_back(model):
        function = logits_function(model, forward)
        classes = class_count(function, x, device)
        check_dlr(classes)
        check_labels(y, classes)
        clean = predictions(function, x, batch_size=batch_size, device=device).eq(y)
        robust, x_adv = clean.clone(), x.detach().clone()
        per_attack: dict[str, Tensor] = {}
        warnings: list[str] = []
        attacks: dict[str, Callable[..., APGDResult]] = {"apgd-ce": apgd_ce, "apgd-t": partial(apgd_t, targets=targets)}
        for name, attack in attacks.items():
            flat, alive = 0, torch.nonzero(robust).flatten()
            for start in range(0, len(alive), batch_size):
                chosen = alive[start : start + batch_size]
                outcome = attack(
                    model, x[chosen].to(device), y[chosen].to(device), eps=radius, steps=steps,
                    noise=_keyed(chosen, x, seed, device), autocast=autocast, forward=function,
                )  # fmt: skip
                robust[chosen] = outcome.robust.to(robust.device)
                x_adv[chosen] = outcome.x_adv.to(x_adv.device)
                flat += outcome.flat
                if progress is not None:
                    progress(name, start + len(chosen), len(alive), int(robust.sum()))
            per_attack[name] = robust.clone()
            if flat:
                warnings.append(f"{name}: {flat} runs began at a zero gradient, where it can tell nothing")
        check, notes = verify(function, x, y, x_adv, robust, radius=radius, batch_size=batch_size, device=device)
    used = min(targets, classes - 1)
    return AttackResult(
        attack="aa2",
        eps=text,
        seed=seed,
        clean=clean,
        robust=robust,
        x_adv=x_adv,
        per_attack=per_attack,
        settings={
            "steps": steps,
            "targets": used,
            "rho": RHO,
            "restarts": 1,
            "batch_size": batch_size,
            "autocast": None if autocast is None else str(autocast),
        },
        warnings=(*warnings, *notes),
        check=check,
        seconds=time.perf_counter() - began,
    )


def _keyed(chosen: Tensor, x: Tensor, seed: int, device: torch.device) -> Noise:
    """Noise by stream: 0 is APGD-CE's, r that of the r-th target."""
    indices = chosen.tolist()
    return lambda stream: keyed_uniform(indices, x.shape[1:], seed=seed, stream=stream).to(device, x.dtype)
