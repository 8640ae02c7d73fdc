"""How long the parts of a run took."""

from __future__ import annotations

import time


class Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """The seconds since the lap before are those of `name`."""
        now = time.monotonic()
        self.laps[name], self._last = round(now - self._last, 3), now
