"""Mutate valid checkpoints byte by byte and load them: only the project's own errors may come out.

    python tests/hessdiag/fuzz/fuzz_checkpoint.py --mutations 100000 --seed 0

Half of the mutations strike the file as it lies on disk; the other half strike what checksums and lengths
would protect (the pickle inside a zip, the JSON inside safetensors), with those set right afterwards, so that
the deeper checks are reached too. TorchScript archives, the index of weights in several files and one of those files
are struck as well. Some mutations put in opcodes that ask for much (a list copied a thousand
times, keys that collide, a memo of gigabytes). An offender is a foreign exception, a load that takes more
processor time or memory than the limits, here or in the process that reads pickles, or an audit event that
loading data never needs (any other process, a socket, a file written or removed, a class looked up by the
pickle module).
"""

from __future__ import annotations

import argparse
import io
import json
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from children import most_held, noting, spent
from safetensors.torch import save

from hessdiag import networks
from hessdiag.checkpoint import inspect_checkpoint, load_checkpoint, save_checkpoint
from hessdiag.errors import HessdiagError
from hessdiag.store import pickled

# Of the processor, here and in the process that reads pickles, on a machine that does `work` in `WORK_SECONDS`; a slower
# one has more.
LIMIT_SECONDS = pickled.SECONDS + 2.0
WORK_SECONDS = 0.03
LIMIT_BYTES = pickled.MEMORY  # and four times the file
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "subprocess.Popen",
    "socket.",
    "os.remove",
)
FORBIDDEN += (
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "shutil.",
    "pickle.find_class",
    "ctypes.dlopen",
    "webbrowser.",
)
EDGES = (
    0,
    1,
    7,
    127,
    128,
    255,
    256,
    32767,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63 - 1,
    2**64 - 1,
)

Mutation = Callable[[bytes, random.Random, bytes], bytes]


def limit() -> float:
    """Processor seconds that one file may take here: what else the machine does, and how slow it is, is no offence."""
    begun = time.process_time()
    sum(i * i for i in range(400_000))
    return LIMIT_SECONDS * max(1.0, (time.process_time() - begun) / WORK_SECONDS)


@dataclass
class Report:
    """What came of the mutations."""

    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    offenders: list[str] = field(default_factory=list)
    slowest: float = 0.0  # in processor seconds
    limit: float = field(default_factory=limit)
    grown: int = 0  # MiB of peak memory beyond that of loading the valid files
    held: int = 0  # bytes that the process which reads pickles held at most

    @property
    def total(self) -> int:
        return self.accepted + sum(self.refused.values()) + len(self.offenders)


@dataclass(frozen=True)
class Seed:
    """A valid file, how to load it, and how to reach what its checksums protect."""

    name: str
    data: bytes
    options: dict[str, Any]
    open: Callable[[bytes], bytes] | None = None
    close: Callable[[bytes, bytes], bytes] | None = None
    file: str = "mutated"  # what is struck
    loaded: str = "mutated"  # what is loaded: an index, where one of its files is struck


