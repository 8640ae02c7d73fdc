"""A request becomes an objective and batches: checkpoint, data, device, perturbation, and the facts to report."""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.checkpoint import Checkpoint, load_checkpoint
from hessdiag.checkpoint.pretrained import SCHEME, folder_of
from hessdiag.checkpoint.shards import SUFFIXES
from hessdiag.cli.accuracy import Counted, judged
from hessdiag.cli.options import (
    data_named_by,
    device_of,
    dtype_of,
    forward_of,
    loss_of,
    names_of,
    normalize_of,
    output_of,
    pattern_of,
    spec_of,
)
from hessdiag.cli.request import Request
from hessdiag.data import DataSet, NamedDataSet, load_named
from hessdiag.data.dataset import GREY
from hessdiag.errors import (
    CheckpointError,
    ConfigurationError,
    DataError,
    HessdiagError,
    UnknownNameError,
    nearest,
    ran_out,
)
from hessdiag.examples import EXAMPLES, example_path
from hessdiag.measuring.forecast import MOST, fitting
from hessdiag.measuring.ranks import World
from hessdiag.problem.ascent import handed_back
from hessdiag.problem.forward import forward, mapped
from hessdiag.problem.handing_back import memory_errors
from hessdiag.problem.objective import Objective
from hessdiag.problem.outputs import meant
from hessdiag.problem.own_loss import alike, batch_mean, own_loss
from hessdiag.problem.perturbation import PGDSpec, keyed_pgd
from hessdiag.store.files import nearest_file

LOWER = "lower --batch-size"
CHANNELS = (1, 3, 4)
"""How many an image has."""
DECODER = "decoder_input_ids"
"""What transformers call the tokens that a decoder reads."""


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
    whole = load_named(
        request.data or data_named_by(checkpoint),
        split=request.split,
        seed=request.data_seed,
        root=request.data_root,
        inputs=None if request.inputs is None else names_of(request.inputs),
        targets=request.targets,
        loss=request.loss,
        ignore_index=request.ignore_index,
    )
    if request.normalize is not None and isinstance(whole, NamedDataSet):
        raise ConfigurationError("--normalize is for images, one array of floats in [0, 1]; these inputs have names")
    if request.normalize is not None and isinstance(whole, DataSet):
        check_normalised(request.normalize, whole)
    data = whole.sample(request.samples, seed=request.data_seed)
    made = partial(
        Objective,
        model,
        loss_of(request.loss),
        parameters=pattern_of(request.layers),
        l2=request.l2,
        ignore_index=request.ignore_index,
        output=output_of(request.output, request.model),
        forward=forward_of(request.forward, data),
    )
    objective = made(shift=request.shift or 0, label_smoothing=request.label_smoothing)
    size = request.batch_size or MOST
    batches: Iterable[tuple[Any, Tensor]] = data.batches(size, device=device, dtype=dtype)
    few = try_out(objective, batches, data, own=request.model is not None)
    if request.batch_size is None:
        size = fitting(objective, *few)
        batches = data.batches(size, device=device, dtype=dtype)
    own = None if request.dry_run else as_trained(made, request, batches)
    if own is not None and own["shift"] != (request.shift or 0):
        objective = made(shift=own["shift"], label_smoothing=request.label_smoothing)
    loss, accuracy = (math.nan, None) if request.dry_run else mean_loss(objective, batches)
    perturbation = None
    spec = None if request.attack is None else spec_of(request.attack, request.seed)
    if spec is not None and isinstance(data, NamedDataSet):
        raise ConfigurationError("--attack perturbs images, one array of floats in [0, 1]; these inputs have names")
    if spec is not None and not request.dry_run:  # perturbed inputs cost the same to measure at
        batches = perturb(objective, batches, spec, world)
        perturbation = {
            "spec": str(spec),
            "clean_loss": loss,
            "clean_accuracy": None if accuracy is None else accuracy.share,
            "accuracy": None if (after := mean_loss(objective, batches)[1]) is None else after.share,
        }
    facts = facts_of(request, checkpoint, data, perturbation, size)
    facts["data"]["of"] = len(whole)
    facts["data"]["like_bytes"] = bytes_as_floats(data) if isinstance(data, DataSet) else None
    facts["own_loss"] = own
    facts["accuracy"] = None if accuracy is None else judged(accuracy, data, facts["checkpoint"]["metrics"])
    return Prepared(objective, batches, facts)


def check_normalised(text: str, data: DataSet) -> None:
    """Refuse statistics of other channels than the data's, which would be broadcast, and of pixels in [0, 1] alone."""
    statistics, shape = normalize_of(text), data.inputs.shape
    count, channels = len(statistics[0]) if statistics else 1, shape[1] if len(shape) > 1 else 1
    if count not in (1, channels):
        raise ConfigurationError(
            f"--normalize {text} gives {count} means, one for each channel, and {data.name} has {channels}; give as "
            "many, MEANS:DEVIATIONS, or one for all"
        )
    low, high = span(data)
    if low < 0 or high > 1:
        raise DataError(
            f"--normalize is of inputs in [0, 1], and those of {data.name} span [{low:.4g}, {high:.4g}]: divide bytes "
            "by 255 or store them as uint8; leave the option out where the data are normalised already"
        )


