"""Where parameters enter a model: one file per kind of layer, in one table."""

from hessdiag.graph.kinds import Table
from hessdiag.graph.layers.conv import Conv
from hessdiag.graph.layers.embedding import Embedding
from hessdiag.graph.layers.gain import GroupGain, LayerGain
from hessdiag.graph.layers.layer import Layer, LayerKind, Way
from hessdiag.graph.layers.linear import Linear
from hessdiag.graph.layers.norm import Norm
from hessdiag.graph.layers.scale import Scale
from hessdiag.graph.layers.shift import Shift
from hessdiag.graph.layers.transposed import Transposed

KINDS: Table[LayerKind] = Table(
    "layer kind", LayerKind, Norm, Conv, Transposed, Linear, Embedding, Scale, Shift, LayerGain, GroupGain
)


def register_layer(kind: type[LayerKind]) -> type[LayerKind]:
    """Add `kind`, a class derived from `LayerKind` (serves as a decorator); audits compare all its layers."""
    return KINDS.add(kind)


__all__ = ["KINDS", "Layer", "LayerKind", "Way", "register_layer"]
