"""Where parameters enter a model: one file per kind of layer, in one table."""

from ..kinds import Table
from .conv import Conv
from .layer import Layer, LayerKind, Way
from .linear import Linear
from .norm import Norm
from .scale import Scale
from .shift import Shift

KINDS: Table[LayerKind] = Table("layer kind", LayerKind, Norm, Conv, Linear, Scale, Shift)

__all__ = ["KINDS", "Layer", "LayerKind", "Way"]
