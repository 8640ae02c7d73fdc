"""The network that a checkpoint belongs to, built only once its tensors are known to fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hessdiag.checkpoint.layout import translate
from hessdiag.errors import CheckpointError, ConfigurationError, HessdiagError
from hessdiag.store.factories import import_object
from hessdiag.store.files import BadFileError, shown
from hessdiag.store.tensorfiles import TensorFacts

Normalize = tuple[tuple[float, ...], tuple[float, ...]]
Shared = TypeVar("Shared")
Factory = Callable[[], nn.Module] | nn.Module | str
MAX_OPTIONS = 1000


def from_factory(factory: Factory) -> nn.Module:
    """The user's own model: a module, a function of no arguments, or its name package.module:name."""
    made: Any = import_object(factory) if isinstance(factory, str) else factory
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise ConfigurationError(f"factory {shown(str(factory))} is neither a function nor a module")
        try:
            with torch.random.fork_rng(devices=[]):
                made = made()
        except HessdiagError:
            raise
        except Exception as error:
            raise ConfigurationError(f"factory {shown(str(factory))} raised {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise ConfigurationError(f"factory {shown(str(factory))} returned {type(made).__name__}, not a torch.nn.Module")
    return made


@dataclass(frozen=True)
class Normalised:
    """A hook before a model's forward: its first input, normalised by channel. The names of its parameters stay."""

    statistics: Normalize

    def __call__(self, _model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The inputs, the first of them normalised in its own type."""
        first = inputs[0] if inputs else None
        if not isinstance(first, Tensor) or not first.is_floating_point() or first.ndim < 2:
            raise ConfigurationError(
                "normalize is of images, a floating-point tensor [N, C, ...] that the model is given first and by "
                "place: leave it out, and normalise the data"
            )
        shape = (1, -1, *[1] * (first.ndim - 2))
        mean, std = (
            torch.tensor(values, dtype=first.dtype, device=first.device).view(shape) for values in self.statistics
        )
        return ((first - mean) / std, *inputs[1:])


def normalised(model: nn.Module, statistics: Normalize | None) -> None:
    """A model of somebody's own takes its inputs normalised by these alone, whatever was said of it before."""
    from hessdiag.networks import normalize

    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # what torch.compile wraps
        model = inner
    hooks = model._forward_pre_hooks
    for number in [number for number, hook in hooks.items() if isinstance(hook, Normalised)]:
        del hooks[number]
    if statistics is not None:
        normalize.layer(statistics)  # refuses unequal counts and what is not positive
        mean, std = statistics
        model.register_forward_pre_hook(Normalised((tuple(mean), tuple(std))))


def from_config(config: Mapping[str, Any], weights: Mapping[str, TensorFacts], *, trusted: bool) -> nn.Module:
    """`networks.build(**config)`, tried without memory first: a file may claim one larger than any machine.

    `trusted` says whether the user named the network (whose errors are shown as they are) or the file did.
    """
    from hessdiag import networks

    plain = {key: _tuples(value) for key, value in config.items()}
    name = plain.pop("network", None)
    if not isinstance(name, str):
        raise BadFileError("its config names no network")
    depth = plain.get("depth", 0)
    if not trusted and (_count(config) > MAX_OPTIONS or (type(depth) is int and depth > len(weights))):
        raise BadFileError("its config claims a network of more layers than the file holds tensors")
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            sketch = networks.build(name, **plain)
        translate(weights, facts_of(sketch))
        with torch.random.fork_rng(devices=[]):
            made: nn.Module = networks.build(name, **plain)
    except BadFileError:
        raise
    except HessdiagError as error:
        if trusted:
            raise
        raise BadFileError(f"its config builds no network ({error})") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {shown(str(error), 100)}"
        if trusted:
            raise ConfigurationError(f"network {name!r} cannot be built with {plain}: {reason}") from error
        raise BadFileError(f"its config builds no network ({reason})") from None
    return made


def facts_of(model: nn.Module) -> dict[str, TensorFacts]:
    """Names, shapes and types of a model's state."""
    return {name: TensorFacts(tuple(v.shape), v.dtype) for name, v in model.state_dict().items()}


def aliased(model: nn.Module, table: Mapping[str, Shared]) -> dict[str, Shared]:
    """The table with what it lacks because the model ties it: a parameter of two names is stored under one of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found = dict(table)
    for group in names.values():
        held = next((name for name in group if name in table), None)
        if held is not None:
            found.update({name: table[held] for name in group if name not in table})
    return found


def agree(config: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse arguments that contradict what the file says of itself; an option that it leaves out has its default."""
    from hessdiag import activations, networks
    from hessdiag.networks.by_name import defaults_of

    kind = networks.NETWORKS.get(str(config.get("network")))
    defaults = defaults_of(kind) if kind else {}
    for key, value in given.items():
        if value is None:
            continue
        told = config.get(key, defaults.get(key))
        same = _tuples(value) == _tuples(told)
        if key == "activation" and not same and isinstance(told, str):
            same = activations.describe(activations.build(value)) == told
        if not same:
            raise CheckpointError(
                f"the file says {key} {shown(str(told))}, you asked for {shown(str(value))}: "
                f"leave {key} out, or load the bare weights by factory="
            )


def fill(model: nn.Module, tensors: Mapping[str, Tensor], names: Mapping[str, str | None]) -> tuple[str, ...]:
    """Copy checked tensors into the model, in float64 if any of them is; returns notes on conversions."""
    notes: tuple[str, ...] = ()
    kinds = {tensors[found].dtype for found in names.values() if found is not None}
    floats = {kind for kind in kinds if kind.is_floating_point}
    if torch.float64 in floats:
        model.to(torch.float64)
    odd = sorted(str(kind) for kind in floats - {torch.float32})
    if odd:
        wide = "torch.float64" if torch.float64 in floats else "torch.float32"
        notes = (f"weights stored as {', '.join(odd)}: the model is {wide}",)
    state = {}
    for name, current in model.state_dict().items():
        found = names[name]
        value = torch.zeros_like(current) if found is None else tensors[found]
        fits = value.is_floating_point() == current.is_floating_point()
        # Averaging turns BatchNorm's integer counters into floats.
        if not fits and (current.is_floating_point() or bool((value != value.round()).any())):
            raise BadFileError(f"tensor {shown(name)} is {value.dtype}, the network wants {current.dtype}")
        state[name] = value.to(current.dtype)
    try:
        model.load_state_dict(state, strict=True)
    except Exception as error:  # a user's module with rules of its own
        raise BadFileError(f"the model refuses its weights ({shown(str(error), 100)})") from None
    return notes


def _tuples(value: Any) -> Any:
    return tuple(_tuples(entry) for entry in value) if isinstance(value, (list, tuple)) else value


def _count(value: Any) -> int:
    if isinstance(value, Mapping):
        return 1 + sum(_count(entry) for entry in value.values())
    return 1 + sum(_count(entry) for entry in value) if isinstance(value, (list, tuple)) else 1
