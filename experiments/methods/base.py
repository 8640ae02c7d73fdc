"""What a training method is: its loss as a function of logits, the forward passes it needs, its defaults as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hessdiag.errors import ConfigurationError


class Forward(Protocol):
    """Logits of images in at least float32; `norm` chooses a set of BatchNorms where there are two."""

    def __call__(self, x: Tensor, norm: str = "base") -> Tensor:
        """The logits."""
        ...


class View(NamedTuple):
    """One rendering of a batch: clean and adversarial images, and the BatchNorms that see them."""

    clean: Tensor
    adversarial: Tensor
    norm: str = "base"


class Batch(NamedTuple):
    """What a method's loss is computed on; `prior` holds DKL's class-mean probabilities of each sample's class."""

    views: tuple[View, ...]
    labels: Tensor
    prior: Tensor | None = None


class Outcome(NamedTuple):
    """The loss, and the logits it came from where they were computed."""

    loss: Tensor
    clean: Tensor | None = None
    adversarial: Tensor | None = None


Options = Mapping[str, Any]
Objective = Callable[[Forward, Batch, Options], Outcome]


@dataclass(frozen=True)
class Method:
    """One training method.

    defaults: entries of a `TrainConfig` that the method sets, `awp.start` for its own number of epochs.
    options: its own numbers with their defaults.
    weight_objective: the loss that AWP ascends, where it is not the loss itself.
    split_norm: whether images beyond the first view have BatchNorms of their own.
    prior: whether DKL's class means are needed. view_option: the option that counts further views.
    """

    name: str
    source: str
    objective: Objective
    defaults: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    weight_objective: Objective | None = None
    crafts: bool = True
    split_norm: bool = False
    prior: bool = False
    view_option: str | None = None

    def check(self, config: Any) -> None:
        """Refuse a configuration that this method cannot mean."""
        if self.crafts and config.attack.kind == "none":
            raise ConfigurationError(f"method {self.name!r} trains on crafted images: attack.kind must not be 'none'")
        if not self.crafts and config.attack.kind != "none":
            raise ConfigurationError(
                f"method {self.name!r} crafts no images: leave out attack.kind = {config.attack.kind!r}, "
                "or choose method 'pgd_at'"
            )
        if config.attack.loss == "dkl" and not self.prior:
            raise ConfigurationError(f"attack.loss = 'dkl' needs the class means of method 'dkl', not {self.name!r}")
        for key, value in config.options.items():
            default = self.options.get(key)
            kind = int if isinstance(default, int) and not isinstance(default, bool) else (int, float)
            good = isinstance(value, bool) if isinstance(default, bool) else isinstance(value, kind)
            if not good or (isinstance(value, bool) and not isinstance(default, bool)):
                raise ConfigurationError(f"options.{key} of method {self.name!r}: {value!r} is of the wrong type")
            if not isinstance(value, bool) and value < 0:
                raise ConfigurationError(f"options.{key} of method {self.name!r} must not be negative, not {value}")

    def extra_views(self, options: Options) -> int:
        """How many augmented views come beside the first."""
        return 0 if self.view_option is None else int(options[self.view_option])


def log_softmax_pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both log-softmaxes."""
    return torch.log_softmax(first, 1), torch.log_softmax(second, 1)


def kl(clean: Tensor, adversarial: Tensor) -> Tensor:
    """KL(p || p') per sample from logits, the gradient flowing into both."""
    log_p, log_q = log_softmax_pair(clean, adversarial)
    return (log_p.exp() * (log_p - log_q)).sum(1)
