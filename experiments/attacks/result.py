"""What an evaluation under attack hands back, and the check of its adversarial images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.attacks.pgd import judged_logits
from hessdiag.errors import AuditError, ConfigurationError, NonFiniteError
from hessdiag.problem.ascent import Forward

BALL_TOLERANCE = 1e-6
Progress = Callable[[str, int, int, int], None]


@dataclass(frozen=True)
class BallCheck:
    """The adversarial images measured after the fact, and forwarded once more.

    `disagreements` counts samples whose verdict changed in that second forward pass: zero unless rounding
    that depends on the batch (autotuned kernels) moved a sample across the boundary.
    """

    max_distance: float
    low: float
    high: float
    disagreements: int


@dataclass(frozen=True)
class AttackResult:
    """Per-sample outcome of one attack or a worst case over several; `per_attack` maps to the flags after
    each.

    `x_adv` holds a misclassified image where `robust` is False, and the clean image elsewhere.
    """

    attack: str
    eps: str
    seed: int
    clean: Tensor
    robust: Tensor
    x_adv: Tensor
    per_attack: dict[str, Tensor]
    settings: dict[str, Any]
    warnings: tuple[str, ...]
    check: BallCheck
    seconds: float

    @property
    def clean_accuracy(self) -> float:
        """Share of samples classified correctly without attack."""
        return float(self.clean.double().mean())

    @property
    def robust_accuracy(self) -> float:
        """Share of samples classified correctly under attack."""
        return float(self.robust.double().mean())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a result file: accuracies, settings and checks, without the tensors."""
        return {
            "attack": self.attack,
            "eps": self.eps,
            "seed": self.seed,
            "samples": len(self.robust),
            "clean_accuracy": self.clean_accuracy,
            "robust_accuracy": self.robust_accuracy,
            "accuracy_after": {name: float(flags.double().mean()) for name, flags in self.per_attack.items()},
            "settings": dict(self.settings),
            "warnings": list(self.warnings),
            "max_distance": self.check.max_distance,
            "range": [self.check.low, self.check.high],
            "disagreements": self.check.disagreements,
            "seconds": self.seconds,
        }


def predictions(forward: Forward, x: Tensor, *, batch_size: int, device: torch.device) -> Tensor:
    """Predicted classes [N] on the device of x."""
    return all_logits(forward, x, batch_size=batch_size, device=device).argmax(1)


def class_count(forward: Forward, x: Tensor, device: torch.device) -> int:
    """How many logits the model gives, from one sample."""
    logits = judged_logits(forward, x[:1].to(device))
    if logits.ndim != 2:
        raise ConfigurationError(f"an attack needs logits of shape [N, classes], not {list(logits.shape)}")
    return logits.shape[1]


def verify(
    forward: Forward,
    x: Tensor,
    y: Tensor,
    x_adv: Tensor,
    robust: Tensor,
    *,
    radius: float,
    batch_size: int,
    device: torch.device,
) -> tuple[BallCheck, tuple[str, ...]]:
    """Distance, range and verdict of every adversarial image; leaving ball or box is an AuditError."""
    distance = float((x_adv - x).abs().max())
    low, high = (float(bound) for bound in torch.aminmax(x_adv))
    if not (distance <= radius + BALL_TOLERANCE and low >= 0.0 and high <= 1.0):
        raise AuditError(
            f"adversarial images left the threat model: distance {distance:.7g} with eps {radius:.7g}, "
            f"range [{low:.7g}, {high:.7g}]; the attack is at fault, its robust accuracy is void"
        )
    again = predictions(forward, x_adv, batch_size=batch_size, device=device).eq(y)
    differing = int((again != robust).sum())
    warnings = (
        (f"{differing} of {len(robust)} verdicts changed when the adversarial images were forwarded again",)
        if differing
        else ()
    )
    return BallCheck(distance, low, high, differing), warnings


def check_batch_size(batch_size: int) -> None:
    """At least one sample per batch."""
    if batch_size < 1:
        raise ConfigurationError(f"batch_size must be at least 1, not {batch_size}")


def all_logits(forward: Forward, x: Tensor, *, batch_size: int, device: torch.device) -> Tensor:
    """Logits [N, classes] on the device of x; NaN or Inf among them is an error, not a class."""
    outputs = []
    for start in range(0, len(x), batch_size):
        logits = judged_logits(forward, x[start : start + batch_size].to(device))
        if logits.ndim != 2:
            raise ConfigurationError(f"an attack needs logits of shape [N, classes], not {list(logits.shape)}")
        bad = torch.nonzero(~logits.isfinite().all(1)).flatten()
        if len(bad):
            raise NonFiniteError(
                f"NaN or Inf in the logits of {len(bad)} samples (first: {start + int(bad[0])}); "
                "the model is broken there, which no attack may count as fooled"
            )
        outputs.append(logits.to(x.device))
    return torch.cat(outputs)
