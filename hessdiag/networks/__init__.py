"""Networks by name, each built from an activation factory and carrying the configuration that rebuilds it."""

from hessdiag.networks.by_name import NETWORKS, build
from hessdiag.networks.normalize import Normalize

__all__ = ["NETWORKS", "Normalize", "build"]