def span(data: DataSet) -> tuple[float, float]:
    """The smallest and the largest input that a model meets."""
    if data.inputs.dtype == torch.uint8:
        return 0.0, 1.0
    low, high = data.inputs.aminmax()
    return float(low), float(high)


def bytes_as_floats(data: DataSet) -> list[float] | None:
    """The span of inputs that look like bytes which nobody divided by 255: of images, or whole numbers."""
    low, high = span(data)
    whole = data.inputs.ndim >= 3 or bool((data.inputs == data.inputs.round()).all())
    return [low, high] if low >= 0 and 2 < high <= 255 and whole else None


def open_checkpoint(request: Request) -> Checkpoint:
    """The file, or the shipped example of that name (a file of the same name in the working directory wins)."""
    source = request.source
    path = folder_of(source) if source.startswith(SCHEME) and source == request.model else found(source)
    return load_checkpoint(
        path,
        network=request.network,
        activation=request.activation,
        num_classes=request.num_classes,
        normalize=normalize_of(request.normalize),
        weights=request.weights,
        key=request.key,
        prefix=request.prefix,
        factory=request.model,
    )


def found(source: str) -> Path:
    """The path of a checkpoint that was named, or what could be meant by one that is not there."""
    path: Path = Path(source)
    if os.path.exists(path):
        return path
    shipped = example_path(source)
    if shipped is not None:
        return shipped
    if source.startswith(SCHEME):
        raise ConfigurationError(f"{source} is a model: hessdiag measure --model {source}")
    if not path.suffix and path.parent == Path():
        close = nearest(source, list(EXAMPLES))
        raise UnknownNameError(f"{source}: neither a file nor a shipped example; {close}")
    other = nearest_file(path, SUFFIXES)
    if other is not None:
        raise CheckpointError(f"{source}: no such file; did you mean {other}?")
    return path


