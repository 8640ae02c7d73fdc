"""The whole configuration of one training run, and the hash that names it.

A configuration is the defaults of its method (data in `experiments.methods`), overridden by a recipe, overridden by
the caller. What the run does is a function of this object and the data alone; where it writes and on which device
it runs are not part of it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from experiments import methods
from experiments.fields import digest, merged, plain, read
from experiments.parts import (
    Attack,
    Augment,
    Averaging,
    Control,
    Group,
    Perturbation,
    Schedule,
    Watch,
    one_of,
    require,
    step_size,
)
from hessdiag import activations, networks
from hessdiag.errors import ConfigurationError, UnknownNameError, nearest
from hessdiag.problem.perturbation import fraction
from hessdiag.store.files import BadFileError, read_bytes

# Raise it when the trainer changes what a configuration means: every key changes with it.
MEANING = 1

STANDARD = "standard"
AUTO = "auto"
MAX_TOML = 1 << 20
MAX_DEPTH = 20
MAX_DOTS = 200
STATISTICS: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
# How the images of a data set may be changed without changing what they show. What is not named here is trained on as
# it is: a mirrored digit is no digit, four pixels of eight are half the image, and AutoAugment's colours are CIFAR's.
AUGMENTATION: Mapping[str, Mapping[str, Any]] = {
    "cifar10": {"crop": 4, "flip": True},
    "cifar100": {"crop": 4, "flip": True},
}
UNCHANGED: Mapping[str, Any] = {"crop": 0, "flip": False, "auto": "none"}


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Make it with `from_dict`, which fills in the defaults of the method and of the data set.

    normalize: none, "standard" (the data set's mean and deviation), or given as [[means], [deviations]]; a layer
    inside the network, so that eps is always in units of pixels in [0, 1].
    options: the method's own numbers (beta, ...). train_samples: a stratified-by-chance subset chosen with
    `data_seed`. held_out: training images kept aside, on which select = "best" finds the epoch of highest PGD accuracy.
    autocast ("none", "bfloat16"), channels_last: "auto" leaves them to a timed step before the first (see
    `experiments.trainer.choosing`); the run's directory keeps what was chosen, and the key says "auto". drop_last:
    "auto" leaves out the short batch at an epoch's end where `compile` would compile a second time for it.
    """

    method: str
    network: str = "resnet18"
    network_options: Mapping[str, Any] = field(default_factory=dict)
    activation: str = "relu"
    normalize: Any = None
    data: str = "cifar10"
    train_samples: int | None = None
    data_seed: int = 0
    held_out: int = 0
    select: str = "last"
    epochs: int = 110
    batch_size: int = 128
    drop_last: bool | str = False
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Schedule = field(default_factory=Schedule)
    eps: str = "8/255"
    options: Mapping[str, Any] = field(default_factory=dict)
    attack: Attack = field(default_factory=Attack)
    awp: Perturbation = field(default_factory=Perturbation)
    averaging: Averaging = field(default_factory=Averaging)
    augment: Augment = field(default_factory=Augment)
    groups: tuple[Group, ...] = ()
    control: Control = field(default_factory=Control)
    watch: Watch = field(default_factory=Watch)
    seed: int = 0
    dtype: str = "float32"
    autocast: str = "none"
    channels_last: bool | str = False
    compile: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "activation", canonical_activation(self.activation))
        one_of(self.method, list(methods.METHODS), "method")
        one_of(self.network, [*networks.NETWORKS], "network")
        one_of(self.select, ("last", "best"), "select")
        one_of(self.dtype, ("float32", "float64"), "dtype")
        one_of(self.autocast, ("none", "bfloat16", AUTO), "autocast")
        for name in ("drop_last", "channels_last"):
            value = getattr(self, name)
            require(isinstance(value, bool) or value == AUTO, f"{name} must be true, false or 'auto', not {value!r}")
        require(self.epochs >= 1, f"epochs must be at least 1, not {self.epochs}")
        require(self.batch_size >= 1, f"batch_size must be at least 1, not {self.batch_size}")
        require(self.train_samples is None or self.train_samples >= 1, "train_samples must be at least 1")
        require(self.lr >= 0 and self.weight_decay >= 0, "lr and weight_decay must not be negative")
        require(0 <= self.momentum < 1, f"momentum must lie in [0, 1), not {self.momentum}")
        require(self.held_out >= 0, f"held_out must not be negative, not {self.held_out}")
        require(
            self.select == "last" or self.held_out > 0,
            "select = 'best' needs held_out > 0: the best epoch is found on images that are not trained on",
        )
        require(0 <= self.seed < 2**63 and 0 <= self.data_seed < 2**63, "seeds must lie in [0, 2^63)")
        require(
            0 <= fraction(self.eps, "eps") <= 1,
            f"eps must lie in [0, 1], since pixels lie in [0, 1], not {self.eps}; 8/255 is written '8/255'",
        )
        require(
            not self.awp.gamma or self.awp.start <= self.epochs,
            f"awp.start = {self.awp.start} lies after the last of {self.epochs} epochs; lower it, or set awp.gamma = 0",
        )
        methods.METHODS[self.method].check(self)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> TrainConfig:
        """The defaults of method and data set under `table`; an unknown key is refused with the nearest known one."""
        if not isinstance(table, Mapping) or "method" not in table:
            known = ", ".join(methods.METHODS)
            raise ConfigurationError(f"a training configuration names its method; known: {known}")
        name = table["method"]
        if not isinstance(name, str) or name not in methods.METHODS:
            raise UnknownNameError(f"unknown method {name!r}; {nearest(str(name), list(methods.METHODS))}")
        method = methods.METHODS[name]
        options = table.get("options", {})
        for key in options if isinstance(options, Mapping) else ():
            if key not in method.options:
                known = nearest(str(key), list(method.options)) if method.options else "it has none"
                raise UnknownNameError(f"method {name!r} has no option {key!r}; {known}")
        base = merged(method.defaults, {"options": dict(method.options)})
        base["augment"] = augmentation(method, table.get("data", cls.data))
        return read(cls, merged(moved(base, table.get("epochs")), table))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every default written out; `from_dict` is its inverse."""
        result: dict[str, Any] = plain(self)
        return result

    def replace(self, table: Mapping[str, Any]) -> TrainConfig:
        """A copy with the entries of `table`, tables merged; another data set brings its own augmentation."""
        if table.get("method", self.method) != self.method:
            raise ConfigurationError("replace() keeps the method; use from_dict for another one")
        base, name = self.to_dict(), table.get("data", self.data)
        if name != self.data:
            base["augment"] = augmentation(methods.METHODS[self.method], name)
        return read(TrainConfig, merged(base, table))

    def key(self) -> str:
        """The hash of everything in here."""
        return digest([MEANING, self.to_dict()])

    def refuse_weak_attack(self) -> None:
        """Refuse to train with an attack whose steps together do not reach the radius that it is trained for.

        Apart from the constructor, because results that were stored before this was refused must still be read.
        """
        attack = self.attack
        if attack.kind != "pgd" or attack.budget != "fixed":
            return
        reach = attack.steps * step_size(attack.step, self.radius)
        require(
            reach >= self.radius * (1 - 1e-9),
            f"attack: {attack.steps} steps of {attack.step} reach {reach:.4g}, not eps = {self.eps}; "
            'raise attack.steps, or attack.step (to "1/4 eps" for instance)',
        )

    @property
    def drops_last(self) -> bool:
        """Whether the short batch at an epoch's end is left out."""
        return self.compile if self.drop_last == AUTO else bool(self.drop_last)

    @property
    def radius(self) -> float:
        """Eps as a float."""
        return float(fraction(self.eps, "eps"))

    @property
    def label(self) -> str:
        """One line: method, network, activation, data, seed."""
        return f"{self.method} {self.network} {self.activation} {self.data} seed {self.seed}"


