"""pyautoattack at arm's length: its four 'standard' attacks with every number pinned, its globals put back.

The package sets torch's global random state, clears sys.settrace, and counts suspicious calls in module
globals that nothing resets, so that one flagged model flags every later one of the process. Here all three
are restored.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hessdiag.errors import ConfigurationError, NonFiniteError
from hessdiag.problem.ascent import Forward

ORDER = ("apgd-ce", "apgd-t", "fab-t", "square")
Perturb = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Budgets:
    """Every hyperparameter of AutoAttack 'standard' in Linf (arXiv 2003.01690), none left to a default."""

    apgd_steps: int = 100
    apgd_restarts: int = 1
    rho: float = 0.75
    targets: int = 9
    fab_steps: int = 100
    fab_restarts: int = 1
    fab_alpha_max: float = 0.1
    fab_eta: float = 1.05
    fab_beta: float = 0.9
    square_queries: int = 5000
    square_restarts: int = 1
    square_p_init: float = 0.8


STANDARD = Budgets()


class Package:
    """The modules of pyautoattack that are used, or a ConfigurationError saying how to get them."""

    def __init__(self) -> None:
        try:
            root = importlib.import_module("pyautoattack")
            self.apgd: ModuleType = importlib.import_module("pyautoattack.autopgd_base")
            self.fab: ModuleType = importlib.import_module("pyautoattack.fab_pt")
            self.square: ModuleType = importlib.import_module("pyautoattack.square")
            self.checks: ModuleType = importlib.import_module("pyautoattack.checks")
        except ImportError as error:
            raise ConfigurationError(
                f"AutoAttack needs pyautoattack>=0.2,<0.3 ({error}): pip install 'hessdiag[robust]'"
            ) from None
        self.version = str(getattr(root, "__version__", "unknown"))
        if not re.match(r"0\.2(\.|$)", self.version):
            raise ConfigurationError(
                f"pyautoattack must be >=0.2,<0.3, not {self.version}: pip install 'hessdiag[robust]'"
            )


class Notes:
    """Stands in for the package's logger: keeps each warning once, however logging is configured."""

    def __init__(self, kept: list[str]) -> None:
        self.kept = kept
        self.prefix = ""

    def warning(self, message: str, *_: object) -> None:
        """Keep it."""
        text = f"{self.prefix}{message}"
        if text not in self.kept:
            self.kept.append(text)

    def info(self, *_: object) -> None:
        """Pass over it."""

    def debug(self, *_: object) -> None:
        """Pass over it."""


class Guarded:
    """The model's logits, an error where they are not finite: argmax would call NaN a class.

    Hands out a tensor of its own, since Square writes into the logits that it gets.
    """

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.doing = "the checks"

    def __call__(self, x: Tensor) -> Tensor:
        """Logits of x."""
        logits = self.forward(x)
        bad = int((~logits.detach().isfinite().flatten(1).all(1)).sum())
        if bad:
            raise NonFiniteError(
                f"NaN or Inf in the logits of {bad} of {len(logits)} samples during {self.doing}; "
                "the model is broken there, which no attack may count as fooled"
            )
        return logits if logits.requires_grad else logits.clone()


@contextmanager
def globals_put_back(package: Package, device: torch.device) -> Iterator[None]:
    """Random state (CPU and the device), trace function and the package's call counters as they were."""
    gpu: Any = torch.cuda
    cuda = {gpu.current_device()} if device.type == "cuda" or gpu.is_initialized() else set()
    cuda |= {device.index} if device.type == "cuda" and device.index is not None else set()
    trace, counters = sys.gettrace(), package.checks.funcs
    counts = dict(counters)
    try:
        with torch.random.fork_rng(devices=sorted(cuda)):
            for name in counters:
                counters[name] = 0
            yield
    finally:
        counters.update(counts)
        sys.settrace(trace)


def run_checks(package: Package, forward: Guarded, x: Tensor, y: Tensor, *, budgets: Budgets, notes: Notes) -> int:
    """The package's checks for defences it cannot judge, in its own order; returns the number of classes."""
    checks, trace = package.checks, sys.gettrace()
    notes.prefix = ""
    with torch.no_grad():
        checks.check_randomized(forward, x, y, bs=len(x), logger=notes)
        classes = int(checks.check_range_output(forward, x, logger=notes))
    try:
        checks.check_dynamic(forward, x, False, logger=notes)
    finally:
        sys.settrace(trace)
    targets = min(budgets.targets, classes - 1)
    if targets < budgets.targets:
        notes.warning(f"{budgets.targets} target classes cut to {targets}: the model has {classes} classes")
    checks.check_n_classes(classes, list(ORDER), targets, targets, logger=notes)
    return classes


def compose(
    package: Package,
    forward: Forward,
    *,
    radius: float,
    seed: int,
    device: torch.device,
    classes: int,
    budgets: Budgets,
    notes: Notes,
) -> dict[str, Perturb]:
    """The four attacks by name, each (images, labels) -> images."""
    targets = min(budgets.targets, classes - 1)
    common = {"norm": "Linf", "eps": radius, "seed": seed, "verbose": False, "device": device}
    gradient = {
        "n_iter": budgets.apgd_steps,
        "n_restarts": budgets.apgd_restarts,
        "eot_iter": 1,
        "rho": budgets.rho,
        "topk": None,
        "use_largereps": False,
        "is_tf_model": False,
        "logger": notes,
    }
    untargeted = package.apgd.APGDAttack(forward, loss="ce", **common, **gradient)
    targeted = package.apgd.APGDAttack_targeted(forward, n_target_classes=targets, **common, **gradient)
    boundary = package.fab.FABAttack_PT(
        forward,
        n_iter=budgets.fab_steps,
        n_restarts=budgets.fab_restarts,
        alpha_max=budgets.fab_alpha_max,
        eta=budgets.fab_eta,
        beta=budgets.fab_beta,
        targeted=True,
        n_target_classes=targets,
        **common,
    )
    square = package.square.SquareAttack(
        forward,
        p_init=budgets.square_p_init,
        n_queries=budgets.square_queries,
        n_restarts=budgets.square_restarts,
        targeted=False,
        loss="margin",
        resc_schedule=False,
        **common,
    )
    return {
        "apgd-ce": untargeted.perturb,
        "apgd-t": targeted.perturb,
        "fab-t": boundary.perturb,
        "square": square.perturb,
    }
