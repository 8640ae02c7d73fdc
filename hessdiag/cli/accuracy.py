"""Whether a network still does, on these data, what its checkpoint says it does.

A norm can be exact and of nothing: labels shifted by one, channels in another order, inputs not normalised. The
accuracy shows it. It is compared with chance and with the checkpoint's own, within what so few samples can tell.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hessdiag.data import DataSet, NamedDataSet

SURE = 4.0
"""Standard errors beyond which a difference is told."""
SLACK = 0.02
"""A difference below this is not told, however many samples show it."""
HELD_OUT = {"test", "val", "valid", "validation", "eval"}
ATTACKED = {"robust", "adv", "adversarial", "attack", "attacked", "pgd", "fgsm", "apgd", "aa", "autoattack"}
"""Words of an accuracy under attack, which is lower by design."""
OTHER = {"top5", "5", "epoch", "step", "steps", "iter", "at", "std", "err", "error", "loss"}
"""Words of what is no accuracy of the first answer: of the first five, or where, when or how surely there was one."""


@dataclass(frozen=True)
class Counted:
    """Targets that are classes, by class, and how many of them the outputs name: samples, or tokens, or pixels."""

    right: int
    classes: Tensor

    @property
    def total(self) -> int:
        """All of them that count."""
        return int(self.classes.sum())

    @property
    def share(self) -> float:
        """The accuracy."""
        return self.right / self.total


def judged(found: Counted, data: DataSet | NamedDataSet, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The accuracy, chance, the checkpoint's own, and whether one or the other is out of line."""
    count, accuracy = found.total, found.share
    chance = int(found.classes.max()) / count  # always answering with the commonest class
    name, own = _own(metrics, data.split)
    return {
        "value": accuracy,
        "samples": count,
        "unit": "sample" if data.targets.ndim == 1 else "target",
        "classes": data.num_classes or len(found.classes),
        "chance": chance,
        "no_better_than_chance": accuracy <= chance + 2.0 * _error(chance, count),
        "own": own,
        "own_name": name,
        "below_own": own is not None and own - accuracy > max(SURE * _error(own, count), SLACK),
    }


def _error(share: float, count: int) -> float:
    """Standard error of a share among so many samples, not zero at 0 and 1."""
    return math.sqrt((share * (1.0 - share) + 0.25 / count) / count)


def _own(metrics: Mapping[str, Any], split: str) -> tuple[str | None, float | None]:
    """The accuracy that the checkpoint reports for this split, in [0, 1]."""
    names = {name: words for name in metrics if _plain(words := _words(name))}
    wanted = {"train"} if split == "train" else HELD_OUT
    order = [name for name, words in names.items() if words & wanted]  # files without a split are seldom training sets
    order += [name for name, words in names.items() if not words & {"train", *HELD_OUT}]
    for name in order:
        value = metrics[name]
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value <= 100.0:
            return name, float(value) / (100.0 if value > 1.0 else 1.0)
    return None, None


def _words(name: str) -> set[str]:
    """Of a name with points, lines, blanks or capitals between them; "acc1", "Acc@1" and "testacc" hold two."""
    apart = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)
    found = re.findall(r"top\d+|[a-z]+|\d+", apart.lower())
    return {part for word in found for part in re.sub(r"^(train|test|val)(acc)", r"\1 \2", word).split()}


def _plain(words: set[str]) -> bool:
    """Whether a name of these words is that of an accuracy on clean data."""
    return bool(words & {"acc", "accuracy", "top1"}) and not words & (ATTACKED | OTHER)
