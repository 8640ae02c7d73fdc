"""Finished runs as rows to draw and to correlate: which activation, which curve, which number."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.correlation.coefficients import Array
from experiments.sweep.export import Result, SweepResults
from experiments.sweep.grid import Sweep
from experiments.sweep.records import unlearned
from experiments.train import OVERFITTED
from hessdiag.activations import max_curvature
from hessdiag.errors import ConfigurationError

NORMS = ("norm", "invariant", "plugin")


@dataclass(frozen=True)
class Row:
    """One run, with what places it in a figure; `curvature` is max|σ''|, infinite at a kink."""

    key: str
    activation: str
    beta: int | None
    alpha: float | None
    curvature: float
    method: str
    network: str
    data: str
    seed: int
    variant: str
    family: str
    result: Result

    @property
    def record(self) -> dict[str, Any]:
        """What the run recorded."""
        return self.result.record

    @property
    def configuration(self) -> tuple[str, str, str]:
        """What runs share that differ by their seed only."""
        return self.family, self.activation, self.variant

    @property
    def learned(self) -> bool:
        """Whether the network answers better than chance."""
        return not unlearned(self.record, str(self.result.config.train["data"]))

    @property
    def collapsed(self) -> bool:
        """Whether training was stopped by catastrophic overfitting."""
        return (self.record.get("train") or {}).get("status") == OVERFITTED

    def _table(self, name: str) -> Any:
        """What the record holds of an accuracy or a norm: the number and its interval."""
        kind, _, place = name.partition(" ")
        if kind in ("aa2", "aa", "clean"):
            return self.record.get("clean_accuracy" if kind == "clean" else kind)
        norm = (self.record.get("norms") or {}).get(place) or {}
        return norm if kind == "norm" else norm.get(kind)

    def value(self, name: str) -> float:
        """A number by its name, NaN where the run has none.

        "aa2", "aa", "clean" (shares); "kept" (of the images that AA-2 attacked and that are right without it, the share
        that stays right); "norm test/clean" and "invariant ...", "plugin ...", "gauss_newton ...", "functional ..."
        (rms); "cosine ..." (of the angle between the diagonals of these two parts);
        "effective" (geometric mean over layers of |gamma| max|σ''|);
        "seconds" (of the whole run); "train_seconds" (of the epochs alone: the first run of a process also
        pays for imports); "peak_memory", "saved_bytes"; "residual" (half of the share of adversarial training
        images that are misclassified, a lower bound of the mean |f - y| of the true class; over the first two thirds
        of the epochs, or of the last epoch where the record has no others); "fitted" (accuracy on the adversarial
        training images of the last epoch). "low aa2", "high norm test/clean" and the like: the ends of its 95%
        interval (Wilson's over the test images; the measurement's), where it has one.
        """
        for end in ("low", "high"):
            if name.startswith(f"{end} "):
                return _number(self._table(name.removeprefix(f"{end} ")), end)
        kind = name.partition(" ")[0]
        if kind in ("aa2", "aa", "clean"):
            return _number(self._table(name), "value")
        if kind == "kept":
            right = _number(self.record.get("aa2"), "clean")
            return self.value("aa2") / right if right else math.nan
        if kind == "effective":
            means = [layer["mean"] for layer in self.record.get("effective_curvature") or () if layer.get("mean")]
            return math.exp(sum(map(math.log, means)) / len(means)) if means else math.nan
        if kind == "seconds":
            return self.result.seconds
        if kind == "train_seconds":
            return _number(self.record.get("train"), "train_seconds")
        if kind == "residual":
            train = self.record.get("train") or {}
            told = [float(v) for v in (train.get("history") or {}).get("train_adversarial") or () if v is not None]
            early = told[: max(1, 2 * len(told) // 3)] or [_number(train.get("last_epoch"), "train_adversarial")]
            return (1 - math.fsum(early) / len(early)) / 2
        if kind == "fitted":
            return _number((self.record.get("train") or {}).get("last_epoch"), "train_adversarial")
        if kind in ("peak_memory", "saved_bytes"):
            return _number(self.record.get("cost"), kind)
        if kind == "cosine":
            return _number(self._table(name), "value")
        if kind in ("norm", "invariant", "plugin", "gauss_newton", "functional"):
            return _number(self._table(name), "rms")
        raise ConfigurationError(f"a run records no {name!r}")


def _number(table: Any, name: str) -> float:
    value = table.get(name) if isinstance(table, dict) else None
    return math.nan if value is None else float(value)


def rows(results: SweepResults) -> list[Row]:
    """The runs of one sweep as rows, in its order."""
    return [_row(run) for run in results.runs]


def learned(chosen: Iterable[Row]) -> list[Row]:
    """The runs whose networks answer better than chance: one that does not is no point of a curve."""
    return [row for row in chosen if row.learned]


def planned(sweep: Sweep) -> list[Row]:
    """The runs of a sweep that has not run, as rows without numbers."""
    runs = []
    for run in sweep.runs:
        about = {"max_curvature": max_curvature(run.train["activation"])}
        runs.append(Result(run.key, run, sweep.variants[run.key], math.nan, about))
    return rows(SweepResults(sweep.name, sweep.figure, sweep.tier, sweep.title, 0, tuple(runs)))


def _row(run: Result) -> Row:
    train = run.config.train
    name, _, text = str(train["activation"]).partition(":")
    options = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    rct = name == "rct"
    curvature = run.record.get("max_curvature")
    sizes = ",".join(f"{k}={v}" for k, v in sorted((train.get("network_options") or {}).items()))
    samples = train.get("train_samples")
    return Row(
        key=run.key,
        activation=str(train["activation"]),
        beta=int(options["beta"]) if rct else None,
        alpha=float(options["alpha"]) if rct else None,
        curvature=math.inf if curvature in (None, "inf") else float(curvature),
        method=str(train["method"]),
        network=str(train["network"]) + (f" ({sizes})" if sizes else ""),
        data=str(train["data"]) + (f" ({samples} images)" if samples else ""),
        seed=int(train["seed"]),
        variant=run.variant,
        family=run.config.family,
        result=run,
    )


def column(chosen: Sequence[Row], name: str) -> Array:
    """One number of every row."""
    return np.array([row.value(name) for row in chosen])


def quantity(chosen: Sequence[Row], name: str) -> Array:
    """A number of every row; "log ..." takes its natural logarithm."""
    if name.startswith("log "):
        with np.errstate(invalid="ignore", divide="ignore"):
            values: Array = np.log(column(chosen, name.removeprefix("log ")))
        return values
    return column(chosen, name)


def curvatures(chosen: Sequence[Row]) -> Array:
    """max|σ''| of every row."""
    return np.array([row.curvature for row in chosen])


def split(chosen: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the given attributes, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in chosen:
        groups.setdefault(tuple(getattr(row, name) for name in names), []).append(row)
    return groups


def one_family(chosen: Sequence[Row], where: str) -> None:
    """Refuse to join runs of different experiments in one curve, and name what differs."""
    families = {row.family: row for row in chosen}
    if len(families) < 2:
        return
    first, second = list(families.values())[:2]
    a, b = (row.result.config.to_dict() for row in (first, second))
    differing = [
        f"{part}.{name}: {json.dumps(a[part].get(name))} and {json.dumps(b[part].get(name))}"
        for part in ("train", "attack", "measure", "along")
        for name in sorted({*a.get(part, {}), *b.get(part, {})})
        if name not in ("activation", "seed", "aa_samples", "pgd_samples")
        and a.get(part, {}).get(name) != b.get(part, {}).get(name)
    ]
    raise ConfigurationError(
        f"{where}: runs of different configurations would mix in one curve ({'; '.join(differing) or 'schema'}); "
        "run and export the sweep again with one configuration"
    )