def flip(data: bytes, rng: random.Random, other: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def overwrite(data: bytes, rng: random.Random, other: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + rng.randbytes(rng.choice((1, 1, 2, 4, 8))) + data[at + 1 :]


def truncate(data: bytes, rng: random.Random, other: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def insert(data: bytes, rng: random.Random, other: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.randrange(1, 32)) + data[at:]


def delete(data: bytes, rng: random.Random, other: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.randrange(1, 64) :]


def splice(data: bytes, rng: random.Random, other: bytes) -> bytes:
    start = rng.randrange(len(other))
    at = rng.randrange(len(data))
    piece = other[start : start + rng.randrange(1, 128)]
    return data[:at] + piece + data[at + (len(piece) if rng.random() < 0.5 else 0) :]


def repeat(data: bytes, rng: random.Random, other: bytes) -> bytes:
    at = rng.randrange(len(data))
    piece = data[at : at + rng.randrange(1, 64)]
    return data[:at] + piece * rng.choice((2, 3, 50)) + data[at + len(piece) :]


def length_field(data: bytes, rng: random.Random, other: bytes) -> bytes:
    layout = rng.choice(("<H", "<I", "<Q", ">I"))
    width = struct.calcsize(layout)
    at = rng.randrange(max(1, len(data) - width))
    value = rng.choice(EDGES) + rng.choice((-1, 0, 0, 1))
    return data[:at] + struct.pack(layout, value % (1 << 8 * width)) + data[at + width :]


PRIME = 2**61 - 1  # whole numbers that differ by it have one hash
FRAGMENTS = (
    b"](" + b"K\x01K\x02\x86" * 3000 + b"eq\xf0](" + b"ccollections\nOrderedDict\nh\xf0\x85R" * 500 + b"e0",
    b"(" + b"K\x01" * 3000 + b"tq\xf0](" + b"cargparse\nNamespace\nh\xf0R" * 500 + b"e0",
    b"}(" + b"".join(b"\x8a\x0a" + (PRIME * n).to_bytes(10, "little") + b"N" for n in range(1, 20_000)) + b"u0",
    b"Nr\xff\xff\xff\xff",
    b"]q\xf0h\xf0a",
    b"]q\xf0" + b"](h\xf0h\xf0eq\xf0" * 40,
    b")" + b"\x85" * 1000,
    b"cos\nsystem\nX\x01\x00\x00\x00x\x85R0",
    b"cargparse\nNamespace\n)\x81}X\x01\x00\x00\x00xK\x01sb0",
    b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R0",
)
"""Opcodes that leave the stack as it was, or nearly, and ask for time, memory, or something to be run."""


def fragment(data: bytes, rng: random.Random, other: bytes) -> bytes:
    at = rng.randrange(3) if rng.random() < 0.5 else rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(FRAGMENTS) + data[at:]


MUTATIONS: tuple[Mutation, ...] = (
    fragment,
    flip,
    flip,
    overwrite,
    truncate,
    insert,
    delete,
    splice,
    repeat,
    length_field,
)


def seeds(folder: Path) -> list[Seed]:
    """Small valid files of every kind that is read."""
    model = networks.build("mlp", in_features=3, widths=(2,), num_classes=2, seed=0)
    bare = {"module." + key: value for key, value in model.state_dict().items()}
    public = {"network": "mlp", "activation": "relu"}
    found = []
    for suffix in ("pt", "safetensors"):
        path = folder / f"seed.{suffix}"
        save_checkpoint(path, model, ema=model, epoch=3, metrics={"accuracy": 0.5}, dataset="digits")
        inner = (_pickle_of, _with_pickle) if suffix == "pt" else (_header_of, _with_header)
        found.append(Seed(suffix, path.read_bytes(), {}, *inner))
    for new in (True, False):
        buffer = io.BytesIO()
        torch.save({"net": bare, "epoch": 3, "optimizer": {"lr": 0.1}}, buffer, _use_new_zipfile_serialization=new)
        inner = (_pickle_of, _with_pickle) if new else (None, None)
        found.append(Seed("zip" if new else "legacy", buffer.getvalue(), public, *inner))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; its files are not gone
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.trace(model.eval(), torch.zeros(1, 3)), buffer)
    found.append(Seed("script", buffer.getvalue(), public, _pickle_of, _with_pickle))
    return [*found, *_sharded(folder, model, public)]


def _sharded(folder: Path, model: torch.nn.Module, options: dict[str, Any]) -> list[Seed]:
    """An index of one safetensors file and one pickle, and each of its files."""
    state = dict(model.state_dict())
    first, *rest = state
    files = {"a.safetensors": save({first: state[first]}), "b.bin": b""}
    buffer = io.BytesIO()
    torch.save({name: state[name] for name in rest}, buffer)
    files["b.bin"] = buffer.getvalue()
    places = {first: "a.safetensors", **dict.fromkeys(rest, "b.bin")}
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": places}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    name = "model.safetensors.index.json"
    (folder / name).write_text(json.dumps(index))
    inner = {"a.safetensors": (_header_of, _with_header), "b.bin": (_pickle_of, _with_pickle)}
    shards = [Seed(f"shard {file}", files[file], options, *inner[file], file, name) for file in files]
    return [Seed("index", json.dumps(index).encode(), options, None, None, name, name), *shards]


def _pickle_of(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read("archive/data.pkl")


def _with_pickle(data: bytes, pickled: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name == "archive/data.pkl" else old.read(name))
    return out.getvalue()


def _header_of(data: bytes) -> bytes:
    return data[8 : 8 + struct.unpack_from("<Q", data)[0]]


def _with_header(data: bytes, header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data[8 + struct.unpack_from("<Q", data)[0] :]


_note = ""
_events: list[str] = []
_watching = False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event == "subprocess.Popen" and arguments[1][:4] == pickled.command("", 0)[:4]:
        return  # the process that reads pickles; what it does, its own audit hook watches
    named = event == "open" and not isinstance(arguments[0], int)  # a number: the pipe to that process
    writes = named and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writes or event.startswith(FORBIDDEN):
        _events.append(event)


def attempt(path: Path, options: dict[str, Any], look: bool, report: Report, label: str) -> None:
    """Load (or inspect) one file and record what came of it."""
    global _watching
    _events.clear()
    most_held(_note)
    begun = spent()
    _watching = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            inspect_checkpoint(path) if look else load_checkpoint(path, **options)
        outcome = ""
    except HessdiagError as error:
        outcome = type(error).__name__
        if "\n" in str(error) or len(str(error)) > 1000:
            outcome = f"OFFENDER a message of several lines or {len(str(error))} characters"
    except BaseException as error:
        outcome = f"OFFENDER {type(error).__name__}: {str(error)[:200]}"
    finally:
        _watching = False
    seconds = spent() - begun
    held = most_held(_note)
    report.slowest, report.held = max(report.slowest, seconds), max(report.held, held)
    if _events:
        outcome = f"OFFENDER did {sorted(set(_events))}"
    elif seconds > report.limit:
        outcome = f"OFFENDER took {seconds:.1f} s"
    elif held > LIMIT_BYTES + 4 * (path.stat().st_size if path.exists() else 0):
        outcome = f"OFFENDER took {held >> 20} MiB"
    if outcome.startswith("OFFENDER"):
        report.offenders.append(f"{label}: {outcome[9:]}")
    elif outcome:
        report.refused[outcome] += 1
    else:
        report.accepted += 1


def run(mutations: int, seed: int, folder: Path, keep: Path | None = None) -> Report:
    """That many mutated files, the same for the same seed."""
    global _note
    sys.addaudithook(_watch)
    honest, _note = pickled.command, str(folder / "held")
    pickled.command = noting(honest, _note)
    try:
        return _run(mutations, seed, folder, keep)
    finally:
        pickled.command, _note = honest, ""


def _run(mutations: int, seed: int, folder: Path, keep: Path | None) -> Report:
    report = Report()
    valid = seeds(folder)
    for base in valid:  # also brings in every lazy import before anything is watched
        (folder / base.file).write_bytes(base.data)
        load_checkpoint(folder / base.loaded, **base.options)
        inspect_checkpoint(folder / base.loaded)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in range(mutations):
        rng = random.Random(f"{seed}/{index}")
        base, other = rng.choice(valid), rng.choice(valid)
        inner = base.open is not None and base.close is not None and rng.random() < 0.6
        data = base.open(base.data) if inner and base.open else base.data
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            if data:
                data = rng.choice(MUTATIONS)(data, rng, other.data)
        if inner and base.close:
            data = base.close(base.data, data)
        (folder / base.file).write_bytes(data)
        before = len(report.offenders)
        label = f"seed {seed} mutation {index} of {base.name}"
        attempt(folder / base.loaded, base.options, rng.random() < 0.1, report, label)
        if base.loaded != "mutated":
            (folder / base.file).write_bytes(base.data)
        if keep is not None and len(report.offenders) > before:
            (keep / f"offender-{seed}-{index}").write_bytes(data)
    report.grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) >> 10  # Linux counts in KiB
    return report


def main() -> int:
    """The command line; exit status 1 if there is any offender."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--mutations", type=int, default=100_000)
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--keep", type=Path, help="folder for the files of offenders")
    told = ask.parse_args()
    if told.keep is not None:
        told.keep.mkdir(parents=True, exist_ok=True)
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        report = run(told.mutations, told.seed, Path(folder), told.keep)
    for offender in report.offenders:
        print(offender)
    refused = sum(report.refused.values())
    print(
        f"{report.total} mutations in {time.perf_counter() - begun:.0f} s: {refused} refused "
        f"({json.dumps(report.refused)}), {report.accepted} loaded, {len(report.offenders)} offenders, "
        f"slowest {report.slowest:.3f} s, peak memory grew by {report.grown} MiB, the reader held {report.held >> 20} MiB"
    )
    return 1 if report.offenders else 0


if __name__ == "__main__":
    sys.exit(main())
