"""`hessdiag compare`: measurements side by side, with the interval of each ratio."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hessdiag.cli.exits import Outputs, guarded

NAME = "compare"
EXAMPLES = """[bold]Examples[/bold]

hessdiag compare relu.json silu.json mish.json

hessdiag compare a.json b.json --plot curvature.svg     [dim]# norms over max|σ''|[/dim]

For paired ratios, which are narrower, let the measurements share seed, plan and number of replicates:

hessdiag measure a.pt --json a.json --min-replicates 24 --max-replicates 24

hessdiag measure b.pt --json b.json --min-replicates 24 --max-replicates 24 --plan a.json"""


@guarded
def command(
    files: Annotated[list[Path], typer.Argument(help="JSON files of hessdiag measure; the first is the yardstick.")],
    *,
    confidence: Annotated[float, typer.Option(help="Of the intervals of the ratios.")] = 0.95,
    plot: Annotated[Path | None, typer.Option(help="Draw norms over max|σ''| into this .svg, .png or .pdf.")] = None,
    json: Annotated[str | None, typer.Option(help="Write the comparison as JSON; - for stdout.")] = None,
) -> int:
    """Compare measurements: each norm relative to the first, with an interval."""
    from hessdiag.cli.places import check_places
    from hessdiag.errors import ConfigurationError
    from hessdiag.norm.estimates import check_confidence
    from hessdiag.show.comparison import compare, print_comparison
    from hessdiag.show.result_file import read_document, strict, write_json
    from hessdiag.show.table import terminal

    check_confidence(confidence)
    if len(files) < 2:
        raise ConfigurationError("compare needs at least two JSON files")
    if plot is not None:
        from hessdiag.show import plot as pictures

        pictures.check_name(plot)
    check_places({"--json": json, "--plot": plot}, {f"the result {file}": file for file in files})
    names = [file.stem for file in files]
    labels = [name if names.count(name) == 1 else str(file) for name, file in zip(names, files)]
    rows = compare([(label, read_document(file)) for label, file in zip(labels, files)], confidence=confidence)
    outputs = Outputs()
    content = {"schema": "hessdiag-comparison/1", "confidence": confidence, "rows": [r.to_dict() for r in rows]}
    with outputs.attempt("stdout"):
        if json == "-":
            write_json(json, strict(content))
        else:
            print_comparison(terminal(), rows, confidence=confidence)
    if json not in (None, "-"):
        with outputs.attempt("--json"):
            write_json(str(json), strict(content))
    if plot is not None:
        from math import isfinite

        points = [(r.name, r.max_curvature, r.estimate.rms, r.estimate.low, r.estimate.high) for r in rows]
        shown = [p for p in points if isfinite(p[1]) and p[2] > 0]
        with outputs.attempt("--plot"):
            pictures.save(pictures.over_curvature(shown), plot)
        left_out = [p[0] for p in points if p not in shown]
        if left_out:
            typer.echo(f"not in the plot, for want of a finite max|sigma''|: {', '.join(left_out)}", err=True)
    return outputs.close()
