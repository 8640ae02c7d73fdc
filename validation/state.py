"""What a stored result is worth: the key of the code and the inputs that made it.

The key of a check is a hash over the sources of its module and of every module of this project that it imports,
directly or not, the versions of the libraries underneath, the mode, and the stored results where it reads them.
Change any of these and the result is made anew; change none and it is taken from the ledger.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("hessdiag", "theory", "validation", "experiments")
LIBRARIES = ("torch", "numpy", "scipy", "sympy", "mpmath")


def _file(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


@lru_cache(maxsize=1024)
def _imports(module: str) -> frozenset[str]:
    """Modules of this project that a module names in an import, wherever it stands in the file."""
    path = _file(module)
    if path is None:
        return frozenset()
    inside = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = inside.split(".")[: len(inside.split(".")) - node.level + 1]
                base = ".".join([*parent, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    own = {name for name in found if name.split(".")[0] in PACKAGES}
    parents = {".".join(name.split(".")[:i]) for name in own for i in range(1, name.count(".") + 1)}
    return frozenset(name for name in own | parents if _file(name) is not None)


@lru_cache(maxsize=1024)
def closure(module: str) -> tuple[str, ...]:
    """A module of this project and all that it imports from the project, sorted."""
    seen, stack = {module}, [module]
    while stack:
        for name in _imports(stack.pop()) - seen:
            seen.add(name)
            stack.append(name)
    return tuple(sorted(seen))


@lru_cache(maxsize=1)
def _libraries() -> str:
    return " ".join([platform.python_version(), *(f"{n}={importlib.metadata.version(n)}" for n in LIBRARIES)])


@lru_cache(maxsize=4096)
def _digest(module: str) -> str:
    path = _file(module)
    return "" if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def key(module: str, name: str, *, quick: bool, inputs: bytes = b"") -> str:
    """The key of what `module:name` finds."""
    parts = [name, "quick" if quick else "full", _libraries()]
    parts += [f"{m} {_digest(m)}" for m in closure(module)]
    return hashlib.sha256("\n".join(parts).encode() + b"\n" + inputs).hexdigest()


def seal(record: dict[str, Any]) -> str:
    """A digest of a record's contents, so that a record changed by hand is noticed and made anew."""
    body = {name: value for name, value in record.items() if name != "seal"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
