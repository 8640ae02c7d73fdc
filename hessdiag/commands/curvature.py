"""`hessdiag curvature`."""

from __future__ import annotations

from hessdiag.commands.exits import guarded

NAME = "curvature"
EXAMPLES = ""


@guarded
def command() -> int:
    """To come."""
    return 0
