"""The process that reads a stranger's pickle: `python -I -S pickle_child.py MODE MEMORY SECONDS < pickle > answer`.

Started by `hessdiag.store.pickled` alone, without torch and without anything of hessdiag. The standard library's
Unpickler does the work, with a `find_class` that imports nothing: names that torch.save writes stand for inert
descriptions, names that act (os.system) end the reading, any other is a stand-in that swallows whatever is done to it
and goes back as its name. An audit hook ends the process should anything be opened, imported or started all the same;
limits of memory and processor time end what has none. Modes: `zip` (one pickle), `script` (one, the attributes of
TorchScript's modules kept as dictionaries), `legacy` (the five of old torch files), `arrays` (one, numpy's arrays
handed back as bytes). The answer: 8 bytes of length, so much JSON, the bytes of arrays.
"""

from __future__ import annotations

import io
import json
import os
import sys
from pickle import Unpickler

try:
    import resource
except ImportError:  # Windows: the parent's clock is the only limit
    resource = None  # type: ignore[assignment]

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing would cost a quarter of this process's start
    from typing import Any

MAX_WORK = 500_000  # values, entries copied, pieces of 32 characters
MAX_DEPTH = 40
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in zip(
        ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool"),
        ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"),
    )
}
ACTING = """posix nt os sys subprocess socket shutil importlib runpy pty ctypes code io _io webbrowser pickle _pickle
marshal types operator commands multiprocessing asyncio timeit bdb pdb cProfile profile tempfile urllib http requests"""
"""Modules whose names end the reading. Nothing would run; but a file with an attack in it has no numbers to trust."""
BUILTINS = "set frozenset complex slice range bytearray object list dict tuple int float str bytes bool"
"""Those of Python's own names that are no such attack."""


class Refused(Exception):
    """Why the pickle is not read, on one line."""


class Left:
    """Stands for an instance of a class that is not data: takes anything, keeps nothing. Subclasses carry the name."""

    work, name = MAX_WORK, ""

    def __new__(cls, *arguments: Any, **options: Any) -> Left:
        """Its arguments are counted and dropped."""
        charge(1 + len(arguments))
        return object.__new__(cls)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        charge()

    append = extend = add = __setstate__

    def __setitem__(self, key: Any, value: Any) -> None:
        charge()


class Module(Left):
    """Stands for a module of a TorchScript archive, whose classes are text beside the pickle: keeps its attributes."""

    attributes: Any = None

    def __setstate__(self, state: Any) -> None:
        charge()
        self.attributes = state if type(state) is dict else None


def charge(count: int = 1) -> None:
    """Take `count` from the work that is left."""
    Left.work -= count
    if Left.work < 0:
        raise Refused("the values inside repeat one another without end, or are more than any checkpoint's")


class Node:
    """A description for the parent: what it is, then the rest. Its own state cannot be set, but for an array's."""

    __slots__ = ("node",)

    def __init__(self, *node: Any) -> None:
        self.node = node

    def __call__(self, *arguments: Any) -> Any:
        """Nothing here can be called but a `Call`."""
        raise Refused(f"the pickle calls {self.node[-1]}, which torch.save does not: refused")

    def __setstate__(self, state: Any) -> None:
        if self.node[0] == "array":
            self.node = ("array", state)
        elif self.node[0] != "dtype":  # byte order and alignment: what is read has neither
            raise Refused("the pickle sets the state of an object that is no state dict: refused")


class Call(Node):
    """A function that the pickle may call: what it does here is describe."""

    __slots__ = ()

    def __call__(self, *arguments: Any) -> Any:
        """Count the arguments, then describe."""
        charge(1 + len(arguments))
        try:
            return self.node[1](*arguments)
        except (TypeError, ValueError, AttributeError):
            raise Refused(f"the pickle calls {self.node[0]} in a way torch.save does not: refused") from None


