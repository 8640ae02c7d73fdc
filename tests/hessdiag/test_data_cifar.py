"""CIFAR in its published layouts, with made-up images; and the real files where they are at hand."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hessdiag.data import DataSet, fetch, load
from hessdiag.data.fetch import default_root
from hessdiag.data.published import SOURCES, Source
from hessdiag.errors import DataError, UnknownNameError

BOTH = pytest.mark.parametrize("name", ["cifar10", "cifar100"])


def made_up(name: str, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images [N, 3072], classes and coarse classes."""
    rng = np.random.default_rng(seed)
    classes = SOURCES[name].num_classes
    return (
        rng.integers(0, 256, (count, 3072), dtype=np.uint8),
        rng.integers(0, classes, count),
        rng.integers(0, 20, count),
    )


def python2_pickle(fields: dict[bytes, Any]) -> bytes:
    """A protocol-2 pickle as Python 2 and its numpy wrote the published batches: 8-bit strings, BINSTRING arrays."""

    def encode(value: Any) -> bytes:
        if isinstance(value, bytes):
            return (
                b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value
            )
        if isinstance(value, int):
            return b"K" + bytes([value]) if value < 256 else b"J" + struct.pack("<i", value)
        if isinstance(value, list):
            return b"](" + b"".join(map(encode, value)) + b"e"
        assert isinstance(value, np.ndarray)
        shape = b"".join(map(encode, value.shape))
        head = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        kind = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        return head + b"(K\x01(" + shape + b"t" + kind + b"\x89" + encode(value.tobytes()) + b"tb"

    return b"\x80\x02}(" + b"".join(encode(key) + encode(value) for key, value in fields.items()) + b"u."


def batch_file(name: str, kind: str, count: int, seed: int) -> bytes:
    images, classes, coarse = made_up(name, count, seed)
    if kind == "binary":
        labels = [classes] if name == "cifar10" else [coarse, classes]
        return np.concatenate([*(x[:, None].astype(np.uint8) for x in labels), images], 1).tobytes()
    fields: dict[bytes, Any] = {b"batch_label": b"made up", b"data": images}
    fields[SOURCES[name].label_key.encode()] = classes.tolist()
    if name == "cifar100":
        fields[b"coarse_labels"] = coarse.tolist()
    return python2_pickle({**fields, b"filenames": [b"x.png"] * count})


def files(name: str, kind: str, split: str) -> list[str]:
    layout = next(layout for layout in SOURCES[name].layouts if layout.kind == kind)
    return [f"{layout.folder}/{file}" for file in layout.files[split]]


def write_layout(root: Path, name: str, kind: str, split: str) -> None:
    for seed, file in enumerate(files(name, kind, split)):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(batch_file(name, kind, 4, seed))


