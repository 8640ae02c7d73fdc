"""Who holds a run: a process that others on the same machine can see to be alive or dead.

A lease alone is a guess about time. Where the holder runs on the same machine and in the same process
namespace, its process id together with the moment that process started is knowledge, and a run is taken
back at once when its holder is dead and never while it lives, however long it stalls. For a holder
elsewhere the lease decides.
"""

from __future__ import annotations

import os
import platform
import secrets
import uuid
from dataclasses import dataclass
from pathlib import Path


def machine() -> str:
    """One name per booted system and process namespace: within it, process ids mean the same thing."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:
        boot, space = f"{uuid.getnode():x}", ""
    return f"{platform.node()}/{boot[:8]}/{space}"


def started(pid: int) -> str | None:
    """The kernel's start time of process `pid` (field 22 of its stat); "" where unknown, None when it is
    dead.

    A missing file proves no death: there may be no /proc, or it may hide other users' processes (hidepid).
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except OSError:
            return ""
        return ""
    fields = text.rpartition(")")[2].split()  # the name in parentheses may hold blanks and parentheses itself
    return None if fields[0] in "ZX" else fields[19]


@dataclass(frozen=True)
class Owner:
    """One holder of runs; `text` is what the store keeps."""

    machine: str
    pid: int
    started: str
    token: str

    @classmethod
    def current(cls) -> Owner:
        """This process, under a fresh token, so that two holders in one process stay apart."""
        return cls(machine(), os.getpid(), started(os.getpid()) or "", secrets.token_hex(4))

    @classmethod
    def parse(cls, text: str) -> Owner:
        """The inverse of `text`."""
        name, pid, start, token = text.rsplit("|", 3)
        return cls(name, int(pid), start, token)

    @property
    def text(self) -> str:
        """The form in which the store keeps it."""
        return f"{self.machine}|{self.pid}|{self.started}|{self.token}"

    @property
    def alive(self) -> bool | None:
        """Whether its process runs; None where this machine cannot know."""
        if self.machine != machine():
            return None
        now = started(self.pid)
        if now is None or now == self.started:
            return now is not None
        return False if now and self.started else None  # another process has the number; or nobody may look
