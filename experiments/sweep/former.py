"""A store of the form before, in SQLite: its sweeps are read from there, its results from runs/, as they lie today.

Nothing is written to it; what is not done stands as queued.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

from hessdiag.errors import StoreError

NAME = "store.sqlite"


def sweeps(root: Path) -> list[dict[str, Any]]:
    """Its sweeps as `sweeps/TIER/NAME.json` would hold them."""
    members = "SELECT m.position, m.key, m.variant, r.config FROM members m JOIN runs r USING (key) WHERE m.sweep = ?"
    try:
        connection = sqlite3.connect(f"{(root / NAME).absolute().as_uri()}?mode=ro", uri=True)
        connection.row_factory = sqlite3.Row
        try:
            found = [dict(row) for row in connection.execute("SELECT * FROM sweeps")]
            for sweep in found:
                rows = [dict(row) for row in connection.execute(members, (sweep["name"],))]
                sweep["runs"] = [{**row, "config": json.loads(row["config"])} for row in rows]
        finally:
            connection.close()
    except (sqlite3.Error, ValueError) as error:
        raise StoreError(f"store {root / NAME}: {error}; what it has exported can still be read") from error
    return found
