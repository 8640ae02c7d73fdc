"""Numbers and names as a reader wants them: short, honest about digits, harmless to a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def value(x: Any, digits: int = 4) -> str:
    """A number of a document: `digits` significant ones; n/a for what is not known."""
    if x is None or (isinstance(x, float) and math.isnan(x)):
        return "n/a"
    if isinstance(x, str):
        return x
    if isinstance(x, float) and math.isinf(x):
        return "inf" if x > 0 else "-inf"
    return f"{x:.{digits}g}"


def digits(low: Any, high: Any, least: int = 4, most: int = 9) -> int:
    """Significant digits that tell the ends of an interval apart by two digits, where floats can."""
    ends = (low, high)
    if not all(isinstance(x, float) and math.isfinite(x) for x in ends) or not high > low or high <= 0:
        return least
    return min(max(math.ceil(math.log10(high / (high - low))) + 2, least), most)


def interval(low: Any, high: Any, least: int = 4) -> str:
    """[low, high], with as many digits as it takes to tell them apart."""
    count = digits(low, high, least)
    return f"[{value(low, count)}, {value(high, count)}]"


def spread(estimate: dict[str, Any]) -> str:
    """Half the interval relative to the norm, or what stands in its place."""
    rms, low, high = estimate["rms"], estimate["low"], estimate["high"]
    if estimate["status"] == "exact":
        return "exact"
    if not isinstance(rms, float) or not isinstance(low, float) or not isinstance(high, float):
        return "n/a"
    if rms == 0.0:
        return "exact" if high == 0.0 else "n/a"
    half = 50.0 * (high - low) / rms
    if half < 1e-9:  # rounding alone: nothing random reaches this parameter
        return "exact"
    return f"±{half:.2g}%" if half < 1000 else ">1000%"


def loss(facts: Mapping[str, Any]) -> str:
    """The loss of a `provenance` with its options, as far as these are told."""
    name, options = str(facts.get("loss", "?")), facts.get("loss_options") or {}
    told = ", ".join(f"{key}={_setting(item)}" for key, item in options.items())
    return plain(f"{name} ({told})" if told else name)


def _setting(item: Any) -> str:
    if isinstance(item, (list, tuple)):
        return f"[{', '.join(map(_setting, item))}]"
    return value(item, 6) if isinstance(item, float) else str(item)


def percent(ratio: dict[str, Any] | None) -> str:
    """A share in per cent."""
    if ratio is None or not isinstance(ratio["value"], (int, float)):
        return "n/a"
    share = 100.0 * ratio["value"]
    return f"{share:.3g}%" if share == 0 or abs(share) >= 0.01 else f"{share:.1e}%"


ABOVE = "above 100%: a relative size, no share; the two parts cancel in the whole"


def is_above(ratio: dict[str, Any] | None) -> bool:
    """Whether what is called a share is larger than the whole, so that the name would mislead."""
    return ratio is not None and isinstance(ratio["value"], (int, float)) and ratio["value"] > 1 + 1e-9


def percent_interval(ratio: dict[str, Any] | None) -> str:
    """The interval of a share in per cent, empty where the share is exact."""
    if ratio is None or not isinstance(ratio["value"], (int, float)) or ratio["low"] == ratio["high"]:
        return ""
    ends = [x if isinstance(x, str) else f"{100.0 * x:.3g}" for x in (ratio["low"], ratio["high"])]
    return f"[{ends[0]}%, {ends[1]}%]"


def plain(text: Any, limit: int = 400) -> str:
    """Text out of a file, with whatever could steer a terminal replaced."""
    kept = "".join(c if c.isprintable() else "?" for c in str(text)[: limit + 1])
    return kept if len(kept) <= limit else kept[: limit - 1] + "…"


def counted(count: int, one: str, many: str | None = None) -> str:
    """1 sample, 2 samples, 1,000 samples."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def seconds(x: float) -> str:
    """A duration in the unit that fits."""
    if x < 1:
        return f"{1000 * x:.0f} ms"
    if x < 120:
        return f"{x:.1f} s"
    if x < 7200:
        return f"{x / 60:.0f} min"
    return f"{x / 3600:.1f} h" if x < 48 * 3600 else f"{x / 86400:.1f} days"


def bytes_(x: float) -> str:
    """A size in the unit that fits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if x < 1000 or unit == "TB":
            return f"{x:.0f} {unit}" if unit == "B" or x >= 100 else f"{x:.1f} {unit}"
        x /= 1000
    raise AssertionError
