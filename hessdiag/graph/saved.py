"""What a node of autograd's graph saved for its backward pass: the one module that reads `_saved_*`.

torch names these attributes after the arguments of the forward function and promises nothing about them. Here every
read has a type, tensors come without a graph, and what is missing is refused by name rather than guessed. Nothing is
read before it is asked for: under checkpointing to read takes a forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hessdiag.errors import UncoveredModelError


def has(node: Any, name: str) -> bool:
    """Whether the node keeps something of this name."""
    return hasattr(node, f"_saved_{name}")


def tensor(node: Any, name: str) -> Tensor:
    """A tensor that the node kept."""
    found = tensor_or_none(node, name)
    if found is None:
        raise UncoveredModelError(f"{node.name()} kept no {name!r}: is a gradient of it needed?")
    return found


def tensor_or_none(node: Any, name: str) -> Tensor | None:
    """The same, or None where the backward pass needs none.

    Python's numbers are kept on the CPU whatever the device; here they come on the node's, to be expanded there.
    """
    found = getattr(node, f"_saved_{name}", None)
    if not isinstance(found, Tensor):
        return None
    found = found.detach()
    return found if found.ndim else found.to(node._input_metadata[0].device)


def number(node: Any, name: str, default: float | None = None) -> float:
    """A number; `default` where this node has no such argument."""
    found = number_or_none(node, name)
    if found is None:
        if default is None:
            raise UncoveredModelError(f"{node.name()} kept no {name!r}: this version of torch is not known here")
        return default
    return found


def number_or_none(node: Any, name: str) -> float | None:
    """A number, or None where it was not given."""
    found = getattr(node, f"_saved_{name}", None)
    return None if found is None else float(found)


def flag(node: Any, name: str) -> bool:
    """A truth value."""
    return bool(number(node, name))


def text(node: Any, name: str) -> str:
    """A string."""
    return str(getattr(node, f"_saved_{name}"))


def integers(node: Any, name: str) -> tuple[int, ...]:
    """Whole numbers, one alone as a tuple of one; torch shows negative ones as unsigned. Empty where none was given."""
    found = getattr(node, f"_saved_{name}", None)
    if found is None:
        return ()
    values = (found,) if isinstance(found, int) else tuple(found)
    return tuple(int(value) - (1 << 64) if int(value) >= 1 << 63 else int(value) for value in values)


def integer(node: Any, name: str, default: int | None = None) -> int:
    """One whole number; `default` where this node has no such argument."""
    found = integers(node, name)
    if not found:
        if default is None:
            raise UncoveredModelError(f"{node.name()} kept no {name!r}: this version of torch is not known here")
        return default
    return found[0]


def first_tensor(node: Any, *names: str) -> Tensor | None:
    """The first of several names under which a tensor may have been kept."""
    return next((found for found in (tensor_or_none(node, name) for name in names) if found is not None), None)


def constant(node: Any, slot: int) -> Tensor:
    """What a product or a quotient multiplies its input `slot` by, in the dtype of its output.

    A Python number is saved as a float64 tensor that torch still takes for a number: what is computed from it falls to
    the default dtype, and what it meets as a tensor of no axes is lifted to float64. Neither is left of it here.
    """
    other = tensor_or_none(node, "self" if slot == 1 else "other")
    if other is None:
        raise UncoveredModelError(f"{node.name()} did not save its other factor; is a gradient of it needed?")
    value: Tensor = torch.empty_like(other, dtype=node._input_metadata[0].dtype).copy_(other)
    return value.reciprocal_() if node.name().startswith("Div") else value
