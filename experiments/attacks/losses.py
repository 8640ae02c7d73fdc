"""What an attack ascends: one value per sample, from the logits and a target.

The target of "ce" and "margin" is the label, of "kl" the logits at the clean input. The logits
come in at least float32: `hessdiag.problem.ascent.input_gradient` sees to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hessdiag.errors import UnknownNameError, nearest
from hessdiag.problem.ascent import AttackLoss
from hessdiag.problem.perturbation import cross_entropy


def kl_to_clean(logits: Tensor, clean_logits: Tensor) -> Tensor:
    """KL(p(x_clean) || p(x)) per sample, the clean side fixed: what TRADES ascends (arXiv 1901.08573)."""
    clean = F.log_softmax(clean_logits.detach().to(logits.dtype), 1)
    return (clean.exp() * (clean - F.log_softmax(logits, 1))).sum(1)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """max_{k != y} z_k - z_y: positive exactly where the sample is misclassified."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.masked_fill(F.one_hot(labels, logits.shape[1]).bool(), -torch.inf)
    return others.amax(1) - own


def dlr_targeted(logits: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4))/2 + 1e-12) for target = (labels, classes aimed at).

    The targeted difference of logits ratio (Croce & Hein 2020, arXiv 2003.01690, section 4.3); z_(k) is the
    k-th largest logit, so there must be four.
    """
    labels, aim = target
    largest = logits.topk(4, dim=1).values
    gap = logits.gather(1, labels[:, None]).squeeze(1) - logits.gather(1, aim[:, None]).squeeze(1)
    return -gap / (largest[:, 0] - 0.5 * (largest[:, 2] + largest[:, 3]) + 1e-12)


LOSSES: dict[str, AttackLoss] = {"ce": cross_entropy, "kl": kl_to_clean, "margin": margin}


def resolve(loss: str | AttackLoss) -> AttackLoss:
    """A named loss, or the callable (logits, target) -> value per sample itself."""
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise UnknownNameError(f"unknown attack loss {loss!r}; {nearest(loss, sorted(LOSSES))}")
    return LOSSES[loss]


def needs_clean_logits(loss: str | AttackLoss, target: Any) -> bool:
    """Whether `target` has still to be replaced by the logits at the clean input."""
    return loss == "kl" and not (isinstance(target, Tensor) and target.is_floating_point())
