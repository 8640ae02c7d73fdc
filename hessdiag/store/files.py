"""Where every file is opened: read once, whole and within a budget; written in one step or not at all."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import secrets
import stat
import time
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None  # type: ignore[assignment]

PathLike = str | os.PathLike[str]

JSON_BUDGET = 64 * 2**20
MAX_VALUES = 2_000_000
STALE_SECONDS = 3600.0
_PLAIN = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


class BadFileError(Exception):
    """Why a file was refused, without its name: whoever knows the path and the purpose raises the public
    error.
    """


def shown(value: object, limit: int = 60) -> str:
    """`value` fit for one line of a terminal: names may hold line breaks or megabytes."""
    if isinstance(value, (str, bytes)):
        text = ascii(value[: limit + 1])
    else:
        text = ascii(value) if isinstance(value, (int, float, bool, type(None))) else type(value).__name__
    return text if len(text) <= limit + 2 else text[: limit - 3] + "..." + text[0]


def path_text(path: PathLike) -> str:
    """A path as messages name it: on one line and of bearable length."""
    text = os.fsdecode(path)
    return text if text.isprintable() and len(text) <= 300 else shown(text)


def size_text(count: int) -> str:
    """A number of bytes in the unit that a reader expects: 512 bytes, 3.2 MiB."""
    value, unit = float(count), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{count} bytes" if unit == "bytes" else f"{value:.1f} {unit}"


Judge = Callable[[bytes, bytes, int], None]  # first bytes, last bytes, size of the whole; raises BadFileError


def read_bytes(
    path: PathLike, *, budget: int, accepts: Callable[[bytes], bool] | None = None, judge: Judge | None = None
) -> bytes:
    """The bytes of a regular file, opened once.

    Before the bulk of it is read, `accepts` sees its first 512 bytes and `judge` also its last 65,557.
    Everything after works on these bytes alone, so that a file which changes meanwhile cannot pass one check
    and fail the next. FIFOs, devices and directories are refused without blocking on them.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _PLAIN)
    except FileNotFoundError:
        raise BadFileError("no such file") from None
    except PermissionError:
        raise BadFileError("no permission to read it") from None
    except IsADirectoryError:
        raise BadFileError("a directory, not a file") from None
    except (OSError, ValueError) as error:
        raise BadFileError(f"cannot be opened ({_reason(error)})") from None
    try:
        facts = os.fstat(handle)
        if stat.S_ISDIR(facts.st_mode):
            raise BadFileError("a directory, not a file")
        if not stat.S_ISREG(facts.st_mode):
            raise BadFileError("not a regular file (a pipe, socket or device)")
        if facts.st_size == 0:
            raise BadFileError("the file is empty")
        if facts.st_size > budget:
            raise BadFileError(f"{size_text(facts.st_size)} exceed the limit of {size_text(budget)} for one file")
        with os.fdopen(os.dup(handle), "rb") as stream:
            head = stream.read(512)
            if accepts is not None and not accepts(head):
                raise BadFileError("its first bytes are those of another kind of file")
            if judge is not None:
                stream.seek(max(0, facts.st_size - 65_557))  # as far back as a zip directory's end may lie
                judge(head, stream.read(65_557), facts.st_size)
            stream.seek(0)
            data = stream.read(facts.st_size + 1)
    except OSError as error:
        raise BadFileError(f"cannot be read ({error.strerror or error})") from None
    except MemoryError:
        raise BadFileError(f"no memory to read it ({size_text(facts.st_size)})") from None
    finally:
        os.close(handle)
    if len(data) != facts.st_size:
        raise BadFileError("it changed while it was read")
    return data


def parse_json(data: bytes, *, finite: bool = True, values: int = MAX_VALUES) -> Any:
    """The value of a JSON text: UTF-8, of at most so many values, without NaN and Infinity if `finite`.

    No value of JSON is shorter than the comma or bracket that comes before it, so that counting those bounds time and
    memory before any of it is built.
    """
    count = sum(data.count(sign) for sign in (b",", b"[", b"{"))
    if count > values:
        raise BadFileError(f"its JSON holds about {count} values; the limit is {values}")
    try:
        return json.loads(data.decode(), parse_constant=_no_number if finite else None)
    except RecursionError:
        raise BadFileError("its JSON is nested too deeply") from None
    except ValueError:  # JSON and UTF-8 errors, and integers of thousands of digits
        raise BadFileError("is no JSON") from None
    except MemoryError:
        raise BadFileError("no memory for its JSON") from None


