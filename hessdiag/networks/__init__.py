"""Networks by name, each built from an activation factory and carrying the configuration that rebuilds it."""

from hessdiag.networks.normalize import Normalize
from hessdiag.networks.registry import NETWORKS, build

__all__ = ["NETWORKS", "Normalize", "build"]
