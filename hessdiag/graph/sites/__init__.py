"""Where a model bends: one file per kind of site, in one table."""

from hessdiag.graph.kinds import Table
from hessdiag.graph.sites.bilinear import Bilinear
from hessdiag.graph.sites.elementwise import Elementwise
from hessdiag.graph.sites.length import Length
from hessdiag.graph.sites.normalised import GroupNorm, InstanceNorm, LayerNorm
from hessdiag.graph.sites.product import Product
from hessdiag.graph.sites.quotient import Quotient
from hessdiag.graph.sites.several import Several
from hessdiag.graph.sites.site import Map, Pairs, Pointwise, Site, SiteKind
from hessdiag.graph.sites.softmax import LogSoftmax, LogSumExp, Softmax
from hessdiag.graph.sites.tested import Tested

KINDS: Table[SiteKind] = Table(
    "site kind", SiteKind,
    Elementwise, Product, Quotient, Several, Bilinear, Softmax, LogSoftmax, LogSumExp, LayerNorm, GroupNorm,
    InstanceNorm, Length, Tested,
)  # fmt: skip


def register_site(kind: type[SiteKind]) -> type[SiteKind]:
    """Add `kind` (a class derived from `SiteKind` or `Pointwise`; serves as a decorator)."""
    return KINDS.add(kind)


__all__ = ["KINDS", "Map", "Pairs", "Pointwise", "Site", "SiteKind", "register_site"]
