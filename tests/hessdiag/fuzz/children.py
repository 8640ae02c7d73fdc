"""What the processes that a loader starts have cost: processor time and peak memory."""

from __future__ import annotations

import resource
import time


def spent() -> float:
    """Processor seconds of this process and of those that it started and that ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def most_held() -> int:
    """Bytes of the largest child so far; 0 where that is this process's own memory, which a child counts as its own
    until it has become another program. Linux counts in KiB.
    """
    held = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return held << 10 if held > 1.1 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss else 0
