"""What a model's autograd graph says: where parameters enter (layers) and where the loss bends (sites)."""

from .layers import Layer, LayerKind
from .linearise import Linearisation
from .nodes import edge_shape
from .reading import Graph
from .sites import Site, SiteKind
from .visit import visit

__all__ = ["Graph", "Layer", "LayerKind", "Linearisation", "Site", "SiteKind", "edge_shape", "visit"]
