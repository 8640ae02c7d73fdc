"""Where a loss bends: sites and layers read from a model's autograd graph."""

from .graph import Graph, Layer
from .linearise import Linearisation, Site
from .nodes import edge_shape
from .visit import visit

__all__ = ["Graph", "Layer", "Linearisation", "Site", "edge_shape", "visit"]
