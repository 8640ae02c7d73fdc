"""What deleting a weight costs: the change of the loss predicted by several diagonals beside the change that came.

Setting one weight theta_k to 0 changes the loss by -g_k theta_k + h_k theta_k^2 / 2 to second order, with g the
gradient and h the diagonal of the Hessian. For h stand, on the same images: Hutchinson's estimate, Adam's second moment
(its average of squared gradients of batches, times the batch, which makes it a Fisher of the last steps), the Fisher
(mean of squared gradients of single samples), the Gauss-Newton diagonal and the exact one; "gradient alone" has h = 0.
The change that came is the loss in float64 with that weight at 0, for weights drawn at random, one at a time. Agreement
is Spearman's rank correlation, early and late in training with Adam, for every seed.

The other half: many weights deleted at once, lowest score first, with the prediction, its absolute value, its quadratic
part or the magnitude as the score, and the accuracy that is left on test images.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from scipy import stats
from torch import Tensor, nn

import hessdiag as hd
from benchmarks.common import RESULTS, digits, store
from hessdiag import networks
from hessdiag.show import plot

Points = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    nets: tuple[str, ...] = ("mlp", "small_resnet")
    activation: str = "silu"
    early: int = 20
    late: int = 400
    batch: int = 64
    lr: float = 3e-3
    samples: int = 128
    probes: int = 20
    weights: int = 300
    seeds: int = 3
    shares: tuple[float, ...] = (0.25, 0.5, 0.75)


SETTINGS = Settings()
OPTIONS: dict[str, dict[str, Any]] = {"mlp": {"in_features": 64, "widths": (32, 32)}, "small_resnet": {}}
DIAGONALS = ("Hutchinson", "Adam's second moment", "Fisher", "Gauss-Newton", "exact")
ACTUAL, GRADIENT = "actual", "gradient alone"
SHOWN = "small_resnet"


def trained(name: str, settings: Settings, seed: int) -> dict[str, tuple[nn.Module, Points]]:
    """The net in float64 and Adam's second moment, corrected for its start, times the batch: early and late."""
    model = networks.build(name, activation=settings.activation, seed=seed, **OPTIONS[name])
    inputs, targets = digits(1297)
    optimiser = torch.optim.Adam(model.parameters(), lr=settings.lr)
    decay = optimiser.defaults["betas"][1]
    generator = torch.Generator().manual_seed(seed)
    kept: dict[str, tuple[nn.Module, Points]] = {}
    model.train()
    for step in range(1, settings.late + 1):
        chosen = torch.randint(len(inputs), (settings.batch,), generator=generator)
        optimiser.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen]))
        optimiser.step()
        if step in (settings.early, settings.late):
            copy = networks.build(name, activation=settings.activation, seed=seed, **OPTIONS[name])
            copy.load_state_dict(model.state_dict())
            moment = {
                n: settings.batch * optimiser.state[p]["exp_avg_sq"].double() / (1.0 - decay**step)
                for n, p in model.named_parameters()
            }
            kept["early" if step == settings.early else "late"] = (copy.double().eval(), moment)
    return kept


def fisher(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Points, Points]:
    """The gradient of the mean loss, and the mean of the squared gradients of single samples."""
    named = dict(model.named_parameters())
    first = {n: torch.zeros_like(p) for n, p in named.items()}
    second = {n: torch.zeros_like(p) for n, p in named.items()}
    for i in range(len(x)):
        found = torch.autograd.grad(
            nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(named.values())
        )
        for n, g in zip(named, found):
            first[n] += g / len(x)
            second[n] += g.square() / len(x)
    return first, second


