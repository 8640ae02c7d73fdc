"""Where the shipped checkpoints lie. `build_digits.py` beside them makes them anew."""

from __future__ import annotations

from pathlib import Path

EXAMPLES = {"digits-example": "digits-example.safetensors"}
"""Name on the command line -> file beside this module."""


def example_path(name: str) -> Path | None:
    """The file of a shipped example, or None where `name` is none."""
    file = EXAMPLES.get(name)
    return None if file is None else Path(__file__).with_name(file)
