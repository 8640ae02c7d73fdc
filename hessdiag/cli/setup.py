"""A request becomes an objective and batches: checkpoint, data, device, perturbation, and the facts to report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.checkpoint import Checkpoint, load_checkpoint
from hessdiag.cli.accuracy import judged
from hessdiag.cli.options import (
    data_named_by,
    device_of,
    dtype_of,
    loss_of,
    normalize_of,
    pattern_of,
    spec_of,
)
from hessdiag.cli.request import Request
from hessdiag.data import DataSet, load
from hessdiag.errors import (
    DataError,
    HessdiagError,
    UnknownNameError,
    nearest,
    ran_out,
)
from hessdiag.examples import EXAMPLES, example_path
from hessdiag.measuring.ranks import World
from hessdiag.networks import Normalize
from hessdiag.problem.forward import forward
from hessdiag.problem.handing_back import memory_errors
from hessdiag.problem.objective import Objective
from hessdiag.problem.perturbation import PGDSpec, keyed_pgd

LOWER = "lower --batch-size"


@dataclass(frozen=True)
class Prepared:
    """Everything a measurement needs, and what to say about it."""

    objective: Objective
    batches: Iterable[tuple[Tensor, Tensor]]
    facts: dict[str, Any]


def prepare(request: Request, world: World) -> Prepared:
    """Load, move, perturb; every refusal comes from here before the measurement begins."""
    device = device_of(request.device, world)
    checkpoint = open_checkpoint(request)
    dtype = dtype_of(request.dtype, checkpoint)
    model = checkpoint.model.to(device=device, dtype=dtype).eval()
    if request.model is not None and request.normalize is not None:
        normalised(model, request.normalize)
    whole = load(
        request.data or data_named_by(checkpoint),
        split=request.split,
        seed=request.data_seed,
        root=request.data_root,
    )
    data = whole.sample(request.samples, seed=request.data_seed)
    objective = Objective(
        model,
        loss_of(request.loss),
        parameters=pattern_of(request.layers),
        l2=request.l2,
        label_smoothing=request.label_smoothing,
    )
    batches: Iterable[tuple[Tensor, Tensor]] = data.batches(request.batch_size, device=device, dtype=dtype)
    try_out(objective, batches, data)
    loss, accuracy = (math.nan, None) if request.dry_run else mean_loss(objective, batches)
    perturbation = None
    spec = None if request.attack is None else spec_of(request.attack, request.seed)
    if spec is not None and not request.dry_run:  # perturbed inputs cost the same to measure at
        batches = perturb(objective, batches, spec, world)
        perturbation = {
            "spec": str(spec),
            "clean_loss": loss,
            "clean_accuracy": accuracy,
            "accuracy": mean_loss(objective, batches)[1],
        }
    facts = facts_of(request, checkpoint, data, perturbation)
    facts["data"]["of"] = len(whole)
    facts["accuracy"] = None if accuracy is None else judged(accuracy, data, facts["checkpoint"]["metrics"])
    return Prepared(objective, batches, facts)


def normalised(model: nn.Module, text: str) -> None:
    """The user's own model, its inputs normalised first; its parameters keep their names."""
    statistics = normalize_of(text)
    assert statistics is not None
    first = next(model.parameters())
    layer = Normalize(*statistics).to(device=first.device, dtype=first.dtype)
    model.register_forward_pre_hook(lambda _module, inputs: (layer(inputs[0]), *inputs[1:]))


def open_checkpoint(request: Request) -> Checkpoint:
    """The file, or the shipped example of that name (a file of the same name in the working directory wins)."""
    path: Path = Path(request.checkpoint)
    if not path.exists():
        path = example_path(request.checkpoint) or path
    if not path.exists() and not path.suffix and path.parent == Path():
        close = nearest(request.checkpoint, list(EXAMPLES))
        raise UnknownNameError(f"{request.checkpoint}: neither a file nor a shipped example; {close}")
    return load_checkpoint(
        path,
        network=request.network,
        activation=request.activation,
        num_classes=request.num_classes,
        normalize=None if request.model else normalize_of(request.normalize),
        weights=request.weights,
        factory=request.model,
    )


@memory_errors(LOWER)
def try_out(objective: Objective, batches: Iterable[Any], data: DataSet) -> None:
    """One forward pass, so that data of the wrong shape are refused in terms of data."""
    inputs, targets = objective.check_batch(next(iter(batches)), 0)
    few, labels = inputs[:2], targets[:2]
    try:
        with torch.no_grad():
            forward(objective.model, few, objective.call)
    except HessdiagError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        if ran_out(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"the model does not take {data.name} (inputs of shape {list(inputs.shape[1:])}): {reason}; "
            "choose other --data, or the --network that fits"
        ) from error
    with torch.no_grad():
        objective.summed_loss(few, labels)


@memory_errors(LOWER)
def perturb(
    objective: Objective, batches: Iterable[tuple[Tensor, Tensor]], spec: PGDSpec, world: World
) -> list[tuple[Tensor, Tensor]]:
    """Every batch at the inputs that maximise the measured loss; dealt out over processes, then shared."""
    crafted: list[tuple[Tensor, Tensor]] = []
    start = 0
    for number, (inputs, targets) in enumerate(batches):
        owner = number % world.size
        if owner == world.rank:
            indices = range(start, start + len(inputs))
            points = keyed_pgd(objective.model, inputs, targets, indices, spec, loss=objective.loss.values)
        else:
            points = torch.empty_like(inputs)
        crafted.append((world.from_rank(points, owner), targets))
        start += len(inputs)
    return crafted


@memory_errors(LOWER)
def mean_loss(objective: Objective, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float | None]:
    """Mean loss, and the share classified right where targets are classes."""
    loss = weight = right = 0.0
    count, classes = 0, True
    with torch.no_grad():
        for index, (inputs, targets) in enumerate(batches):
            outputs = objective.outputs(inputs, targets, index=index)
            loss += float(objective.loss.values(outputs, targets).double().sum())
            weight += float(objective.loss.weights(outputs, targets).sum())
            classes = classes and not targets.is_floating_point() and outputs.ndim == 2
            right += float((outputs.argmax(1) == targets).sum()) if classes else 0.0
            count += len(targets)
    return loss / weight, right / count if classes else None


def facts_of(
    request: Request, checkpoint: Checkpoint, data: DataSet, perturbation: dict[str, Any] | None
) -> dict[str, Any]:
    """The `cli` block of the JSON: what was measured, on what."""
    training = checkpoint.extra.get("training")
    method = checkpoint.extra.get("method") or (training.get("method") if isinstance(training, Mapping) else None)
    return {
        "checkpoint": {
            "name": request.checkpoint,
            "sha256": checkpoint.sha256,
            "weights": checkpoint.weights,
            "factory": request.model,
            "config": dict(checkpoint.config),
            "trained_by": method if isinstance(method, str) else None,
            "epoch": checkpoint.epoch,
            "metrics": dict(checkpoint.metrics),
            "notes": list(checkpoint.notes),
        },
        "data": {
            "name": data.name,
            "split": data.split,
            "samples": len(data),
            "chosen": request.samples is not None,
            "data_seed": request.data_seed,
            "batch_size": request.batch_size,
            "shape": list(data.inputs.shape[1:]),
            "classes": data.num_classes,
            "sha256": data.sha256,
            "notes": list(data.notes),
        },
        "perturbation": perturbation,
        "normalize": request.normalize,
        "layers": request.layers,
        "rtol": request.rtol,
    }
