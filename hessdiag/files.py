"""Files from strangers: read once, whole and within a budget; written in one step or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

PathLike = str | os.PathLike[str]


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
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        handle = os.open(path, flags)
    except FileNotFoundError:
        raise BadFileError("no such file") from None
    except PermissionError:
        raise BadFileError("no permission to read it") from None
    except IsADirectoryError:
        raise BadFileError("a directory, not a file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BadFileError(f"cannot be opened ({reason})") from None
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


def replace_file(path: PathLike, content: bytes) -> None:
    """Write `content` to `path` so that a reader finds the old file or the new one, never a part (fsync,
    rename); what the system refuses is an OSError.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    # O_EXCL with mode 0o666 obeys the user's umask, which tempfile's 0o600 would not.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_bytes(path: PathLike, content: bytes) -> None:
    """As `replace_file`, with the reason of a refusal fit for one line."""
    try:
        replace_file(path, content)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BadFileError(f"cannot be written ({reason})") from None
