"""`package.module:name`: an object from the user's own code, imported because the user named it."""

from __future__ import annotations

import importlib
import os
import re
import sys
from difflib import get_close_matches
from pathlib import Path
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
        raise ConfigurationError(f"{text!r} does not name an object as package.module:name{module_of_file(text)}")
    module_name, _, attribute = text.partition(":")
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"{text}: there is no module {error.name!r} (looked in sys.path and {here}){_module_meant(text)}"
        ) from error
    except Exception as error:
        raise ConfigurationError(f"{text}: importing {module_name} raised {type(error).__name__}: {error}") from error
    finally:
        if added:
            sys.path.remove(here)
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [name for name in vars(found) if not name.startswith("_")] if hasattr(found, "__dict__") else []
            close = get_close_matches(part, public, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigurationError(f"{text}: {module_name} has no attribute {attribute!r}{hint}")
        found = getattr(found, part)
    return found


def module_of_file(text: str) -> str:
    """What is meant by a file, or by an object in a file, PATH.py:name: its module, and where that has to be found."""
    place, _, name = text.partition(":")
    here = os.getcwd()
    path = os.path.normpath(os.path.join(here, os.path.expanduser(place.removesuffix(".py"))))
    within = path.startswith(os.path.join(here, ""))
    module = os.path.relpath(path, here).replace(os.sep, ".") if within else os.path.basename(path)
    meant = f"{module}:{name or 'NAME'}"
    if not is_factory_name(meant):
        return ""
    where = "" if within else f" with PYTHONPATH={os.path.dirname(path)}"
    return f"; did you mean {meant}{where}{'' if name else ', NAME being a function in it'}?"


def _module_meant(text: str) -> str:
    """The module that was meant: one named as a file, or one of the working directory that is called nearly so."""
    module, _, attribute = text.partition(":")
    if module.endswith(".py"):
        return f"; did you mean {module.removesuffix('.py')}:{attribute}?"
    close = get_close_matches(module, [path.stem for path in Path().glob("*.py")], n=1)
    return f"; did you mean {close[0]}:{attribute}?" if close else ""
