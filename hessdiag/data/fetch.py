"""Download a data set, check it, unpack it: `hessdiag data NAME`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from urllib.parse import urlsplit

from hessdiag.data.cifar import by_hand, load_cifar, members
from hessdiag.data.published import SOURCES, Source
from hessdiag.errors import DataError, UnknownNameError, nearest
from hessdiag.store.files import BadFileError, read_bytes, write_bytes


def default_root() -> Path:
    """The data folder: $HESSDIAG_DATA, or ~/.cache/hessdiag."""
    told = os.environ.get("HESSDIAG_DATA")
    return Path(told).expanduser() if told else Path("~/.cache/hessdiag").expanduser()


def fetch(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    registry: Mapping[str, Source] = SOURCES,
    progress: bool = True,
) -> Path:
    """Download the python archive of `name` into `root` (once), verify its md5, unpack it; its folder.

    An archive or folder that already lies there is taken as it is. Progress goes to stderr.
    """
    if name == "digits":
        raise DataError("digits come with scikit-learn; there is nothing to fetch")
    if name not in registry:
        raise UnknownNameError(f"no data set {name!r} to fetch; {nearest(name, sorted(registry))}")
    source = registry[name]
    layout = source.layouts[0]
    base = Path(root) if root is not None else default_root()
    folder, archive = base / layout.folder, base / layout.archive
    if not all((folder / file).is_file() for files in layout.files.values() for file in files):
        if not archive.is_file():
            _download(source, base, progress)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for file, content in members(read_bytes(archive, budget=2**30), layout):
                write_bytes(folder / file, content)
        except BadFileError as reason:
            raise DataError(f"{archive}: {reason}; remove it and fetch again") from None
        except OSError as error:
            raise DataError(f"{folder}: cannot be written ({error.strerror or error})") from None
    for split in layout.files:
        load_cifar(source, split, base)
    return folder


def _download(source: Source, base: Path, progress: bool) -> None:
    import pooch

    layout = source.layouts[0]
    bar = _Bar(layout.archive) if progress else False
    made = [folder for folder in (base, *base.parents) if not folder.exists()]
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel(logging.WARNING)  # its own notices would mix with the bar
    try:
        pooch.retrieve(
            url=source.address + layout.archive,
            known_hash=f"md5:{layout.md5}",
            fname=layout.archive,
            path=base,
            downloader=pooch.HTTPDownloader(progressbar=bar, timeout=30),
        )
    except Exception as error:  # requests, urllib3, OSError, pooch's ValueError on a wrong hash
        _clear(made)
        reason = _reason(error, source)
        raise DataError(f"cannot fetch {source.name} into {base} ({reason}); {by_hand(source)}") from None
    finally:
        logger.setLevel(level)


def _reason(error: Exception, source: Source) -> str:
    """Why, in a few words: requests tells of pools, retries and objects."""
    from requests.exceptions import ConnectionError, Timeout

    if isinstance(error, (ConnectionError, Timeout)):
        return f"no connection to {urlsplit(source.address).netloc}"
    return shorten(str(error), 160, placeholder=" ...") or type(error).__name__


def _clear(folders: list[Path]) -> None:
    """Take away folders that were made for a file which never came, the inner ones first."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # never made, or no longer empty
            return


class _Bar:
    """A progress bar on stderr with the four calls that pooch makes (it would otherwise need tqdm)."""

    def __init__(self, label: str) -> None:
        self.label, self.total, self.done, self.shown = label, 0, 0, -1

    def update(self, count: int) -> None:
        """`count` more bytes have come."""
        self.done += count
        percent = 100 * self.done // self.total if self.total else 0
        if percent != self.shown:
            self.shown = percent
            filled = percent * 30 // 100
            told = f"{self.done / 2**20:.1f} of {self.total / 2**20:.1f} MiB"
            print(
                f"\r{self.label} [{'#' * filled}{'.' * (30 - filled)}] {told}",
                end="",
                file=sys.stderr,
                flush=True,
            )

    def reset(self) -> None:
        """Pooch rewinds before it sets the final state."""
        self.done = 0

    def close(self) -> None:
        """End the line."""
        print(file=sys.stderr)
