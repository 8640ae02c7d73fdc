"""`package.module:name`: an object from the user's own code, imported because the user named it."""

from __future__ import annotations

import importlib
import os
import re
import sys
from typing import Any

from hessdiag.errors import ConfigurationError

_PATTERN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_factory_name(text: str) -> bool:
    """Does `text` read like `package.module:name`?"""
    return _PATTERN.fullmatch(text) is not None


def import_object(text: str) -> Any:
    """The object that `package.module:name` names; modules of the working directory are found as well.

    This runs the user's code, so only ever call it with what the user typed, never with a name out of a file.
    """
    if not is_factory_name(text):
        raise ConfigurationError(f"{text!r} does not name an object as package.module:name")
    module_name, _, attribute = text.partition(":")
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"{text}: there is no module {error.name!r} (looked in sys.path and {here})"
        ) from error
    except Exception as error:
        raise ConfigurationError(f"{text}: importing {module_name} raised {type(error).__name__}: {error}") from error
    finally:
        if added:
            sys.path.remove(here)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigurationError(f"{text}: {module_name} has no attribute {attribute!r}")
        found = getattr(found, part)
    return found
