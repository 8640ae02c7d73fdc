"""One function, many norms: α as a change of coordinates on the engine's networks, and a norm 100 times larger."""

from __future__ import annotations

import torch

from theory import rescaling
from validation.bridge import deviation, engine_diagonal, vector
from validation.coordinates import (
    KINDS,
    Steps,
    batch,
    build,
    counterpart,
    rescaled_groups,
    rule_of,
    state_gap,
    trajectory,
)
from validation.evidence import Finding, measured
from validation.register import Run
from validation.studies.base import Study, study

RATIO = 100.0
FACTOR = 8.0  # a power of two: no rounding for the BatchNorms of a deep net in training to amplify


@study("rescaling")
def run(options: Run) -> Study:
    """For each architecture: equality, trajectory, diagonal, invariants; and the worked example."""
    rows = []
    findings: list[Finding] = []
    kinds = ("mlp", "small_resnet") if options.quick else KINDS
    for kind in kinds:
        alpha, beta = 14.0, 1
        model = build(kind, alpha, beta)
        x, y = batch(kind, 4)
        rule = rule_of(kind, model)
        diagonal = dict(engine_diagonal(model, x, y, "cross_entropy").total)
        factor = rescaling.factor_for_norm(diagonal, rule, RATIO)
        twin = counterpart(kind, model, alpha, alpha / factor, beta)
        with torch.no_grad():
            function = deviation(twin(x), model(x))
        other = dict(engine_diagonal(twin, x, y, "cross_entropy").total)
        predicted = rescaling.rescale_diagonal(diagonal, rule, factor)
        entries = max(deviation(other[n].double(), predicted[n].double()) for n in diagonal)
        ratio = rescaling.root_mean_square(other) / rescaling.root_mean_square(diagonal)
        one = rescaling.invariant_entries(diagonal, dict(model.named_parameters()))
        two = rescaling.invariant_entries(other, dict(twin.named_parameters()))
        invariant = deviation(vector(two), vector(one))
        path = _trajectory_gap(kind, alpha, beta)
        rows.append((kind, alpha, alpha / factor, ratio, function, entries, invariant, path))
        findings += [
            measured(f"{kind}: same function", function, at_most=1e-9, label="deviation"),
            measured(f"{kind}: E[8] is 100 times as large", abs(ratio / RATIO - 1), at_most=1e-6, label="deviation"),
            measured(f"{kind}: every entry of the diagonal goes as H/c²", entries, at_most=1e-8, label="deviation"),
            measured(f"{kind}: θ²H stays", invariant, at_most=1e-8, label="deviation"),
            measured(f"{kind}: same trajectory, 20 steps", path, at_most=1e-8, label="deviation"),
        ]
    columns = (
        "network",
        "α",
        "α of the twin",
        "norm E[8] of the twin / norm",
        "function",
        "entries",
        "θ²H",
        "trajectory",
    )
    notes = (
        "Both networks compute one function; only the coordinates differ. "
        "Columns from `function` on are relative deviations.",
        "Trajectory: 20 steps of SGD with momentum 0.9 and weight decay in training mode, α = 14 against α = 1.75, "
        "rates and decays rescaled; running statistics and eps included.",
    )
    title = "Rescaling: the same function with a norm 100 times as large"
    return Study("rescaling", title, columns, tuple(rows), tuple(findings), notes)


def _trajectory_gap(kind: str, alpha: float, beta: int) -> float:
    model, steps = build(kind, alpha, beta, seed=2), Steps()
    twin = counterpart(kind, model, alpha, alpha / FACTOR, beta)
    rule = rule_of(kind, model)
    groups = rescaled_groups(twin, rule, FACTOR, steps)
    trajectory(kind, model, steps)
    trajectory(kind, twin, steps, groups)
    return state_gap(model, twin, rule, FACTOR)
