"""Refusals in the project's own exceptions, imported only when one is raised.

The symbolic modules need neither torch nor the engine; importing the error classes at the top would pull
in both.
"""

from __future__ import annotations

from typing import NoReturn


def refuse(message: str, *, error: str = "ConfigurationError") -> NoReturn:
    """Raise the exception of `hessdiag.errors` called `error`, with one line that says what, where and what
    to do.
    """
    from hessdiag import errors

    kind: type[Exception] = getattr(errors, error)
    raise kind(message)
