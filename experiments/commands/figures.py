"""`python -m experiments figures`: draw everything again from the stored results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from experiments.commands.common import Results
from hessdiag.errors import ConfigurationError


def command(
    results: Results = Path("results"),
    resamples: Annotated[
        int | None, typer.Option(help="Of bootstrap and permutation; as the rules say by default.")
    ] = None,
) -> int:
    """Draw every figure and table into RESULTS/figures, judge the claims, and write RESULTS/gallery.html.

    What has no results yet is listed with the command that makes them. Nothing is trained.
    """
    from experiments.figures import gallery
    from experiments.figures.build import build

    if resamples is not None and resamples < 100:
        raise ConfigurationError(f"--resamples {resamples}: at least 100, for intervals at 95%")
    built = build(results, results / "figures", resamples=resamples)
    gallery.write(built, results / "gallery.html")
    for picture in built.pictures:
        if picture.path is None:
            print(f"missing  {picture.figure}: {picture.command}")
        else:
            missing = f"; {picture.missing}" if picture.missing else ""
            print(f"drawn    {picture.path}.png ({picture.caption}{missing})")
    counts: dict[str, int] = {}
    for verdict in built.verdicts.values():
        counts[verdict.verdict] = counts.get(verdict.verdict, 0) + 1
    print("verdicts " + ", ".join(f"{number} {word}" for word, number in sorted(counts.items())))
    print(results / "gallery.html")
    return 0
