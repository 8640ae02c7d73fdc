"""Where a file keeps what: its weights, its averaged weights, and what it says of itself."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hessdiag.checkpoint import shards
from hessdiag.checkpoint.onefile import Held, Piece, read_piece
from hessdiag.errors import nearest
from hessdiag.store.files import BadFileError, PathLike, shown, size_text
from hessdiag.store.pickled import Left
from hessdiag.store.tensorfiles import MAX_TENSORS, TensorFacts, check_key

FORMAT = "hessdiag/1"
FILE_BUDGET = 4 * 2**30
# Under which names public training code keeps weights.
MODEL_KEYS = ("state_dict", "model", "net", "model_state_dict", "network", "model_state", "weights")
EMA_KEYS = ("ema_state_dict", "ema", "model_ema", "state_dict_ema", "ema_model_state_dict")
MAX_PLAIN = 20_000
MAX_DEPTH = 40
SOUGHT_DEPTH = 4
"""How deep a message looks for state dicts that a key could name."""
Places = dict[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Document:
    """A checkpoint understood, without a network."""

    kind: str  # "torch zip", "TorchScript", "torch legacy" or "safetensors"
    layout: str  # "hessdiag/1", "bare state dict", "state dict under 'net'"
    sha256: str
    size: int
    weights: Mapping[str, Mapping[str, TensorFacts]]  # "model", and "ema" where there is one
    config: Mapping[str, Any]
    epoch: int | None
    metrics: Mapping[str, Any]
    extra: Mapping[str, Any]
    others: tuple[str, ...]  # what else lies in the file and is not used
    pieces: tuple[Piece, ...]  # one, or the files of an index
    notes: tuple[str, ...] = ()  # what an index says that is not so

    @property
    def self_describing(self) -> bool:
        """Does the file name its network?"""
        return self.layout == FORMAT

    @property
    def scripted(self) -> bool:
        """Are its tensors attributes of modules, some of which may be no state?"""
        return self.kind == "TorchScript"

    def tensors(self, which: str) -> dict[str, Tensor]:
        """The weights themselves, made of the bytes that were checked."""
        made: dict[str, Tensor] = {}
        table = self.weights[which]
        for number, piece in enumerate(self.pieces):
            made |= piece.tensors({k: f for k, f in table.items() if (f.piece if isinstance(f, Held) else 0) == number})
        return {name: made[name] for name in table}


def open_document(
    path: PathLike, *, budget: int = FILE_BUDGET, key: str | None = None, prefix: str | None = None
) -> Document:
    """Read and understand a file, the files of an index, or the folder that holds either.

    What lies beside tensors and plain values is named and left out. `key` says where in the file the state dict lies
    ("trainer.model"), `prefix` which of its names are meant ("student.") and is taken off them.
    """
    place = Path(path)
    if os.path.isdir(place):
        place = shards.weights_in(place)
    if place.name.endswith(shards.INDEX):
        table, pieces, digest, notes = shards.read_index(place, budget=budget)
        kind, tree, size = f"{pieces[0].kind}, {len(pieces)} files", table, sum(piece.size for piece in pieces)
    else:
        piece = read_piece(place, budget=budget)
        kind, tree, pieces, digest, size, notes = piece.kind, piece.tree, [piece], piece.sha256, piece.size, []
    about = _understand(tree, key)
    weights: Mapping[str, Mapping[str, TensorFacts]] = about.pop("weights")
    left: list[str] = []
    layout_of_ema = about.pop("layout_of_ema")
    if prefix is not None:
        weights, left, averaged = _prefixed(weights, prefix)
        if averaged:
            about["layout"] = layout_of_ema
    others, told = (*left, *about.pop("others")), tuple(notes)
    return Document(
        kind=kind, sha256=digest, size=size, pieces=tuple(pieces), weights=weights, others=others, notes=told, **about
    )


def _understand(tree: Any, key: str | None) -> dict[str, Any]:
    """What is to be said of the tree: layout, weights, and the file's words on itself."""
    if not isinstance(tree, dict):
        raise BadFileError(f"holds a {_kind(tree)}, not a dict with weights: save model.state_dict() instead")
    told = tree.get("format")
    ours = isinstance(told, str) and told.startswith("hessdiag/") and key is None
    if ours and told != FORMAT:
        raise BadFileError(f"written in format {shown(told)}; this version reads {FORMAT}")
    places: Places
    if ours:
        places, layout = {"model": ("state_dict",)}, FORMAT
        if tree.get("ema_state_dict") is not None:
            places["ema"] = ("ema_state_dict",)
    elif key is not None:
        places, layout = {"model": _path_of(tree, key)}, _under(key)
    else:
        places, layout = _public(tree)
    weights, odd = {}, []
    for which, place in places.items():
        weights[which], more = _weights(tree, place, strict=ours)
        odd += more
    used = {place[0] for place in places.values() if place} | {"format", "config", "epoch", "metrics", "extra"}
    epoch = tree.get("epoch")
    if type(epoch) is not int and ours and epoch is not None:
        raise BadFileError("its epoch is no whole number")
    if ours:
        about = {name: _plain_dict(tree.get(name), name) for name in ("config", "metrics", "extra")}
    else:
        numbers = {k: v for k, v in tree.items() if isinstance(k, str) and type(v) in (int, float) and k != "epoch"}
        about = {"config": {}, "metrics": numbers, "extra": {}}
    if ours:
        used.add("ema_state_dict")  # None where there is no average
    used |= set(weights["model"]) if places["model"] == () else set()
    unread = [name for name in tree if name not in used and name not in about["metrics"]]
    others = [shown(name) + _left_name(tree[name]) for name in unread[:50]]
    return {
        "layout": layout,
        "layout_of_ema": _under(places["ema"][-1]) if "ema" in places else "",
        "weights": weights,
        "epoch": epoch if type(epoch) is int else None,
        "others": (*(odd if places["model"] else ()), *others),
        **about,
    }


