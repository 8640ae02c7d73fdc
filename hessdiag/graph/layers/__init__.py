"""Where parameters enter a model: one file per kind of layer, in one table."""

from ..kinds import Table
from .conv import Conv
from .layer import Layer, LayerKind, Way
from .linear import Linear
from .norm import Norm
from .scale import Scale
from .shift import Shift

KINDS: Table[LayerKind] = Table("layer kind", LayerKind, Norm, Conv, Linear, Scale, Shift)


def register_layer(kind: type[LayerKind]) -> type[LayerKind]:
    """Add `kind`, a class derived from `LayerKind` (serves as a decorator); audits compare all its layers."""
    return KINDS.add(kind)


__all__ = ["KINDS", "Layer", "LayerKind", "Way", "register_layer"]
