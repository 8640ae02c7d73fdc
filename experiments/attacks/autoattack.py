"""AutoAttack 'standard' in Linf, by pyautoattack, with a memory: the reference evaluation of robustness.

APGD-CE, APGD-T, FAB-T and Square in this order (arXiv 2003.01690), each from the clean image and only on
samples that still stand: a pointwise worst case. Same images, byte for byte, as pyautoattack's own loop.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.attacks.borrowed import (
    ORDER,
    STANDARD,
    Budgets,
    Guarded,
    Notes,
    Package,
    Perturb,
    compose,
    globals_put_back,
    run_checks,
)
from experiments.attacks.inputs import check_dlr, check_labels, check_samples, home, plain_radius
from experiments.attacks.pgd import logits_function
from experiments.attacks.progress_file import Standing, model_digest, restore, save
from experiments.attacks.result import AttackResult, Progress, all_logits, check_batch_size, verify
from hessdiag.errors import ConfigurationError, DtypeError
from hessdiag.problem.ascent import handed_back
from hessdiag.problem.full_float32 import full_float32
from hessdiag.store.states import digest

SAVE_EVERY = 60.0


def autoattack(
    model: object,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str | Fraction,
    seed: int = 0,
    batch_size: int = 250,
    directory: str | os.PathLike[str] | None = None,
    budgets: Budgets = STANDARD,
    progress: Progress | None = None,
) -> AttackResult:
    """Clean and robust flags, adversarial images, flags after each attack, and the package's warnings as
    fields.

    The model is evaluated in eval mode and whole float32 and handed back as it came; so are torch's random state,
    the trace function and the package's counters. With `directory` the standing is kept there after every
    attack, and every minute within one; the same call after a kill goes on from there and ends with the
    same images. progress(attack, done, total, robust) is called after each batch.
    """
    package = Package()
    radius, text = plain_radius(eps)
    y = _check(model, x, y, radius, batch_size)
    device, folder = home(model, x), None if directory is None else Path(directory)
    with handed_back(model), full_float32(), globals_put_back(package, device), torch.no_grad():
        forward = Guarded(logits_function(model, None))
        logits = all_logits(forward, x, batch_size=batch_size, device=device)
        classes = logits.shape[1]
        check_dlr(classes)
        check_labels(y, classes)
        identity = {
            "eps": radius,
            "seed": seed,
            "batch_size": batch_size,
            "budgets": asdict(budgets),
            "pyautoattack": package.version,
            "data": digest(x, y),
            "model": model_digest(model),
        }
        standing = None if folder is None else restore(folder, identity, logits, x.device)
        if standing is None:
            clean = logits.argmax(1).eq(y)
            standing = Standing(clean=clean, robust=clean.clone(), x_adv=x.detach().clone(), logits=logits)
        notes = Notes(standing.warnings)
        with torch.enable_grad():
            run_checks(
                package,
                forward,
                x[:batch_size].to(device),
                y[:batch_size].to(device),
                budgets=budgets,
                notes=notes,
            )
        attacks = compose(
            package,
            forward,
            radius=radius,
            seed=seed,
            device=device,
            classes=classes,
            budgets=budgets,
            notes=notes,
        )
        run = _Run(standing, identity, folder, batch_size, device, forward, notes, progress)
        for name in ORDER:
            if name not in standing.per_attack:
                run.attack(name, attacks[name], x, y)
        drop = _square_drop(package, standing, notes)
        check, differing = verify(
            forward,
            x,
            y,
            standing.x_adv,
            standing.robust,
            radius=radius,
            batch_size=batch_size,
            device=device,
        )
    return AttackResult(
        attack="aa",
        eps=text,
        seed=seed,
        clean=standing.clean,
        robust=standing.robust,
        x_adv=standing.x_adv,
        per_attack=dict(standing.per_attack),
        settings={
            **asdict(budgets),
            "targets": min(budgets.targets, classes - 1),
            "batch_size": batch_size,
            "version": "standard",
            "norm": "Linf",
            "pyautoattack": package.version,
            "square_gain": drop,
        },
        warnings=(*standing.warnings, *differing),
        check=check,
        seconds=standing.seconds,
    )


class _Run:
    """The package's loop over batches of what still stands, written down as it goes."""

    def __init__(
        self,
        standing: Standing,
        identity: dict[str, Any],
        folder: Path | None,
        batch_size: int,
        device: torch.device,
        forward: Guarded,
        notes: Notes,
        progress: Progress | None,
    ) -> None:
        self.standing, self.identity, self.folder = standing, identity, folder
        self.batch_size, self.device = batch_size, device
        self.forward, self.notes, self.progress = forward, notes, progress
        self.clock = self.saved = time.perf_counter()

    def attack(self, name: str, perturb: Perturb, x: Tensor, y: Tensor) -> None:
        now = self.standing
        if now.current != name:
            now.current, now.batch, now.alive = name, 0, torch.nonzero(now.robust).flatten()
        self.notes.prefix, self.forward.doing = f"{name}: ", name
        while now.batch * self.batch_size < len(now.alive):
            start = now.batch * self.batch_size
            chosen = now.alive[start : start + self.batch_size]
            images, labels = x[chosen].clone().to(self.device), y[chosen].clone().to(self.device)
            adversarial = perturb(images, labels)
            fooled = (self.forward(adversarial).max(dim=1)[1] != labels).to(now.robust.device)
            now.robust[chosen[fooled]] = False
            now.x_adv[chosen[fooled]] = adversarial.detach().to(now.x_adv.device)[fooled]
            now.batch += 1
            if time.perf_counter() - self.saved >= SAVE_EVERY:
                self.write()
            if self.progress is not None:
                self.progress(name, start + len(chosen), len(now.alive), int(now.robust.sum()))
        now.per_attack[name] = now.robust.clone()
        self.write()

    def write(self) -> None:
        self.saved = time.perf_counter()
        self.standing.seconds += self.saved - self.clock
        self.clock = self.saved
        if self.folder is not None:
            save(self.folder, self.standing, self.identity)


def _check(model: object, x: Tensor, y: Tensor, radius: float, batch_size: int) -> Tensor:
    labels = check_samples(x, y)
    check_batch_size(batch_size)
    if x.ndim != 4:
        raise ConfigurationError(f"AutoAttack needs images [N, C, H, W] (Square cuts windows), not {list(x.shape)}")
    if radius == 0.0:
        raise ConfigurationError("AutoAttack with eps 0 attacks nothing; measure the clean accuracy instead")
    kinds = {p.dtype for p in model.parameters()} if isinstance(model, nn.Module) else set()
    if x.dtype != torch.float32 or kinds - {torch.float32}:
        found = ", ".join(sorted(str(kind) for kind in kinds | {x.dtype}))
        raise DtypeError(f"AutoAttack computes in float32, found {found}; convert model and images by .float()")
    return labels


def _square_drop(package: Package, standing: Standing, notes: Notes) -> float:
    """By how much Square lowered the accuracy; above 0.2 points the package warns of masked gradients."""
    shares = {name: float(flags.float().mean()) for name, flags in standing.per_attack.items()}
    notes.prefix = ""
    package.checks.check_square_sr({"clean": float(standing.clean.float().mean()), **shares}, logger=notes)
    return shares["fab-t"] - shares["square"]
