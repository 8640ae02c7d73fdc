"""A run's whole configuration as plain values, and the hash that is its name.

Whatever could change a run's result is in the configuration, with defaults written out: two runs with the
same key are the same run, whichever sweep asks for them, and a sweep that shares runs with another finds
them done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from experiments.fields import digest
from hessdiag.errors import ConfigurationError

# What a record means. Raise it when the code that makes records changes what a number in them means: every
# key changes with it, so that old and new records never pass for one another.
RECORD_SCHEMA = "1"
OWN = "own"
TIERS = ("smoke", "quick", "campaign", "paper", OWN)  # sizes of a sweep, smallest first; sweeps of one's own

Plain = dict[str, Any]


def canonical(value: Any, *, where: str = "configuration") -> Any:
    """`value` with one spelling per meaning: 7.0 and 7 alike, tuples as lists, keys as text."""
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise ConfigurationError(f"{where}: {value} cannot be part of a configuration; use a finite number")
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, Mapping):
        return {str(key): canonical(value[key], where=f"{where}.{key}") for key in sorted(value, key=str)}
    if isinstance(value, (list, tuple)):
        return [canonical(item, where=where) for item in value]
    raise ConfigurationError(f"{where}: a {type(value).__name__} cannot be stored; use numbers, text, lists, tables")


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines one run: how it trains, how it is attacked, what is measured on it at the end and, if
    `along` is not empty, at chosen epochs. What records nothing on the way has the key it had before it could.
    """

    train: Plain
    attack: Plain = field(default_factory=dict)
    measure: Plain = field(default_factory=dict)
    schema: str = RECORD_SCHEMA
    along: Plain = field(default_factory=dict)

    def to_dict(self) -> Plain:
        """Plain values, canonical."""
        parts: Plain = {"schema": self.schema, "train": self.train, "attack": self.attack, "measure": self.measure}
        parts |= {"along": self.along} if self.along else {}
        plain: Plain = canonical(parts)
        return plain

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> RunConfig:
        """The inverse of `to_dict`."""
        train, attack, measure = (dict(value[name]) for name in ("train", "attack", "measure"))
        return cls(train, attack, measure, str(value["schema"]), dict(value.get("along", {})))

    @cached_property
    def key(self) -> str:
        """The run's name: a hash over all of it."""
        return digest(self.to_dict())

    @cached_property
    def family(self) -> str:
        """The hash of what the curves of one figure share: all but the activation, the seed and the images
        for AA and PGD.

        A curve over max|σ''| joins runs of one family only; anything else that differs is another experiment.
        """
        plain = self.to_dict()
        for name in ("activation", "seed"):
            plain["train"].pop(name, None)
        for name in ("aa_samples", "pgd_samples"):
            plain["attack"].pop(name, None)  # a further evaluation changes nothing in the others
        return digest(plain)

    @property
    def label(self) -> str:
        """One line for tables: method, network, activation, data, seed."""
        names = ("method", "network", "activation", "data", "seed")
        return " ".join(str(self.train[name]) for name in names if name in self.train)

    def replace(self, **sections: Mapping[str, Any]) -> RunConfig:
        """A copy in which each named section is updated by the given entries."""
        parts = {name: dict(getattr(self, name)) for name in ("train", "attack", "measure", "along")}
        for name, entries in sections.items():
            parts[name].update(entries)
        return RunConfig(**parts, schema=self.schema)
