"""Where a model bends: one file per kind of site, in one table."""

from ..kinds import Table
from .elementwise import Elementwise
from .product import Product
from .site import Pairs, Pointwise, Site, SiteKind

KINDS: Table[SiteKind] = Table("site kind", SiteKind, Elementwise, Product)


def register_site(kind: type[SiteKind]) -> type[SiteKind]:
    """Add `kind` (a class derived from `SiteKind` or `Pointwise`; serves as a decorator)."""
    return KINDS.add(kind)


__all__ = ["KINDS", "Pairs", "Pointwise", "Site", "SiteKind", "register_site"]
