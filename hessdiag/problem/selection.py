"""Which of a model's parameters are meant: by names, by a regular expression or by a function of the name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from torch import nn

from hessdiag.errors import ConfigurationError, NoParametersError


def choose(model: nn.Module, wanted: str | Iterable[str] | Callable[[str], bool] | None) -> dict[str, nn.Parameter]:
    """The parameters meant, by name and in the model's order: those that need a gradient where nothing is said."""
    everything = dict(model.named_parameters())
    if not everything:
        packed = any("quantized" in type(module).__module__ for module in model.modules())
        why = "; quantised layers hold none: measure the model that was quantised" if packed else ""
        raise NoParametersError(f"the model has no parameters{why}")
    first = {id(p): name for name, p in everything.items()}
    again = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if name not in everything}
    if wanted is None:
        chosen = {name: p for name, p in everything.items() if p.requires_grad}
        if not chosen:
            raise NoParametersError("no parameter of the model requires a gradient; call requires_grad_(True)")
        return chosen
    if isinstance(wanted, str):
        try:
            pattern = re.compile(wanted)
        except re.error as error:
            raise ConfigurationError(f"parameters={wanted!r} is no regular expression: {error}") from None
        names = [name for name in everything if pattern.fullmatch(name)]
        if not names:
            alias = next((name for name in again if pattern.fullmatch(name)), None)
            meant = _meant(wanted, list(everything)) if alias is None else _shared(alias, again)
            raise NoParametersError(f"no parameter matches {wanted!r}; {meant}")
    elif callable(wanted):
        names = [name for name in everything if wanted(name)]
    else:
        names = list(wanted)
        if not all(isinstance(name, str) for name in names):
            raise NoParametersError(
                f"parameters= takes names, not a {type(names[0]).__name__}: there are {_some(list(everything))}"
            )
        unknown = [name for name in names if name not in everything]
        if unknown:
            there = _shared(unknown[0], again) if unknown[0] in again else f"there are {_some(list(everything))}"
            raise NoParametersError(f"the model has no parameter {unknown[0]!r}; {there}")
    if not names:
        raise NoParametersError("no parameter was chosen")
    frozen = [name for name in names if not everything[name].requires_grad]
    if frozen:
        raise NoParametersError(f"parameter {frozen[0]!r} does not require a gradient; call requires_grad_(True)")
    keep = set(names)
    return {name: p for name, p in everything.items() if name in keep}


def _shared(name: str, again: dict[str, str]) -> str:
    return f"{name!r} is {again[name]!r} under another name: choose that"


def _meant(wanted: str, names: list[str]) -> str:
    """A module's name, or another part of whole names, which are what is matched; else what there is."""
    for pattern in (rf"{wanted}\..*", f".*{wanted}.*"):
        found = [name for name in names if re.fullmatch(pattern, name)]
        if found:
            return f"whole names are matched: '{pattern}' would mean {_some(found)}"
    return f"there are {_some(names)}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
