"""Freed memory that stays with the process: what a training step gives back, the next one takes again.

glibc returns large freed blocks to the system at once, so every step of a CPU run faulted thousands of pages in anew
(about 6,000 a step of ResNet-18 of width 16, some 5% of its time).
"""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of <malloc.h>
KEPT = 1 << 30  # bytes free at the heap's end before any go back
LARGEST = 1 << 25  # blocks up to this come from the heap: the most that every glibc takes


def keep_freed_memory() -> bool:
    """Ask glibc for it, for this process; False where there is no such allocator."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(TRIM_THRESHOLD, KEPT)) and bool(mallopt(MMAP_THRESHOLD, LARGEST))
