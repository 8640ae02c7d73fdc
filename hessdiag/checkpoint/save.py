"""A network becomes a file that says what it is."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from hessdiag.checkpoint.document import FORMAT
from hessdiag.checkpoint.onefile import EMA_PREFIX, METADATA_KEY
from hessdiag.errors import CheckpointError
from hessdiag.store.files import BadFileError, PathLike, path_text, write_bytes
from hessdiag.store.tensorfiles import check_key

Weights = nn.Module | Mapping[str, Tensor]


def save_checkpoint(
    path: PathLike,
    model: Weights,
    *,
    config: Mapping[str, Any] | None = None,
    ema: Weights | None = None,
    epoch: int | None = None,
    metrics: Mapping[str, Any] | None = None,
    **extra: Any,
) -> None:
    """Write `model` to `path`, self-describing, `.pt`/`.pth` or `.safetensors` by its suffix, in one atomic step.

    `ema` are averaged weights beside the model's own; `epoch` and `metrics` say how far it was trained.
    `config` is what `networks.build(**config)` needs (default: `model.config`); `{}` for a model of your own,
    which is then loaded with `factory=`. `extra` is any further plain value (data set, method, ...). Equal
    contents give equal bytes.
    """
    target = Path(path)
    try:
        about = _about(model, config, epoch, metrics, extra)
        weights = _state(model)
        averaged = None if ema is None else _state(ema)
        if averaged is not None and averaged.keys() != weights.keys():
            odd = sorted(averaged.keys() ^ weights.keys())[0]
            raise BadFileError(f"model and ema differ in their tensors, first in {odd!r}")
        suffix = target.suffix.lower()
        if suffix in (".pt", ".pth"):
            write_bytes(target, _torch_bytes(weights, averaged, about))
        elif suffix == ".safetensors":
            write_bytes(target, _safetensors_bytes(weights, averaged, about))
        else:
            raise BadFileError("end the name in .pt, .pth or .safetensors")
    except BadFileError as reason:
        raise CheckpointError(f"{path_text(target)}: {reason}") from None


def _about(model: Weights, config: Any, epoch: Any, metrics: Any, extra: Any) -> dict[str, Any]:
    if config is None:
        config = getattr(model, "config", None)
        if not isinstance(config, Mapping):
            raise BadFileError("the model has no .config: pass config=, {} if it is loaded by factory= later")
    if epoch is not None and (type(epoch) is not int or epoch < 0):
        raise BadFileError(f"epoch {epoch!r} is no count")
    return {
        "format": FORMAT,
        "config": _plain(config, "config"),
        "epoch": epoch,
        "metrics": _plain(metrics or {}, "metrics"),
        "extra": _plain(extra, "extra"),
    }


def _plain(value: Any, where: str) -> Any:
    """`value` as dicts, lists and primitives alone, which any reader can load without running code."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        if not all(type(key) is str for key in value):
            raise BadFileError(f"{where} has keys that are no strings")
        return {key: _plain(entry, f"{where}.{key}") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    if isinstance(value, (bool, int, float, str)):  # numpy's and other subclasses of the primitives
        for kind in (bool, int, float, str):
            if isinstance(value, kind):
                return kind(value)
    raise BadFileError(f"{where} is a {type(value).__name__}; a checkpoint keeps plain values only")


def _state(weights: Weights) -> dict[str, Tensor]:
    table = weights.state_dict() if isinstance(weights, nn.Module) else weights
    found: dict[str, Tensor] = {}
    for key, value in table.items():
        name = check_key(key).replace("_orig_mod.", "")  # torch.compile's wrapper
        if not isinstance(value, Tensor):
            raise BadFileError(f"{key!r} among the weights is a {type(value).__name__}, not a tensor")
        if name.startswith(EMA_PREFIX) or name in found:
            raise BadFileError(f"the weights' name {key!r} cannot be stored")
        # A clone, so that a view does not drag its whole storage into the file.
        found[name] = value.detach().cpu().contiguous().clone()
    while found and all(name.startswith("module.") for name in found):  # DataParallel and its kin
        found = {name.removeprefix("module."): value for name, value in found.items()}
    return found


def _torch_bytes(weights: dict[str, Tensor], averaged: dict[str, Tensor] | None, about: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save({**about, "state_dict": weights, "ema_state_dict": averaged}, buffer)
    return buffer.getvalue()


def _safetensors_bytes(weights: dict[str, Tensor], averaged: dict[str, Tensor] | None, about: dict[str, Any]) -> bytes:
    tensors = dict(weights)
    tensors.update({EMA_PREFIX + key: value for key, value in (averaged or {}).items()})
    # One metadata entry: the library writes several in no fixed order.
    try:
        return safetensors.torch.save(tensors, metadata={METADATA_KEY: json.dumps(about)})
    except Exception as error:  # unsupported types
        raise BadFileError(f"cannot be stored as safetensors ({error})") from None
