"""Where a model bends: one file per kind of site, in one table."""

from ..kinds import Table
from .elementwise import Elementwise
from .product import Product
from .site import Pairs, Pointwise, Site, SiteKind

KINDS: Table[SiteKind] = Table("site kind", SiteKind, Elementwise, Product)

__all__ = ["KINDS", "Pairs", "Pointwise", "Site", "SiteKind"]
