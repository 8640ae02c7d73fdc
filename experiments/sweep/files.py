"""What stands in a run's directory, each file whole or absent, and who holds the run.

    lock            locked (flock) by the process that does the run, for as long as it lives
    config.json     what the run is, for people
    attempts.json   every time it was taken up, by whom, and how that ended
    result.json     its record, under a seal: a run is done when this is there

The kernel ends a lock with its process, killed or not, so that nothing here depends on a clock.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.fields import storable
from experiments.sweep.keys import RunConfig
from experiments.sweep.seals import DamagedError, sealed, unsealed
from hessdiag.errors import StoreError
from hessdiag.store.files import BadFileError, clear_stale, read_json, replace_file

try:
    import fcntl
except ImportError:  # Windows: stores are read there, and no run is done
    fcntl = None  # type: ignore[assignment]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_ADVICE = "the disk is full; free space and start the same command again: nothing that was finished is lost"
RESULT, LOCK, ATTEMPTS = "result.json", "lock", "attempts.json"
LOOKERS = 10_000
"""How often one who only looks is waited for."""

Attempt = dict[str, Any]  # worker, started, outcome (None: not ended by itself), error


class GoneError(StoreError):
    """A store's folder is no longer there."""

    def __init__(self, root: Path) -> None:
        super().__init__(
            f"store {root}: it is no longer there (removed, moved, or its disk is not mounted): put it back, and the "
            "same command goes on; without it, the same command begins anew and takes up what was finished since, in "
            "runs/"
        )


def disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what it arose from, says that no more bytes fit."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if "disk is full" in str(error) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def explained(root: Path) -> Iterator[None]:
    """What the system refuses in a store, in one line that says what to do."""
    try:
        yield
    except OSError as error:
        refusal = f"it cannot be written ({error.strerror or error}); choose another with --store"
        raise StoreError(f"store {root}: {FULL_ADVICE if disk_full(error) else refusal}") from error


def lock(path: Path) -> int | None:
    """A handle that holds `path` until it is closed or this process ends; None where another process holds it.

    Who only looks shares it for a moment, and is waited for; who holds it shares with nobody.
    """
    handle = _opened(path)
    try:
        for _ in range(LOOKERS):
            if _taken(handle, fcntl.LOCK_EX):
                return handle
            if not _taken(handle, fcntl.LOCK_SH):
                break
            fcntl.flock(handle, fcntl.LOCK_UN)
            time.sleep(0.001)
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


def _taken(handle: int, how: int) -> bool:
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` while the block runs; wait for it first."""
    handle = _opened(path)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _opened(path: Path) -> int:
    if fcntl is None:
        raise StoreError(f"{path}: this system has no flock; run sweeps on Linux or macOS")
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


def held(folder: Path) -> bool:
    """Whether a living process holds the run."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        return fcntl is not None and not _taken(handle, fcntl.LOCK_SH)
    finally:
        os.close(handle)


def write_config(folder: Path, config: RunConfig) -> None:
    """Say in the run's directory what the run is, before it begins."""
    clear_stale(folder)
    replace_file(folder / "config.json", (json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n").encode())


def write_result(folder: Path, config: RunConfig, record: Mapping[str, Any], seconds: float) -> None:
    """Put a finished run's record on disk, in one step, with the key and configuration it belongs to.

    A folder that went meanwhile is made anew for it.
    """
    content = {"key": config.key, "config": config.to_dict(), "seconds": seconds, "record": storable(record)}
    text = json.dumps(sealed(content), sort_keys=True, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / RESULT, text.encode())


def read_result(folder: Path, config: RunConfig) -> tuple[dict[str, Any], float, bool]:
    """The record that `folder` holds, its seconds, and whether it had a seal; DamagedError where it is not whole or of
    another configuration.
    """
    try:
        content, whole = unsealed(read_json(folder / RESULT))
    except BadFileError as reason:
        raise DamagedError(f"damaged: its record {reason}") from None
    if content.get("config") != config.to_dict() or not isinstance(content.get("record"), dict):
        raise DamagedError("damaged: its record is of another configuration")
    seconds = content.get("seconds")
    return content["record"], float(seconds) if isinstance(seconds, (int, float)) else math.nan, whole


def write_attempts(folder: Path, attempts: list[Attempt]) -> None:
    """Keep the history of a run; only who holds it writes."""
    replace_file(folder / ATTEMPTS, (json.dumps(attempts, indent=1) + "\n").encode())


def read_attempts(folder: Path) -> list[Attempt]:
    """The history of a run; none where it cannot be read, since no result depends on it."""
    try:
        found = read_json(folder / ATTEMPTS)
    except BadFileError:
        return []
    known = {"worker": "", "started": None, "outcome": None, "error": None}
    rows = found if isinstance(found, list) else []
    return [{name: row.get(name, value) for name, value in known.items()} for row in rows if isinstance(row, dict)]
