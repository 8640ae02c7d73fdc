"""Accuracy of a network on clean and on attacked test images, as one record.

evaluate(model, data.load("digits", split="test"), eps="0.15", attacks=["aa2:300", "aa:50"])
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.attacks.evaluate import ATTACKS
from experiments.attacks.evaluate import evaluate as attacked
from experiments.attacks.result import AttackResult, Progress
from experiments.provenance import provenance
from hessdiag.data.dataset import DataSet
from hessdiag.errors import ConfigurationError, UnknownNameError, nearest
from hessdiag.problem.ascent import handed_back


@dataclass(frozen=True)
class Request:
    """One attack and on how many test images; None is all of them."""

    attack: str
    samples: int | None = None

    @property
    def name(self) -> str:
        """What the attack is called in a record: "aa", "aa2", "pgd"."""
        return self.attack.partition(":")[0]

    @classmethod
    def parse(cls, text: str) -> Request:
        """Read "aa2", "aa2:300", "pgd:500", or "pgd:eps=8/255,steps=20" (all images)."""
        name, _, rest = (part.strip() for part in text.strip().partition(":"))
        if name not in ATTACKS:
            raise UnknownNameError(f"unknown attack {name!r}; {nearest(name, list(ATTACKS))}")
        if not rest:
            return cls(name)
        if rest.isdigit():
            if int(rest) < 1:
                raise ConfigurationError(f"attack {text!r}: at least one image")
            return cls(name, int(rest))
        if name == "pgd" and "=" in rest:
            return cls(text.strip())
        raise ConfigurationError(f"attack {text!r}: write {name}, or {name}:300 for 300 images")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What came out; `results` by attack."""

    eps: str
    seed: int
    samples_seed: int
    clean_accuracy: float
    test_samples: int
    results: Mapping[str, AttackResult]
    data: Mapping[str, Any]
    provenance: Mapping[str, Any]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values: for each attack its accuracy, samples, settings, warnings and checks."""
        return {
            "eps": self.eps,
            "seed": self.seed,
            "samples_seed": self.samples_seed,
            "clean": self.clean_accuracy,
            "clean_samples": self.test_samples,
            **{name: result.to_dict() for name, result in self.results.items()},
            "data": dict(self.data),
            "provenance": dict(self.provenance),
            "seconds": self.seconds,
        }


def evaluate(
    model: nn.Module,
    test: DataSet,
    *,
    eps: str,
    attacks: Sequence[str | Request] = ("aa2",),
    seed: int = 0,
    samples_seed: int = 0,
    batch_size: int = 250,
    directory: Path | str | None = None,
    progress: Callable[[str], Progress] | None = None,
) -> Evaluation:
    """Clean accuracy on all test images, and each attack on as many as asked for, chosen with `samples_seed`.

    directory: where AutoAttack keeps its standing, to go on from after a kill. Pixels must lie in [0, 1].
    """
    began = time.perf_counter()
    if test.num_classes is None:
        raise ConfigurationError(f"{test.name}: an evaluation needs class labels")
    requests = [item if isinstance(item, Request) else Request.parse(item) for item in attacks]
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    clean = 0
    with torch.no_grad(), handed_back(model):
        for x, y in test.batches(batch_size, device=device, dtype=dtype):
            logits = model(x)
            if logits.shape[1] != test.num_classes:
                raise ConfigurationError(
                    f"the network has {logits.shape[1]} classes, {test.name} has {test.num_classes}: "
                    "evaluate it on the data it was trained for"
                )
            clean += int(logits.argmax(1).eq(y).sum())
    results: dict[str, AttackResult] = {}
    for request in requests:
        count = None if request.samples is None else min(request.samples, len(test))
        chosen = test.sample(count, seed=samples_seed)
        ((x, y),) = chosen.batches(len(chosen), dtype=dtype)
        results[request.name] = attacked(
            model,
            x,
            y,
            attack=request.attack,
            eps=eps,
            seed=seed,
            batch_size=batch_size,
            directory=None if directory is None else Path(directory) / request.name,
            progress=None if progress is None else progress(request.name),
        )
    return Evaluation(
        eps=eps,
        seed=seed,
        samples_seed=samples_seed,
        clean_accuracy=clean / len(test),
        test_samples=len(test),
        results=results,
        data={"name": test.name, "split": test.split, "sha256": test.sha256, "notes": list(test.notes)},
        provenance=provenance(device),
        seconds=time.perf_counter() - began,
    )
