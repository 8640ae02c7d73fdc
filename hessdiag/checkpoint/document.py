"""Where a file keeps what: its weights, its averaged weights, and what it says of itself."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from hessdiag.checkpoint import torchfile
from hessdiag.store import tensorfiles
from hessdiag.store.files import BadFileError, PathLike, parse_json, read_bytes, shown, size_text
from hessdiag.store.pickled import Left, Stored
from hessdiag.store.tensorfiles import MAX_TENSORS, TensorFacts, check_key

FORMAT = "hessdiag/1"
FILE_BUDGET = 4 * 2**30
EMA_PREFIX = "ema:"
METADATA_KEY = "hessdiag"
# Under which names public training code keeps weights.
MODEL_KEYS = ("state_dict", "model", "net", "model_state_dict", "network", "model_state", "weights")
EMA_KEYS = ("ema_state_dict", "ema", "model_ema", "state_dict_ema", "ema_model_state_dict")
MAX_PLAIN = 20_000
MAX_DEPTH = 40
Places = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Document:
    """A checkpoint file understood, without a network."""

    kind: str  # "torch zip", "torch legacy" or "safetensors"
    layout: str  # "hessdiag/1", "bare state dict", "state dict under 'net'"
    sha256: str
    size: int
    weights: Mapping[str, Mapping[str, TensorFacts]]  # "model", and "ema" where there is one
    config: Mapping[str, Any]
    epoch: int | None
    metrics: Mapping[str, Any]
    extra: Mapping[str, Any]
    others: tuple[str, ...]  # what else lies in the file and is not used
    source: torchfile.Parsed | bytes

    @property
    def self_describing(self) -> bool:
        """Does the file name its network?"""
        return self.layout == FORMAT

    def tensors(self, which: str) -> dict[str, Tensor]:
        """The weights themselves, made of the bytes that were checked."""
        if not isinstance(self.source, bytes):
            return torchfile.tensors(self.source, cast(Mapping[str, Stored], self.weights[which]))
        found = tensorfiles.read_tensors(self.source)
        prefix = EMA_PREFIX if which == "ema" else ""
        return {key: found[prefix + key] for key in self.weights[which]}


def open_document(path: PathLike, *, budget: int = FILE_BUDGET) -> Document:
    """Read and understand a file: tensors and plain values; what else lies beside them is named and left out."""
    data = read_bytes(path, budget=budget, judge=_judge)
    if torchfile.is_zip(data) or torchfile.is_legacy(data):
        parsed = torchfile.parse(data)
        return _understand(parsed.kind, parsed.tree, data, parsed)
    facts, metadata = tensorfiles.read_header(data)
    return _understand("safetensors", _tree(facts, metadata), data, data)


def _judge(head: bytes, tail: bytes, size: int) -> None:
    """Refuse what its first and last bytes give away, so that gigabytes are not read for nothing."""
    if head[257:262] == b"ustar":
        raise BadFileError("a tar archive, as torch wrote before 2017; save it again with a current torch")
    if torchfile.is_zip(head):
        if b"PK\x05\x06" not in tail:
            raise BadFileError("a zip archive without its directory: the file is truncated")
    elif tensorfiles.looks_like(head):
        tensorfiles.header_length(head, size)
    elif not torchfile.is_legacy(head):
        raise BadFileError("neither a torch checkpoint nor safetensors: its first bytes belong to no known format")


def _tree(facts: Mapping[str, TensorFacts], metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a safetensors file would be, had torch written it."""
    if METADATA_KEY not in metadata:
        return dict(facts)
    try:
        about = parse_json(metadata[METADATA_KEY].encode(), finite=False)
    except (BadFileError, UnicodeEncodeError):
        raise BadFileError("the safetensors metadata is damaged") from None
    if not isinstance(about, dict):
        raise BadFileError("the safetensors metadata is damaged")
    model = {key: value for key, value in facts.items() if not key.startswith(EMA_PREFIX)}
    ema = {key.removeprefix(EMA_PREFIX): value for key, value in facts.items() if key.startswith(EMA_PREFIX)}
    return {**about, "state_dict": model, "ema_state_dict": ema or None}


