"""The tables within a training configuration: schedule, attack, weight perturbation, averaging, augmentation.

Radii and steps keep the text in which they were given ("8/255"), so that reports repeat it; a step may be
relative to the radius in force ("1/2 eps").
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction

from hessdiag.errors import ConfigurationError, UnknownNameError, nearest
from hessdiag.problem.perturbation import fraction


def one_of(value: str, known: Collection[str], what: str) -> None:
    """Refuse a name that is not among `known`."""
    if value not in known:
        raise UnknownNameError(f"unknown {what} {value!r}; {nearest(value, list(known))}")


def require(good: bool, message: str) -> None:
    """ConfigurationError unless `good`."""
    if not good:
        raise ConfigurationError(message)


def step_size(text: str, eps: float) -> float:
    """A step such as "2/255" or "0.007", or relative to the radius in force: "eps", "1/2 eps", "1.25 eps"."""
    head = text.strip()
    if not head.endswith("eps"):
        return float(fraction(head, "attack.step"))
    head = head.removesuffix("eps").strip().removesuffix("*").strip()
    return float(fraction(head, "attack.step") if head else Fraction(1)) * eps


SCHEDULES = ("constant", "piecewise", "cosine", "cosine_inner", "triangular")


@dataclass(frozen=True)
class Schedule:
    """How the learning rate moves; the formulas are in `schedules`.

    milestones: where factors apply, in epochs, or as a share of all epochs where below 1.
    per: whether "piecewise" looks at the epoch's number, or at the fractional epoch at the end of each step.
    peak: where "triangular" has its maximum, as a share of all steps.
    """

    name: str = "constant"
    milestones: tuple[float, ...] = ()
    factors: tuple[float, ...] = ()
    per: str = "epoch"
    peak: float = 0.5

    def __post_init__(self) -> None:
        one_of(self.name, SCHEDULES, "schedule.name")
        one_of(self.per, ("epoch", "iteration"), "schedule.per")
        require(
            len(self.milestones) == len(self.factors),
            f"schedule: {len(self.milestones)} milestones for {len(self.factors)} factors; give one factor each",
        )
        require(
            not self.milestones or self.name == "piecewise",
            f"schedule: milestones belong to name = 'piecewise', not {self.name!r}",
        )
        ordered = all(a < b for a, b in zip(self.milestones, self.milestones[1:]))
        require(ordered and all(m > 0 for m in self.milestones), "schedule.milestones must be positive and increasing")
        require(all(f >= 0 for f in self.factors), "schedule.factors must not be negative")
        require(0 < self.peak < 1, f"schedule.peak must lie between 0 and 1, not {self.peak}")


KINDS = ("none", "pgd", "fgsm_rs", "n_fgsm")
STARTS = ("uniform", "gauss", "none")
LOSSES = ("ce", "kl", "dkl")
BUDGETS = ("fixed", "low", "as_coded", "as_published")
BN_MODES = ("eval", "train", "train_but_first")


@dataclass(frozen=True)
class Attack:
    """How the training images are crafted.

    budget: "fixed" takes `steps` and `step`; the others are DAJAT's step schedules (see `schedules`).
    ramp: "linear" lets the radius grow as eps·t/T with the epoch t = 1..T.
    bn: mode of BatchNorm while crafting; "train_but_first" is "train" but for the first batch after an
    evaluation, which finds the model in eval mode (as in the public AWP code).
    noise: width of N-FGSM's noise in units of eps.
    """

    kind: str = "pgd"
    loss: str = "ce"
    steps: int = 10
    step: str = "2/255"
    start: str = "uniform"
    bn: str = "eval"
    budget: str = "fixed"
    ramp: str = "none"
    noise: float = 2.0

    def __post_init__(self) -> None:
        one_of(self.kind, KINDS, "attack.kind")
        one_of(self.loss, LOSSES, "attack.loss")
        one_of(self.start, STARTS, "attack.start")
        one_of(self.bn, BN_MODES, "attack.bn")
        one_of(self.budget, BUDGETS, "attack.budget")
        one_of(self.ramp, ("none", "linear"), "attack.ramp")
        require(self.steps >= 1, f"attack.steps must be at least 1, not {self.steps}")
        require(self.noise >= 0, f"attack.noise must not be negative, not {self.noise}")
        require(0 < step_size(self.step, 1.0) <= 4, f"attack.step must lie in (0, 4], not {self.step}")
        require(
            self.kind in ("pgd", "none") or self.loss == "ce",
            f"attack.loss = {self.loss!r} belongs to attack.kind = 'pgd', not {self.kind!r}",
        )


@dataclass(frozen=True)
class Perturbation:
    """Adversarial weight perturbation (arXiv 2004.05884): radius gamma, from the epoch `start` (1-based) on."""

    gamma: float = 0.0
    start: int = 1

    def __post_init__(self) -> None:
        require(self.gamma >= 0, f"awp.gamma must not be negative, not {self.gamma}")
        require(self.start >= 1, f"awp.start is an epoch, counted from 1, not {self.start}")


@dataclass(frozen=True)
class Averaging:
    """Averaged weights: "iteration" m <- tau m + (1 - tau) w after each step; "epoch" the same after each epoch.

    per = "run" is "iteration" with tau^(1/n) in place of tau, n the number of steps that are averaged: tau is then the
    share of the starting weights that is left at the end, however long the run.
    after: the share of the epochs after which averaging begins; the average starts as the weights of that moment.
    """

    per: str = "none"
    tau: float = 0.9996
    after: float = 0.0

    def __post_init__(self) -> None:
        one_of(self.per, ("none", "iteration", "epoch", "run"), "averaging.per")
        require(0 <= self.tau < 1, f"averaging.tau must lie in [0, 1), not {self.tau}")
        require(0 <= self.after < 1, f"averaging.after must lie in [0, 1), not {self.after}")


@dataclass(frozen=True)
class Augment:
    """Random crop after padding by `crop` pixels, then a mirror image with probability 1/2; AutoAugment's place.

    auto: "none"; "before" or "after" crop and mirror. For DAJAT it concerns the views beyond the first. What is left
    out of a configuration is filled in by data set (`config.AUGMENTATION`).
    """

    crop: int = 0
    pad: str = "zeros"
    flip: bool = False
    auto: str = "none"

    def __post_init__(self) -> None:
        one_of(self.pad, ("zeros", "reflect"), "augment.pad")
        one_of(self.auto, ("none", "before", "after"), "augment.auto")
        require(self.crop >= 0, f"augment.crop must not be negative, not {self.crop}")


@dataclass(frozen=True)
class Group:
    """Factors on a group of parameters: initial values, learning rate, weight decay.

    match: "bn", "bn.weight", "bn.bias", "conv", "linear", "linear.weight", "linear.bias", "all", or "re:" and
    a regular expression searched in the parameter's name. Where groups overlap, their factors multiply.
    """

    match: str
    init: float = 1.0
    lr: float = 1.0
    decay: float = 1.0

    def __post_init__(self) -> None:
        require(self.lr >= 0 and self.decay >= 0, f"group {self.match!r}: lr and decay must not be negative")
        require(self.init > 0, f"group {self.match!r}: init must be positive, not {self.init}")


CONTROL_FACTORS = ("init", "lr", "decay", "statistics")
CONTROL_FAMILIES = ("bn", "conv", "linear")


@dataclass(frozen=True)
class Control:
    """Train as a network with another alpha would (see `control`): all factors at once, or some of them.

    as_alpha: the alpha to imitate; factors and families choose what is scaled; both empty is no control at all.
    """

    as_alpha: float | None = None
    factors: tuple[str, ...] = CONTROL_FACTORS
    families: tuple[str, ...] = CONTROL_FAMILIES

    def __post_init__(self) -> None:
        require(self.as_alpha is None or self.as_alpha > 0, f"control.as_alpha must be positive, not {self.as_alpha}")
        for factor in self.factors:
            one_of(factor, CONTROL_FACTORS, "control factor")
        for family in self.families:
            one_of(family, CONTROL_FAMILIES, "control family")


@dataclass(frozen=True)
class Watch:
    """What is looked at while training: a fixed batch of training images, every so many epochs.

    samples, steps: size of the batch and PGD steps on it; every: in epochs, 0 for never.
    drop: training stops when PGD accuracy on it has fallen by more than this while FGSM's has not; 0 for never.
    """

    samples: int = 128
    steps: int = 10
    every: int = 1
    drop: float = 0.2

    def __post_init__(self) -> None:
        require(self.samples >= 1 and self.steps >= 1, "watch.samples and watch.steps must be at least 1")
        require(self.every >= 0, f"watch.every must not be negative, not {self.every}")
        require(0 <= self.drop < 1, f"watch.drop must lie in [0, 1), not {self.drop}")
