"""Where results go: to places that can be written to, each to another, and none to what is read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from hessdiag.checkpoint.pretrained import CONFIG
from hessdiag.checkpoint.shards import INDEX, WEIGHTS
from hessdiag.errors import ConfigurationError
from hessdiag.store import files

SHARD = re.compile(r"(pytorch_)?model-\d+-of-\d+\.(bin|safetensors)")


def check_places(outputs: Mapping[str, str | Path | None], inputs: Mapping[str, str | Path | None]) -> None:
    """Refuse outputs (options and their paths) that cannot be written, or of which one would replace another's file.

    Nor may one replace an input: the file itself or, of a folder with weights, one of its own.
    """
    taken: dict[str, str] = {}
    read = {what: os.path.realpath(path) for what, path in inputs.items() if path is not None}
    for option, path in outputs.items():
        if path is None or path == "-":
            continue
        check_writable(Path(path), option)
        if os.path.exists(path) and not os.path.isfile(path):  # devices and pipes are written through
            continue
        if option != "--resume":  # is read before it is written, and refused if it is something else
            for what, other in read.items():
                if _replaces(os.path.realpath(path), other):
                    raise ConfigurationError(f"{option} {path} would replace {what}: name another file")
        before = next((name for name, other in taken.items() if _same(other, path)), None)
        if before is not None:
            raise ConfigurationError(f"{option} {path} would replace {before} {taken[before]}: name another file")
        taken[option] = str(path)


def check_writable(path: Path, option: str) -> None:
    """Refuse an output path now rather than after hours of work."""
    try:
        files.check_writable(path)
    except files.BadFileError as reason:
        raise ConfigurationError(f"{option} {path}: {reason}") from None


def _same(one: str | Path, other: str | Path) -> bool:
    if os.path.exists(one) and os.path.exists(other):
        return os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other)


def _replaces(output: str, read: str) -> bool:
    """Whether it is the file that is read, or weights or config of the folder, or beside the index, that is."""
    if _same(output, read):
        return True
    folder = read if os.path.isdir(read) else os.path.dirname(read) if read.endswith(INDEX) else None
    name = os.path.basename(output)
    its_own = name in (*WEIGHTS, CONFIG) or SHARD.fullmatch(name) is not None
    return folder is not None and its_own and os.path.dirname(output) == folder and os.path.exists(output)
