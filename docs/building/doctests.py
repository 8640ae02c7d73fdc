"""What mkdocs does to docstrings: their doctests are shown as code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

DOCTEST = re.compile(r"^>>> .*?(?=\n[ \t]*\n|\Z)", re.S | re.M)


class Doctests(Extension):
    """Puts a fence around every doctest: its output is no link, and keeps its lines."""

    def on_object(self, *, obj: Object, **_given: Any) -> None:
        """For each class and function."""
        if obj.docstring is not None:
            obj.docstring.value = DOCTEST.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
