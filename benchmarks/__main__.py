"""`python -m benchmarks [NAME...]`: run benchmarks one after the other, all without a name; `list`, `table`.

Each is a module with a `main()` that prints what it finds and stores it in benchmarks/results; `table` writes
benchmarks/README.md from what is stored there.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

from hessdiag.errors import nearest

FOLDER = Path(__file__).parent


def found() -> dict[str, str]:
    """Benchmarks by name (modules that define `main`), each with the first line of its docstring; none is imported."""
    names = {}
    for path in sorted(FOLDER.glob("[!_]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.stem != "tables" and any(isinstance(n, ast.FunctionDef) and n.name == "main" for n in tree.body):
            names[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return names


def main(arguments: list[str]) -> int:
    """Run what is named."""
    known = found()
    if arguments in (["list"], ["--help"], ["-h"]):
        print(__doc__)
        for name, line in known.items():
            print(f"{name:12} {line}")
        return 0
    if arguments == ["table"]:
        from benchmarks.tables import main as write

        write()
        return 0
    for name in arguments:
        if name not in known:
            print(f"unknown benchmark {name!r}; {nearest(name, [*known, 'list', 'table'])}", file=sys.stderr)
            return 2
    for name in arguments or known:
        print(f"== {name}: {known[name]}", flush=True)
        sys.argv = [f"benchmarks.{name}"]
        importlib.import_module(f"benchmarks.{name}").main()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
