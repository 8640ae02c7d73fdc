"""DKL / IKL-AT, first version (Cui et al. 2024, arXiv 2305.13948): the KL divergence decoupled into two parts.

With s the mean probabilities of a sample's class over the previous epoch, d = f - f' the difference of clean and
adversarial logits:

    wMSE = 1/4 sum_jk s_j s_k (d_j - d_k)^2 = 1/2 [ sum_j s_j d_j^2 - (sum_j s_j d_j)^2 ]     since sum_j s_j = 1,

half the variance of d under s: O(C) instead of the O(C^2) tensor of the first form.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.methods.base import Batch, Forward, Method, Options, Outcome
from hessdiag.errors import ConfigurationError


def weighted_mse(clean: Tensor, adversarial: Tensor, prior: Tensor) -> Tensor:
    """WMSE per sample; gradients to both logits, none to the prior.

    Centred at its mean the variance cannot cancel: sum s (d - sum s d)^2.
    """
    d, s = clean - adversarial, prior.detach()
    centred = d - (s * d).sum(1, keepdim=True)
    return 0.5 * (s * centred.square()).sum(1)


def soft_cross_entropy(clean: Tensor, adversarial: Tensor) -> Tensor:
    """-sum_k sg[p_k] log p'_k per sample: the clean side detached."""
    return -(torch.softmax(clean, 1).detach() * torch.log_softmax(adversarial, 1)).sum(1)


def divergence(clean: Tensor, adversarial: Tensor, prior: Tensor, *, alpha: float, beta: float) -> Tensor:
    """Beta wMSE + alpha soft cross-entropy, per sample."""
    return beta * weighted_mse(clean, adversarial, prior) + alpha * soft_cross_entropy(clean, adversarial)


def loss(clean: Tensor, adversarial: Tensor, labels: Tensor, prior: Tensor, *, alpha: float, beta: float) -> Tensor:
    """Mean CE(f, y) + mean divergence."""
    return F.cross_entropy(clean, labels) + divergence(clean, adversarial, prior, alpha=alpha, beta=beta).mean()


def objective(forward: Forward, batch: Batch, options: Options) -> Outcome:
    """Two passes: clean, adversarial."""
    if batch.prior is None:
        raise ConfigurationError("DKL's loss needs the class means of the previous epoch")
    view = batch.views[0]
    clean = forward(view.clean)
    adversarial = forward(view.adversarial)
    alpha, beta = options["alpha"], options["beta"]
    return Outcome(loss(clean, adversarial, batch.labels, batch.prior, alpha=alpha, beta=beta), clean, adversarial)


class ClassMeans:
    """Row c of W: the mean over the previous epoch of softmax(f/T) on the clean images of class c.

    1/C everywhere in the first epoch, and for a class that did not occur. Sums are kept on the device: no step waits.
    """

    def __init__(self, classes: int, *, temperature: float, device: torch.device, dtype: torch.dtype) -> None:
        if temperature <= 0:
            raise ConfigurationError(f"options.temperature must be positive, not {temperature}")
        self.temperature = temperature
        self.rows = torch.full((classes, classes), 1.0 / classes, device=device, dtype=dtype)
        self.sums = torch.zeros_like(self.rows)

    def of(self, labels: Tensor) -> Tensor:
        """The prior s of each sample."""
        return self.rows[labels]

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Collect a step's clean logits, from training mode at the (perturbed) weights of the step."""
        probabilities = torch.softmax(logits.detach().to(self.sums.dtype) / self.temperature, 1)
        self.sums.index_add_(0, labels, probabilities)

    def turn(self) -> None:
        """End of an epoch: the sums, renormalised by row, become the prior of the next."""
        mass = self.sums.sum(1, keepdim=True)
        self.rows = torch.where(mass > 0, self.sums / mass.clamp_min(1e-30), 1.0 / len(self.rows))
        self.sums = torch.zeros_like(self.sums)


METHOD = Method(
    name="dkl",
    source="Cui et al. 2024, Decoupled Kullback-Leibler divergence loss, NeurIPS (arXiv 2305.13948), first version",
    objective=objective,
    options={"alpha": 4.0, "beta": 20.0, "temperature": 4.0, "attack_alpha": 1.0, "attack_beta": 0.0},
    prior=True,
    defaults={
        "epochs": 200,
        "lr": 0.2,
        "weight_decay": 5e-4,
        "schedule": {"name": "cosine_inner"},
        "attack": {
            "kind": "pgd",
            "loss": "dkl",
            "start": "gauss",
            "bn": "eval",
            "budget": "as_coded",
            "ramp": "linear",
        },
        "awp": {"gamma": 0.005, "start": 10},
        "averaging": {"per": "epoch", "tau": 0.9},
    },
)
