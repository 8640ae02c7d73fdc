"""What a model's autograd graph says: where parameters enter (layers) and where the loss bends (sites).

Both are open: `register_layer` and `register_site` add kinds from outside.
"""

from . import saved
from .layers import Layer, LayerKind, register_layer
from .linearise import Linearisation
from .nodes import edge_shape
from .reading import Graph
from .sites import Pointwise, Site, SiteKind, register_site
from .visit import visit

__all__ = [
    "Graph",
    "Layer",
    "LayerKind",
    "Linearisation",
    "Pointwise",
    "Site",
    "SiteKind",
    "edge_shape",
    "register_layer",
    "register_site",
    "saved",
    "visit",
]
