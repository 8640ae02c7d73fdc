"""One file of tensors: opened once, judged by its first and last bytes, described before any tensor is made."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from hessdiag.checkpoint import torchfile
from hessdiag.store import tensorfiles
from hessdiag.store.files import BadFileError, PathLike, parse_json, read_bytes
from hessdiag.store.pickled import Stored
from hessdiag.store.tensorfiles import TensorFacts

EMA_PREFIX = "ema:"
METADATA_KEY = "hessdiag"


@dataclass(frozen=True)
class Held(TensorFacts):
    """A tensor by the name that its file gives it, and the number of that file where there are several."""

    name: str
    piece: int = 0


@dataclass(frozen=True)
class Piece:
    """A file understood: its values, with TensorFacts in the place of tensors, and the bytes they are made of."""

    kind: str  # "torch zip", "TorchScript", "torch legacy" or "safetensors"
    tree: Any
    sha256: str
    size: int
    source: torchfile.Parsed | bytes

    def tensors(self, table: Mapping[str, TensorFacts]) -> dict[str, Tensor]:
        """The tensors of a table out of the tree, by the table's names."""
        if isinstance(self.source, bytes):
            found = tensorfiles.read_tensors(self.source)
            return {name: found[facts.name] for name, facts in table.items() if isinstance(facts, Held)}
        inside = {name: self.tree[facts.name] if isinstance(facts, Held) else facts for name, facts in table.items()}
        return torchfile.tensors(self.source, cast(Mapping[str, Stored], inside))


def read_piece(path: PathLike, *, budget: int) -> Piece:
    """Read and understand one file: tensors and plain values; what else lies beside them is named."""
    data = read_bytes(path, budget=budget, judge=_judge)
    digest = hashlib.sha256(data).hexdigest()
    if torchfile.is_zip(data) or torchfile.is_legacy(data):
        parsed = torchfile.parse(data)
        return Piece(parsed.kind, parsed.tree, digest, len(data), parsed)
    facts, metadata = tensorfiles.read_header(data)
    return Piece("safetensors", _tree(facts, metadata), digest, len(data), data)


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
        raise BadFileError(
            "neither a torch checkpoint nor safetensors: its first bytes belong to no known format" + _guess(head)
        )


def _guess(head: bytes) -> str:
    """What else a file is that people take for a checkpoint."""
    if head.startswith(b"version https://git-lfs"):
        return " (a pointer of git-lfs; `git lfs pull` brings the file itself)"
    if head.lstrip()[:1] in (b"{", b"["):
        return " (it looks like JSON; the weights lie in another file)"
    if head.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        return " (it is a web page; the download did not bring the file)"
    if head.startswith(b"\x93NUMPY"):
        return " (it is an array of numpy; data are given by --data)"
    if head.startswith(b"\x89HDF"):
        return " (it is HDF5; save the weights by torch.save or safetensors)"
    return ""


def _tree(facts: Mapping[str, TensorFacts], metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a safetensors file would be, had torch written it."""
    held = {name: Held(found.shape, found.dtype, name) for name, found in facts.items()}
    if METADATA_KEY not in metadata:
        return dict(held)
    try:
        about = parse_json(metadata[METADATA_KEY].encode(), finite=False)
    except (BadFileError, UnicodeEncodeError):
        raise BadFileError("the safetensors metadata is damaged") from None
    if not isinstance(about, dict):
        raise BadFileError("the safetensors metadata is damaged")
    model = {key: value for key, value in held.items() if not key.startswith(EMA_PREFIX)}
    ema = {key.removeprefix(EMA_PREFIX): value for key, value in held.items() if key.startswith(EMA_PREFIX)}
    return {**about, "state_dict": model, "ema_state_dict": ema or None}
