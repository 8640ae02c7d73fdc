"""Attack what a checkpoint or a run's directory holds, and put the outcome beside it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import robustbench
from experiments.attacks.result import Progress
from experiments.evaluate import Request, evaluate
from experiments.folder import Folder
from experiments.trained import load_trained
from experiments.trainer.rig import pick_device
from hessdiag import data
from hessdiag.errors import ConfigurationError


def run_attacks(
    checkpoint: Path,
    attacks: Sequence[str],
    *,
    eps: str | None = None,
    name: str | None = None,
    device: str | None = None,
    root: Path | None = None,
    seed: int = 0,
    samples_seed: int = 0,
    batch_size: int = 250,
    weights: str | None = None,
    out: Path | None = None,
    quiet: bool = False,
    given: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The evaluation's record; a run's directory gains it in result.json and, with AutoAttack, robustbench.json."""
    requests = [Request.parse(text) for text in attacks]
    trained = load_trained(checkpoint, weights=weights, **(given or {}))
    data_name, radius = name or trained.training.get("data"), eps or trained.training.get("eps")
    if data_name is None or radius is None:
        lacking = "--data" if data_name is None else "--eps"
        raise ConfigurationError(f"{trained.path}: does not say what it was trained on; give {lacking}")
    test = data.load(str(data_name), split="test", root=root)
    folder = Folder(out or trained.path.parent)
    record = evaluate(
        trained.model.to(pick_device(device)),
        test,
        eps=str(radius),
        attacks=requests,
        seed=seed,
        samples_seed=samples_seed,
        batch_size=batch_size,
        directory=folder.path / "attacks",
        progress=None if quiet else _progress,
    ).to_dict()
    record |= {"checkpoint": trained.path.name, "sha256": trained.sha256, "weights": trained.weights}
    before = folder.read_json("result.json") or {}
    kept = before.get("evaluation", {})
    same = all(kept.get(key) == record[key] for key in ("eps", "seed", "samples_seed", "sha256", "weights"))
    before["evaluation"] = {**(kept if same else {}), **record}
    folder.write_json("result.json", before)
    if "aa" in before["evaluation"]:
        folder.write_json("robustbench.json", robustbench.entry(before["evaluation"], trained.training))
    return record


def _progress(name: str) -> Progress:
    def report(attack: str, done: int, total: int, robust: int) -> None:
        end = "\n" if done >= total else "\r"
        line = f"{name}: {attack} {done}/{total} images, {robust} robust"
        print(line, file=sys.stderr, end=end if sys.stderr.isatty() else "\n", flush=True)

    return report
