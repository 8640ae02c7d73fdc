"""What the text of single options means: a device, a dtype, a data set, a loss, layers, a perturbation."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hessdiag import networks
from hessdiag.checkpoint import Checkpoint
from hessdiag.checkpoint.build import Normalize
from hessdiag.checkpoint.pretrained import SCHEME
from hessdiag.data import DataSet, NamedDataSet
from hessdiag.errors import ConfigurationError, DeviceError, UnknownNameError, nearest
from hessdiag.measuring.ranks import World
from hessdiag.problem.outputs import Output
from hessdiag.problem.perturbation import PGDSpec, parse_pgd
from hessdiag.store.factories import import_object, is_factory_name

PLAIN_SETS = ("digits", "cifar10", "cifar100")
"""Data sets that a checkpoint may name by itself; paths and code must come from the user."""
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def device_of(text: str, world: World) -> torch.device:
    """The device meant; with several processes on one machine each takes its own card."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
    except RuntimeError:
        raise ConfigurationError(f"--device {text!r}: it is auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"--device {text!r}: cpu or cuda; sums need float64, which {device.type} may lack")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError(f"--device {text!r}: this torch sees no CUDA device; use --device cpu")
        count = torch.cuda.device_count()
        number = device.index if device.index is not None else world.local_rank % count
        if number >= count:
            raise DeviceError(f"--device {text!r}: there are {count} CUDA devices, counted from 0")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    return device


def dtype_of(text: str | None, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype asked for, or that of the weights where curvature can be had in it."""
    if text is None:
        kinds = {p.dtype for p in checkpoint.model.parameters()}
        return torch.float64 if torch.float64 in kinds else torch.float32
    if text not in DTYPES:
        raise UnknownNameError(f"--dtype {text!r}; {nearest(text, list(DTYPES))}")
    return DTYPES[text]


def data_named_by(checkpoint: Checkpoint) -> str:
    """The data set that the checkpoint was trained on, if it says so and the name is a plain one."""
    extra = checkpoint.extra
    training = extra.get("training")
    tables: list[Mapping[str, Any]] = [extra, training if isinstance(training, Mapping) else {}]
    for table in tables:
        for key in ("data", "dataset", "data_set"):
            value = table.get(key)
            if isinstance(value, Mapping):
                value = value.get("name")
            if value in PLAIN_SETS:
                return str(value)
    raise ConfigurationError(
        f"the checkpoint names no data set: say --data NAME ({', '.join(PLAIN_SETS)}, npz:PATH, ...)"
    )


def names_of(text: str) -> list[str]:
    """Names of arrays, with commas between."""
    return [name for name in (part.strip() for part in text.split(",")) if name]


def output_of(text: str | None, model: str | None) -> Output:
    """What is meant of what the model returns: a name, a place, a function of the user's; logits of transformers."""
    if text is None:
        return "logits" if model is not None and model.startswith(SCHEME) else None
    if re.fullmatch(r"-?\d{1,4}", text):
        return int(text)
    return function_of(text, "--output", "returned -> outputs") if is_factory_name(text) else text


FORWARDS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "keywords": lambda model, inputs: model(**inputs),
    "positions": lambda model, inputs: model(*inputs.values()),
}
"""How a model is called with inputs of names."""


def forward_of(text: str | None, data: DataSet | NamedDataSet) -> Callable[[nn.Module, Any], Any] | None:
    """How the model is called: with several inputs by their names, with one as it is, if nothing else is said."""
    named = isinstance(data, NamedDataSet)
    if text is None:
        return FORWARDS["keywords" if len(data.inputs) > 1 else "positions"] if named else None
    if is_factory_name(text):
        return function_of(text, "--forward", "(model, inputs) -> outputs")
    if text not in FORWARDS:
        known = [*FORWARDS, "package.module:function"]
        raise UnknownNameError(f"--forward {text!r}; {nearest(text, known)}")
    if not named:
        raise ConfigurationError(
            f"--forward {text}: the inputs of {data.name} are one array, which the model takes as it is"
        )
    return FORWARDS[text]


def function_of(text: str, option: str, form: str) -> Callable[..., Any]:
    """A function of the user's own, imported because the user named it."""
    found = import_object(text)
    if not callable(found):
        raise ConfigurationError(f"{option} {text}: no function {form}")
    made: Callable[..., Any] = found
    return made


def loss_of(text: str) -> Any:
    """A loss by name, or a function (outputs, targets) -> loss per sample of the user's own."""
    return function_of(text, "--loss", "(outputs, targets) -> loss per sample") if is_factory_name(text) else text


def pattern_of(text: str | None) -> str | None:
    """A regular expression that compiles."""
    if text is not None:
        try:
            re.compile(text)
        except re.error as error:
            raise ConfigurationError(
                f"--layers {text!r} is no regular expression ({error}); write e.g. 'layer3.*' or '.*bias'"
            ) from None
    return text


STATISTICS: dict[str, Normalize] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Means and deviations by channel, as public training code has them."""


def normalize_of(text: str | None) -> Normalize | None:
    """(means, deviations), by the name of a data set or as numbers."""
    if text is None:
        return None
    if text in STATISTICS:
        return STATISTICS[text]
    parts = text.split(":")
    try:
        means, deviations = (tuple(float(x) for x in part.split(",")) for part in parts)
    except ValueError:
        close = nearest(text, list(STATISTICS))
        raise ConfigurationError(f"--normalize {text!r}: {close}; or numbers, MEAN,MEAN,MEAN:STD,STD,STD") from None
    networks.Normalize(means, deviations)  # refuses unequal counts and what is not positive
    return means, deviations


def spec_of(text: str, seed: int) -> PGDSpec:
    """The perturbation, its noise keyed by --seed unless it names a seed itself."""
    spec = parse_pgd(text)
    named = any(part.partition("=")[0].strip() == "seed" for part in text.partition(":")[2].split(","))
    return spec if named else replace(spec, seed=seed)
