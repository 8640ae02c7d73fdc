"""Activations by name: "silu", "rct:beta=1,alpha=14", "rct:beta=1,curvature=7", "elu:alpha=0.5"."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from hessdiag.activations.module import RCTAF, alpha_for
from hessdiag.errors import ConfigurationError, UnknownNameError, nearest

Option = bool | int | float | str
Spec = str | nn.Module | Callable[[], nn.Module]

CUSTOM = "custom:"
"""What stands before the class name of an activation that no spec string can rebuild."""


@dataclass(frozen=True)
class Entry:
    """A registered activation: its class and its options with their defaults."""

    kind: type[nn.Module]
    options: Mapping[str, Option]


def _entry(kind: type[nn.Module], **options: Option) -> Entry:
    return Entry(kind, MappingProxyType(options))


_ENTRIES = {
    "relu": _entry(nn.ReLU),
    "leaky_relu": _entry(nn.LeakyReLU, negative_slope=0.01),
    "elu": _entry(nn.ELU, alpha=1.0),
    "selu": _entry(nn.SELU),
    "gelu": _entry(nn.GELU, approximate="none"),
    "silu": _entry(nn.SiLU),
    "mish": _entry(nn.Mish),
    "softplus": _entry(nn.Softplus, beta=1.0, threshold=20.0),
    "tanh": _entry(nn.Tanh),
    "sigmoid": _entry(nn.Sigmoid),
    "rct": _entry(RCTAF, beta=1, alpha=14.0),
}
REGISTRY: Mapping[str, Entry] = MappingProxyType(_ENTRIES)
"""Those of this project and those added by `hessdiag.register_activation`."""

ALIASES: Mapping[str, str] = MappingProxyType({"swish": "silu"})


def enter(name: str, kind: type[nn.Module], options: Mapping[str, Option]) -> None:
    """One more name; one that is taken is refused."""
    if name in _ENTRIES or name in ALIASES:
        raise ConfigurationError(f"an activation {name!r} is registered already")
    _ENTRIES[name] = _entry(kind, **options)


def build(spec: Spec) -> nn.Module:
    """A new activation module: from a spec string, by copying a module, or by calling a factory.

    >>> build("rct:beta=1,curvature=7")
    RCTAF(alpha=14, beta=1)
    """
    if isinstance(spec, str):
        return _from_string(spec)
    if isinstance(spec, nn.Module):
        return _own(copy.deepcopy(spec))
    if not callable(spec):
        raise ConfigurationError(f"an activation is a name, a module or a factory, got {type(spec).__name__}")
    try:
        inspect.signature(spec).bind()
    except (TypeError, ValueError):  # ValueError: a built-in function, which tells no signature
        raise ConfigurationError(
            f"activation factory {_name_of(spec)} takes arguments: pass a callable of none that "
            "returns a module (torch.nn.Tanh, not torch.tanh)"
        ) from None
    made = spec()
    if not isinstance(made, nn.Module):
        raise ConfigurationError(
            f"activation factory {_name_of(spec)} returned {type(made).__name__}, expected a torch.nn.Module"
        )
    return _own(made)


def factory(spec: Spec) -> Callable[[], nn.Module]:
    """A callable that returns a new module for each place; a bad spec is refused here already."""
    build(spec)
    return lambda: build(spec)


def spec_of(module: nn.Module) -> str:
    """The canonical string that rebuilds a module: options away from their defaults, and all of RCT-AF's.

    >>> spec_of(nn.LeakyReLU(0.1)), spec_of(RCTAF(14, 1)), spec_of(nn.SiLU())
    ('leaky_relu:negative_slope=0.1', 'rct:beta=1,alpha=14', 'silu')
    """
    for name, entry in REGISTRY.items():
        if type(module) is entry.kind:
            shown = {
                key: getattr(module, key)
                for key, default in entry.options.items()
                if name == "rct" or getattr(module, key) != default
            }
            return name + (":" if shown else "") + ",".join(f"{k}={_show(v)}" for k, v in shown.items())
    raise UnknownNameError(
        f"no name stands for an activation of class {_name_of(type(module))}; known: {', '.join(REGISTRY)}"
    )


def describe(module: nn.Module) -> str:
    """`spec_of`, or "custom:CLASS" for what only its owner can rebuild."""
    try:
        return spec_of(module)
    except UnknownNameError:
        return CUSTOM + _name_of(type(module))


def _from_string(spec: str) -> nn.Module:
    name, _, tail = (part.strip() for part in spec.partition(":"))
    name = ALIASES.get(name.lower(), name.lower())
    if spec.startswith(CUSTOM):
        raise UnknownNameError(f"activation {spec!r} cannot be rebuilt from its name: pass the module or a factory")
    if name not in REGISTRY:
        raise UnknownNameError(f"unknown activation {name!r}; {nearest(name, [*REGISTRY, *ALIASES])}")
    entry = REGISTRY[name]
    known = [*entry.options, "curvature"] if name == "rct" else list(entry.options)
    options: dict[str, Option] = {}
    for item in tail.split(",") if tail else ():
        key, equals, text = (part.strip() for part in item.partition("="))
        if not equals or not text:
            raise ConfigurationError(f"activation {spec!r}: {item!r} is not of the form option=value")
        if key not in known:
            raise UnknownNameError(
                f"activation {name!r} has no option {key!r}; " + (nearest(key, known) if known else "it takes none")
            )
        if key in options:
            raise ConfigurationError(f"activation {spec!r}: option {key!r} is given twice")
        options[key] = _parse(spec, key, text, entry.options.get(key, 0.0))
    if "curvature" in options:
        if "alpha" in options:
            raise ConfigurationError(f"activation {spec!r}: give alpha or curvature, not both")
        beta = int(options.get("beta", entry.options["beta"]))
        options["alpha"] = alpha_for(max_curvature=float(options.pop("curvature")), beta=beta)
    if name == "gelu" and options.get("approximate", "none") not in ("none", "tanh"):
        raise ConfigurationError(f"activation {spec!r}: approximate must be none or tanh")
    return entry.kind(**options)


def _parse(spec: str, key: str, text: str, default: Option) -> Option:
    """`text` as the type of the option's default; numbers must be finite."""
    if isinstance(default, str):
        return text
    try:
        value = int(text) if isinstance(default, int) else float(text)
    except ValueError:
        wanted = "an integer" if isinstance(default, int) else "a number"
        raise ConfigurationError(f"activation {spec!r}: {key} must be {wanted}, got {text!r}") from None
    if value - value != 0:
        raise ConfigurationError(f"activation {spec!r}: {key} must be finite, got {text!r}")
    return value


def _show(value: object) -> str:
    """Shortest text that reads back as the same value: 14.0 as 14, 0.1 as 0.1."""
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e15
    return str(int(value)) if whole and isinstance(value, float) else str(value)


def _own(module: nn.Module) -> nn.Module:
    """The same function, never in place: an in-place activation would overwrite what the graph refers to."""
    for part in module.modules():
        if getattr(part, "inplace", False) is True:
            part.inplace = False  # type: ignore[assignment]
    return module


def _name_of(thing: object) -> str:
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{getattr(kind, '__module__', '?')}.{getattr(kind, '__qualname__', kind)}"