def augmentation(method: methods.Method, data: Any) -> dict[str, Any]:
    """What the method does to images, as far as the data set allows it."""
    known = AUGMENTATION.get(data, UNCHANGED) if isinstance(data, str) else UNCHANGED
    return merged(method.defaults.get("augment", {}), known)


def moved(table: Mapping[str, Any], epochs: Any) -> dict[str, Any]:
    """What `table` names by its epoch, for a training of `epochs`: AWP's first epoch, and the schedule's milestones.

    Each keeps its share of the table's own epochs. Values of a wrong type are left to be refused by name.
    """
    found, of = dict(table), table.get("epochs")
    if not (_counts(of) and _counts(epochs)) or of == epochs:
        return found
    awp, schedule = table.get("awp"), table.get("schedule")
    if isinstance(awp, Mapping) and _counts(awp.get("start")):
        found["awp"] = {**awp, "start": max(1, -(-awp["start"] * epochs // of))}
    if isinstance(schedule, Mapping):
        there = schedule.get("milestones")
        if isinstance(there, list | tuple) and all(isinstance(m, int | float) for m in there):
            found["schedule"] = {**schedule, "milestones": [_moved_milestone(m, of, epochs) for m in there]}
    return found


def _counts(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and value >= 1


def _moved_milestone(milestone: float, of: int, epochs: int) -> float:
    """Where a milestone lies then; one within the first epoch is written as a share, as below 1 it is read."""
    if milestone < 1:
        return milestone
    there = milestone * epochs / of
    return there if there >= 1 else milestone / of


def canonical_activation(spec: str) -> str:
    """One spelling per activation, so that "rct:curvature=7" and "rct:beta=1,alpha=14" share their key."""
    return activations.spec_of(activations.build(spec))


def normalisation(value: Any, data: str) -> Any:
    """(mean, std) for `networks.build`, from what a configuration says."""
    if value is None or value == "none":
        return None
    if value == STANDARD:
        if data not in STATISTICS:
            raise ConfigurationError(
                f"normalize = 'standard' is known for {', '.join(STATISTICS)}, not {data}; give [[means], [deviations]]"
            )
        return STATISTICS[data]
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ConfigurationError(f"normalize must be 'none', 'standard' or [[means], [deviations]], not {value!r}")
    return value


def load_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file, or one line that says what is wrong with it."""
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        text = read_bytes(path, budget=MAX_TOML).decode()
        if any(part.count(".") > MAX_DOTS for line in text.splitlines() for part in line.split(",")):
            raise RecursionError  # the parser's time grows with the square of a key's dots
        table: dict[str, Any] = toml.loads(text)
    except BadFileError as reason:
        raise ConfigurationError(f"{path}: {reason}") from None
    except RecursionError:
        raise ConfigurationError(f"{path}: nested too deeply") from None
    except ValueError as error:  # TOML's and Unicode's
        raise ConfigurationError(f"{path}: not valid TOML: {error}") from None
    level: list[Any] = [table]
    for _ in range(MAX_DEPTH):
        inner = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, (dict, list))]
        level = [part for parts in inner for part in parts]
    if level:  # dotted keys nest without the parser's recursion
        raise ConfigurationError(f"{path}: nested too deeply")
    return table
