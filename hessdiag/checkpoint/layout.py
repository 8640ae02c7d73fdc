"""The tensor names of public training code, translated into a network's own; nothing is dropped in silence.

Layouts read: kuangliu/pytorch-cifar and its heirs in TRADES, MART and AWP; TRADES' wide networks with their
dead `sub_block1`; DAJAT's split BatchNorms (`bn1_auto`, `shortcut_bn.0`), of which the test-time set "base"
is kept; wrappers of DataParallel, torch.compile, AveragedModel and RobustBench. Whatever does not fit in the
end is listed and refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hessdiag.store.files import BadFileError, shown
from hessdiag.store.tensorfiles import TensorFacts

PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
# Constants of a normalisation layer stored beside the weights: mean and deviation per channel.
NORMALISATIONS = (
    ("normalize.mean", "normalize.std"),
    ("normalizer.mean", "normalizer.std"),
    ("0.mean", "0.std"),
    ("mean", "std"),
    ("mu", "sigma"),
    ("mu", "std"),
)
MAX_LISTED = 6


@dataclass(frozen=True)
class Translation:
    """Target name -> name in the file of each tensor of the network; None is filled with zero."""

    names: Mapping[str, str | None]
    notes: tuple[str, ...]


def split_normalisation(
    names: Mapping[str, TensorFacts],
) -> tuple[dict[str, TensorFacts], tuple[str, str] | None]:
    """The weights without the constants of a normalisation layer, and the names of those constants if it has
    them.
    """
    rest = dict(names)
    for prefix in ("", *PREFIXES):
        for mean, std in NORMALISATIONS:
            pair = (prefix + mean, prefix + std)
            if pair[0] in rest and pair[1] in rest:
                for key in pair:
                    del rest[key]
                return rest, pair
    return rest, None


def translate(
    source: Mapping[str, TensorFacts], target: Mapping[str, TensorFacts], *, spare: bool = False
) -> Translation:
    """Match the names of a file to those of a network; refuses (BadFileError) what is missing, left over or
    misshapen. With `spare` what is left over is named and not used, as where tensors may be no state.
    """
    notes: list[str] = []
    names = {name: name for name in source}  # name as translated so far -> name in the file
    for step in (
        _strip,
        _put_inside,
        _drop_dead_blocks,
        _keep_base_norms,
        _rename_shortcuts,
        _rename_classifier,
        _rename_gains,
    ):
        names = step(names, target, notes)
    result: dict[str, str | None] = {name: names[name] for name in target if name in names}
    counters = [name for name in target if name not in names and name.endswith("num_batches_tracked")]
    if counters:
        result.update(dict.fromkeys(counters))
        notes.append(f"{len(counters)} num_batches_tracked absent (torch before 0.4.1): set to 0")
    missing = [name for name in target if name not in result]
    unexpected = [name for name in names if name not in target]
    if spare and unexpected and not missing:
        notes.append(f"not used, since the network has none of that name: {some(unexpected)}")
        unexpected = []
    if missing or unexpected:
        raise BadFileError(
            "its tensors are not those of the network: "
            + _listed(missing, unexpected)
            + _next_step(source, target, missing, unexpected)
        )
    _check_shapes({name: source[found] for name, found in result.items() if found is not None}, target)
    return Translation(result, tuple(notes))


def stripped(names: Mapping[str, TensorFacts]) -> dict[str, TensorFacts]:
    """The same tensors under names without wrappers, for guessing what network they belong to."""
    table = _strip({name: name for name in names}, {}, [])
    return {name: names[found] for name, found in table.items()}


Names = dict[str, str]


def _strip(names: Names, target: Mapping[str, TensorFacts], notes: list[str]) -> Names:
    """Wrappers' prefixes, as often as they are stacked; the few tensors outside one are left out by name."""
    gone: list[str] = []
    if "n_averaged" in names and "n_averaged" not in target:  # torch.optim.swa_utils.AveragedModel
        names = _renamed(names, lambda name: None if name == "n_averaged" else name)
        gone.append("n_averaged")
    spare: list[str] = []
    while names and set(names) != set(target):
        prefix = _wrapper(names, target)
        if prefix is None:
            break
        spare += [found for name, found in names.items() if not name.startswith(prefix)]
        names = _renamed(
            names,
            lambda name, p=prefix: name.removeprefix(p) if name.startswith(p) else None,  # type: ignore[misc]
        )
        gone.append(prefix)
    if any("._orig_mod." in name for name in names):  # a compiled part inside
        names = _renamed(names, lambda name: name.replace("._orig_mod.", "."))
        gone.append("_orig_mod.")
    if gone:
        notes.append(f"names stripped of {' '.join(gone)}")
    if spare:
        notes.append(f"outside {' '.join(gone)} and not used: {some(spare)}")
    return names


