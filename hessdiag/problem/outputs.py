"""The one tensor that is meant of what a model returns: a dataclass, a dictionary, a tuple."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from hessdiag.errors import ConfigurationError, nearest

Output = str | int | Callable[[Any], Tensor] | None


def meant(returned: Any, output: Output) -> Any:
    """What `output` names of it: an attribute or key, a place, or a function's answer."""
    if output is None:
        return returned
    if callable(output):
        return output(returned)
    if isinstance(output, int) and not isinstance(output, bool):
        if not isinstance(returned, (tuple, list)) or not -len(returned) <= output < len(returned):
            raise ConfigurationError(f"output={output}: the model returned no tuple that long; {advice(returned)}")
        return returned[output]
    if isinstance(returned, Mapping) and output in returned:
        return returned[output]
    if not isinstance(returned, (Mapping, Tensor)) and hasattr(returned, str(output)):
        return getattr(returned, str(output))
    known = names(returned)
    more = nearest(str(output), known) if known else advice(returned)
    raise ConfigurationError(f"output={output!r}: the model returned nothing of that name; {more}")


def names(returned: Any) -> list[str]:
    """Names under which it holds tensors."""
    if isinstance(returned, Mapping):
        return [str(key) for key, value in returned.items() if isinstance(value, Tensor)]
    held = [f.name for f in fields(returned)] if is_dataclass(returned) else list(getattr(returned, "_fields", ()))
    return [name for name in held if isinstance(getattr(returned, name, None), Tensor)]


def advice(returned: Any) -> str:
    """What to say to `Objective` so that one tensor is meant."""
    known = names(returned)
    if known:
        first = next((name for name in ("logits", "outputs", "output") if name in known), known[0])
        return f"it holds {', '.join(known[:6])}: say Objective(..., output={first!r}) (--output {first})"
    if isinstance(returned, (tuple, list)):
        places = [str(k) for k, value in enumerate(returned) if isinstance(value, Tensor)]
        if places:
            return f"say which is meant: Objective(..., output={places[0]}) (--output {places[0]})"
    if isinstance(returned, Tensor):
        return "it is one tensor: leave output out"
    return "say what is meant by a function: Objective(..., output=lambda returned: ...) (--output module:function)"
