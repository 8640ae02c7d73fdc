"""A file becomes a network: read, judged, matched by name and shape, and only then given its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.checkpoint import pretrained
from hessdiag.checkpoint.build import (
    Factory,
    Normalize,
    agree,
    aliased,
    facts_of,
    fill,
    from_config,
    from_factory,
    normalised,
)
from hessdiag.checkpoint.document import FILE_BUDGET, Document, open_document
from hessdiag.checkpoint.guess import public_config
from hessdiag.checkpoint.layout import split_normalisation, translate
from hessdiag.errors import CheckpointError, ConfigurationError, HessdiagError, NonFiniteError
from hessdiag.store.files import BadFileError, PathLike, path_text, shown


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A network with its weights, in eval mode, and what the file says about them."""

    model: nn.Module
    config: Mapping[str, Any]
    epoch: int | None
    metrics: Mapping[str, Any]
    notes: tuple[str, ...]
    sha256: str
    weights: str  # "model" or "ema"
    extra: Mapping[str, Any]


def load_checkpoint(
    path: PathLike,
    *,
    network: str | None = None,
    activation: Any = None,
    num_classes: int | None = None,
    normalize: Normalize | None = None,
    weights: str | None = None,
    key: str | None = None,
    prefix: str | None = None,
    factory: Factory | None = None,
    options: Mapping[str, Any] | None = None,
    max_bytes: int = FILE_BUDGET,
) -> Checkpoint:
    """Load the file at `path`: a checkpoint of ours, or the state dict of public code with `network` and `activation`.

    `path` may also be the index of weights in several files (model.safetensors.index.json), or the folder that holds
    them. `key` says where in a file its state dict lies ("trainer.model"), `prefix` which names in it are the
    network's ("student."). `num_classes` and `normalize` say what such a file does not; files of more than `max_bytes`
    are refused. `weights` chooses "model" or averaged ("ema") weights; None takes the averaged ones where the file has
    them, since they are what such methods report, and the notes say so. `options` are further options of the network.
    `factory` builds a model of your own instead, "hf:DIR" that of a folder of transformers; `normalize` then goes
    before it, and no other option does. Nothing in the file is
    executed: the pickle of a torch file is described by another process (`hessdiag.store.pickled`), and what is neither
    tensor nor plain value is left out and named in the notes.
    """
    if weights not in (None, "model", "ema"):
        raise ConfigurationError(f"weights {weights!r}: it is 'model', 'ema' or None")
    if factory is not None:
        told = {"network": network, "activation": activation, "num_classes": num_classes, "options": options or None}
        if idle := [name for name, value in told.items() if value is not None]:
            raise ConfigurationError(f"factory builds the whole model: leave out {' and '.join(idle)}")
    try:
        document = open_document(path, budget=max_bytes, key=key, prefix=prefix)
        which, notes = _choose(document, weights)
        given = {
            "network": network,
            "activation": activation,
            "num_classes": num_classes,
            "normalize": normalize,
        }
        try:
            return _assemble(document, which, notes, given, options or {}, factory)
        except (BadFileError, CheckpointError, NonFiniteError) as error:
            if weights is None and which == "ema" and _plain_fit(document, given, options or {}, factory):
                raise type(error)(f"{error}{AVERAGED}") from None
            raise
    except BadFileError as reason:
        raise CheckpointError(f"{path_text(path)}: {reason}") from None
    except CheckpointError as error:
        more = pretrained.advice(path) if factory is None and network is None else ""
        raise CheckpointError(f"{path_text(path)}: {error}{more}") from None
    except NonFiniteError as error:
        raise NonFiniteError(f"{path_text(path)}: {error}") from None
    except MemoryError:
        raise CheckpointError(f"{path_text(path)}: no memory left to load it") from None


def _choose(document: Document, weights: str | None) -> tuple[str, tuple[str, ...]]:
    has_average = "ema" in document.weights
    if weights == "ema" and not has_average:
        raise BadFileError("holds no averaged weights: pass weights='model' (--weights model)")
    if weights is None and has_average:
        return "ema", ("averaged (ema) weights, which the file holds beside the model's",)
    return weights or "model", ()


AVERAGED = (
    "; these are the averaged (ema) weights, which are taken where a file has them: the model's own fit, say "
    "weights='model' (--weights model)"
)


def _plain_fit(
    document: Document, given: Mapping[str, Any], options: Mapping[str, Any], factory: Factory | None
) -> bool:
    """Whether the weights beside the averaged ones are those of the network."""
    if "model" not in document.weights:
        return False
    try:
        _assemble(document, "model", (), given, options, factory)
    except (BadFileError, HessdiagError, MemoryError):
        return False
    return True


