"""Weights in several files named by an index, and the folder that transformers writes them to.

The index is JSON: `weight_map`, tensor name to file name, and `metadata.total_size` in bytes
(huggingface/safetensors and transformers, "sharded checkpoints"). It is as little to be believed as any file: its
names are those of files beside it, links lead out of the folder only into the blobs of a Hugging Face cache, sizes are
added up before any file is read, and every tensor lies where the index says.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hessdiag.checkpoint.onefile import Held, Piece, read_piece
from hessdiag.store import pickled
from hessdiag.store.files import BadFileError, parse_json, read_bytes, shown, size_text
from hessdiag.store.tensorfiles import MAX_TENSORS, TensorFacts, check_key

INDEX = ".index.json"
INDEX_BUDGET = 16 * 2**20
MAX_SHARDS = 128
WEIGHTS = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")
"""What transformers calls the weights of a folder, the first that is there."""
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
MAX_FILES = 10_000
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}", re.ASCII)


def weights_in(folder: Path) -> Path:
    """The file of a folder that holds its weights, or the index of those that do."""
    for name in WEIGHTS:
        if (folder / name).exists():
            return beside(folder, name)
    found: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for number, entry in enumerate(entries):
                if number >= MAX_FILES:
                    raise BadFileError(f"a folder of more than {MAX_FILES} files; name the one with the weights")
                if entry.name.endswith((*SUFFIXES, INDEX)):
                    found.append(entry.name)
    except OSError as error:
        raise BadFileError(f"cannot be listed ({error.strerror})") from None
    if len(found) == 1:
        return beside(folder, found[0])
    if found:
        told = ", ".join(shown(name)[1:-1] for name in sorted(found)[:6]) + (", ..." if len(found) > 6 else "")
        raise BadFileError(f"a folder with several files of weights: name one of {told}")
    raise BadFileError(f"a folder without weights: none of {', '.join(WEIGHTS)}, no other {', '.join(SUFFIXES)}")


def beside(folder: Path, name: str) -> Path:
    """The file of that plain name in the folder; a link must not lead out of it, but into a cache's blobs."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise BadFileError(f"{shown(name)} is no plain name of a file beside it: refused")
    home = Path(os.path.realpath(folder))
    real = Path(os.path.realpath(home / name))
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if real.parent not in (home, blobs):
        raise BadFileError(f"{shown(name)} is a link that leads out of its folder: refused")
    return folder / name


def read_index(path: Path, *, budget: int) -> tuple[dict[str, TensorFacts], list[Piece], str, list[str]]:
    """The tensors that an index names, the files they lie in, a sha256 of all of them, and what is to be said."""
    content = read_bytes(path, budget=INDEX_BUDGET)
    table = parse_json(content, values=4 * MAX_TENSORS)
    places = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(places, dict) or not places:
        raise BadFileError("an index without a weight_map of tensors to files")
    if len(places) > MAX_TENSORS:
        raise BadFileError(f"{len(places)} tensors; the limit is {MAX_TENSORS}")
    if not all(isinstance(name, str) for name in places.values()):
        raise BadFileError("its weight_map names files that are no text")
    names = sorted(set(places.values()))
    if len(names) > MAX_SHARDS:
        raise BadFileError(f"{len(names)} files; the limit is {MAX_SHARDS}")
    for key in places:
        check_key(key)
    files = [beside(path.parent, name) for name in names]
    _check_sizes(files, budget)
    pieces, facts, unlisted = list[Piece](), dict[str, TensorFacts](), 0
    begun, digest = _children(), hashlib.sha256(content)
    for number, (name, file) in enumerate(zip(names, files, strict=True)):
        piece = _read(name, file, budget - sum(p.size for p in pieces))
        if _children() - begun > pickled.SECONDS * (1 + len(names) / 8):
            raise BadFileError("reading its files takes too much processor time: refused")
        digest.update(piece.sha256.encode())
        pieces.append(piece)
        listed = [key for key, place in places.items() if place == name]
        for key in listed:
            found = piece.tree.get(key)
            if not isinstance(found, TensorFacts):
                raise BadFileError(f"the index places tensor {shown(key)} in {name}, which does not hold it")
            facts[key] = Held(found.shape, found.dtype, key, number)
        unlisted += len(piece.tree) - len(listed)
    notes = [f"{unlisted} entries of its files are not in the index and not used"] if unlisted else []
    return {key: facts[key] for key in places}, pieces, digest.hexdigest(), [*notes, *_total(table, facts)]


def _check_sizes(files: list[Path], budget: int) -> None:
    """All there, and together within the budget, before any is read."""
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise BadFileError(
            f"{missing[0]}{more} is missing beside it; {len(files) - len(missing)} of {len(files)} files are there: "
            "fetch the others"
        )
    try:
        total = sum(file.stat().st_size for file in files)
    except OSError as error:
        raise BadFileError(f"its files cannot be read ({error.strerror})") from None
    if total > budget:
        raise BadFileError(f"its files have {size_text(total)}; the limit is {size_text(budget)}")


def _read(name: str, file: Path, budget: int) -> Piece:
    try:
        piece = read_piece(file, budget=budget)
    except BadFileError as reason:
        raise BadFileError(f"{name}: {reason}") from None
    if not isinstance(piece.tree, dict):
        raise BadFileError(f"{name}: holds no table of tensors")
    return piece


def _total(table: Mapping[str, Any], facts: Mapping[str, TensorFacts]) -> list[str]:
    metadata = table.get("metadata")
    claimed = metadata.get("total_size") if isinstance(metadata, dict) else None
    held = sum(found.bytes for found in facts.values())
    if type(claimed) is not int or claimed == held:
        return []
    return [f"the index claims {shown(claimed)} bytes of tensors, its files hold {held}"]


def _children() -> float:
    """Processor seconds of processes that ended; 0 where the system does not count them."""
    spent = os.times()
    return spent.children_user + spent.children_system