def read_json(path: PathLike, *, budget: int = JSON_BUDGET, values: int = MAX_VALUES) -> Any:
    """`parse_json` of a regular file."""
    return parse_json(read_bytes(path, budget=budget), values=values)


def _no_number(name: str) -> None:
    raise ValueError(name)


def replace_file(path: PathLike, content: bytes | memoryview) -> None:
    """Write `content` to `path`; what the system refuses is an OSError.

    Links are followed. A regular file is replaced in one step, so that a reader finds the old file or the new one and
    never a part (fsync, rename). A character device or a pipe is written through; nothing else is touched.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    if not stat.S_ISREG(mode):
        _write_through(path, mode, content)
        return
    target = Path(os.path.realpath(path))
    temporary, handle = _temporary(target)
    try:
        try:
            _write_all(handle, content)
            os.fsync(handle)
            if fcntl is not None:  # held, and so locked, until the rename
                os.replace(temporary, target)
        finally:
            os.close(handle)
        if fcntl is None:
            os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def nearest_file(path: Path, suffixes: tuple[str, ...]) -> Path | None:
    """The file of one of those suffixes that is called nearly so, where the one that was named is not there."""
    try:
        names = [one.name for one in itertools.islice(path.parent.iterdir(), 1000) if one.suffix in suffixes]
    except (OSError, ValueError):
        return None
    stems = [name for name in names if Path(name).stem == path.name]
    close = stems or get_close_matches(path.name, names, n=1)
    return path.parent / close[0] if close else None


def _temporary(target: Path) -> tuple[Path, int]:
    """A new file beside `target`, open and locked for as long as somebody writes it: see `clear_stale`."""
    while True:
        temporary = target.with_name(f".{target.name[:50]}.{secrets.token_hex(6)}.tmp")
        # O_EXCL with mode 0o666 obeys the user's umask, which tempfile's 0o600 would not.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _PLAIN, 0o666)
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            if os.fstat(handle).st_nlink == 0:  # cleared away before it was locked
                os.close(handle)
                continue
        return temporary, handle


def write_bytes(path: PathLike, content: bytes | memoryview) -> None:
    """As `replace_file`, with the reason of a refusal fit for one line."""
    try:
        replace_file(path, content)
    except (OSError, ValueError) as error:
        raise BadFileError(f"cannot be written ({_reason(error)})") from None


def write_json(path: PathLike, content: Any) -> None:
    """A table as JSON that people may read, in one step."""
    write_bytes(path, (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def check_writable(path: PathLike) -> None:
    """Refuse (BadFileError) now what `write_bytes` would refuse after hours of work.

    For a regular file, there or not, the folder's permission is asked: the file will be replaced, not opened.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    except (OSError, ValueError) as error:
        raise BadFileError(f"cannot be written ({_reason(error)})") from None
    folder = Path(os.path.realpath(path)).parent
    if stat.S_ISDIR(mode):
        raise BadFileError("that is a folder; name a file")
    if not (stat.S_ISREG(mode) or stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)):
        raise BadFileError("a socket or block device; name a file")
    if stat.S_ISREG(mode) and not folder.is_dir():
        raise BadFileError(f"there is no folder {folder}; make it first")
    asked = (folder, os.W_OK | os.X_OK) if stat.S_ISREG(mode) else (path, os.W_OK)
    if not os.access(*asked):
        raise BadFileError("no permission to write there")


def clear_stale(folder: Path) -> None:
    """Remove what writers left that were killed: temporary files that nobody holds locked.

    A dead process holds no lock, a live one its own until the file has its name: no clock, which may jump, is asked.
    Where there are no locks, files untouched for an hour go.
    """
    for stale in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if fcntl is None:
                if time.time() - stale.stat().st_mtime >= STALE_SECONDS:
                    stale.unlink()
                continue
            handle = os.open(stale, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | _PLAIN)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                stale.unlink()
            finally:
                os.close(handle)


def _write_all(handle: int, content: bytes | memoryview) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(handle, left[: 1 << 26]) :]


def _write_through(path: PathLike, mode: int, content: bytes | memoryview) -> None:
    """Into a device or a pipe, which a rename would destroy; a pipe without a reader is refused, not waited for."""
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "that is a folder")
    if not (stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)):
        raise OSError(errno.EINVAL, "a socket or block device")
    try:
        handle = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | _PLAIN)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "a pipe that nobody reads") from None
        raise
    try:
        os.set_blocking(handle, True)
        _write_all(handle, content)
    finally:
        os.close(handle)


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