def _assemble(
    document: Document,
    which: str,
    notes: tuple[str, ...],
    given: Mapping[str, Any],
    options: Mapping[str, Any],
    factory: Factory | None,
) -> Checkpoint:
    given, options = dict(given), dict(options)
    facts: Mapping[str, Any] = document.weights[which]
    if factory is None and document.self_describing:
        agree(document.config, {**given, **options})
    elif factory is None:  # says what is missing before any tensor is made
        public_config(split_normalisation(facts)[0], **given, options=options)
    config: Mapping[str, Any]
    tensors = document.tensors(which)
    _refuse_non_finite(tensors, masks=factory is not None)
    if not document.self_describing:
        notes = (f"read as a {document.layout}", *document.notes, *notes)
    if document.others:
        notes = (*notes, f"not used: {', '.join(document.others[:8])}")
    if isinstance(factory, str) and factory.startswith(pretrained.SCHEME):
        model, config, more = pretrained.network(factory, tensors)
        normalised(model, given["normalize"])
        return _finished(document, which, (*notes, *more), model, config)
    if factory is not None:
        model = from_factory(factory)
        normalised(model, given["normalize"])
        own = getattr(model, "config", None)
        config = own if isinstance(own, Mapping) else document.config
        if document.config and dict(config) != document.config:
            notes = (*notes, "the network is the factory's; the file's own config was not used")
    elif document.self_describing:
        if not isinstance(document.config.get("network"), str):
            raise BadFileError(
                "names no network: pass the model it belongs to by factory= (--model package.module:factory)"
            )
        model = from_config(document.config, facts, trusted=False)
        config = document.config
    else:
        facts, given["normalize"], more = _normalisation(facts, tensors, given["normalize"])
        config, also = public_config(facts, **given, options=options)
        notes = (*notes, *more, *also)
        model = from_config(config, facts, trusted=True)
        config = getattr(model, "config", config)
    if factory is not None:
        facts, tensors = aliased(model, facts), aliased(model, tensors)
    translation = translate(facts, facts_of(model), spare=document.scripted)
    notes = (*notes, *translation.notes, *fill(model, tensors, translation.names))
    return _finished(document, which, notes, model, config)


def _finished(
    document: Document, which: str, notes: tuple[str, ...], model: nn.Module, config: Mapping[str, Any]
) -> Checkpoint:
    return Checkpoint(
        model=model.eval(),
        config=dict(config),
        epoch=document.epoch,
        metrics=document.metrics,
        notes=notes,
        sha256=document.sha256,
        weights=which,
        extra=document.extra,
    )


def _normalisation(
    facts: Mapping[str, Any], tensors: Mapping[str, Tensor], normalize: Normalize | None
) -> tuple[Mapping[str, Any], Normalize | None, tuple[str, ...]]:
    """Constants of a normalisation layer among the weights decide `normalize`, or must agree with it."""
    rest, pair = split_normalisation(facts)
    if pair is None:
        return facts, normalize, ()
    mean, std = (tuple(tensors[key].double().flatten().tolist()) for key in pair)
    if not 1 <= len(mean) == len(std) <= 64 or min(std) <= 0:
        raise BadFileError(f"{shown(pair[0])} and {shown(pair[1])} are no normalisation constants")
    if normalize is not None:
        told = torch.tensor([normalize[0], normalize[1]], dtype=torch.float64)
        held = torch.tensor([mean, std], dtype=torch.float64)
        if told.shape != held.shape or not torch.allclose(told, held, rtol=0, atol=1e-4):
            raise BadFileError(f"holds normalisation mean {mean}, std {std}, other than the given ones")
    return (
        rest,
        (mean, std),
        (f"inputs normalised inside by the file's own constants ({pair[0]}, {pair[1]})",),
    )


def _refuse_non_finite(tensors: Mapping[str, Tensor], *, masks: bool) -> None:
    """Of a network that may hold `masks` minus infinity is left to the objective, which knows the parameters."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            off = tensor.isnan() | (tensor.isposinf() if masks else tensor.isinf())
            if count := int(off.sum()):
                raise NonFiniteError(f"tensor {shown(name)} holds {count} NaN or infinite values of {tensor.numel()}")
        if name.endswith("running_var") and tensor.numel() and float(tensor.min()) < 0:
            raise BadFileError(f"tensor {shown(name)} is a variance below zero")
