"""`python -m experiments card`: the best use of one GPU for a few minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    seconds: Annotated[float, typer.Option(help="When to end, whatever is under way.")] = 540.0,
    data: Annotated[Path | None, typer.Option(help="Folder with CIFAR-10 in any layout, parts of strips too.")] = None,
    results: Annotated[Path, typer.Option(help="Exported results: what they hold is left out.")] = Path("results"),
    out: Annotated[Path | None, typer.Option(help="Where new results go; by default to the others.")] = None,
    store: Annotated[Path, typer.Option(help="Directory for what is under way.")] = Path("runs/card"),
    workers: Annotated[int | None, typer.Option(help="Runs of a sweep at a time.", min=1)] = None,
    rehearse: Annotated[bool, typer.Option(help="Every part at a tiny size on the CPU; numbers say nothing.")] = False,
) -> int:
    """Measure on this GPU, in order of worth, what nobody has measured yet; the same command goes on where it ended.

    Example: python -m experiments card --seconds 540 --data parts
    """
    from experiments import card

    card.check(seconds=seconds, rehearse=rehearse)
    if rehearse:
        results, out, store = store / "nothing", out or store / "rehearsal", store / "rehearsal-store"
    places = card.Places(results, out or results, store)
    failures = card.run(
        places,
        seconds=seconds,
        folder=data,
        rehearse=rehearse,
        workers=card.WORKERS if workers is None else workers,
        tell=lambda text: print(text, flush=True),
    )
    print(f"results: {places.out}")
    return 1 if failures else 0