def _public(tree: dict[Any, Any]) -> tuple[Places, str]:
    """Where the weights lie in a file of other code, and what to call that layout."""
    found = [key for key in MODEL_KEYS if _is_weights(tree.get(key))]
    averaged = [key for key in EMA_KEYS if _is_weights(tree.get(key))]
    if len(found) > 1 or len(averaged) > 1:
        several = found if len(found) > 1 else averaged
        names = ", ".join(map(repr, several))
        raise BadFileError(f"holds weights under {names}: say which by key= (--key {several[0]})")
    if not found and averaged:
        found = averaged  # the only weights there are
    if not found and any(isinstance(value, TensorFacts) for value in tree.values()):
        return {"model": ()}, "bare state dict"
    if not found:
        held = ", ".join(shown(key) + _left_name(tree[key]) for key in list(tree)[:8]) or "nothing"
        module = next((key for key in (*MODEL_KEYS, *EMA_KEYS) if isinstance(tree.get(key), Left)), None)
        if module is not None:
            more = f"{module!r} is an object of code, {_kind(tree[module])}: save model.state_dict() in its place"
            raise BadFileError(f"no state dict of tensors in it (holds {held}; {more})")
        raise BadFileError(f"no state dict of tensors in it (holds {held}; {_where(tree)})")
    places: Places = {"model": (found[0],)}
    if averaged and averaged != found:
        places["ema"] = (averaged[0],)
    return places, _under(found[0])


def _under(key: str) -> str:
    return f"state dict under {shown(key)}"


def _is_weights(value: Any) -> bool:
    """Tensors by name, for the most part: what else stands among them is named and left out."""
    if not isinstance(value, dict):
        return False
    return 2 * sum(isinstance(entry, TensorFacts) for entry in value.values()) > len(value)


def _path_of(tree: Any, key: str) -> tuple[Any, ...]:
    """The steps that `key` means: names joined by dots, numbers of lists among them, each as long as it can be."""
    steps: list[Any] = []
    at, rest = tree, key
    while rest:
        known: dict[str, Any] = {}
        if isinstance(at, dict):
            known = {str(name): name for name in at if isinstance(name, (str, int))}
        elif isinstance(at, (list, tuple)):
            known = {str(number): number for number in range(len(at))}
        fits = [name for name in known if rest == name or rest.startswith(f"{name}.")]
        if not fits:
            raise BadFileError(f"nothing lies under {shown(key)} in it; {_where(tree)}")
        step = max(fits, key=len)
        steps.append(known[step])
        at, rest = at[known[step]], rest[len(step) + 1 :]
    if not isinstance(at, dict) or not any(isinstance(value, TensorFacts) for value in at.values()):
        raise BadFileError(f"a {_kind(at)} lies under {shown(key)}, no state dict of tensors; {_where(tree)}")
    return tuple(steps)


def _where(tree: dict[Any, Any]) -> str:
    """Which keys would name a state dict, the largest first."""
    found: list[tuple[int, str]] = []
    todo: list[tuple[str, Any, int]] = [("", tree, 0)]
    optimizers: list[str] = []
    while todo and len(found) < 1000:
        path, value, depth = todo.pop()
        parts: list[tuple[Any, Any]] = []
        if isinstance(value, dict) and {"state", "param_groups"} <= set(value):
            optimizers.append(path or "the whole")
        elif isinstance(value, dict):
            parts = list(value.items())
            count = sum(isinstance(entry, TensorFacts) for entry in value.values())
            if count and path:
                found.append((count, path))
        elif isinstance(value, (list, tuple)):
            parts = list(enumerate(value[:100]))
        if depth < SOUGHT_DEPTH:
            inner = [(name, entry) for name, entry in parts if isinstance(entry, (dict, list, tuple))]
            todo += [
                (f"{path}.{name}" if path else str(name), e, depth + 1) for name, e in inner[:1000] if _short(name)
            ]
    if not found and any(isinstance(value, TensorFacts) for value in tree.values()):
        return "it is a bare state dict: leave key out (--key)"
    if not found and optimizers:
        return f"{_bare(optimizers[0])} is the state of an optimizer: the weights must be in another file"
    if not found:
        return f"weights are sought under {', '.join(MODEL_KEYS)}"
    found.sort(key=lambda pair: (-pair[0], pair[1]))
    told = ", ".join(f"{_bare(path)} ({count})" for count, path in found[:4])
    return f"tensors lie under {told}: say which by key= (--key {_bare(found[0][1])})"


