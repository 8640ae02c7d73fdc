"""A perturbation spelled out ("pgd:eps=8/255,steps=10"), and a PGD whose noise is keyed by sample.

A measurement at perturbed inputs needs inputs that are a property of the sample alone: here the random start
of sample i comes from a counter-based generator keyed by (seed, i), so that neither batch size nor order
changes it. In eval mode the rest of the attack acts on each sample by itself; what batching may still change
is the rounding of the forward pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hessdiag.errors import ConfigurationError, EmptyDataError, UnknownNameError, nearest
from hessdiag.problem.ascent import (
    AttackLoss,
    Forward,
    check_box,
    handed_back,
    linf_ascent,
    refuse_non_finite,
)

_NUMBER = re.compile(r"\d{1,9}/\d{1,9}|(\d{1,9}(\.\d{0,30})?|\.\d{1,30})(e-?\d{1,2})?", re.IGNORECASE)


def fraction(text: str, what: str = "number") -> Fraction:
    """The exact value of "8/255", "0.031" or "1e-2"; ConfigurationError for anything else."""
    value = text.strip()
    if not _NUMBER.fullmatch(value) or re.fullmatch(r"\d+/0+", value):
        raise ConfigurationError(f"{what} must be a number such as 8/255 or 0.031, not {text!r}")
    return Fraction(value)


@dataclass(frozen=True)
class PGDSpec:
    """An Linf PGD to the letter: `eps` and `step` keep their exact text ("8/255") for reports to repeat."""

    eps: str
    steps: int
    step: str
    seed: int = 0

    def __post_init__(self) -> None:
        radius, step = fraction(self.eps, "eps"), fraction(self.step, "step")
        if not 0 < radius <= 1:
            hint = f"; did you mean {self.eps}/255?" if 1 < radius <= 255 and self.eps.isdecimal() else ""
            raise ConfigurationError(f"eps must lie in (0, 1], since pixels lie in [0, 1], not {self.eps}{hint}")
        if not 0 < step <= 2:
            raise ConfigurationError(f"step must lie in (0, 2], not {self.step}")
        if not 1 <= self.steps <= 100_000:
            raise ConfigurationError(f"steps must lie in [1, 100000], not {self.steps}")
        if not 0 <= self.seed < 2**64:
            raise ConfigurationError(f"seed must lie in [0, 2^64), not {self.seed}")

    @property
    def radius(self) -> float:
        """The radius eps as a float."""
        return float(fraction(self.eps))

    @property
    def step_size(self) -> float:
        """The step as a float."""
        return float(fraction(self.step))

    def __str__(self) -> str:
        return f"pgd:eps={self.eps},steps={self.steps},step={self.step},seed={self.seed}"


def parse_pgd(text: str) -> PGDSpec:
    """Read "pgd:eps=8/255,steps=10[,step=2/255][,seed=0]"; the step defaults to 5/2 eps/steps."""
    name, _, rest = text.partition(":")
    if name.strip() != "pgd":
        one_step = "; one step of it is pgd:eps=8/255,steps=1" if "fgsm" in name.lower() else ""
        raise UnknownNameError(f"unknown perturbation {name.strip()!r}; {nearest(name.strip(), ['pgd'])}{one_step}")
    known = ["eps", "steps", "step", "seed"]
    found: dict[str, str] = {}
    for part in filter(None, (piece.strip() for piece in rest.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in known:
            raise UnknownNameError(f"unknown option {key!r} in {text!r}; {nearest(key, known)}")
        if not equals or not value or key in found:
            problem = "is given twice" if key in found else "has no value"
            raise ConfigurationError(f"option {key!r} {problem} in {text!r}; write pgd:eps=8/255,steps=10")
        found[key] = value
    for key in ("eps", "steps"):
        if key not in found:
            raise ConfigurationError(f"{text!r} lacks {key}; write pgd:eps=8/255,steps=10")
    for key in ("steps", "seed"):
        if key in found and not re.fullmatch(r"\d{1,20}", found[key]):
            raise ConfigurationError(f"{key} must be a whole number in {text!r}, not {found[key]!r}")
    steps = int(found["steps"])
    radius = fraction(found["eps"], "eps")
    step = found.get("step", str(Fraction(5, 2) * radius / max(steps, 1)))
    if "step" not in found and not _NUMBER.fullmatch(step):
        step = repr(float(Fraction(step)))
    return PGDSpec(eps=found["eps"], steps=steps, step=step, seed=int(found.get("seed", "0")))


def keyed_uniform(indices: Sequence[int], shape: Sequence[int], *, seed: int, stream: int = 0) -> Tensor:
    """U[-1, 1) noise [len(indices), *shape] in float64; row i depends on (seed, stream, indices[i]) alone.

    Philox-4x64 (Salmon et al. 2011) with key (seed, index) and counter (0, 0, stream, 0); its top 53 bits.
    """
    count = int(np.prod(shape, dtype=np.int64))
    if not 0 <= seed < 2**64 or not 0 <= stream < 2**64 or any(not 0 <= index < 2**64 for index in indices):
        raise ConfigurationError("seed, stream and sample indices must lie in [0, 2^64)")
    rows = np.empty((len(indices), count))
    for row, index in zip(rows, indices, strict=True):
        raw = np.random.Philox(key=(index << 64) | seed, counter=stream << 128).random_raw(count)
        row[:] = (raw >> np.uint64(11)) * 2.0**-52 - 1.0
    return torch.from_numpy(rows).reshape(len(indices), *shape)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(f)_y per sample."""
    return F.cross_entropy(logits, targets, reduction="none")


def keyed_pgd(
    model: Forward,
    inputs: Tensor,
    targets: Tensor,
    indices: Sequence[int],
    spec: PGDSpec,
    *,
    loss: AttackLoss = cross_entropy,
) -> Tensor:
    """PGD from x + eps U(-1, 1), noise keyed by (spec.seed, sample index), the model in eval mode."""
    check_box(inputs)
    if len(indices) != len(inputs):
        raise ConfigurationError(f"{len(indices)} sample indices for {len(inputs)} inputs")
    noise = keyed_uniform(indices, inputs.shape[1:], seed=spec.seed).to(inputs)
    centre = inputs.detach()
    start = (centre + spec.radius * noise).clamp(0.0, 1.0)
    with handed_back(model):
        points, finite = linf_ascent(
            model, start, centre, targets, eps=spec.radius, step=spec.step_size, steps=spec.steps, loss=loss
        )
    refuse_non_finite(finite, f"crafting {spec}")
    return points


def perturb_batches(
    model: Forward,
    batches: Iterable[tuple[Tensor, Tensor]],
    spec: PGDSpec,
    *,
    loss: AttackLoss = cross_entropy,
) -> list[tuple[Tensor, Tensor]]:
    """The batches, inputs perturbed once and held fixed; a sample's index is its place in the data."""
    crafted: list[tuple[Tensor, Tensor]] = []
    seen = 0
    for number, (inputs, targets) in enumerate(batches):
        check_box(inputs, f"the inputs of batch {number}")
        indices = range(seen, seen + len(inputs))
        crafted.append((keyed_pgd(model, inputs, targets, indices, spec, loss=loss), targets))
        seen += len(inputs)
    if not crafted:
        raise EmptyDataError("no batches to perturb")
    return crafted
