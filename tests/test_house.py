"""The house is as ARCHITECTURE.md says: imports run downward, no file name stands twice, little lies loose."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = [
    "errors",
    "signs",
    "activations",
    "networks",
    "store",
    "checkpoint",
    "problem",
    "feed",
    "data",
    "examples",
    "graph",
    "norm",
    "kernels",
    "methods",
    "measuring",
    "callbacks",
    "show",
    "cli",
]
"""From the ground up: a room imports from those before it alone."""
LATER = {("methods", "measuring"), ("measuring", "show")}
"""Rooms that name a later one: its types alone, or within a function."""
NOBODYS = {"tests", "benchmarks"}
FLOORS = {
    "hessdiag": {"hessdiag"},
    "theory": {"theory", "hessdiag"},
    "experiments": {"experiments", "hessdiag"},
    "validation": {"validation", "theory", "experiments", "hessdiag"},
}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether the import runs when the file is imported) of every absolute import of a file."""
    tree = ast.parse(path.read_text())
    later: set[int] = set()
    for node in ast.walk(tree):
        typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if typing or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            later |= {id(part) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: line {node.lineno} imports relatively"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) not in later
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in later


def test_rooms_import_downward_when_they_are_imported() -> None:
    for path in sorted((ROOT / "hessdiag").rglob("*.py")):
        room = path.relative_to(ROOT / "hessdiag").parts[0].removesuffix(".py")
        if room in ("__init__", "__main__"):
            continue
        assert room in ROOMS, f"{path}: a room that ARCHITECTURE.md does not know"
        for module, at_once in imports(path):
            parts = module.split(".")
            if parts[0] == "hessdiag" and parts[1] != "__version__" and (at_once or (room, parts[1]) not in LATER):
                assert ROOMS.index(parts[1]) <= ROOMS.index(room), f"{path} imports {module}: upward"


def test_the_engine_knows_nothing_of_what_is_built_on_it() -> None:
    for floor, known in FLOORS.items():
        for path in sorted((ROOT / floor).rglob("*.py")):
            for module, _ in imports(path):
                top = module.split(".")[0]
                assert top not in FLOORS or top in known, f"{path} imports {module}"
                assert top not in NOBODYS, f"{path} imports {module}"


def test_no_file_name_stands_twice_and_few_modules_lie_loose() -> None:
    paths = [path for path in (ROOT / "hessdiag").rglob("*.py") if path.name != "__init__.py"]
    twice = [name for name, count in Counter(path.name for path in paths).items() if count > 1]
    assert not twice
    assert len([path for path in paths if path.parent.name == "hessdiag"]) <= 4


def test_architecture_names_every_room() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for room in ROOMS:
        assert f"`{room}/`" in text or f"`{room}.py`" in text, room
