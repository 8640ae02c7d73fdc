"""Which stored sweep speaks for a figure, and the command that makes one where there is none."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.sweep.export import SweepResults

ORDER = ("paper", "quick", "smoke")


def best(results: Sequence[SweepResults], figure: str, tiers: Sequence[str] = ORDER) -> SweepResults | None:
    """The sweep of the largest tier that has runs for a figure; of several, the one with most runs."""
    for tier in tiers:
        chosen = [sweep for sweep in results if sweep.figure == figure and sweep.tier == tier and sweep.runs]
        if chosen:
            return max(chosen, key=lambda sweep: len(sweep.runs))
    return None


def command(figure: str, tier: str = "smoke") -> str:
    """What makes and exports a figure's results: three seeds on the smallest tier, elsewhere the file's own."""
    seeds = "--seeds 0,1,2 " if tier == "smoke" else ""
    return f"python -m experiments sweep {file_of(figure, tier)} {seeds}--export"


def file_of(figure: str, tier: str = "smoke") -> str:
    """The sweep file that makes a figure's results."""
    return f"experiments/sweeps/{tier}/{figure}.toml"