def _understand(kind: str, tree: Any, data: bytes, source: torchfile.Parsed | bytes) -> Document:
    if not isinstance(tree, dict):
        raise BadFileError(f"holds a {_kind(tree)}, not a dict with weights: save model.state_dict() instead")
    told = tree.get("format")
    ours = isinstance(told, str) and told.startswith("hessdiag/")
    if ours and told != FORMAT:
        raise BadFileError(f"written in format {shown(told)}; this version reads {FORMAT}")
    places, layout = ({}, FORMAT) if ours else _public(tree)
    if ours:
        places = {"model": ("state_dict",)}
        if tree.get("ema_state_dict") is not None:
            places["ema"] = ("ema_state_dict",)
    weights = {which: _weights(tree, place) for which, place in places.items()}
    used = {place[0] for place in places.values() if place} | {
        "format",
        "config",
        "epoch",
        "metrics",
        "extra",
    }
    epoch = tree.get("epoch")
    if type(epoch) is not int and ours and epoch is not None:
        raise BadFileError("its epoch is no whole number")
    if ours:
        about = {key: _plain_dict(tree.get(key), key) for key in ("config", "metrics", "extra")}
    else:
        numbers = {k: v for k, v in tree.items() if isinstance(k, str) and type(v) in (int, float) and k != "epoch"}
        about = {"config": {}, "metrics": numbers, "extra": {}}
    if ours:
        used.add("ema_state_dict")  # None where there is no average
    used |= set(weights["model"]) if places["model"] == () else set()
    unread = [key for key in tree if key not in used and key not in about["metrics"]]
    others = tuple(shown(key) + _left_name(tree[key]) for key in unread[:50])
    return Document(
        kind=kind,
        layout=layout,
        sha256=hashlib.sha256(data).hexdigest(),
        size=len(data),
        weights=weights,
        epoch=epoch if type(epoch) is int else None,
        others=others,
        source=source,
        **about,
    )


def _public(tree: dict[Any, Any]) -> tuple[Places, str]:
    """Where the weights lie in a file of other code, and what to call that layout."""
    found = [key for key in MODEL_KEYS if _is_weights(tree.get(key))]
    averaged = [key for key in EMA_KEYS if _is_weights(tree.get(key))]
    if len(found) > 1 or len(averaged) > 1:
        names = ", ".join(map(repr, found if len(found) > 1 else averaged))
        raise BadFileError(f"holds weights under {names}: save the wanted ones alone")
    if not found and averaged:
        found = averaged  # the only weights there are
    if not found and any(isinstance(value, TensorFacts) for value in tree.values()):
        return {"model": ()}, "bare state dict"
    if not found:
        held = ", ".join(shown(key) + _left_name(tree[key]) for key in list(tree)[:8]) or "nothing"
        known = ", ".join(MODEL_KEYS)
        raise BadFileError(f"no state dict of tensors in it (holds {held}; weights are sought under {known})")
    places: Places = {"model": (found[0],)}
    if averaged and averaged != found:
        places["ema"] = (averaged[0],)
    return places, f"state dict under {found[0]!r}"


def _is_weights(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, TensorFacts) for v in value.values())


def _weights(tree: dict[str, Any], place: tuple[str, ...]) -> dict[str, TensorFacts]:
    table: Any = tree
    for step in place:
        table = table.get(step)
    if not isinstance(table, dict) or not table:
        raise BadFileError(f"no weights under {place[-1]!r}")
    if len(table) > MAX_TENSORS:
        raise BadFileError(f"{len(table)} tensors; the limit is {MAX_TENSORS}")
    if not place:  # whatever lies beside the tensors of a bare state dict is named among the others
        table = {key: value for key, value in table.items() if isinstance(value, TensorFacts)}
    for key, value in table.items():
        check_key(key)
        if not isinstance(value, TensorFacts):
            raise BadFileError(f"{shown(key)} among the weights is no tensor but a {_kind(value)}")
    found: dict[str, TensorFacts] = table
    return found


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
