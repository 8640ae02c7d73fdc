"""How a trained network is attacked and measured in a sweep, and the completion of a run's configuration.

A run's configuration is stored with every default written out, so that its key says all that its numbers
depend on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from experiments.fields import plain, read
from experiments.sweep.keys import RECORD_SCHEMA, RunConfig
from hessdiag.errors import ConfigurationError, UnknownNameError, nearest

SPLITS = ("train", "test")
LOSSES = ("clean", "adversarial")


@dataclass(frozen=True)
class AttackSettings:
    """AA-2 on `aa2_samples` test images, the full AutoAttack on `aa_samples` of them (0: not run).

    eps: "train" takes the radius of training, or a radius such as "8/255": it must be given where training
    has none of its own. The images are chosen with `samples_seed`, the same for every run of a sweep.
    """

    eps: str = "train"
    aa2_samples: int = 1000
    aa_samples: int = 0
    batch_size: int = 250
    samples_seed: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("aa2_samples", "aa_samples", "samples_seed", "seed"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"attack.{name} must not be negative, not {getattr(self, name)}")
        if self.batch_size < 1:
            raise ConfigurationError(f"attack.batch_size must be at least 1, not {self.batch_size}")


@dataclass(frozen=True)
class MeasureSettings:
    """The norm of the Hessian diagonal on `samples` images of each split, of each loss.

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
        if self.samples < 1 or self.batch_size < 1 or self.pgd_steps < 1:
            raise ConfigurationError("measure.samples, batch_size and pgd_steps must be at least 1")
        if self.plugin_probes < 0 or self.plugin_probes == 1:
            raise ConfigurationError(f"measure.plugin_probes must be 0 or at least 2, not {self.plugin_probes}")
        if not self.rtol > 0:
            raise ConfigurationError(f"measure.rtol must be positive, not {self.rtol}")


def train_fields() -> list[str]:
    """The names that a training configuration knows."""
    from experiments.config import TrainConfig

    return [field.name for field in fields(TrainConfig)]


def complete(config: RunConfig) -> RunConfig:
    """The same run with every default written out and every value checked."""
    from experiments.config import MEANING, TrainConfig

    train = _train(config.train).to_dict()
    attack = _section(AttackSettings, config.attack, "attack")
    measure = _section(MeasureSettings, config.measure, "measure")
    radius = train["eps"] if attack.eps == "train" else attack.eps
    from hessdiag.perturbation import fraction

    if not 0 < fraction(radius, "attack.eps") <= 1:
        raise ConfigurationError(f"attack.eps: {radius!r} is no radius in (0, 1]; give one, such as '8/255'")
    assert set(train) == {field.name for field in fields(TrainConfig)}
    attack_plain = {**plain(attack), "eps": radius}
    return RunConfig(train, attack_plain, plain(measure), f"{RECORD_SCHEMA}.{MEANING}")


def _train(table: Mapping[str, Any]) -> Any:
    from experiments.config import TrainConfig

    return TrainConfig.from_dict(table)


def _section(kind: type[Any], table: Mapping[str, Any], name: str) -> Any:
    return read(kind, table, where=name)
