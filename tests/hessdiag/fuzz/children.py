"""What the processes that a loader starts have cost: processor time and peak memory.

As a program it runs another command and notes the most memory that held. A child of a large process counts its
parent's memory as its own until it becomes another program, so that `ru_maxrss` is blind below the parent's peak; a
child of this small one does not.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable

Command = Callable[[str, int], "list[str]"]


def spent() -> float:
    """Processor seconds of this process and of those that it started and that ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def noting(command: Command, note: str) -> Command:
    """The same command, whose peak memory is added to the file `note`."""
    return lambda mode, size: [sys.executable, "-I", "-S", os.path.abspath(__file__), note, *command(mode, size)]


def most_held(note: str) -> int:
    """Bytes of the largest so noted since this was last asked; 0 if there was none."""
    try:
        with open(note) as file:
            held = max(map(int, file.read().split()), default=0)
    except FileNotFoundError:
        return 0
    os.unlink(note)
    return held


def run(note: str, command: list[str]) -> None:
    """Become the outcome of `command`: its exit code or its signal."""
    child = os.posix_spawn(command[0], command, os.environ)
    _, status, usage = os.wait4(child, 0)
    with open(note, "a") as file:
        file.write(f"{usage.ru_maxrss << 10}\n")  # Linux counts in KiB
    if os.WIFSIGNALED(status):
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2:])
