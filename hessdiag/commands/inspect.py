"""`hessdiag inspect`."""

from __future__ import annotations

from hessdiag.commands.exits import guarded

NAME = "inspect"
EXAMPLES = ""


@guarded
def command() -> int:
    """To come."""
    return 0
