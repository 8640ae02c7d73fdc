"""One directory per run: config.json and result.json, each whole or absent.

The result is on disk before the store calls the run done. A process killed in between leaves a result that
the next holder of the run adopts instead of computing it again.
"""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.fields import storable
from experiments.sweep.keys import RunConfig
from experiments.sweep.seals import DamagedError, sealed, unsealed
from hessdiag.store.files import BadFileError, clear_stale, read_json, replace_file

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_ADVICE = "the disk is full; free space and start the same command again: nothing that was finished is lost"


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


def write_config(folder: Path, config: RunConfig) -> None:
    """Say in the run's directory what the run is, before it begins."""
    folder.mkdir(parents=True, exist_ok=True)
    clear_stale(folder, seconds=0.0)  # nobody else holds this run
    replace_file(folder / "config.json", (json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n").encode())


def write_result(folder: Path, config: RunConfig, record: Mapping[str, Any], seconds: float) -> None:
    """Put a finished run's record on disk, in one step, with the key and configuration it belongs to."""
    content = {"key": config.key, "config": config.to_dict(), "seconds": seconds, "record": storable(record)}
    text = json.dumps(sealed(content), sort_keys=True, allow_nan=False)
    replace_file(folder / "result.json", text.encode())


def read_result(folder: Path, config: RunConfig) -> tuple[dict[str, Any], float] | None:
    """The record that `folder` holds for this very configuration, with its seconds; None if there is none."""
    try:
        content, _ = unsealed(read_json(folder / "result.json"))
    except (BadFileError, DamagedError):  # to be done again
        return None
    if content.get("key") != config.key or not isinstance(content.get("record"), dict):
        return None
    seconds = content.get("seconds")
    if json.dumps(content.get("config"), sort_keys=True) != json.dumps(config.to_dict(), sort_keys=True):
        return None
    return content["record"], float(seconds) if isinstance(seconds, (int, float)) else math.nan
