"""The command that makes a figure's results where there are none."""

from __future__ import annotations


def command(figure: str, tier: str = "smoke") -> str:
    """What makes and exports a figure's results: three seeds on the smallest tier, elsewhere the file's own."""
    seeds = "--seeds 0,1,2 " if tier == "smoke" else ""
    return f"python -m experiments sweep {file_of(figure, tier)} {seeds}--export"


def file_of(figure: str, tier: str = "smoke") -> str:
    """The sweep file that makes a figure's results."""
    return f"experiments/sweeps/{tier}/{figure}.toml"
