"""From a name to a data set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from hessdiag.data.arrays import load_npz, load_safetensors
from hessdiag.data.cifar import load_cifar
from hessdiag.data.custom import load_custom
from hessdiag.data.dataset import DataSet, Reading
from hessdiag.data.digits import load_digits
from hessdiag.data.fetch import default_root
from hessdiag.data.folder import load_folder
from hessdiag.data.named import Arrays, NamedDataSet
from hessdiag.data.published import SOURCES
from hessdiag.errors import ConfigurationError, DataError, UnknownNameError, nearest
from hessdiag.problem.handing_back import memory_errors
from hessdiag.problem.losses import IGNORE
from hessdiag.store.factories import is_factory_name, module_of_file
from hessdiag.store.files import nearest_file, shown

NAMES = ("digits", *SOURCES)
NAMED = ("npz", "safetensors")
SCHEMES = (*NAMED, "folder")
TABLES = ("csv", "tsv", "txt", "json", "jsonl", "parquet", "arrow", "h5", "hdf5", "mat", "xlsx", "pkl", "pickle")
"""What tables are called that others read."""


def load(
    name: str,
    *,
    split: str = "test",
    samples: int | None = None,
    seed: int = 0,
    root: str | os.PathLike[str] | None = None,
) -> DataSet:
    """The data set `name`, or `samples` of it chosen with `seed` (without replacement, in original order).

    Names: digits, cifar10, cifar100; npz:PATH and safetensors:PATH (arrays `inputs`, `targets`); folder:PATH
    (one subfolder per class); package.module:factory (your code). `root` is where cifar lies: the argument,
    else $HESSDIAG_DATA, else ~/.cache/hessdiag. Files without splits of their own report the split "all".

    >>> load("digits", split="test").inputs.shape
    torch.Size([500, 1, 8, 8])
    """
    found = load_named(name, split=split, samples=samples, seed=seed, root=root)
    if isinstance(found, NamedDataSet):
        held = ", ".join(found.inputs)
        raise DataError(
            f"{shown(name)}: its inputs are arrays of names ({held}); hessdiag.data.load_named reads them as such"
        )
    return found


def load_named(
    name: str,
    *,
    split: str = "test",
    samples: int | None = None,
    seed: int = 0,
    root: str | os.PathLike[str] | None = None,
    inputs: Sequence[str] | None = None,
    targets: str | None = None,
    loss: str = "cross_entropy",
    ignore_index: int = IGNORE,
) -> DataSet | NamedDataSet:
    """As `load`, and files or code whose inputs are several arrays by name (input_ids, attention_mask, labels).

    `inputs` and `targets` say which arrays of a file are which, where their names do not. `loss` and `ignore_index` are
    those of the objective: integers are class numbers in cross-entropy, plain values in "bce", "mse" and "half_mse".
    """
    if split not in ("train", "test"):
        raise ConfigurationError(f"split {split!r}: it is 'train' or 'test'")
    arrays = Arrays.of(inputs, targets, Reading.of(loss, ignore_index))
    folder = Path(root).expanduser() if root is not None else default_root()
    with memory_errors(f"a data set is held in memory whole, and {shown(name)} does not fit; name a smaller one"):
        return _whole(name, split, seed, folder, arrays).sample(samples, seed=seed)


def _whole(name: str, split: str, seed: int, root: Path, arrays: Arrays) -> DataSet | NamedDataSet:
    scheme, colon, rest = name.partition(":")
    if arrays.given and not (colon and scheme in NAMED) and not is_factory_name(name):
        raise ConfigurationError(
            f"inputs and targets (--inputs, --targets) name arrays of npz: and safetensors: files, not of {shown(name)}"
        )
    if name == "digits":
        return load_digits(split)
    if name in SOURCES:
        return load_cifar(SOURCES[name], split, root)
    if colon and scheme in SCHEMES:
        if not rest:
            raise DataError(f"{name!r} names no path; write {scheme}:PATH")
        path = Path(rest).expanduser()
        if not os.path.exists(path):
            close = nearest_file(path, (f".{scheme}",)) if scheme in NAMED else None
            if close is not None:
                raise DataError(f"{path}: no such file; did you mean {scheme}:{close}?")
        if scheme == "folder":
            return load_folder(path, split, name)
        return load_npz(path, name, arrays) if scheme == "npz" else load_safetensors(path, name, arrays)
    table = rest if colon and (scheme in TABLES or Path(rest).suffix.lower()[1:] in TABLES) else name
    if Path(table).suffix.lower()[1:] in TABLES:
        made = f"{shown(Path(table).stem)[1:-1]}.npz"
        raise UnknownNameError(
            f"no data set {name!r}: such tables are not read; numpy.savez('{made}', inputs=..., targets=...) of its "
            f"columns makes npz:{made}, which is"
        )
    if is_factory_name(name):
        return load_custom(name, split=split, seed=seed, arrays=arrays)
    if ".py:" in name:
        raise UnknownNameError(f"no data set {name!r}{module_of_file(name)}")
    path = Path(name).expanduser()
    meant = {".npz": "npz", ".safetensors": "safetensors"}.get(path.suffix.lower(), "folder" if path.is_dir() else None)
    if meant:
        raise UnknownNameError(f"no data set {name!r}; did you mean '{meant}:{name}'?")
    if path.suffix.lower() == ".npy":
        raise UnknownNameError(
            f"no data set {name!r}; numpy.savez('data.npz', inputs=..., targets=...) makes one, npz:data.npz"
        )
    known = [*NAMES, *(f"{s}:PATH" for s in SCHEMES), "package.module:factory"]
    raise UnknownNameError(f"no data set {name!r}; {nearest(name, known)}")
