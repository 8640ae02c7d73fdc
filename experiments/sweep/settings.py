"""How a trained network is attacked and measured in a sweep, and the completion of a run's configuration.

A run's configuration is stored with every default written out, so that its key says all that its numbers
depend on.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, fields

import torch

from experiments.config import MEANING, TrainConfig
from experiments.fields import plain, read
from experiments.sweep.keys import RECORD_SCHEMA, RunConfig
from experiments.trainer.rig import build_network
from hessdiag.errors import ConfigurationError, UnknownNameError, nearest
from hessdiag.methods import METHODS
from hessdiag.problem.perturbation import fraction

SPLITS = ("train", "test")
LOSSES = ("clean", "adversarial")
NETWORK_FIELDS = ("method", "network", "network_options", "normalize", "data", "groups", "control")
IMAGE = {"digits": (1, 8, 8)}


@dataclass(frozen=True)
class AttackSettings:
    """AA-2 on `aa2_samples` test images, the full AutoAttack on `aa_samples`, PGD-10 on `pgd_samples` (0: not run).

    eps: "train" takes the radius of training, or a radius such as "8/255": it must be given where training
    has none of its own. The images are chosen with `samples_seed`, the same for every run of a sweep.
    """

    eps: str = "train"
    aa2_samples: int = 1000
    aa_samples: int = 0
    pgd_samples: int = 0
    batch_size: int = 250
    samples_seed: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("aa2_samples", "aa_samples", "pgd_samples", "samples_seed", "seed"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"attack.{name} must not be negative, not {getattr(self, name)}")
        if self.batch_size < 1:
            raise ConfigurationError(f"attack.batch_size must be at least 1, not {self.batch_size}")


@dataclass(frozen=True)
class MeasureSettings:
    """The norm of the Hessian diagonal on `samples` images of each split, of each loss.

    The images of "train" come from the data set's whole training split, also where a run trains on a part of it: all
    runs of a sweep share them. `AlongSettings` takes those of the part.
    The adversarial loss is the cross-entropy at images crafted once by PGD at the attack's radius and held
    fixed. plugin_probes: Hutchinson probes behind the plug-in norm, as it is often reported; 0 leaves it
    out.
    """

    samples: int = 512
    batch_size: int = 128
    splits: tuple[str, ...] = SPLITS
    losses: tuple[str, ...] = LOSSES
    method: str = "propagation"
    rtol: float = 0.05
    confidence: float = 0.95
    min_replicates: int = 10
    max_replicates: int = 400
    pgd_steps: int = 10
    plugin_probes: int = 50
    samples_seed: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("splits", SPLITS), ("losses", LOSSES)):
            for value in getattr(self, name):
                if value not in known:
                    raise UnknownNameError(f"measure.{name}: {value!r}; {nearest(value, list(known))}")
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ConfigurationError(f"measure.{name}: each once, not {', '.join(getattr(self, name))}")
        if self.method not in (*METHODS, "auto"):
            raise UnknownNameError(f"measure.method: {self.method!r}; {nearest(self.method, [*METHODS, 'auto'])}")
        if self.samples < 1 or self.batch_size < 1 or self.pgd_steps < 1:
            raise ConfigurationError("measure.samples, batch_size and pgd_steps must be at least 1")
        if self.plugin_probes < 0 or self.plugin_probes == 1:
            raise ConfigurationError(f"measure.plugin_probes must be 0 or at least 2, not {self.plugin_probes}")
        if not self.rtol > 0:
            raise ConfigurationError(f"measure.rtol must be positive, not {self.rtol}")
        if not 0 < self.confidence < 1:
            raise ConfigurationError(f"measure.confidence must lie between 0 and 1, not {self.confidence}")
        if not 2 <= self.min_replicates <= self.max_replicates:
            raise ConfigurationError(
                f"measure: 2 <= min_replicates <= max_replicates, not {self.min_replicates} and {self.max_replicates}"
            )
        if self.seed < 0 or self.samples_seed < 0:
            raise ConfigurationError("measure.seed and samples_seed must not be negative")


@dataclass(frozen=True)
class AlongSettings:
    """What is recorded at the end of each of `epochs`, on the live weights (see `along`); no epochs: nothing.

    Training images are of the part that `train_samples` chooses. images: of them and of the test set, clean and under
    PGD of `pgd_steps`. samples: training images for the curvature: the norms of both losses within `rtol`, and the
    Gauss-Newton trace by `replicates` of signs. batches: of other training images, of training's batch size, for the
    covariance of a step's gradient.
    """

    epochs: tuple[int, ...] = ()
    images: int = 1000
    samples: int = 256
    batch_size: int = 64
    batches: int = 12
    method: str = "propagation"
    rtol: float = 0.1
    confidence: float = 0.95
    min_replicates: int = 10
    max_replicates: int = 100
    replicates: int = 16
    pgd_steps: int = 10
    samples_seed: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        ordered = all(a < b for a, b in zip(self.epochs, self.epochs[1:]))
        if not ordered or any(epoch < 1 for epoch in self.epochs):
            raise ConfigurationError(f"along.epochs must be increasing, from 1 on, not {list(self.epochs)}")
        if min(self.images, self.samples, self.batch_size, self.pgd_steps) < 1:
            raise ConfigurationError("along.images, samples, batch_size and pgd_steps must be at least 1")
        if self.batches < 3 or self.replicates < 2:
            raise ConfigurationError("along: at least 3 batches and 2 replicates, which tell their own scatter")
        MeasureSettings(
            method=self.method,
            rtol=self.rtol,
            confidence=self.confidence,
            min_replicates=self.min_replicates,
            max_replicates=self.max_replicates,
            seed=self.seed,
            samples_seed=self.samples_seed,
        )


def train_fields() -> list[str]:
    """The names that a training configuration knows."""
    return [field.name for field in fields(TrainConfig)]


def complete(config: RunConfig) -> RunConfig:
    """The same run with every default written out and every value checked: what is wrong is said before training."""
    try:
        settings = TrainConfig.from_dict(config.train)
        settings.refuse_weak_attack()
        train = settings.to_dict()
        shape = settings.activation if settings.control.as_alpha is not None else "relu"  # the control reads its alpha
        named = {name: train[name] for name in NETWORK_FIELDS}
        _check_network(json.dumps({**named, "activation": shape}))
    except ConfigurationError as error:
        raise type(error)(f"[train]: {error}") from error
    attack = read(AttackSettings, config.attack, where="attack")
    measure = read(MeasureSettings, config.measure, where="measure")
    radius = train["eps"] if attack.eps == "train" else attack.eps
    if not 0 < fraction(radius, "attack.eps") <= 1:
        raise ConfigurationError(f"attack.eps: {radius!r} is no radius in (0, 1]; give one, such as '8/255'")
    along = read(AlongSettings, config.along, where="along")
    if along.epochs and along.epochs[-1] > settings.epochs:
        raise ConfigurationError(f"along.epochs: training ends after {settings.epochs}, before {along.epochs[-1]}")
    schema = f"{RECORD_SCHEMA}.{MEANING}"
    looks = plain(along) if along.epochs else {}
    return RunConfig(train, {**plain(attack), "eps": radius}, plain(measure), schema, looks)


@functools.lru_cache(maxsize=64)
def _check_network(text: str) -> None:
    """Build the network without its numbers (seconds for hundreds of runs of one kind)."""
    settings = TrainConfig.from_dict(json.loads(text))
    with torch.device("meta"):
        build_network(settings, IMAGE.get(settings.data, (3, 32, 32)), classes=10)