def expected(name: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    count = len(files(name, "python", split))
    parts = [made_up(name, 4, seed) for seed in range(count)]
    images = np.concatenate([images for images, _, _ in parts]).reshape(-1, 3, 32, 32)
    return torch.from_numpy(images), torch.from_numpy(np.concatenate([classes for _, classes, _ in parts]))


def archive(name: str, *, extra: list[tuple[tarfile.TarInfo, bytes]] | None = None) -> bytes:
    """The python archive as downloaded, reproducible byte for byte."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for split in ("train", "test"):
            for seed, file in enumerate(files(name, "python", split)):
                content = batch_file(name, "python", 4, seed)
                info = tarfile.TarInfo(file)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        for info, content in extra or []:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@BOTH
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kind", ["python", "binary", "npz", "archive", "inside"])
def test_layouts(name: str, split: str, kind: str, tmp_path: Path) -> None:
    images, classes = expected(name, split)
    root = tmp_path
    if kind == "npz":
        np.savez(tmp_path / f"{name}-{split}.npz", images=images.permute(0, 2, 3, 1).numpy(), labels=classes.numpy())
    elif kind == "archive":
        (tmp_path / SOURCES[name].layouts[0].archive).write_bytes(archive(name))
    else:
        write_layout(tmp_path, name, "python" if kind == "inside" else kind, split)
        root = tmp_path / SOURCES[name].layouts[0].folder if kind == "inside" else tmp_path
    data = load(name, split=split, root=root)
    assert data.inputs.dtype == torch.uint8
    assert torch.equal(data.inputs, images)
    assert torch.equal(data.targets, classes)
    assert (data.name, data.split, data.num_classes) == (name, split, SOURCES[name].num_classes)
    assert any("md5 of no recorded official file" in note for note in data.notes)
    assert any(f"the official {split} set has" in note for note in data.notes)


@BOTH
@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_batches_pickled_again_by_python_3(name: str, protocol: int, tmp_path: Path) -> None:
    images, classes, _ = made_up(name, 4)
    file = tmp_path / files(name, "python", "test")[0]
    file.parent.mkdir()
    table = {b"data": images, SOURCES[name].label_key.encode(): classes.tolist(), b"batch_label": b"again"}
    file.write_bytes(pickle.dumps(table, protocol))
    assert np.array_equal(load(name, root=tmp_path).inputs.numpy().reshape(4, -1), images)


def test_a_known_hash_leaves_no_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_layout(tmp_path, "cifar10", "python", "test")
    content = (tmp_path / "cifar-10-batches-py" / "test_batch").read_bytes()
    source = SOURCES["cifar10"]
    first = replace(source.layouts[0], known={"test_batch": hashlib.md5(content).hexdigest()})
    known = replace(source, layouts=(first, source.layouts[1]), sizes={"train": 20, "test": 4})
    monkeypatch.setitem(SOURCES, "cifar10", known)
    assert load("cifar10", root=tmp_path).notes == ()


def evil(call: bytes) -> bytes:
    return b"\x80\x02}U\x04data" + call + b"s."


def array(shape: bytes, content: bytes, code: bytes = b"u1") -> bytes:
    head = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    kind = b"cnumpy\ndtype\n(U" + bytes([len(code)]) + code + b"K\x00K\x01tR"
    return head + b"(K\x01" + shape + kind + b"\x89U" + bytes([len(content)]) + content + b"tb"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (evil(b"cos\nsystem\n(U\x18echo executed > executedtR"), "asks for os.system"),
        (evil(b"c__builtin__\neval\n(U\x011tR"), "eval"),
        (evil(b"cnumpy.core.multiarray\nscalar\n(tR"), "scalar"),
        (evil(b"(iposix\nsystem\n"), "posix.system"),
        (evil(array(b"(J\xff\xff\xff\x7fJ\xff\xff\xff\x7ft", b"x")), "has 1 bytes"),
        (evil(array(b"(J\xff\xff\xff\xfft", b"x")), "has 1 bytes"),
        (evil(array(b"(K\x01t", b"x", b"O8")), "not of plain integers"),
        (b"\x80\x02}.", "holds "),
        (b"\x80\x02].", "no dict"),
        (b"\x80\x02", "truncated"),
        (b"", "empty"),
        (b"\xff" * 100, "truncated or corrupt"),
        (python2_pickle({b"data": made_up("cifar10", 3)[0], b"labels": [0, 1]}), "3 images and 2 labels"),
        (python2_pickle({b"data": made_up("cifar10", 2)[0], b"labels": [0, 10]}), "class 10 among 10 classes"),
        (python2_pickle({b"data": made_up("cifar10", 2)[0][:, :99], b"labels": [0, 1]}), "no uint8 array"),
        (python2_pickle({b"data": made_up("cifar10", 2)[0], b"fine_labels": [0, 1]}), "wants 'data' and 'labels'"),
    ],
)
def test_hostile_batches(content: bytes, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("test_batch").write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        load("cifar10", root=tmp_path)
    assert "\n" not in str(caught.value)
    assert "test_batch" in str(caught.value)
    assert not Path("executed").exists()


def test_bad_binary_batches(tmp_path: Path) -> None:
    (tmp_path / "test_batch.bin").write_bytes(bytes(3074))
    with pytest.raises(DataError, match="no whole number of records of 3073"):
        load("cifar10", root=tmp_path)
    (tmp_path / "test_batch.bin").write_bytes(b"\x0a" + bytes(3072))
    with pytest.raises(DataError, match="class 10 among 10 classes"):
        load("cifar10", root=tmp_path)


def test_archive_members_stay_inside(tmp_path: Path) -> None:
    """Links, absolute names and steps upward are ignored or refused, whatever they are called."""
    link = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    outside = tarfile.TarInfo("../../escaped/test_batch")
    path = tmp_path / "in" / "cifar-10-python.tar.gz"
    path.parent.mkdir()
    path.write_bytes(archive("cifar10", extra=[(outside, b"x")]))
    assert fetch("cifar10", path.parent) == path.parent / "cifar-10-batches-py"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
    path.write_bytes(archive("cifar10", extra=[(link, b"")]))
    (path.parent / "cifar-10-batches-py" / "test_batch").unlink()
    with pytest.raises(DataError, match="data_batch_1 is no plain file"):
        load("cifar10", root=path.parent)


def test_archive_bomb_and_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hessdiag.data.cifar.UNPACKED_BUDGET", 2**20)
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(gzip.compress(bytes(2**21)))
    with pytest.raises(DataError, match="unpacks to more than 1 MiB"):
        load("cifar10", root=tmp_path)
    path.write_bytes(archive("cifar10")[:-5000])
    with pytest.raises(DataError, match="damaged archive"):
        load("cifar10", root=tmp_path)
    path.write_bytes(b"no gzip")
    with pytest.raises(DataError, match="damaged archive"):
        load("cifar10", root=tmp_path)


def test_absent_data_says_where_to_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HESSDIAG_DATA", str(tmp_path))
    assert default_root() == tmp_path
    with pytest.raises(DataError, match=r"cifar10 is not in .*hessdiag data cifar10.*c58f30108f718f92721af3b95e74349a"):
        load("cifar10")
    monkeypatch.delenv("HESSDIAG_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_root() == tmp_path / ".cache" / "hessdiag"


def test_official_checksums() -> None:
    """As listed at https://www.cs.toronto.edu/~kriz/cifar.html."""
    assert {layout.archive: layout.md5 for source in SOURCES.values() for layout in source.layouts} == {
        "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
        "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
        "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
        "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
    }


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """A web server on this machine."""
    server = HTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


def source_at(address: str, md5: str) -> dict[str, Source]:
    source = SOURCES["cifar10"]
    return {
        "cifar10": replace(source, address=address, layouts=(replace(source.layouts[0], md5=md5), source.layouts[1]))
    }


def test_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    content = archive("cifar10")
    (there / "cifar-10-python.tar.gz").write_bytes(content)
    with served(there) as address:
        registry = source_at(address, hashlib.md5(content).hexdigest())
        assert fetch("cifar10", here, registry=registry) == here / "cifar-10-batches-py"
        out, err = capfd.readouterr()
        assert out == ""
        assert "cifar-10-python.tar.gz [##############################]" in err
        assert torch.equal(load("cifar10", root=here).inputs, expected("cifar10", "test")[0])
        wrong = source_at(address, "0" * 32)
        with pytest.raises(DataError, match=r"cannot fetch cifar10 .*by hand"):
            fetch("cifar10", tmp_path / "other", registry=wrong, progress=False)
        assert not (tmp_path / "other" / "cifar-10-python.tar.gz").exists()
    # All is there: nothing is asked of the network any more.
    assert fetch("cifar10", here, registry=registry, progress=False) == here / "cifar-10-batches-py"
    with pytest.raises(DataError, match=r"cannot fetch cifar10 .*by hand") as caught:
        fetch("cifar10", tmp_path / "third", registry=registry, progress=False)
    told = str(caught.value)
    assert "\n" not in told
    assert f"(no connection to {address.split('/')[2]})" in told
    assert "run `hessdiag data" not in told  # which is what was run
    assert not (tmp_path / "third").exists()


def test_fetch_refusals() -> None:
    with pytest.raises(DataError, match="nothing to fetch"):
        fetch("digits")
    with pytest.raises(UnknownNameError, match="cifar10"):
        fetch("cifar")


def real(split: str) -> DataSet:
    root = Path(os.environ.get("HESSDIAG_DATA", Path(__file__).parents[2] / "data"))
    try:
        return load("cifar10", split=split, root=root)
    except DataError as error:
        pytest.skip(f"CIFAR-10 is not here: {str(error)[:80]}")


def test_real_cifar10_in_official_order() -> None:
    test = real("test")
    assert len(test) == 10_000
    assert test.targets.bincount().tolist() == [1000] * 10
    assert test.targets[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]


@pytest.mark.slow
def test_real_cifar10_mean_and_deviation() -> None:
    """Per channel over the training set: the values that every CIFAR-10 code quotes."""
    train = real("train")
    assert train.targets.bincount().tolist() == [5000] * 10
    assert train.targets[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    pixels = train.inputs.float() / 255
    known = torch.tensor([[0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]])
    found = torch.stack([pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))])
    torch.testing.assert_close(found, known, rtol=0, atol=6e-5)