def _wrapper(names: Names, target: Mapping[str, TensorFacts]) -> str | None:
    """The wrapper's prefix to take off next: that of all names, or of those that are the network's.

    Tensors outside it must not be what the network wants, and be fewer than those inside unless the network's own
    names appear once it is gone, or no network is known yet (none that is known by name has such names). Where two
    prefixes would do equally, none is guessed.
    """
    if target and all(name in names for name in target):
        return None
    fits: list[tuple[int, str]] = []
    for prefix in PREFIXES:
        inside = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        if not inside or (target and all(name.startswith(prefix) for name in target)):
            continue
        if any(name in target for name in names if not name.startswith(prefix)):
            continue
        shared = sum(name in target for name in inside)
        if shared or not target or 2 * len(inside) > len(names):
            fits.append((shared or len(inside), prefix))
    fits.sort(reverse=True)
    if len(fits) > 1 and fits[0][0] == fits[1][0]:
        raise BadFileError(
            f"the network's tensors lie under both {shown(fits[0][1])} and {shown(fits[1][1])}: say which by prefix= "
            f"(--prefix {fits[0][1]})"
        )
    return fits[0][1] if fits else None


def _put_inside(names: Names, target: Mapping[str, TensorFacts], notes: list[str]) -> Names:
    """The weights of a part that is all the network has: one prefix before every name makes them the network's."""
    wanted = [name for name in target if not name.endswith("num_batches_tracked")]
    for prefix in _prefixes(wanted[0]) if wanted else []:
        rest = {name.removeprefix(prefix) for name in wanted}
        if all(name.startswith(prefix) for name in wanted) and rest <= set(names) and not set(names) & set(target):
            notes.append(f"names put under {prefix}, which all of the network's have")
            return _renamed(names, lambda name: prefix + name)  # noqa: B023 (used before the next turn)
    return names


def _prefixes(name: str) -> list[str]:
    """a., a.b. of a.b.c."""
    parts = name.split(".")
    return [".".join(parts[:k]) + "." for k in range(1, len(parts))]


def _drop_dead_blocks(names: Names, target: Mapping[str, TensorFacts], notes: list[str]) -> Names:
    """TRADES' WideResNet builds `sub_block1` and never calls it."""
    dead = [name for name in names if name.startswith("sub_block1.") and name not in target]
    if dead and any(name.startswith("block1.") for name in names):
        notes.append(f"{len(dead)} tensors of sub_block1 dropped: that code never uses them")
        return _renamed(names, lambda name: None if name in set(dead) else name)
    return names


def _keep_base_norms(names: Names, target: Mapping[str, TensorFacts], notes: list[str]) -> Names:
    """DAJAT trains two sets of BatchNorm, "base" and "auto", and tests with the base set."""
    auto = {name for name in names if name not in target and "_auto." in name and name.replace("_auto.", ".") in names}
    if auto:
        notes.append(f"{len(auto)} tensors of the *_auto BatchNorms dropped: the base set is the one tested with")
        names = _renamed(names, lambda name: None if name in auto else name)
    return _read_as(names, target, "shortcut_bn.0", "shortcut.1", notes)


def _rename_shortcuts(names: Names, target: Mapping[str, TensorFacts], notes: list[str]) -> Names:
    """A residual net of torchvision calls its shortcuts downsample; its stem differs, unless it was made for CIFAR."""
    warning = "; no tensor tells a max-pooling behind the stem: none is made"
    return _read_as(names, target, "downsample", "shortcut", notes, warning)


def _read_as(
    names: Names, target: Mapping[str, TensorFacts], old: str, new: str, notes: list[str], warning: str = ""
) -> Names:
    """The part `old` of a name called `new`, where that makes it one that is wanted."""
    moved = {name: name.replace(f".{old}.", f".{new}.") for name in names if f".{old}." in name}
    moved = {name: other for name, other in moved.items() if name not in target and other in target}
    if moved:
        notes.append(f"{old} read as {new}{warning}")
        names = _renamed(names, lambda name: moved.get(name, name))
    return names


def _rename_classifier(names: Names, target: Mapping[str, TensorFacts], notes: list[str]) -> Names:
    """The last layer is `linear` in some copies and `fc` in others."""
    for old, new in (("linear", "fc"), ("fc", "linear")):
        pair = {f"{old}.{part}": f"{new}.{part}" for part in ("weight", "bias")}
        if all(key in names and key not in target for key in pair) and all(
            key in target and key not in names for key in pair.values()
        ):
            notes.append(f"{old} read as {new}")
            return _renamed(names, lambda name: pair.get(name, name))  # noqa: B023 (used before the next turn)
    return names


