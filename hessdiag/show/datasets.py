"""What `hessdiag data` prints: which data sets are here, and how to get the others by hand."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from hessdiag.data.cifar import by_hand
from hessdiag.data.published import SOURCES, Source
from hessdiag.show.columns import print_pairs
from hessdiag.show.text import plain

FORMS = (
    ("npz:PATH", "a numpy archive with arrays inputs and targets"),
    ("safetensors:PATH", "a file with tensors inputs and targets"),
    ("folder:PATH", "images in PATH/CLASS/, or PATH/test/CLASS/"),
    ("package.module:f", "your function of (split, seed); returns (inputs, targets) or batches"),
)


def print_shelves(out: Console, base: Path) -> None:
    """Named sets with what was found of them, then the other forms that --data takes."""
    out.print(Text(f"Data sets, looked for in {plain(base)}", style="bold"))
    rows = [("digits", "here: 8x8 images, 1297 train and 500 test, with scikit-learn")]
    rows += [(name, _found(source, base)) for name, source in SOURCES.items()]
    print_pairs(out, rows)
    out.print()
    out.print(Text("Also taken by --data", style="bold"))
    print_pairs(out, FORMS)


def _found(source: Source, base: Path) -> str:
    for layout in source.layouts:
        for folder in (base / layout.folder, base):
            if all((folder / file).is_file() for files in layout.files.values() for file in files):
                return f"here: {plain(folder)} ({layout.kind} layout)"
    packed = [base / f"{source.name}-{split}.npz" for split in source.sizes]
    if all(path.is_file() for path in packed):
        return f"here: {plain(packed[0].parent)} (npz)"
    for layout in source.layouts:
        if (base / layout.archive).is_file():
            return f"here: {plain(base / layout.archive)} (archive)"
    return f"not here; run `hessdiag data {source.name}`, or {by_hand(source)}"