def flat(parts: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """The named tensors in a row."""
    return torch.cat([parts[n].detach().double().flatten() for n in names])


def predictions(model: nn.Module, moment: Points, settings: Settings, seed: int) -> tuple[list[str], Points, Points]:
    """Names of the weights; by diagonal -g theta + h theta^2 / 2 of every weight; and its quadratic part alone."""
    x, y = digits(settings.samples)
    x = x.double()
    names = [n for n, p in model.named_parameters() if p.ndim > 1]
    theta = flat(dict(model.named_parameters()), names)
    gradient, squared = fisher(model, x, y)
    objective = hd.Objective(model, loss="cross_entropy")
    batches = [(x, y)]
    exact = hd.diagonal(objective, batches, method="exact")
    noisy = hd.diagonal(
        objective,
        batches,
        method="hutchinson",
        replicates=settings.probes,
        seed=seed,
        audit_model=False,  # the line above has just done it
        deterministic_check=False,
    )
    found = (noisy.total, moment, squared, exact.gauss_newton, exact.total)
    quadratic = {name: flat(h, names) * theta.square() / 2 for name, h in zip(DIAGONALS, found)}
    linear = -flat(gradient, names) * theta
    return names, {GRADIENT: linear, **{name: linear + q for name, q in quadratic.items()}}, quadratic


@torch.no_grad()
def deleted(model: nn.Module, names: Sequence[str], chosen: Tensor, settings: Settings) -> Tensor:
    """The change of the loss with each of the chosen weights at 0, one at a time."""
    x, y = digits(settings.samples)
    x = x.double()
    views = [dict(model.named_parameters())[n].detach().view(-1) for n in names]
    before = float(nn.functional.cross_entropy(model(x), y))
    changes = []
    for place in chosen.tolist():
        view = views[0]
        for view in views:
            if place < len(view):
                break
            place -= len(view)
        kept = view[place].clone()
        view[place] = 0.0
        changes.append(float(nn.functional.cross_entropy(model(x), y)) - before)
        view[place] = kept
    return torch.tensor(changes, dtype=torch.float64)


@torch.no_grad()
def pruned(model: nn.Module, names: Sequence[str], score: Tensor, settings: Settings) -> dict[str, float]:
    """Test accuracy with the given shares of weights, lowest score first, at 0."""
    x, y = digits(500, split="test")
    x = x.double()
    parameters = dict(model.named_parameters())
    kept = {n: parameters[n].clone() for n in names}
    order, left = score.argsort(stable=True), {}
    for share in settings.shares:
        mask = torch.ones(len(score), dtype=torch.bool)
        mask[order[: round(share * len(score))]] = False
        for n, part in zip(names, mask.split([kept[n].numel() for n in names])):
            parameters[n].copy_(kept[n] * part.view_as(kept[n]))
        left[f"{share:.0%}"] = float((model(x).argmax(1) == y).double().mean())
    for n in names:
        parameters[n].copy_(kept[n])
    return left


def one_stage(model: nn.Module, moment: Points, settings: Settings, seed: int) -> tuple[dict[str, Any], Points]:
    """Rank correlations, what pruning leaves, and the points themselves."""
    names, predicted, quadratic = predictions(model, moment, settings, seed)
    theta = flat(dict(model.named_parameters()), names)
    # A pixel that is never lit has weights without any effect: ties that every method would get right.
    live = (predicted["exact"] != 0).nonzero().flatten()
    order = torch.randperm(len(live), generator=torch.Generator().manual_seed(seed))
    chosen = live[order[: settings.weights]]
    points = {ACTUAL: deleted(model, names, chosen, settings), **{n: p[chosen] for n, p in predicted.items()}}
    scores = {
        "magnitude": theta.abs(),
        "exact, signed": predicted["exact"],
        "exact, absolute": predicted["exact"].abs(),
        "exact, quadratic part": quadratic["exact"],
        "Gauss-Newton, quadratic part": quadratic["Gauss-Newton"],
        "Fisher, quadratic part": quadratic["Fisher"],
        "Adam's second moment, quadratic part": quadratic["Adam's second moment"],
    }
    x, y = digits(settings.samples)
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(model(x.double()), y))
    row = {
        "loss": loss,
        "weights": len(theta),
        "live": len(live),
        "correlation": {n: float(stats.spearmanr(points[n], points[ACTUAL])[0]) for n in predicted},
        "accuracy": {"none": pruned(model, names, theta.abs(), replace(settings, shares=(0.0,)))["0%"]},
        "pruned": {n: pruned(model, names, s, settings) for n, s in scores.items()},
    }
    return row, points


def over_seeds(rows: Sequence[Any]) -> Any:
    """Every number of the rows as its mean with the lowest and the highest seed."""
    if isinstance(rows[0], dict):
        return {key: over_seeds([row[key] for row in rows]) for key in rows[0]}
    return {"value": sum(rows) / len(rows), "low": min(rows), "high": max(rows)}