class Ordered(dict):  # type: ignore[type-arg]
    """An OrderedDict; what a state dict carries beside its items is dropped."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict) or set(state) - {"_metadata"}:
            raise Refused("the pickle sets the state of an object that is no state dict: refused")


def is_node(value: Any, kind: str) -> bool:
    """Whether a value of the pickle is our description of that kind."""
    return type(value) is Node and value.node[0] == kind


def ordered(pairs: Any = ()) -> Ordered:
    """A copy of all pairs: work that must be counted, since two bytes of a pickle can ask for it again."""
    charge(len(pairs))
    return Ordered(pairs)


def sizes(numbers: Any) -> tuple[Any, ...]:
    """`torch.Size`, counted likewise."""
    charge(len(numbers))
    return tuple(numbers)


def tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    """`torch._utils._rebuild_tensor_v2`: requires_grad and an empty table of hooks may follow."""
    if isinstance(storage, Left):
        return storage
    whole = (isinstance(size, tuple), isinstance(stride, tuple), len(size) <= 8, len(stride) <= 8)
    if not all(whole) or not all(type(n) is int for n in (offset, *size, *stride)):
        raise Refused("a tensor in the pickle has no valid shape")
    if not is_node(storage, "storage") or len(rest) not in (0, 2) or (rest and rest[1] != {}):
        raise Refused("a tensor in the pickle is described in a way torch.save does not, or carries hooks: refused")
    return Node("tensor", *storage.node[1:], offset, size, stride)


def parameter(data: Any, requires_grad: Any, hooks: Any) -> Any:
    """`torch._utils._rebuild_parameter`: the tensor itself."""
    if not (is_node(data, "tensor") or isinstance(data, Left)) or hooks != {}:
        raise TypeError
    return data


def encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in protocol 2."""
    if encoding != "latin1":
        raise TypeError
    charge(len(text) >> 5)
    return text.encode("latin-1")


CALLS: dict[str, Any] = {
    "collections.OrderedDict": ordered,
    "torch._utils._rebuild_tensor": tensor,
    "torch._utils._rebuild_tensor_v2": tensor,
    "torch._utils._rebuild_parameter": parameter,
    "torch.Size": sizes,
    "_codecs.encode": encode,
    "numpy.core.multiarray._reconstruct": lambda *_: Node("array", None),
    "numpy._core.multiarray._reconstruct": lambda *_: Node("array", None),
    "numpy.dtype": lambda code, *_: Node("dtype", code.decode("latin-1") if isinstance(code, bytes) else str(code)),
}
NAMES: dict[str, Any] = {name: Call(name, does) for name, does in CALLS.items()}
NAMES |= {name: Node("kind", dtype, name) for name, dtype in STORAGES.items()}


