"""Whether a network learned anything: its answers on test images against one that does not look at them.

Who ignores the images does best by always answering the commonest class, right on the share s_max of them, and by
always stating the classes' shares s_c, at the cross-entropy H = -sum_c s_c log s_c (ln C where classes are equally
common). A network has learned something if either can be told from these at the level `LEVEL`:

    accuracy   k of n right, above s_max by the exact binomial test: P(X >= k), X ~ B(n, s_max);
    loss       the mean over images of l_i + log s_{y_i} below 0 by its standard error.

The loss decides where few test images hide an accuracy; it cannot speak for a network that is right but overconfident.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from scipy import stats
from torch import Tensor, nn

from hessdiag.data.dataset import DataSet
from hessdiag.problem.ascent import handed_back
from hessdiag.problem.full_float32 import full_float32

LEVEL = 0.001
UNLEARNED = "did_not_learn"


@dataclass(frozen=True)
class Answers:
    """What a network says on test images, beside what is known without looking at them."""

    correct: int
    samples: int
    loss: float
    gain: float  # mean of log-loss below that of the shares, in standard errors; -inf where the loss is not finite
    commonest: float
    entropy: float

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.correct / self.samples

    @property
    def learned(self) -> bool:
        """Whether accuracy or loss is better than without looking."""
        return better_than_guessing(self.correct, self.samples, self.commonest) or self.gain > NormalDist().inv_cdf(
            1 - LEVEL
        )

    @property
    def reason(self) -> str | None:
        """The sentence that says that nothing was learned, if so."""
        if self.learned:
            return None
        chance = by_chance(self.correct, self.samples, self.commonest)
        return (
            f"did not learn: {self.accuracy:.1%} of {self.samples} test images are classified correctly, which always "
            f"answering the commonest class ({self.commonest:.1%}) reaches by chance (p = {chance:.2g}), and their "
            f"loss, {self.loss:.4f}, is not clearly below the {self.entropy:.4f} of guessing; "
            "look at lr, eps, epochs and augment"
        )


def better_than_guessing(correct: int, samples: int, commonest: float) -> bool:
    """Whether so many right answers cannot be had by chance."""
    return by_chance(correct, samples, commonest) < LEVEL


def by_chance(correct: int, samples: int, commonest: float) -> float:
    """The probability of so many right answers or more without looking: the exact binomial test."""
    return float(stats.binom.sf(correct - 1, samples, commonest))


def answers(model: nn.Module, test: DataSet, *, batch_size: int, dtype: torch.dtype) -> Answers:
    """The network's answers on every test image, in eval mode."""
    device = next(model.parameters()).device
    correct = torch.zeros((), dtype=torch.long, device=device)
    losses: list[Tensor] = []
    labels: list[Tensor] = []
    with torch.no_grad(), handed_back(model), full_float32():
        for x, y in test.batches(batch_size, device=device, dtype=dtype):
            logits = model(x)
            correct += logits.argmax(1).eq(y).sum()
            losses.append(nn.functional.cross_entropy(logits.double(), y, reduction="none"))
            labels.append(y)
    loss, target = torch.cat(losses).cpu(), torch.cat(labels).cpu()
    shares = target.bincount().double() / len(target)
    present = shares[shares > 0]
    gains = -(loss + shares[target].log())
    return Answers(
        correct=int(correct),
        samples=len(target),
        loss=float(loss.mean()),
        gain=_in_errors(gains),
        commonest=float(shares.max()),
        entropy=float(-(present * present.log()).sum()),
    )


def _in_errors(gains: Tensor) -> float:
    """A mean over its standard error; certainty, of either sign, where nothing scatters."""
    if not bool(gains.isfinite().all()) or len(gains) < 2:
        return -math.inf
    mean, scatter = float(gains.mean()), float(gains.std())
    if scatter < 1e-9:
        return math.inf if mean > 1e-9 else -math.inf
    return mean / scatter * math.sqrt(len(gains))
