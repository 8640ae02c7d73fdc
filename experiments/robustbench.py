"""A result in the shape of RobustBench's leaderboard files (arXiv 2010.09670): accuracies as percent strings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hessdiag.errors import ConfigurationError

ARCHITECTURES = {
    "resnet18": "ResNet-18",
    "preact_resnet18": "PreActResNet-18",
    "wrn28_10": "WideResNet-28-10",
}
FULL = 10_000


def entry(evaluation: Mapping[str, Any], training: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of one model, from an evaluation that includes AutoAttack; `training` is its configuration.

    Link and authors are for its owner to fill in. An evaluation on other than the 10,000 test images says so in the
    footnote.
    """
    if "aa" not in evaluation:
        raise ConfigurationError("a RobustBench entry needs AutoAttack: evaluate with attack 'aa' first")
    attack = evaluation["aa"]
    samples = int(attack["samples"])
    network = str(training.get("network", "unknown"))
    notes = [f"activation {training.get('activation')}", f"seed {training.get('seed')}"]
    if samples != FULL:
        notes.append(f"AutoAttack on {samples} test images only")
    notes += [str(warning) for warning in attack["warnings"]]
    return {
        "link": "",
        "name": f"{training.get('method', 'unknown')}, {ARCHITECTURES.get(network, network)}",
        "authors": "",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": str(evaluation["data"]["name"]),
        "venue": "unpublished",
        "architecture": ARCHITECTURES.get(network, network),
        "eps": str(evaluation["eps"]),
        "clean_acc": percent(float(evaluation["clean"])),
        "reported": percent(float(attack["robust_accuracy"])),
        "autoattack_acc": percent(float(attack["robust_accuracy"])),
        "unreliable": bool(attack["warnings"]),
        "footnote": "; ".join(notes),
    }


def percent(share: float) -> str:
    """0.5279 -> "52.79"."""
    return f"{100 * share:.2f}"