def _short(name: Any) -> bool:
    return isinstance(name, int) or (isinstance(name, str) and len(name) <= 100)


def _weights(tree: dict[str, Any], place: tuple[Any, ...], *, strict: bool) -> tuple[dict[str, TensorFacts], list[str]]:
    """The tensors at that place, and what else lies among them; `strict` allows nothing else."""
    table: Any = tree
    for step in place:
        table = table.get(step) if isinstance(table, dict) else table[step]
    if not isinstance(table, dict) or not table:
        raise BadFileError(f"no weights under {place[-1]!r}")
    if len(table) > MAX_TENSORS:
        raise BadFileError(f"{len(table)} tensors; the limit is {MAX_TENSORS}")
    found: dict[str, TensorFacts] = {}
    odd: list[str] = []
    for key, value in table.items():
        if isinstance(value, TensorFacts):
            found[check_key(key)] = value
        elif strict:
            raise BadFileError(f"{shown(key)} among the weights is no tensor but a {_kind(value)}")
        elif len(odd) < 8:
            odd.append(f"{shown(key)} ({_kind(value)}) among the weights")
    return found, odd


def _prefixed(
    weights: Mapping[str, Mapping[str, TensorFacts]], prefix: str
) -> tuple[dict[str, dict[str, TensorFacts]], list[str], bool]:
    """Of each table the names that begin with these whole parts, without them; what that leaves out; and whether the
    averaged weights alone have such names, which are then the only weights there are.
    """
    prefix = prefix.rstrip(".") + "."
    chosen: dict[str, dict[str, TensorFacts]] = {}
    left: list[str] = []
    for which, table in weights.items():
        mine = {name.removeprefix(prefix): facts for name, facts in table.items() if name.startswith(prefix)}
        if mine:
            chosen[which] = mine
        left += [name for name in table if not name.startswith(prefix)]
    averaged = set(chosen) == {"ema"}
    if averaged:
        chosen = {"model": chosen["ema"]}
    if not chosen:
        counts: dict[str, int] = {}
        for name in (name for table in weights.values() for name in table):
            first, dot, _ = name.partition(".")
            counts[first + dot] = counts.get(first + dot, 0) + 1
        common = sorted(counts, key=lambda part: -counts[part])[:8]
        raise BadFileError(
            f"no tensor's name begins with {shown(prefix)}; {nearest(prefix, [_bare(c) for c in common])}"
        )
    if not left:
        return chosen, [], averaged
    told = ", ".join(_bare(name) for name in left[:3]) + (", ..." if len(left) > 3 else "")
    return chosen, [f"{len(left)} tensor{'s' * (len(left) > 1)} outside {shown(prefix)} ({told})"], averaged


def _bare(name: str) -> str:
    return shown(name)[1:-1]


def _kind(value: Any) -> str:
    if isinstance(value, TensorFacts):
        return "tensor"
    return value.name if isinstance(value, Left) else type(value).__name__


def _left_name(value: Any) -> str:
    """What a message adds to a key whose value could only be named."""
    inner = [item for item in value.values() if isinstance(item, Left)] if isinstance(value, dict) else []
    if isinstance(value, Left) or inner:
        return f" ({(value if isinstance(value, Left) else inner[0]).name}, left out)"
    return ""


def _plain_dict(value: Any, what: str) -> dict[str, Any]:
    """A dict of plain values, small enough for anything a person would write."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadFileError(f"its {what} is a {_kind(value)}, not a dict")
    todo, count = [(value, 0)], 0
    while todo:
        item, depth = todo.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise BadFileError(f"its {what} is nested more than {MAX_DEPTH} deep")
        if isinstance(item, dict):
            if not all(isinstance(key, str) and len(key) <= 200 for key in item):
                raise BadFileError(f"its {what} has keys that are no short texts")
            todo.extend((entry, depth + 1) for entry in item.values())
        elif isinstance(item, (list, tuple)):
            todo.extend((entry, depth + 1) for entry in item)
        elif isinstance(item, str):
            if len(item) > 10_000:
                raise BadFileError(f"its {what} holds a text of {size_text(len(item))}")
        elif type(item) is int:
            if abs(item) >= 2**63:
                raise BadFileError(f"its {what} holds an absurdly large number")
        elif type(item) is not bool and type(item) is not float and item is not None:
            raise BadFileError(f"its {what} holds a {_kind(item)}: only plain values belong there")
        if count > MAX_PLAIN:
            raise BadFileError(f"its {what} holds more than {MAX_PLAIN} values")
    return {str(key): entry for key, entry in value.items()}


def parameter_count(weights: Mapping[str, TensorFacts]) -> int:
    """Numbers in floating-point tensors that are no running statistics of BatchNorm."""
    return sum(
        math.prod(facts.shape)
        for key, facts in weights.items()
        if facts.dtype.is_floating_point and not key.endswith(("running_mean", "running_var", "num_batches_tracked"))
    )
