"""What the JSON of a measurement may hold: every field that is read later, with its range.

A check takes a value and its place in the document, and raises BadFileError. Fields that are not named here pass: a
later version may write more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from hessdiag.store.files import BadFileError, shown

Check = Callable[[Any, str], None]
BOUNDS = {"inf": math.inf, "-inf": -math.inf, None: math.nan}


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    """A float as strict JSON writes it (null is NaN, infinities are strings), in [low, high] unless it is NaN."""

    def check(value: Any, where: str) -> None:
        known = value is None or (isinstance(value, str) and value in BOUNDS)
        plain = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not known and not (plain and abs(value) < 1e300):
            raise BadFileError(f"{where} is {shown(value)}, no number")
        found = BOUNDS[value] if known else float(value)
        if found < low or found > high:
            raise BadFileError(f"{where} is {shown(value)}, not in [{low:g}, {high:g}]")

    return check


def whole(low: int = 0, high: int = 1 << 53) -> Check:
    """A whole number in [low, high]."""

    def check(value: Any, where: str) -> None:
        if type(value) is not int or not low <= value <= high:
            raise BadFileError(f"{where} is {shown(value)}, not a whole number in [{low}, {high}]")

    return check


def text(value: Any, where: str) -> None:
    """Text of bearable length."""
    if not isinstance(value, str) or len(value) > 10_000:
        raise BadFileError(f"{where} is {shown(value)}, no short text")


def flag(value: Any, where: str) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise BadFileError(f"{where} is {shown(value)}, neither true nor false")


def anything(value: Any, where: str) -> None:
    """What nobody reads back."""


def rows(of: Check, length: int | None = None) -> Check:
    """A list."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or length not in (None, len(value)):
            raise BadFileError(f"{where} is no list" + (f" of {length}" if length else ""))
        for index, item in enumerate(value):
            of(item, f"{where}[{index}]")

    return check


def table(of: Check) -> Check:
    """Names and one kind of value."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise BadFileError(f"{where} is no table")
        for key, item in value.items():
            of(item, f"{where}.{shown(key)[1:-1]}")

    return check


def fields(needed: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """A table with these fields; an optional one may be absent or null."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise BadFileError(f"{where} is no table")
        for key, of in needed.items():
            if key not in value:
                raise BadFileError(f"{where} lacks {key}")
            of(value[key], f"{where}.{key}")
        for key, of in (optional or {}).items():
            if value.get(key) is not None:
                of(value[key], f"{where}.{key}")

    return check


def setting(value: Any, where: str) -> None:
    """An option as it was given: a word, a number, or a few numbers."""
    if isinstance(value, list):
        rows(number())(value, where)
        if len(value) > MOST_SETTINGS:
            raise BadFileError(f"{where} is a list of {len(value)}")
    else:
        (text if isinstance(value, str) else number())(value, where)


MOST_SETTINGS = 1000
CONFIDENCE = number(1e-9, 1 - 1e-9)
_NORM = fields(
    {
        "square": number(),
        **{key: number(0) for key in ("square_error", "norm", "rms", "mean_scaled", "low", "high", "noise_share")},
        "participation": number(0),
        "entries": whole(1),
        **{key: whole(0) for key in ("replicates", "dof")},
        "confidence": CONFIDENCE,
        "sequential": flag,
        "status": text,
        "flags": rows(text),
        "deleted": rows(number()),
        "sizes": rows(whole(1)),
    }
)


def norm(value: Any, where: str) -> None:
    """A NormEstimate, which also agrees with itself."""
    _NORM(value, where)
    if len(value["deleted"]) != len(value["sizes"]) or sum(value["sizes"]) != value["replicates"]:
        raise BadFileError(f"{where} has {len(value['deleted'])} deleted groups, and groups of {value['sizes'][:8]}")
    if isinstance(value["low"], float) and isinstance(value["high"], float) and value["low"] > value["high"]:
        raise BadFileError(f"{where} has an interval from {value['low']} to {value['high']}")


RATIO = fields({"value": number(), "low": number(), "high": number()})
SUMMARY = fields(
    {"total": norm},
    {"gauss_newton": norm, "functional": norm, "share_gauss_newton": RATIO, "share_functional": RATIO, "cosine": RATIO},
)
PLAN = fields(
    {"method": text},
    {
        "gauss_newton": text,
        "groups": whole(4, 1024),
        "at_once": whole(1, 4096),
        "sample_groups": table(whole(1, 1 << 20)),
        "balance": table(number()),
        "deflate": whole(0, 4096),
        "probes": table(whole(1, 1 << 20)),
        "probe_rank": whole(0, 4096),
        "parts": flag,
        "reason": text,
    },
)
CLI = fields(
    {},
    {
        "checkpoint": fields({}, {"config": table(anything), "sha256": text, "name": text}),
        "data": fields({"sha256": text}, {"name": text, "samples": whole(1)}),
        "perturbation": fields({"spec": text}),
        **dict.fromkeys(("loss", "normalize", "output", "forward"), text),
    },
)
CURVATURE = {"layer": text, "activation": text, "max_curvature": number(0), "mean": number(), "largest": number()}
MEASUREMENT = fields(
    {
        **{key: number(0) for key in ("rms", "mean_scaled", "seconds")},
        "interval": rows(number(0), 2),
        "confidence": CONFIDENCE,
        "status": text,
        "notes": rows(text),
        **{key: whole(1) for key in ("samples", "parameters")},
        "replicates": whole(0),
        "loss": number(),
        "norm": SUMMARY,
        **{key: table(SUMMARY) for key in ("layers", "groups")},
        "invariant_groups": table(norm),
        "trace": fields({**{key: number() for key in ("value", "low", "high")}, "error": number(0)}),
        "effective_curvature": rows(fields(CURVATURE)),
        "plan": PLAN,
        "history": rows(rows(number(0), 4)),
        "provenance": fields(
            {"seed": whole(0, 1 << 64)},
            {
                **dict.fromkeys(("loss", "target", "dtype"), text),
                "loss_options": table(setting),
                "l2": number(0),
                **dict.fromkeys(("data_fingerprint", "data_order"), number()),
            },
        ),
    },
    {"invariant": norm, "audit": fields({"passed": flag}), "cli": CLI},
)
