"""The store's tables, who may open them, and how an older version becomes the present one."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from experiments.sweep.files import FULL_ADVICE, disk_full
from hessdiag.errors import StoreError

APPLICATION = 0x48445357  # "HDSW": a file of another program is told apart before anything is written
VERSION = 2
NAME = "store.sqlite"
WAIT_SECONDS = 60.0

TABLES = (
    """CREATE TABLE sweeps (name TEXT PRIMARY KEY, tier TEXT NOT NULL, figure TEXT NOT NULL,
       title TEXT NOT NULL, added REAL NOT NULL)""",
    """CREATE TABLE runs (key TEXT PRIMARY KEY, config TEXT NOT NULL, label TEXT NOT NULL,
       state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'done', 'failed')) DEFAULT 'queued',
       failures INTEGER NOT NULL DEFAULT 0, attempt INTEGER NOT NULL DEFAULT 0,
       owner TEXT, lease REAL, started REAL, finished REAL, seconds REAL, error TEXT, record TEXT,
       interruptions INTEGER NOT NULL DEFAULT 0)""",
    """CREATE TABLE members (sweep TEXT NOT NULL REFERENCES sweeps (name), position INTEGER NOT NULL,
       key TEXT NOT NULL REFERENCES runs (key), variant TEXT NOT NULL DEFAULT '', PRIMARY KEY (sweep,
       key))""",
    "CREATE INDEX members_by_key ON members (key)",
    """CREATE TABLE attempts (key TEXT NOT NULL REFERENCES runs (key), number INTEGER NOT NULL,
       owner TEXT NOT NULL, started REAL NOT NULL, ended REAL,
       outcome TEXT, error TEXT, PRIMARY KEY (key, number))""",
)


def _one_to_two(connection: sqlite3.Connection) -> None:
    """Version 1 counted failures only, kept no history of attempts and knew no variants."""
    connection.execute("ALTER TABLE members ADD COLUMN variant TEXT NOT NULL DEFAULT ''")
    connection.execute("ALTER TABLE runs ADD COLUMN interruptions INTEGER NOT NULL DEFAULT 0")
    connection.execute(TABLES[-1])
    connection.execute(
        "INSERT INTO attempts SELECT key, attempt, coalesce(owner, 'unknown'), coalesce(started, 0),"
        " finished, state, error FROM runs WHERE attempt > 0"
    )


MIGRATIONS: dict[int, Callable[[sqlite3.Connection], None]] = {1: _one_to_two}


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into one line that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        text = str(error)
        if disk_full(error):
            reason = FULL_ADVICE
        elif "readonly" in text or "unable to open" in text:
            reason = "it cannot be written; choose another directory with --store or change its permissions"
        elif "not a database" in text or "malformed" in text:
            reason = (
                "it is not a database of this program, or damaged; choose another directory with --store, or move "
                f"{NAME}* out of this one: what is finished is found again in runs/"
            )
        elif "locked" in text:
            reason = f"another process has held it for {WAIT_SECONDS:.0f} s; wait for it or end it"
        else:
            reason = text
        raise StoreError(f"store {path}: {reason}") from error


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection, path: Path) -> Iterator[None]:
    """All of the statements within, or none; the write lock is taken first, so that what is read stays
    true.
    """
    with explained(path):
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")


def connect(root: Path, *, write: bool = True) -> sqlite3.Connection:
    """Open the store in directory `root`, making or migrating it; refuse what is not ours before any work
    is done.
    """
    path = root / NAME
    if write:
        try:
            root.mkdir(parents=True, exist_ok=True)
            strangers = sorted(item.name for item in root.iterdir())
            if strangers and NAME not in strangers and not set(strangers) <= {"runs", "logs"}:
                raise StoreError(
                    f"store {root}: the directory holds other files ({strangers[0]}, ...) and no store; "
                    "name a new or empty directory with --store"
                )
            (root / "runs").mkdir(exist_ok=True)
            probe = root / "runs" / ".writable"
            probe.write_bytes(b"1")
            probe.unlink(missing_ok=True)
        except OSError as error:
            refusal = f"it cannot be written ({error.strerror or error}); choose another with --store"
            raise StoreError(f"store {root}: {FULL_ADVICE if disk_full(error) else refusal}") from error
    elif not path.exists() or (path.is_file() and path.stat().st_size == 0):
        raise StoreError(f"store {root}: there is none; `python -m experiments sweep FILE --store {root}` makes one")
    with explained(path):
        if write:
            connection = sqlite3.connect(path, timeout=WAIT_SECONDS, isolation_level=None)
        else:
            address = f"{path.absolute().as_uri()}?mode=ro"
            connection = sqlite3.connect(address, uri=True, timeout=WAIT_SECONDS, isolation_level=None)
    connection.row_factory = sqlite3.Row
    try:
        _prepare(connection, path, write=write)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path, *, write: bool) -> None:
    with explained(path):
        version, application = _identity(connection)
        empty = not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if not (empty and version == 0 and application == 0) and application != APPLICATION:
        raise StoreError(f"store {path}: it belongs to another program; choose another directory with --store")
    if version > VERSION:
        raise StoreError(f"store {path}: version {version} is newer than this code's {VERSION}; update the code")
    if not write:
        if version != VERSION:
            raise StoreError(f"store {path}: version {version}; `python -m experiments sweep` migrates it to {VERSION}")
        return
    with explained(path):
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
    if version == VERSION:
        return
    with transaction(connection, path):
        version, _ = _identity(connection)  # another process may have been faster
        if version == 0:
            for statement in TABLES:
                connection.execute(statement)
        else:
            while version < VERSION:
                MIGRATIONS[version](connection)
                version += 1
        connection.execute(f"PRAGMA application_id = {APPLICATION}")
        connection.execute(f"PRAGMA user_version = {VERSION}")


def _identity(connection: sqlite3.Connection) -> tuple[int, int]:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    return int(version), int(application)