def run(settings: Settings, seeds: Sequence[int]) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Points]]:
    """All nets and stages, a row for each seed; the points are those of the first."""
    rows: dict[str, list[dict[str, Any]]] = {}
    shown: dict[str, Points] = {}
    for name in settings.nets:
        for seed in seeds:
            for stage, (model, moment) in trained(name, settings, seed).items():
                row, points = one_stage(model, moment, settings, seed)
                rows.setdefault(f"{name}, {stage}", []).append(row)
                shown.setdefault(f"{name}, {stage}", points)
                told = ", ".join(f"{n} {value:.3f}" for n, value in row["correlation"].items())
                print(f"{name}, {stage}, seed {seed}: loss {row['loss']:.3g}; rank correlation: {told}", flush=True)
    return rows, shown


def picture(found: Mapping[str, Any], shown: Mapping[str, Points], settings: Settings) -> plot.Figure:
    """Predicted against actual change: a column per diagonal, early above late; points of seed 0, numbers of all."""
    stages = {"early": settings.early, "late": settings.late}
    with rc_context(plot.STYLE):
        figure = plot.Figure(figsize=(11.0, 4.9))
        for row, axes in zip(stages.items(), figure.subplots(2, len(DIAGONALS), sharex="row", sharey="row")):
            stage, steps = row
            points = {n: p.numpy() for n, p in shown[f"{SHOWN}, {stage}"].items()}
            actual = points[ACTUAL]
            most = 1.5 * max(abs(actual).max(), abs(points["exact"]).max())
            small = most / 1e4
            for name, axis in zip(DIAGONALS, axes):
                axis.axhline(0, color="#c4c9d2", linewidth=0.8)
                axis.axvline(0, color="#c4c9d2", linewidth=0.8)
                axis.plot([-most, most], [-most, most], color=plot.INNER, linewidth=0.9)
                axis.plot(
                    actual,
                    points[name].clip(-most, most),
                    "o",
                    color=plot.TOTAL,
                    markersize=2.2,
                    alpha=0.35,
                    markeredgewidth=0,
                    rasterized=True,
                )
                for scale, limits in ((axis.set_xscale, axis.set_xlim), (axis.set_yscale, axis.set_ylim)):
                    scale("symlog", linthresh=small)
                    limits(-1.15 * most, 1.15 * most)
                ticks = [-(10.0 ** _decade(most)), -(10.0 ** _decade(30 * small)), 0.0]
                ticks += [-t for t in reversed(ticks[:2])]
                axis.set_xticks(ticks)
                axis.set_yticks(ticks)
                axis.minorticks_off()
                axis.tick_params(labelsize=7)
                m = found[f"{SHOWN}, {stage}"]["correlation"][name]
                head = f"{name}\n" if stage == "early" else ""
                axis.set_title(f"{head}{m['value']:.3f} [{m['low']:.3f}, {m['high']:.3f}]", fontsize=9)
            axes[0].set_ylabel(f"{stage} ({steps} steps)\npredicted")
        for axis in axes:
            axis.set_xlabel("actual change of the loss", fontsize=8)
        return figure


def _decade(x: float) -> int:
    """The power of ten at or below x."""
    return int(f"{x:e}".partition("e")[2])


def main() -> None:
    """Measure, store, draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deletion", description=__doc__)
    parser.add_argument("--seeds", type=int, default=SETTINGS.seeds)
    parser.add_argument("--weights", type=int, default=SETTINGS.weights, help="how many are deleted, one at a time")
    parser.add_argument("--late", type=int, default=SETTINGS.late, help="steps of training")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of deletion.json and deletion.svg")
    given = parser.parse_args()
    settings = replace(SETTINGS, seeds=given.seeds, weights=given.weights, late=given.late)
    torch.set_num_threads(1)
    rows, shown = run(settings, range(settings.seeds))
    found = {name: over_seeds(each) for name, each in rows.items()}
    store("deletion", settings, found, folder=given.out)
    plot.save(picture(found, shown, settings), given.out / "deletion.svg")


if __name__ == "__main__":
    main()
