"""Rounds of a loop until the interval is narrow enough, or something else ends them."""

from __future__ import annotations

from hessdiag.measuring.loop import Loop
from hessdiag.measuring.ranks import World
from hessdiag.norm import enough
from hessdiag.norm.replicates import CAPACITY


def run(loop: Loop, rtol: float, confidence: float, low: int, high: int, seconds: float | None) -> str:
    """The loop to its end; returns the status."""
    World.stops_together, high = loop.world.size > 1, min(high, CAPACITY)
    try:
        loop.run_known()
        check_at = _first_check(loop.done, low)
        while loop.streams:
            if loop.done >= check_at or loop.done >= high:
                norm = loop.current(confidence)
                loop.tell_norm(norm)
                loop.save()
                if enough(norm, rtol=rtol, min_replicates=low):
                    return norm.status
                if loop.done >= high:
                    most = ", the most there can be," if high == CAPACITY else ""
                    return f"{norm.status}; stopped at {loop.done} replicates{most} before rtol={rtol:g} was reached"
                check_at = _next_check(loop.done)
            late = loop.meet(seconds is not None and loop.seconds > seconds)
            if late and loop.done >= 2:
                found = loop.current(confidence).status
                return f"{found}; stopped after {loop.seconds:.0f} s before rtol={rtol:g} was reached"
            loop.run_round(min(loop.plan.at_once, max(check_at - loop.done, 1), high - loop.done))
    except KeyboardInterrupt:
        loop.save()
        if loop.done < 2:
            if loop.goes_on:
                raise KeyboardInterrupt(f"interrupted before there was a result; {loop.goes_on}") from None
            raise
        loop.abandon_round()
        return f"{loop.current(confidence).status}; interrupted before rtol={rtol:g} was reached"
    return "exact"


def _next_check(done: int) -> int:
    """Replicates at which to look again after having looked at `done`."""
    return max(done + 1, int(done * 1.1))


def _first_check(done: int, low: int) -> int:
    """The first look at or after `done` of those an uninterrupted run takes: 10, 11, ..., 20, 22, ..."""
    check = low
    while check < done:
        check = _next_check(check)
    return check
