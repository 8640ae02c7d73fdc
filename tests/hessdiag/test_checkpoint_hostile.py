"""Files made to hurt: each is refused in one line that names the reason, quickly, and nothing in it runs."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from children import most_held, noting, spent

from hessdiag import networks
from hessdiag.checkpoint import inspect_checkpoint, load_checkpoint, save_checkpoint
from hessdiag.errors import CheckpointError, HessdiagError, NonFiniteError
from hessdiag.store import pickled

LIMIT_SECONDS = 2.0  # of the processor, where the sum below takes it WORK_SECONDS
WORK_SECONDS = 0.03


class Evil:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def torch_bytes(value: Any, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def zip_bytes(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def with_pickle(pickled: bytes, **records: bytes) -> bytes:
    return zip_bytes({"a/data.pkl": pickled, "a/version": b"3\n", **{f"a/data/{k[1:]}": v for k, v in records.items()}})


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def integer(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def storage(numel: int, key: str = "0", kind: str = "FloatStorage") -> bytes:
    head = b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n"
    return head + text(key) + text("cpu") + integer(numel) + b"tQ"


def tensor(numel: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """The opcodes of one float tensor over storage 0."""
    shapes = b"".join(b"(" + b"".join(map(integer, numbers)) + b"t" for numbers in (size, stride))
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(numel) + integer(offset) + shapes + b"\x89" + hooks + b"tR"


def one_tensor(numel: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...], held: int) -> bytes:
    pickled = b"\x80\x02}" + text("w") + tensor(numel, offset, size, stride) + b"s."
    return with_pickle(pickled, _0=bytes(held))


def legacy_claim() -> bytes:
    data = torch_bytes({"w": torch.zeros(1000)}, legacy=True)
    return data.replace(b"M\xe8\x03", b"M\xff\xff")


def overlapping() -> bytes:
    """Two entries of which the second lies inside the first one's data (D. Fifield's construction)."""
    inner = zip_bytes({"a/data/0": bytes(64)})
    outer = zip_bytes({"a/data.pkl": inner[: inner.index(b"PK\x01\x02")]})
    shift = outer.index(inner[:30])
    directory = bytearray(inner[inner.index(b"PK\x01\x02") : inner.index(b"PK\x05\x06")])
    struct.pack_into("<I", directory, 42, shift)
    end = outer.index(b"PK\x05\x06")
    fields = list(struct.unpack_from("<HHHHIIH", outer, end + 4))
    fields[2] = fields[3] = 2
    fields[4] += len(directory)
    return outer[:end] + bytes(directory) + b"PK\x05\x06" + struct.pack("<HHHHIIH", *fields)


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def laughs() -> bytes:
    """Lists of lists of one another, 2^38 leaves in a few hundred bytes."""
    body = b"]q\x00"
    for level in range(1, 38):
        body += b"](" + bytes([0x68, level - 1]) * 2 + b"e" + bytes([0x71, level])
    return b"\x80\x02" + body + b"."


def repeated() -> bytes:
    """One list of 60,000 pairs, kept once and handed to OrderedDict a thousand times: each call would copy it."""
    pairs = b"]q\x00(" + b"K\x01K\x02\x86" * 60_000 + b"e0"
    return b"\x80\x02" + pairs + b"](" + b"ccollections\nOrderedDict\nh\x00\x85R" * 1000 + b"e."


def stand_ins() -> bytes:
    """The same with a class that is left out, and 60,000 arguments."""
    arguments = b"(" + b"K\x01" * 60_000 + b"tq\x00" + b"0"
    return b"\x80\x02" + arguments + b"](" + b"cargparse\nNamespace\nh\x00R" * 1000 + b"e."


def nested_config(depth: int) -> str:
    """Lists in lists in the config of a file of ours."""
    return '{"format": "hessdiag/1", "config": {"widths": ' + "[" * depth + "]" * depth + "}}"


def colliding() -> bytes:
    """40,000 whole numbers as keys, all of one hash: each insertion meets all before it."""
    prime = 2**61 - 1
    keys = b"".join(b"\x8a\x0a" + (prime * n).to_bytes(10, "little") + b"N" for n in range(1, 40_000))
    return b"\x80\x02}(" + keys + b"u."


def tar_bytes() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    return buffer.getvalue()


def ours(**config: Any) -> bytes:
    """A self-describing file with a hostile config."""
    document = {
        "format": "hessdiag/1",
        "state_dict": {"w": torch.zeros(2)},
        "ema_state_dict": None,
        "config": config,
    }
    return torch_bytes(document)


def bare(**changes: torch.Tensor) -> bytes:
    """A small MLP's state dict with some tensors replaced."""
    state = networks.build("mlp", in_features=3, widths=(2,), num_classes=2, seed=0).state_dict()
    return torch_bytes({**state, **changes})