def _rename_gains(names: Names, target: Mapping[str, TensorFacts], notes: list[str]) -> Names:
    """Layer norms converted from TensorFlow call weight and bias gamma and beta."""
    moved = {
        name: name.removesuffix(old) + new
        for name in names
        for old, new in ((".gamma", ".weight"), (".beta", ".bias"))
        if name.endswith(old) and name not in target and name.removesuffix(old) + new in target
    }
    if moved:
        notes.append("gamma and beta read as weight and bias")
        names = _renamed(names, lambda name: moved.get(name, name))
    return names


def _renamed(names: Names, rule: Callable[[str], str | None]) -> Names:
    table: Names = {}
    for name, found in names.items():
        new = rule(name)
        if new is None:
            continue
        if new in table:
            raise BadFileError(f"two tensors are called {shown(new)} once wrappers are stripped")
        table[new] = found
    return table


def some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    told = ", ".join(shown(name)[1:-1] for name in names[:MAX_LISTED])
    return told + (f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else "")


def _next_step(
    source: Mapping[str, TensorFacts], target: Mapping[str, TensorFacts], missing: list[str], unexpected: list[str]
) -> str:
    """What to do about tensors that do not fit, where that can be told."""
    if not missing:
        return "; if the network has no use for them, save the state dict without them"
    wanted = [name for name in target if not name.endswith("num_batches_tracked")]
    if not wanted:
        return ""
    ends = [name.removesuffix(wanted[0]) for name in source if name.endswith(f".{wanted[0]}")]
    whole = [prefix for prefix in ends[:100] if all(f"{prefix}{name}" in source for name in wanted)]
    if whole:
        told = " or ".join(f"--prefix {shown(prefix)[1:-1]}" for prefix in whole[:3])
        return f"; all of them lie under a prefix: say prefix= ({told})"
    for prefix in _prefixes(missing[0]):
        if unexpected and all(prefix + name in target for name in unexpected):
            part = shown(prefix)[1:-2]
            return f"; they are those of its part {part} alone: let factory (--model) return that"
    if len(missing) == len(target) and unexpected:
        return "; is it the checkpoint of another network?"
    return ""


def _listed(missing: list[str], unexpected: list[str]) -> str:
    parts = []
    for what, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            parts.append(f"{len(names)} {what} ({some(names)})")
    return "; ".join(parts)


def _check_shapes(found: Mapping[str, TensorFacts], target: Mapping[str, TensorFacts]) -> None:
    wrong = [name for name in found if found[name].shape != target[name].shape]
    if not wrong:
        return
    classes = class_counts(found), class_counts(target)
    last = {name for name in wrong if name.rpartition(".")[0] == last_layer(target)}
    if None not in classes and classes[0] != classes[1] and last == set(wrong):
        raise BadFileError(f"checkpoint has {classes[0]} classes, network built for {classes[1]}")
    of_torchvision = torchvision_resnet(found) if "conv1.weight" in wrong else None
    if of_torchvision is not None:
        raise BadFileError(of_torchvision)
    name = wrong[0]
    more = f" (and {len(wrong) - 1} more tensors)" if len(wrong) > 1 else ""
    raise BadFileError(
        f"tensor {shown(name)} has shape {found[name].shape}, the network wants {target[name].shape}{more}"
    )


def torchvision_resnet(weights: Mapping[str, TensorFacts]) -> str | None:
    """What to do with the tensors of a residual net of torchvision: its stem of 7x7 is in no registered network."""
    stem, second, last = weights.get("conv1.weight"), weights.get("layer1.0.conv2.weight"), last_layer(weights)
    if stem is None or second is None or last is None or "layer4.0.conv1.weight" not in weights:
        return None
    if stem.shape[2:] != (7, 7) or second.shape != (64, 64, 3, 3):  # wider ones have other names
        return None
    blocks = {tuple(name.split(".")[:2]) for name in weights if name.startswith("layer")}
    depth = 2 + (3 if "layer1.0.conv3.weight" in weights else 2) * len(blocks)
    made = f"torchvision.models.resnet{depth}"
    classes = weights[f"{last}.weight"].shape[0]
    how = f"--model torchvision.models:resnet{depth}"
    if classes != 1000:
        how = f"--model mycode:make, where make() returns {made}(num_classes={classes})"
    return f"its stem of 7x7 is that of {made}: {how}"


def last_layer(weights: Mapping[str, TensorFacts]) -> str | None:
    """The name of the last matrix with a bias or without: in every network known here, the classifier."""
    matrices = [name for name, facts in weights.items() if name.endswith(".weight") and len(facts.shape) == 2]
    return matrices[-1].rpartition(".")[0] if matrices else None


def class_counts(weights: Mapping[str, TensorFacts]) -> int | None:
    """How many outputs the last layer has."""
    layer = last_layer(weights)
    return None if layer is None else weights[f"{layer}.weight"].shape[0]
