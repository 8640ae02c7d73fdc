"""A picture of a diagonal itself, entry by entry (the pictures of what was measured of it are in `plot`)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from matplotlib import rc_context

from hessdiag.show.plot import FAINT, INNER, STYLE, TOTAL, WIDE, Figure

BINS = 40


def histogram(
    total: Mapping[str, torch.Tensor], errors: Mapping[str, torch.Tensor], *, exact: bool, width: float = WIDE
) -> Figure:
    """Entries of the diagonal, negative and positive ones on logarithmic axes, and their typical standard error.

    The entries of an estimate are its truth plus noise: their histogram is wider than that of the truth, and the
    figure says so and shows how large the noise is.
    """
    long = width == WIDE
    values = torch.cat([t.detach().reshape(-1).double().cpu() for t in total.values()])
    noise = torch.cat([t.detach().reshape(-1).double().cpu() for t in errors.values()])
    with rc_context(STYLE):
        figure = Figure(figsize=(width, 2.9))
        left, right = figure.subplots(1, 2, sharey=True)
        sizes = values.abs()
        shown = sizes[sizes > 0]
        if not len(shown):
            left.text(0.5, 0.5, "every entry is zero", ha="center", transform=left.transAxes)
            return figure
        top = math.log10(float(shown.max()))
        low = max(math.log10(float(shown.min())), top - 12.0)
        edges = (
            [10 ** (low + (top - low) * k / BINS) for k in range(BINS + 1)]
            if top > low
            else [0.5 * 10**top, 2 * 10**top]
        )
        zero = int((sizes < edges[0]).sum())
        for axis, chosen, label, colour in (
            (left, -values[values < 0], f"{long * 'negative entries, '}-h", INNER),
            (right, values[values > 0], f"{long * 'positive entries, '}h", TOTAL),
        ):
            counts = _counts(chosen, edges)
            axis.bar(
                edges[:-1],
                counts,
                width=[b - a for a, b in itertools.pairwise(edges)],
                align="edge",
                color=colour,
            )
            axis.set_xscale("log")
            axis.set_xlim(edges[0], edges[-1])
            axis.set_title(f"{label}: {int((chosen > 0).sum()):,}", fontsize=9)
        left.invert_xaxis()
        left.set_ylabel("entries")
        typical = float(noise.median()) if len(noise) else 0.0
        if not exact and typical > 0:
            for axis in (left, right):
                axis.axvline(typical, color=FAINT, linestyle="--", linewidth=1)
            axis, side, away = (right, "left", 4) if long else (left, "right", -4)
            axis.annotate(
                "median standard\nerror of an entry",
                (typical, 0.97),
                xycoords=("data", "axes fraction"),
                xytext=(away, 0),
                ha=side,
                textcoords="offset points",
                va="top",
                fontsize=7.5,
                color="#555b66",
            )
            figure.suptitle("broadened by noise: entries are estimates", fontsize=9, color=INNER)
        if zero:
            figure.supxlabel(f"{zero:,} entries smaller than {edges[0]:.1e} not shown", fontsize=8)
        return figure


def _counts(values: torch.Tensor, edges: Sequence[float]) -> list[float]:
    bounds = torch.tensor(edges, dtype=torch.float64)
    bounds[-1] *= 1 + 1e-12  # the largest entry belongs to the last bin
    found: list[float] = torch.histogram(values, bounds).hist.tolist()
    return found