def shadowed() -> bytes:
    """An OrderedDict whose `items` is no method."""
    table = b"ccollections\nOrderedDict\n)R" + text("w") + tensor(4, 0, (4,), (1,)) + b"s"
    return with_pickle(b"\x80\x02" + table + b"}" + text("items") + b"K\x01sb.", _0=bytes(16))


MANY = 50_000
W = torch.zeros(1)
# name -> (bytes, part of the reason); the bytes are made when the test runs
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "zip calls code": (
        lambda: torch_bytes({"w": W, "x": Evil(os.system, "echo executed > executed")}),
        "posix.system",
    ),
    "legacy calls code": (
        lambda: torch_bytes(Evil(os.system, "echo executed > executed"), legacy=True),
        "posix.system",
    ),
    "pickle calls code": (
        lambda: pickle.dumps(Evil(os.system, "echo executed > executed"), 2),
        "posix.system",
    ),
    "eval": (lambda: torch_bytes({"x": Evil(eval, "open('executed', 'w')")}), "eval"),
    "modern pickle": (lambda: pickle.dumps(Evil(os.system, "echo executed > executed"), 4), "posix.system"),
    "getattr chain": (
        lambda: with_pickle(b"\x80\x02cbuiltins\ngetattr\n(ctorch\nload\n" + text("x") + b"tR."),
        "getattr",
    ),
    "bytearray of 100 GB": (
        lambda: with_pickle(b"\x80\x02cbuiltins\nbytearray\n" + integer(10**11) + b"\x85R."),
        "bytearray",
    ),
    "Tensor of 400 GB": (
        lambda: with_pickle(b"\x80\x02ctorch\nTensor\n" + integer(10**11) + b"\x85R."),
        "torch.Tensor",
    ),
    "storage called": (
        lambda: with_pickle(b"\x80\x02ctorch\nFloatStorage\n" + integer(10**11) + b"\x85R."),
        "torch.FloatStorage",
    ),
    "whole module": (lambda: torch_bytes(torch.nn.Linear(2, 2)), "torch.nn.modules.linear.Linear"),
    "shadowed dict": (shadowed, "no state dict"),
    "zip bomb": (lambda: zip_bytes({"a/data.pkl": bytes(2**28)}, zipfile.ZIP_DEFLATED), "compressed"),
    "overlapping zip": (overlapping, "overlaps another"),
    "zip of a million": (lambda: zip_bytes({str(i): b"" for i in range(26_000)}), "entries"),
    "zip with path tricks": (
        lambda: zip_bytes({"a/data.pkl": b"}.", "a/../../x": b""}),
        "none that torch.save writes",
    ),
    "zip of something": (lambda: zip_bytes({"word/document.xml": b"<a/>"}), "no data.pkl"),
    "TorchScript": (lambda: zip_bytes({"a/data.pkl": b"}.", "a/constants.pkl": b")."}), "TorchScript"),
    "storage claims 10 GB": (lambda: one_tensor(2_500_000_000, 0, (4,), (1,), 16), "claims 9.3 GiB"),
    "tensor claims 10 GB": (lambda: one_tensor(4, 0, (2_500_000_000,), (1,), 16), "reaches element"),
    "tensor expands to 10 GB": (
        lambda: torch_bytes({"w": torch.zeros(1).expand(2_500_000_000)}),
        "repeats data",
    ),
    "tensor before its storage": (lambda: one_tensor(4, -1, (1,), (1,), 16), "valid shape"),
    "tensor with negative stride": (lambda: one_tensor(4, 3, (4,), (-1,), 16), "valid shape"),
    "size overflows": (lambda: one_tensor(4, 0, (2**43, 2**43), (1, 1), 16), "reaches element"),
    "many views": (
        lambda: torch_bytes([(x := torch.zeros(2**20))] + [x[:-1] for _ in range(2000)]),
        "tensors of 7.8 GiB",
    ),
    "legacy claims more": (legacy_claim, "holds"),
    "tar": (tar_bytes, "tar archive"),
    "safetensors header lies": (lambda: struct.pack("<Q", 2**63) + b"{}" + bytes(90), "header claims"),
    "safetensors claims 10 GB": (
        lambda: safetensors_bytes({"w": entry(shape=(2_500_000_000,), offsets=(0, 10**10))}, bytes(4)),
        "tensors claim",
    ),
    "safetensors overlaps": (
        lambda: safetensors_bytes({"v": entry(), "w": entry()}, bytes(4)),
        "overlaps another",
    ),
    "safetensors shape lies": (
        lambda: safetensors_bytes({"w": entry(shape=(9,))}, bytes(4)),
        "needs 36 bytes",
    ),
    "safetensors huge number": (lambda: safetensors_bytes(b'{"w":' + b"9" * 9999 + b"}"), "no JSON"),
    "safetensors nested": (lambda: safetensors_bytes(b"{" + b'"a":{' * 10**5 + b"}" * (10**5 + 1)), "nested"),
    "safetensors of a million": (
        lambda: safetensors_bytes({str(i): 0 for i in range(MANY)}),
        "50000 tensors",
    ),
    "safetensors path key": (
        lambda: safetensors_bytes({"../../etc/passwd": entry()}, bytes(4)),
        "attribute path",
    ),
    "safetensors metadata nested": (
        lambda: safetensors_bytes({"__metadata__": {"hessdiag": "[" * 10**5}, "w": entry()}, bytes(4)),
        "metadata is damaged",
    ),
    "safetensors config nested": (
        lambda: safetensors_bytes({"__metadata__": {"hessdiag": nested_config(900)}, "w": entry()}, bytes(4)),
        "nested more than 40 deep",
    ),
    "path key": (lambda: torch_bytes({"../../etc/passwd": W}), "attribute path"),
    "NUL key": (lambda: torch_bytes({"a\0b": W}), "attribute path"),
    "line break key": (lambda: torch_bytes({"a\nb": W}), "attribute path"),
    "megabyte key": (lambda: torch_bytes({"a" * 2**20: W}), "characters"),
    "million keys": (lambda: torch_bytes({str(i): i for i in range(200_000)}), "no state dict"),
    "integer keys": (lambda: torch_bytes(dict.fromkeys(range(3), W)), "names belong"),
    "tuple key": (lambda: with_pickle(b"\x80\x02}" + b")" + b"\x85" * 10**5 + b"K\x01s."), "the pickle inside"),
    "nested lists": (lambda: with_pickle(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."), "nested"),
    "list in itself": (lambda: with_pickle(b"\x80\x02]q\x00h\x00a."), "nested"),
    "memo times REDUCE": (lambda: with_pickle(repeated()), "repeat one another"),
    "stand-ins without end": (lambda: with_pickle(stand_ins()), "repeat one another"),
    "memo of 64 GB": (lambda: with_pickle(b"\x80\x02Nr\xff\xff\xff\xff."), "memory"),
    "billion laughs": (lambda: with_pickle(laughs()), "repeat one another"),
    "endless pickle": (lambda: with_pickle(b"\x80\x02" + b"N" * 2_000_000 + b"."), "NoneType"),
    "empty dict": (lambda: torch_bytes({}), "no state dict"),
    "a list": (lambda: torch_bytes([1, 2]), "a list"),
    "a tensor": (lambda: torch_bytes(W), "not a dict"),
    "complex": (lambda: torch_bytes({"w": torch.zeros(1, dtype=torch.complex64)}), "ComplexFloatStorage"),
    "sparse": (lambda: torch_bytes({"w": torch.zeros(2, 2).to_sparse()}), "_rebuild_sparse_tensor"),
    "other format": (lambda: torch_bytes({"format": "hessdiag/2", "state_dict": {"w": W}}), "hessdiag/2"),
    "empty": (lambda: b"", "empty"),
    "text": (lambda: b"not a checkpoint at all\n" * 100, "no known format"),
    "html": (lambda: b"<!DOCTYPE html><html>", "no known format"),
    "gigantic network": (
        lambda: ours(network="mlp", in_features=10**9, widths=[10**9, 10**9]),
        "not those of the network",
    ),
    "endless network": (lambda: ours(network="wrn28_10", depth=6 * 10**8 + 4), "more layers"),
    "endless widths": (lambda: ours(network="mlp", in_features=1, widths=[1] * 5000), "more layers"),
    "config of code": (lambda: ours(network="os:system", activation="relu"), "unknown network"),
    "activation of code": (
        lambda: ours(network="mlp", in_features=1, activation="os:system"),
        "builds no network",
    ),
    "config with option": (lambda: ours(network="mlp", in_features=1, hack=1), "no option"),
    "config with tensor": (lambda: ours(network=W), "plain values"),
    "config with huge integer": (lambda: ours(network="mlp", in_features=10**30), "absurdly large"),
    "config nested": (lambda: ours(network="mlp", widths=[[[1]]]), "builds no network"),
    "config absent": (lambda: ours(), "names no network"),
    "two state dicts": (lambda: torch_bytes({"net": {"w": W}, "model": {"w": W}}), "'model', 'net'"),
}


@pytest.mark.parametrize("name", FILES)
def test_hostile_file_is_refused_in_one_quick_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make, reason = FILES[name]
    path = tmp_path / "hostile.pt"
    path.write_bytes(make())
    given = {} if "network" in name or name.startswith(("config", "endless w", "activation")) else {"network": "mlp"}
    message = refusal(lambda: load_checkpoint(path, **given))
    assert reason in message, message
    assert str(path) in message
    assert not (tmp_path / "executed").exists()
    assert capfd.readouterr() == ("", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hostile.pt"]


def limit_here() -> float:
    """Seconds of processor time (other work on the machine is no fault of the loader), more on a slow processor."""
    begun = time.process_time()
    sum(i * i for i in range(400_000))
    return LIMIT_SECONDS * max(1.0, (time.process_time() - begun) / WORK_SECONDS)


def refusal(action: Callable[[], Any], kind: type[HessdiagError] = CheckpointError) -> str:
    """The message of the error that `action` must raise, checked for form and time."""
    limit, begun = limit_here(), spent()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(pickled, "command", noting(pickled.command, f"{folder}/held"))
        with pytest.raises(kind) as caught:
            action()
        held = most_held(f"{folder}/held")
    assert spent() - begun < limit
    assert held <= pickled.MEMORY + 4 * pickled.MAX_PICKLE
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def test_keys_that_collide_end_with_the_processor_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickled, "SECONDS", 1)
    path = tmp_path / "hostile.pt"
    path.write_bytes(with_pickle(colliding()))
    assert path.stat().st_size < 640_000
    limit, begun = 1 + limit_here(), spent()
    with pytest.raises(CheckpointError, match="more than 1 s of processor time"):
        load_checkpoint(path, network="mlp")
    assert spent() - begun < limit


def test_where_no_process_can_be_started_nothing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No quiet fallback to reading the pickle in this process."""
    path = tmp_path / "a.pt"
    path.write_bytes(bare())
    monkeypatch.setattr("sys.executable", str(tmp_path / "absent"))
    assert "safetensors" in refusal(lambda: load_checkpoint(path, network="mlp", activation="relu"))
    monkeypatch.setattr("sys.executable", "")
    assert "safetensors" in refusal(lambda: load_checkpoint(path, network="mlp", activation="relu"))


def test_a_child_that_lies_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes back is checked once more: shapes beyond the data, no JSON, an answer without end, a crash."""
    path, child = tmp_path / "a.pt", tmp_path / "child.py"
    path.write_bytes(with_pickle(b"\x80\x02}.", _0=bytes(16)))
    monkeypatch.setattr(pickled, "CHILD", child)
    monkeypatch.setattr(pickled, "MAX_REPLY", 1 << 20)
    say = "import sys; sys.stdin.buffer.read(); out = sys.stdout.buffer\n"
    said = 'out.write(len(text).to_bytes(8, "little") + text)'
    for code, reason in (
        (
            f'text = b\'{{"trees": [["dict", "w", ["tensor", "float32", "0", 4, 0, [9], [1]]]], "end": 3}}\'; {said}',
            "reaches",
        ),
        (
            f'text = b\'{{"trees": [["dict", "w", ["tensor", "float32", "0", 4, -1, [1], [1]]]], "end": 3}}\'; {said}',
            "shape",
        ),
        (
            f'text = b\'{{"trees": [["dict", "w", ["tensor", "load", "0", 4, 0, [1], [1]]]], "end": 3}}\'; {said}',
            "no answer",
        ),
        ("out.write(b'x' * 100)", "no answer"),
        ("out.write(bytes(2 << 20))", "without end"),
        ("import os; os.kill(os.getpid(), 11)", "brings its reader down"),
        ("import os; os._exit(9)", "brings its reader down"),
    ):
        child.write_text(say + code)
        assert reason in refusal(lambda: load_checkpoint(path, network="mlp", activation="relu"))


@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_not_data_is_left_out_by_name(
    legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Common in public training code: arguments and numpy's numbers beside the tensors. Nothing of them is made."""
    monkeypatch.chdir(tmp_path)
    model = networks.build("mlp", in_features=3, widths=(2,), num_classes=2, seed=0)

    class Meter:
        def __setstate__(self, state: Any) -> None:
            raise AssertionError("made")

    Meter.__module__, Meter.__qualname__ = "training_utils", "Meter"
    monkeypatch.setitem(sys.modules, "training_utils", SimpleNamespace(Meter=Meter))
    beside = {
        "args": argparse.Namespace(lr=0.1, device=torch.device("cpu")),
        "best": np.float64(0.5),
        "history": np.zeros(3),
        "meter": Meter(),
        "dtype": torch.float32,
        "optimizer": {"state": {0: {"step": 1}}, "lr": np.float32(0.1)},
    }
    for weights in ({"state_dict": model.state_dict()}, dict(model.state_dict())):
        path = tmp_path / "public.pt"
        path.write_bytes(torch_bytes({**weights, **beside, "epoch": 7}, legacy=legacy))
        monkeypatch.delitem(sys.modules, "training_utils")
        found = load_checkpoint(path, network="mlp", activation="relu")
        monkeypatch.setitem(sys.modules, "training_utils", SimpleNamespace(Meter=Meter))
        for name, tensor in model.state_dict().items():
            assert torch.equal(found.model.state_dict()[name], tensor)
        assert found.epoch == 7
        notes = " ".join(found.notes)
        for word in (
            "'args' (argparse.Namespace, left out)",
            "'best' (numpy",
            "'meter' (training_utils.Meter, left out)",
        ):
            assert word in notes
        assert "'args' (argparse.Namespace, left out)" in " ".join(inspect_checkpoint(path).notes)
    assert capfd.readouterr() == ("", "")


def test_the_child_acts_on_nothing(tmp_path: Path) -> None:
    """Its audit hook, tried: a reader whose names do something is ended before it is done."""
    source = Path(pickled.CHILD).read_text()
    mark = "        full = f"
    assert source.count(mark) == 1
    child = tmp_path / "child.py"
    for action in ("open('executed', 'w')", "__import__('colorsys')", "os.system('echo x > executed')"):
        child.write_text(source.replace(mark, f"        {action}\n{mark}"))
        told = [*pickled.command("zip", 100)]
        told[told.index(str(pickled.CHILD))] = str(child)
        ended = subprocess.run(told, input=b"\x80\x02cargparse\nNamespace\n.", capture_output=True, cwd=tmp_path)
        assert ended.returncode == 9
        assert ended.stdout == b""
        assert not (tmp_path / "executed").exists()


def test_the_executed_marker_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pickles above do act when something runs them: otherwise the test above would pass by accident."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(FILES["pickle calls code"][0]())
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["zip", "legacy", "safetensors"])
def test_truncation_anywhere_is_refused(name: str, tmp_path: Path) -> None:
    model = networks.build("mlp", in_features=3, widths=(2,), num_classes=2, seed=0)
    path = tmp_path / ("a.safetensors" if name == "safetensors" else "a.pt")
    save_checkpoint(path, model)
    if name == "legacy":
        path.write_bytes(torch_bytes(model.state_dict(), legacy=True))
    data = path.read_bytes()
    places = 30 if name == "legacy" else 150  # of an old file each one starts a process
    for length in range(1, len(data), max(1, len(data) // places)):
        path.write_bytes(data[:length])
        refusal(lambda: load_checkpoint(path, network="mlp", activation="relu"))


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"PK\x03\x04",
        b"\x80\x02",
        b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.",
        b"\x40" + bytes(7) + b"{",
    ],
)
def test_random_bytes_are_refused(head: bytes, tmp_path: Path) -> None:
    path = tmp_path / "random.pt"
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        path.write_bytes(head + bytes(torch.randint(0, 256, (5000,), generator=generator).tolist()))
        refusal(lambda: load_checkpoint(path))
        refusal(lambda: inspect_checkpoint(path))


def test_any_corrupt_byte_of_tensor_data_in_a_zip_fails_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    state = {"w": torch.arange(1000.0)}
    data = torch_bytes(state)
    at = data.index(state["w"].numpy().tobytes())
    for position in range(at, at + 4000, 371):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        assert "checksum" in refusal(lambda: load_checkpoint(path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_name_the_tensor(value: float, tmp_path: Path) -> None:
    path = tmp_path / "nan.pt"
    path.write_bytes(bare(**{"layers.2.weight": torch.tensor([[1.0, value], [0.0, 0.0]])}))
    message = refusal(lambda: load_checkpoint(path, network="mlp", activation="relu"), NonFiniteError)
    assert "'layers.2.weight' holds 1 NaN or infinite values of 4" in message


def test_wrong_shapes_name_the_tensor_and_both_shapes(tmp_path: Path) -> None:
    path = tmp_path / "shape.pt"
    path.write_bytes(bare(**{"layers.0.bias": torch.zeros(5)}))
    message = refusal(lambda: load_checkpoint(path, network="mlp", activation="relu"))
    assert "'layers.0.bias' has shape (5,), the network wants (2,)" in message


def test_integers_where_weights_belong(tmp_path: Path) -> None:
    path = tmp_path / "int.pt"
    path.write_bytes(bare(**{"layers.0.bias": torch.zeros(2, dtype=torch.int64)}))
    message = refusal(lambda: load_checkpoint(path, network="mlp", activation="relu"))
    assert "torch.int64, the network wants torch.float32" in message


def test_negative_variance_is_refused(tmp_path: Path) -> None:
    state = networks.build("small_resnet", seed=0).state_dict()
    state["bn1.running_var"][3] = -1e-3
    path = tmp_path / "variance.pt"
    torch.save(state, path)
    message = refusal(lambda: load_checkpoint(path, network="small_resnet", activation="relu"))
    assert "'bn1.running_var' is a variance below zero" in message


def test_what_is_no_readable_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    cases: list[tuple[Any, str]] = [
        (tmp_path / "absent.pt", "no such file"),
        (tmp_path, "a folder without weights"),
        (tmp_path / "fifo", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        ("a\0b", "cannot be opened"),
        ("a" * 5000, "cannot be opened"),
    ]
    for path, reason in cases:
        assert reason in refusal(lambda path=path: load_checkpoint(path))
        assert reason in refusal(lambda path=path: inspect_checkpoint(path))


def test_unreadable_file_says_so(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path = tmp_path / "secret.pt"
    path.write_bytes(b"x")
    path.chmod(stat.S_IWUSR)
    assert "permission" in refusal(lambda: load_checkpoint(path))


def test_a_huge_file_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "huge.pt"
    with open(path, "wb") as stream:
        stream.write(b"PK\x03\x04")
        stream.truncate(10 * 2**30)
    assert "10.0 GiB exceed the limit of 4.0 GiB" in refusal(lambda: load_checkpoint(path))
    os.truncate(path, 3 * 2**30)
    assert "without its directory" in refusal(lambda: load_checkpoint(path))


def test_the_environment_cannot_switch_safety_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pt"
    path.write_bytes(FILES["zip calls code"][0]())
    refusal(lambda: load_checkpoint(path))
    with torch.serialization.safe_globals([os.system]):
        refusal(lambda: load_checkpoint(path))
    assert not (tmp_path / "executed").exists()
