"""What a model's autograd graph says: where parameters enter (layers) and where the loss bends (sites).

Both are open: `register_layer` and `register_site` add kinds from outside.
"""

from hessdiag.graph import saved
from hessdiag.graph.layers import Layer, LayerKind, register_layer
from hessdiag.graph.linearise import Linearisation
from hessdiag.graph.nodes import edge_shape
from hessdiag.graph.reading import Graph
from hessdiag.graph.sites import Map, Pointwise, Site, SiteKind, register_site
from hessdiag.graph.visit import visit

__all__ = [
    "Graph",
    "Layer",
    "LayerKind",
    "Linearisation",
    "Map",
    "Pointwise",
    "Site",
    "SiteKind",
    "edge_shape",
    "register_layer",
    "register_site",
    "saved",
    "visit",
]