@memory_errors(LOWER)
def try_out(
    objective: Objective, batches: Iterable[Any], data: DataSet | NamedDataSet, *, own: bool
) -> tuple[Any, Tensor]:
    """One forward pass, so that data of the wrong shape are refused in terms of data; gives the samples it took.
    `own`: the network is not one of this package.
    """
    inputs, targets = objective.check_batch(next(iter(batches)), 0)
    few, labels = mapped(inputs, lambda x: x[:2]), targets[:2]
    try:
        with torch.no_grad():
            forward(objective.model, few, objective.call)
    except HessdiagError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        if ran_out(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        advice = lacking(error, objective.model, data) or instead(error, data, own=own)
        raise DataError(
            f"the model does not take {data.name} (inputs of shape {told(data)}): {reason}; {advice}"
        ) from error
    with torch.no_grad():
        objective.summed_loss(few, labels)
    return few, labels


def told(data: DataSet | NamedDataSet) -> str:
    """The shape of one sample, of each input where they have names."""
    if isinstance(data, NamedDataSet):
        return ", ".join(f"{name} {list(tensor.shape[1:])}" for name, tensor in data.inputs.items())
    return str(list(data.inputs.shape[1:]))


def lacking(error: Exception, model: nn.Module, data: DataSet | NamedDataSet) -> str | None:
    """What to store besides: what a decoder reads, if there is one, or the optional argument that is asked for."""
    if isinstance(error, TypeError) or not isinstance(data, NamedDataSet):
        return None
    known = optional(model) - set(data.inputs)
    if DECODER in known and not any(name.startswith("decoder_") for name in data.inputs):
        return f"store {DECODER} as well: of targets, these one place to the right, after the start token"
    words = re.findall(r"\w+", str(error))
    wanted = [name for name in dict.fromkeys(words) if name in known]
    if not wanted or any(name in data.inputs for name in words):
        return None
    return f"store {' or '.join(wanted[:4])} as well, under that name"


def optional(model: nn.Module) -> set[str]:
    """The names of what it can be called with and without."""
    try:
        found = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return set()
    return {name for name, one in found.items() if one.default is not one.empty}


def instead(error: Exception, data: DataSet | NamedDataSet, *, own: bool) -> str:
    """What to try when the model does not take the data."""
    if isinstance(data, NamedDataSet) and isinstance(error, TypeError):
        return "its arguments have other names: --inputs chooses arrays, --forward positions calls by place"
    arrays = list(data.inputs.values()) if isinstance(data, NamedDataSet) else [data.inputs]
    if "indices" in str(error) and any(x.dtype == torch.uint8 for x in arrays):
        return (
            "uint8 is read as pixels and divided by 255: store tokens as int64, under a name of their own (input_ids)"
        )
    if isinstance(error, TypeError) and "argument" in str(error):
        return "it takes several inputs: store them by name (npz), or say --forward package.module:function"
    shape = [] if isinstance(data, NamedDataSet) else list(data.inputs.shape)
    if GREY in data.notes:
        return (
            f"its uint8 array [N, {shape[2]}, {shape[3]}] was read as grey images, which have one channel: if it is "
            "none, store floats"
        )
    if len(shape) == 4 and shape[3] in CHANNELS and shape[1] not in CHANNELS:
        return "channels last? images are [N, C, H, W]: store inputs.transpose(0, 3, 1, 2)"
    if len(shape) == 3:
        return "images without channels? they are [N, C, H, W]: store inputs[:, None]"
    return "choose other --data, or the model that fits" if own else "choose other --data, or the --network that fits"


@memory_errors(LOWER)
def perturb(
    objective: Objective, batches: Iterable[tuple[Tensor, Tensor]], spec: PGDSpec, world: World
) -> list[tuple[Tensor, Tensor]]:
    """Every batch at the inputs that maximise the measured loss; dealt out over processes, then shared."""

    def through(points: Tensor) -> Tensor:
        returned = objective.model(points) if objective.call is None else objective.call(objective.model, points)
        out: Tensor = meant(returned, objective.output)
        return out

    crafted: list[tuple[Tensor, Tensor]] = []
    start = 0
    for number, (inputs, targets) in enumerate(batches):
        owner = number % world.size
        if owner == world.rank:
            indices = range(start, start + len(inputs))
            with handed_back(objective.model):
                points = keyed_pgd(through, inputs, targets, indices, spec, loss=objective.loss.values)
        else:
            points = torch.empty_like(inputs)
        crafted.append((world.from_rank(points, owner), targets))
        start += len(inputs)
    return crafted


@memory_errors(LOWER)
def as_trained(
    made: Callable[..., Objective], request: Request, batches: Iterable[tuple[Any, Tensor]]
) -> dict[str, Any] | None:
    """How the loss stands to the model's own on the first batch, and the `shift` to measure at; None without such.

    Where nobody says, it is the model's own: 1 where places are compared with the next token. `fits` is the shift at
    which the two are the same. No model smooths its labels, so that this is left out of both.
    """
    inputs, targets = next(iter(batches))
    told = request.shift or 0
    plain = made(shift=told)
    own = own_loss(plain, inputs, targets)
    if own is None:
        return None
    means = {told: batch_mean(plain, inputs, targets)}
    if request.loss == "cross_entropy" and targets.ndim == 2 and not targets.is_floating_point():
        means |= {shift: batch_mean(made(shift=shift), inputs, targets) for shift in (0, 1) if shift != told}
    fits = alike(own, means)
    shift = told if request.shift is not None or fits is None else fits
    return {"value": own, "measured": means[shift], "samples": len(targets), "shift": shift, "fits": fits}


@memory_errors(LOWER)
def mean_loss(objective: Objective, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, Counted | None]:
    """Mean loss, and what is classified right of the targets that count, where these are classes."""
    loss = weight = 0.0
    right, classes, counted = 0, torch.zeros(0, dtype=torch.int64), True
    with torch.no_grad():
        for index, (inputs, targets) in enumerate(batches):
            outputs = objective.outputs(inputs, targets, index=index)
            loss += float(objective.loss.values(outputs, targets).double().sum())
            weight += float(objective.loss.weights(outputs, targets).sum())
            found = objective.loss.classified(outputs, targets) if counted else None
            if found is None:
                counted = False
                continue
            wanted, given = (numbers.cpu() for numbers in found)
            right += int((wanted == given).sum())
            seen = torch.bincount(wanted, minlength=len(classes))
            seen[: len(classes)] += classes
            classes = seen
    return loss / weight, Counted(right, classes) if counted and int(classes.sum()) else None


def shape_of(data: DataSet | NamedDataSet) -> Any:
    """The shape of a sample, or of each of its inputs by name."""
    if isinstance(data, NamedDataSet):
        return {name: list(tensor.shape[1:]) for name, tensor in data.inputs.items()}
    return list(data.inputs.shape[1:])


def facts_of(
    request: Request,
    checkpoint: Checkpoint,
    data: DataSet | NamedDataSet,
    perturbation: dict[str, Any] | None,
    batch_size: int,
) -> dict[str, Any]:
    """The `cli` block of the JSON: what was measured, on what."""
    training = checkpoint.extra.get("training")
    method = checkpoint.extra.get("method") or (training.get("method") if isinstance(training, Mapping) else None)
    return {
        "checkpoint": {
            "name": request.source,
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
            "batch_size": batch_size,
            "shape": shape_of(data),
            "classes": data.num_classes,
            "sha256": data.sha256,
            "notes": list(data.notes),
        },
        "perturbation": perturbation,
        "loss": request.loss,
        "output": request.output,
        "forward": request.forward,
        "key": request.key,
        "prefix": request.prefix,
        "inputs": request.inputs,
        "targets": request.targets,
        "normalize": request.normalize,
        "layers": request.layers,
        "rtol": request.rtol,
    }
