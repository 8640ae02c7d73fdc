"""What a sweep keeps of a result: shares of test images and estimates of norms as plain values, with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from experiments.chance import UNLEARNED, better_than_guessing

Record = dict[str, Any]
HISTORY = ("loss", "train_clean", "train_adversarial", "clean", "fgsm", "pgd")  # of an epoch, as training tells them
NORMAL = 1.959963984540054  # standard deviations of a normal law on either side of its middle 95%
CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100}


def proportion(count: int, number: int) -> Record:
    """A share with Wilson's 95% interval: the luck of the test images, not of the seed."""
    share, z = count / number, NORMAL
    centre = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = z / (1 + z * z / number) * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    return {
        "value": share,
        "low": max(0.0, centre - half),
        "high": min(1.0, centre + half),
        "samples": number,
    }


def outcomes(robust: Tensor) -> str:
    """Image by image, in the order of the sample, whether the network withstood: bits, eight to two hexadecimal digits.

    `withstood` reads them back.
    """
    return np.packbits(robust.cpu().numpy()).tobytes().hex()


def withstood(share: Mapping[str, Any]) -> npt.NDArray[np.float64] | None:
    """1 or 0 for each image of a recorded share; None where it does not keep them."""
    if not share.get("outcomes"):
        return None
    bits = np.frombuffer(bytes.fromhex(share["outcomes"]), np.uint8)
    return np.unpackbits(bits, count=int(share["samples"])).astype(float)


def history_record(epochs: Sequence[Mapping[str, Any]]) -> Record:
    """How training went: for each number that it tells, the list of its values over the epochs, four digits each."""
    told = [name for name in HISTORY if any(row.get(name) is not None for row in epochs)]
    return {name: [_short(row.get(name)) for row in epochs] for name in told}


def _short(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def unlearned(record: Mapping[str, Any], data: str) -> bool:
    """Whether a run's network answers no better than chance.

    The run says so itself; one from before it did is judged by its clean accuracy alone.
    """
    train = record.get("train")
    if not isinstance(train, Mapping):
        return False
    clean = record.get("clean_accuracy")
    if train.get("status") == UNLEARNED:
        return True
    if "clean_loss" in train or data not in CLASSES or not isinstance(clean, Mapping) or not clean.get("samples"):
        return False
    number = int(clean["samples"])
    return not better_than_guessing(round(clean["value"] * number), number, 1 / CLASSES[data])


def reason(record: Mapping[str, Any]) -> str:
    """Why its training is not simply finished, in the run's own words."""
    return str((record.get("train") or {}).get("reason") or "did not learn")


def norm_record(found: Any) -> Record:
    """What a sweep keeps of one measurement."""
    return {
        **(slim(found.norm.total) or {}),
        "mean_scaled": found.mean_scaled,
        "gauss_newton": slim(found.norm.gauss_newton),
        "functional": slim(found.norm.functional),
        "share_gauss_newton": ratio(found.norm.share_gauss_newton),
        "share_functional": ratio(found.norm.share_functional),
        "cosine": ratio(found.norm.cosine),
        "invariant": slim(found.invariant),
        "groups": {name: slim(part.total) for name, part in found.groups.items()},
        "invariant_groups": {name: slim(part) for name, part in found.invariant_groups.items()},
        "layers": {name: slim(part.total) for name, part in found.layers.items()},
        "trace": vars_of(found.trace),
        "loss": found.loss,
        "status": found.status,
        "method": found.plan.method,
        "replicates": found.replicates,
        "samples": found.samples,
        "audited": found.audit is not None,
    }


def slim(estimate: Any) -> Record | None:
    """The rms norm with its interval."""
    if estimate is None:
        return None
    return {"rms": estimate.rms, "low": estimate.low, "high": estimate.high, "entries": estimate.entries}


def ratio(share: Any) -> Record | None:
    """A share of the squared norm, or the cosine of the angle between its parts, with its interval."""
    return None if share is None else vars_of(share)


def vars_of(value: Any) -> Record:
    """The plain fields of a small frozen dataclass."""
    return {name: item for name, item in vars(value).items() if isinstance(item, (int, float, str, bool, type(None)))}