class Reader(Unpickler):
    """The standard library's, with names that mean nothing."""

    def __init__(self, stream: Any, mode: str) -> None:
        super().__init__(stream, encoding="bytes" if mode == "arrays" else "utf-8")
        self.script = mode == "script"
        self.length = 6 if mode == "legacy" else 5

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for here; the same for the same name."""
        full = f"{module}.{name}"
        if full not in NAMES:
            charge()
            root, told = module.partition(".")[0], ascii(full)[1:-1][:120]
            if root in ACTING.split() or (root in ("builtins", "__builtin__") and name not in BUILTINS.split()):
                raise Refused(f"the pickle asks for {told}, which is not data: refused, nothing was executed")
            kind = Module if self.script and root == "__torch__" else Left
            NAMES[full] = type("Left", (kind,), {"name": told})
        return NAMES[full]

    def persistent_load(self, reference: Any) -> Any:
        """A storage: ('storage', type, key, location, numel), and None in the old format (no view)."""
        if not isinstance(reference, tuple) or len(reference) != self.length or reference[0] != "storage":
            raise Refused("the pickle refers to something that is no tensor data")
        kind, key, location, numel = reference[1:5]
        if isinstance(kind, type) and issubclass(kind, Left):
            return kind()
        if not is_node(kind, "kind") or type(key) is not str or type(location) is not str or type(numel) is not int:
            raise Refused("tensor data of no valid type, name or size")
        if reference[5:] not in ((), (None,)):
            raise Refused("views of storages, as torch wrote before 0.4; save it again with a current torch")
        return Node("storage", kind.node[1], key, numel)


def described(value: Any, blobs: list[bytes] | None, depth: int = 0) -> Any:
    """`value` for JSON: lists that begin with what they are; bytes of arrays go to `blobs`, None leaves them out."""
    charge()
    if depth > MAX_DEPTH:
        raise Refused(f"values nested more than {MAX_DEPTH} deep")
    kind = type(value)
    if value is None or kind is bool or kind is float:
        return value
    if kind is int:
        if value.bit_length() > 512:
            raise Refused("an absurdly long integer in the pickle inside")
        return value
    if kind is str or kind is bytes:
        charge(len(value) >> 5)
        return value if kind is str else ["bytes", value.decode("latin-1")]
    if kind is list or kind is tuple:
        return [kind.__name__, *(described(item, blobs, depth + 1) for item in value)]
    if kind is dict or kind is Ordered:
        if not all(type(key) in (str, bytes, int) for key in value):
            raise Refused("a dict key in the pickle inside is neither text nor number")
        return ["dict", *(described(part, blobs, depth + 1) for pair in value.items() for part in pair)]
    if is_node(value, "array") and blobs is not None:
        return array(value.node[1], blobs)
    if is_node(value, "tensor"):
        return value.node
    if isinstance(value, Module) and type(value.attributes) is dict:
        return described(value.attributes, blobs, depth)
    name = value.name if isinstance(value, Left) else getattr(value, "name", None)
    return ["left", name or (f"{value.node[0]} (numpy or torch)" if isinstance(value, Node) else kind.__name__)]


def array(state: Any, blobs: list[bytes]) -> list[Any]:
    """What numpy says of an array (version, shape, dtype, column-major, bytes), for the parent to believe or not."""
    if not isinstance(state, tuple) or len(state) != 5 or not is_node(state[2], "dtype"):
        raise Refused("an array in the pickle is described in a way numpy does not")
    _, shape, dtype, fortran, data = state
    if type(data) is not bytes or not isinstance(shape, tuple) or not all(type(n) is int for n in shape):
        raise Refused("an array in the pickle has no bytes or no valid shape")
    if any(data is other for other in blobs):
        raise Refused("arrays in the pickle repeat one another")
    blobs.append(data)
    return ["array", dtype.node[1][:20], shape, bool(fortran), len(data)]


def read(data: bytes, mode: str, blobs: list[bytes] | None) -> dict[str, Any]:
    """The descriptions of one pickle, or of the five of an old file, and the offset behind them."""
    stream, trees = io.BytesIO(data), list[object]()
    for _ in range(5 if mode == "legacy" else 1):
        trees.append(described(Reader(stream, mode).load(), blobs))
        if mode == "legacy" and trees[0] != LEGACY_MAGIC:
            break
    return {"trees": trees, "end": stream.tell()}


def limit(name: str, most: int) -> None:
    """Set a limit of this process, where the system has it and does not set a lower one itself."""
    kind = getattr(resource, f"RLIMIT_{name}", None)
    if kind is None:
        return
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    try:  # noqa: SIM105 (contextlib would double the time that this process takes to start)
        resource.setrlimit(kind, (most, most))
    except (ValueError, OSError):  # macOS knows limits that it does not take
        pass


def main() -> None:
    """Limits first, then the pickle, then the answer."""
    mode, memory, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    data, blobs = sys.stdin.buffer.read(), list[bytes]()
    limit("CPU", seconds)
    for name, most in (("AS", memory), ("DATA", memory), ("CORE", 0), ("FSIZE", 0), ("NOFILE", 3)):
        limit(name, most)
    watching = [True]
    sys.addaudithook(lambda event, _: os._exit(9) if watching[0] else None)
    try:
        answer = read(data, mode, blobs if mode == "arrays" else None)
    except Refused as error:
        answer = {"refused": str(error)}
    except MemoryError:
        answer = {"refused": f"reading it needs more than {memory >> 20} MiB of memory: refused"}
    except Exception:  # Unpickler raises a dozen classes on damaged data
        answer = {"refused": "the pickle inside is truncated or corrupt"}
    watching[0] = False
    text = json.dumps(answer).encode()
    for part in (len(text).to_bytes(8, "little"), text, *(() if "refused" in answer else blobs)):
        sys.stdout.buffer.write(part)
    sys.stdout.buffer.flush()
    os._exit(0)  # nothing is torn down: that, too, would be work


if __name__ == "__main__":
    main()
