"""The mistakes of a stranger's first hour: each answered by one line that says what was meant, and the line that it leads
to gives a number.
"""

from __future__ import annotations

import json
import shlex
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import hessdiag as hd
from hessdiag.cli.program import app
from hessdiag.data import NamedDataSet, load, load_named
from hessdiag.errors import ConfigurationError, DataError

NETS = """
from dataclasses import dataclass
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 3)
    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))
@dataclass
class Returned:
    logits: torch.Tensor
class Fields(Net):
    def forward(self, x):
        return Returned(super().forward(x))
class Table(Net):
    def forward(self, x):
        return {"logits": super().forward(x), "aux": x}
class Two(Net):
    def forward(self, a, b):
        return super().forward(a + b), a
class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 3)
    def forward(self, ids):
        return self.fc2(torch.tanh(self.fc1(nn.functional.one_hot(ids, 4).double().to(self.fc1.weight.dtype))))
class Asks(Net):
    def forward(self, ids, decoder_input_ids=None):
        raise ValueError("exactly one of ids")
class Sees(Net):
    def forward(self, ids, pixel_values=None):
        raise ValueError("You have to specify pixel_values")
def make():
    return Net()
def call(model, inputs):
    return model(inputs["a"], inputs["b"])
def first(returned):
    return returned[0]
number = 3
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a stranger has: code, weights and arrays of their own."""
    home = tmp_path_factory.mktemp("home")
    (home / "nets.py").write_text(NETS)
    (home / "sub").mkdir()
    (home / "sub" / "more.py").write_text(NETS)
    torch.manual_seed(0)
    net = nn.Module()
    net.fc1, net.fc2 = nn.Linear(4, 6), nn.Linear(6, 3)
    state = net.state_dict()
    torch.save(state, home / "w.pt")
    torch.save(nn.Linear(2, 2), home / "whole.pt")
    torch.save({"model": state, "net": state}, home / "two.pt")
    torch.save({"trainer": {"m": state}}, home / "deep.pt")
    torch.save({p + k: v for p in ("student.", "teacher.") for k, v in state.items()}, home / "pair.pt")
    rng = np.random.default_rng(0)
    x, y = rng.random((20, 4)).astype("float32"), rng.integers(0, 3, 20)
    y[:3] = 0, 1, 2
    for name, arrays in {
        "d": {"inputs": x, "targets": y},
        "floats": {"inputs": x, "targets": y.astype("float64")},
        "xy": {"x_test": x, "y_test": y},
        "onehot": {"inputs": x, "targets": np.eye(3, dtype=int)[y]},
        "from1": {"inputs": x, "targets": y + 1},
        "whole": {"inputs": (255 * x).astype("int64"), "targets": y},
        "bytes": {"inputs": 255 * x, "targets": y},
        "wide": {"inputs": rng.random((20, 5)).astype("float32"), "targets": y},
        "uneven": {"inputs": x, "targets": y[:-1]},
        "ab": {"a": x / 2, "b": x / 2, "labels": y},
        "ids": {"ids": rng.integers(0, 4, 20), "labels": y},
        "objects": {"inputs": x.astype(object), "targets": y},
    }.items():
        np.savez(home / f"{name}.npz", **arrays)
    np.save(home / "x.npy", x)
    return home


def run(line: str) -> Result:
    return CliRunner().invoke(app, shlex.split(line), env={"COLUMNS": "100"})


W = "measure w.pt --model nets:make --data npz:d.npz"
QUICK = "--no-spread --quiet --rtol 0.9"
# the line as typed, exit code, what is answered, and the line that the answer leads to
MISTAKES: list[tuple[str, int, str, str | None]] = [
    ("measure w.pt --data npz:d.npz", 3, "any other use --model package.module:factory", W),
    ("measure w.pt --model nets:make", 2, "say --data NAME", W),
    ("measure w.pt --model nets:make --data d.npz", 2, "did you mean 'npz:d.npz'", W),
    ("measure w.pt --model nets:make --data npz:d", 3, "did you mean npz:d.npz", W),
    ("measure ww.pt --model nets:make --data npz:d.npz", 3, "did you mean w.pt", W),
    ("measure w --model nets:make --data npz:d.npz", 2, "neither a file nor a shipped example", W),
    ("measure --model nets:make --data npz:d.npz", 2, "hessdiag measure WEIGHTS.pt --model nets:make", W),
    ("measure whole.pt --model nets:make --data npz:d.npz", 3, "save model.state_dict() instead", None),
    ("measure d.npz --model nets:make --data npz:d.npz", 3, "data are given by --data npz:PATH", W),
    ("measure w.pt --model nets:make --data npz:w.pt", 3, "a checkpoint?", W),
    ("measure w.pt --model nets:make --data x.npy", 2, "numpy.savez", W),
    ("measure w.pt --model nets:make --data npz:x.npy", 3, "numpy.savez", W),
    ("measure two.pt --model nets:make --data npz:d.npz", 3, "--key model", W.replace("w.pt", "two.pt --key model")),
    (
        "measure deep.pt --model nets:make --data npz:d.npz",
        3,
        "--key trainer.m",
        W.replace("w.pt", "deep.pt --key trainer.m"),
    ),
    (
        "measure pair.pt --model nets:make --data npz:d.npz",
        3,
        "--prefix student.",
        W.replace("w.pt", "pair.pt --prefix student."),
    ),
    (f"{W} --key model", 3, "leave key out", W),
    (f"{W} --prefix module", 3, "known: fc1., fc2.", W),
    ("measure w.pt --model nets --data npz:d.npz", 2, "did you mean nets:NAME", W),
    ("measure w.pt --model nets.py:make --data npz:d.npz", 2, "did you mean nets:make", W),
    ("measure w.pt --model netz:make --data npz:d.npz", 2, "did you mean nets:make", W),
    (
        "measure w.pt --model sub/more.py:make --data npz:d.npz",
        2,
        "did you mean sub.more:make?",
        W.replace("nets", "sub.more"),
    ),
    (
        "measure w.pt --model /else/where/nets.py:make --data npz:d.npz",
        2,
        "mean nets:make with PYTHONPATH=/else/where?",
        None,
    ),
    (
        "measure w.pt --model /else/where/nets.py --data npz:d.npz",
        2,
        "PYTHONPATH=/else/where, NAME being a function",
        None,
    ),
    ("measure w.pt --model nets:make --data ./sets.py:make", 2, "did you mean sets:make?", None),
    ("measure w.pt --model nets:make --data npz:wide.npz", 3, "choose other --data, or the model that fits", None),
    (
        "measure w.pt --model nets:Sees --data npz:ids.npz",
        3,
        "specify pixel_values; store pixel_values as well, under that name",
        None,
    ),
    (
        "measure w.pt --model nets:Asks --data npz:ids.npz",
        3,
        "exactly one of ids; store decoder_input_ids as well: of targets, these one place to the right, after the start",
        None,
    ),
    ("measure w.pt --model nets:mak --data npz:d.npz", 2, "did you mean 'make'", W),
    ("measure w.pt --model nets:number --data npz:d.npz", 2, "neither a function nor a module", W),
    ("measure w.pt --model nets:make --data d.csv", 2, "numpy.savez('d.npz', inputs=..., targets=...)", W),
    ("measure w.pt --model nets:make --data csv:d.csv", 2, "makes npz:d.npz", W),
    ("measure w.pt --model nets:make --data npz:floats.npz", 3, "store int64", None),
    ("measure w.pt --model nets:make --data npz:onehot.npz", 3, "targets.argmax(1)", None),
    ("measure w.pt --model nets:make --data npz:from1.npz", 3, "do the classes count from 1? take 1 off", None),
    ("measure w.pt --model nets:make --data npz:whole.npz", 3, "uint8 (0 to 255) or as floats", None),
    ("measure w.pt --model nets:make --data npz:wide.npz", 3, "does not take npz:wide.npz (inputs of shape [5])", None),
    ("measure w.pt --model nets:make --data npz:uneven.npz", 3, "20 inputs and 19 targets", None),
    ("measure w.pt --model nets:make --data npz:objects.npz", 3, "only plain numbers are read, never pickles", None),
    (
        "measure w.pt --model nets:make --data npz:xy.npz",
        3,
        "--targets y_test",
        "measure w.pt --model nets:make --data npz:xy.npz --targets y_test",
    ),
    (f"{W} --inputs input", 3, "did you mean 'inputs'", f"{W} --inputs inputs"),
    ("measure digits-example --data digits --targets y", 2, "name arrays of npz: and safetensors: files", None),
    (f"{W} --attack pgd", 2, "write pgd:eps=8/255,steps=10", f"{W} --attack pgd:eps=8/255,steps=10"),
    (f"{W} --attack pgd:eps=8/255", 2, "'pgd:eps=8/255' lacks steps", f"{W} --attack pgd:eps=8/255,steps=10"),
    (f"{W} --attack fgsm:eps=8/255", 2, "pgd:eps=8/255,steps=1", f"{W} --attack pgd:eps=8/255,steps=1"),
    (f"{W} --attack pgd:eps=8,steps=2", 2, "did you mean 8/255", f"{W} --attack pgd:eps=8/255,steps=2"),
    (f"{W.replace('d.npz', 'bytes.npz')} --attack pgd:eps=8/255,steps=2", 3, "divide bytes by 255", None),
    (f"{W} --layers fc1", 2, r"'fc1\..*' would mean fc1.weight, fc1.bias", rf"{W} --layers 'fc1\..*'"),
    (f"{W} --layers 'fc1('", 2, "no regular expression", rf"{W} --layers 'fc1.*'"),
    (W.replace("make", "Table"), 2, "--output logits", f"{W.replace('make', 'Table')} --output logits"),
    (W.replace("make", "Fields"), 2, "--output logits", f"{W.replace('make', 'Fields')} --output logits"),
    (f"{W.replace('make', 'Table')} --output logit", 2, "did you mean 'logits'", None),
    (f"{W} --output logits", 2, "leave output out", W),
    (W.replace("make", "Two"), 3, "it takes several inputs", None),
    (
        W.replace("make", "Two").replace("d.npz", "ab.npz"),
        2,
        "--output 0",
        f"{W.replace('make', 'Two').replace('d.npz', 'ab.npz')} --output 0",
    ),
    (
        f"{W.replace('make', 'Two').replace('d.npz', 'ab.npz')} --output 0 --normalize 0.5:0.5",
        2,
        "--normalize is for images",
        None,
    ),
    (f"{W} --forward keywords", 2, "one array, which the model takes as it is", W),
    (f"{W} --forward keyword", 2, "did you mean 'keywords'", None),
    (f"{W} --method hutchison", 2, "did you mean 'hutchinson'", f"{W} --method hutchinson"),
    (f"{W} --loss crossentropy", 2, "did you mean 'cross_entropy'", f"{W} --loss cross_entropy"),
    (f"{W} --samples 50", 3, "has 20 samples, fewer than the 50", f"{W} --samples 20"),
    (f"{W} --device gpu", 2, "it is auto, cpu, cuda", f"{W} --device cpu"),
    (f"{W} --dtype fp64", 2, "did you mean 'float64'", f"{W} --dtype float64"),
    (f"{W} --split val", 2, "'train' or 'test'", f"{W} --split test"),
    (f"{W} --normalize cifr10", 2, "did you mean 'cifar10'", None),
    (
        f"{W} --normalize cifar10",
        2,
        "gives 3 means, one for each channel, and npz:d.npz has 4",
        f"{W} --normalize 0.5:0.5",
    ),
    (f"{W} --weights ema", 3, "--weights model", f"{W} --weights model"),
    (f"{W} --sample 5", 2, "--samples", f"{W} --samples 5"),
    (f"{W} --rtol 5%", 2, "'--rtol'", f"{W} --rtol 0.05"),
    ("measure w.pt --network resnet --activation relu --data npz:d.npz", 2, "did you mean 'resnet18'", None),
    ("measure w.pt --network resnet18 --data npz:d.npz", 3, "--activation", None),
    ("measure w.pt --model nets:make --data cifar", 2, "did you mean 'cifar10'", None),
    ("measure . --model nets:make --data npz:d.npz", 3, "name one of deep.pt", W),
    ("measure hf:. --data npz:d.npz", 2, "measure --model hf:.", None),
    ("measure --model hf:nowhere --data npz:d.npz", 3, "nothing is downloaded here: `hf download nowhere`", None),
    ("mesure w.pt", 2, "Did you mean 'measure'?", None),
    ("w.pt", 2, "hessdiag measure w.pt", None),
    ("inspect d.npz", 3, "data are given by --data npz:PATH", "inspect w.pt"),
    ("compare w.pt d.npz", 3, "is no JSON", None),
    ("curvature misch", 2, "did you mean 'mish'", "curvature mish"),
]


@pytest.mark.parametrize(("typed", "code", "words", "then"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_answered_by_one_line_that_leads_on(
    typed: str, code: int, words: str, then: str | None, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "no_cache"))
    found = run(typed)
    assert found.exit_code == code, found.output
    assert words in found.stderr
    assert found.stderr.count("\n") == 1
    assert found.stdout == ""
    if then is not None:
        after = run(f"{then} {QUICK}" if then.startswith("measure") else then)
        assert after.exit_code in (0, 1), after.output
        assert after.stdout


def rms(line: str, home: Path) -> float:
    found = run(f"{line} --dtype float64 --no-spread --json a.json")
    assert found.exit_code == 0, found.output
    return float(json.loads((home / "a.json").read_text())["norm"]["total"]["rms"])


def test_a_model_is_called_and_answers_as_the_options_say(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same network behind a dictionary, a dataclass, a tuple and two arguments: one number."""
    monkeypatch.chdir(home)
    truth = rms(W, home)
    ab = W.replace("make", "Two").replace("d.npz", "ab.npz")
    for line in (
        f"{W.replace('make', 'Table')} --output logits",
        f"{W.replace('make', 'Fields')} --output logits",
        f"{ab} --output 0",
        f"{ab} --output -2",
        f"{ab} --output nets:first",
        f"{ab} --output 0 --forward keywords",
        f"{ab} --output 0 --forward positions",
        f"{ab} --output 0 --forward nets:call",
        f"{ab} --output 0 --inputs b,a --targets labels --forward positions",
    ):
        assert rms(line, home) == pytest.approx(truth, rel=1e-6)  # a/2 + a/2 in float32
    tokens = rms(W.replace("make", "Tokens").replace("d.npz", "ids.npz"), home)
    arrays = np.load(home / "ids.npz")
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    saved = torch.load(home / "w.pt", weights_only=True)
    model.load_state_dict({f"{0 if k.startswith('fc1') else 2}.{k[4:]}": v.double() for k, v in saved.items()})
    batch = nn.functional.one_hot(torch.from_numpy(arrays["ids"]), 4).double(), torch.from_numpy(arrays["labels"])
    assert tokens == pytest.approx(hd.measure(hd.Objective(model), [batch]).rms, rel=1e-10)


def test_an_attack_goes_through_output_and_forward(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    attack = "--attack pgd:eps=8/255,steps=3"
    plain = rms(f"{W} {attack}", home)
    assert plain != pytest.approx(rms(W, home), rel=1e-6)
    assert rms(f"{W.replace('make', 'Table')} --output logits {attack}", home) == plain
    refused = run(f"{W.replace('make', 'Two').replace('d.npz', 'ab.npz')} --output 0 {attack}")
    assert refused.exit_code == 2
    assert "--attack perturbs images" in refused.stderr


def test_named_arrays(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "a.npz"
    image = rng.integers(0, 256, (6, 2, 2), dtype=np.uint8)
    mask = rng.random((6, 3)) > 0.5
    np.savez(path, image=image, mask=mask, ids=np.arange(6, dtype=np.int32), labels=np.arange(6) % 2, num_classes=2)
    found = load_named(f"npz:{path}")
    assert isinstance(found, NamedDataSet)
    assert set(found.inputs) == {"image", "mask", "ids"}
    assert (len(found), found.num_classes) == (6, 2)
    assert any("'image' is uint8 and divided by 255" in note for note in found.notes)
    batches = list(found.batches(4, dtype=torch.float64))
    assert [len(y) for _, y in batches] == [4, 2]
    inputs, _ = batches[0]
    assert torch.equal(inputs["image"], torch.from_numpy(image[:4]).double() / 255)
    assert inputs["mask"].dtype == torch.bool
    assert inputs["ids"].dtype == torch.int64
    few = found.sample(3, seed=1)
    rows = few.inputs["ids"].tolist()
    assert rows == sorted(rows)
    assert torch.equal(few.targets, found.targets[rows])
    assert few.sha256 != found.sha256
    only = load_named(f"npz:{path}", inputs=["ids"])
    assert isinstance(only, NamedDataSet)
    assert set(only.inputs) == {"ids"}
    with pytest.raises(DataError, match="load_named reads them"):
        load(f"npz:{path}")
    plain = load_named(f"npz:{path}", inputs=["image"])
    assert torch.equal(plain.inputs, torch.from_numpy(image)[:, None])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a": np.ones((4, 2)), "b": np.ones((3, 2)), "y": np.zeros(4, int)}, "has 3 rows, the targets 4"),
        (
            {"a": np.ones((4, 2)), "m": np.ones((4, 2), np.uint8), "y": np.zeros(4, int)},
            "store a mask as bool or int64",
        ),
        ({"a": np.full((4, 2), np.nan), "b": np.ones(4), "y": np.zeros(4, int)}, "NaN or infinite"),
        ({"a": np.ones((4, 2)), "b": np.ones(4)}, "say which are the targets"),
        ({"y": np.zeros(4, int)}, "targets without inputs"),
        ({"a": np.ones(4), "b": np.float64(3), "y": np.zeros(4, int)}, "one number, the targets 4"),
        ({**{f"a{i}": np.ones(4) for i in range(40)}, "y": np.zeros(4, int)}, "40 arrays beside 'y'"),
        (
            {
                "inputs": np.ones((4, 2)),
                "targets": np.zeros(4, int),
                "images": np.ones((4, 2)),
                "labels": np.zeros(4, int),
            },
            "say which",
        ),
    ],
)
def test_named_arrays_that_cannot_be_meant(arrays: dict[str, Any], words: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(Exception, match=words) as caught:
        load_named(f"npz:{tmp_path / 'a.npz'}")
    assert "\n" not in str(caught.value)


def test_arrays_together_are_no_zip_bomb(tmp_path: Path) -> None:
    """Thirty arrays of 60 MiB of zeros, each small enough by itself."""
    zeros = np.zeros((1, 60 * 2**20 // 8))
    np.savez_compressed(tmp_path / "one.npz", a=zeros)
    with zipfile.ZipFile(tmp_path / "one.npz") as archive:
        info = archive.getinfo("a.npy")
    data = (tmp_path / "one.npz").read_bytes()
    start = info.header_offset + 30 + sum(struct.unpack_from("<HH", data, info.header_offset + 26))
    packed = data[start : start + info.compress_size]
    path = tmp_path / "many.npz"
    with zipfile.ZipFile(path, "w") as made:
        for number in range(30):
            made.writestr(f"a{number}.npy", packed)
            made.filelist[-1].compress_type = zipfile.ZIP_DEFLATED
            made.filelist[-1].file_size, made.filelist[-1].CRC = info.file_size, info.CRC
        buffer = tmp_path / "y.npy"
        np.save(buffer, np.zeros(1, int))
        made.write(buffer, "y.npy")
    assert path.stat().st_size < 4 * 2**20
    with pytest.raises(DataError, match="a zip bomb"):
        load_named(f"npz:{path}")


def test_batches_that_are_dictionaries_come_from_code_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "their_batches.py").write_text(
        "import torch\n"
        "def rows():\n    for k in range(3):\n        yield {'a': torch.ones(2, 2) * k, 'b': torch.ones(2, 2), 'label': torch.tensor([0, 1])}\n"
        "def table(): return {'a': torch.ones(4, 2), 'b': torch.ones(4, 2), 'y': torch.zeros(4, dtype=torch.long)}\n"
        "def pairs(): return [({'a': torch.ones(2, 2), 'b': torch.ones(2, 2)}, torch.tensor([0, 1]))]\n"
        "def odd(): return [{'a': torch.ones(2, 2), 'y': torch.zeros(2)}, {'b': torch.ones(2, 2), 'y': torch.zeros(2)}]\n"
    )
    for name, count in (("rows", 6), ("table", 4), ("pairs", 2)):
        found = load_named(f"their_batches:{name}")
        assert isinstance(found, NamedDataSet), name
        assert (set(found.inputs), len(found)) == ({"a", "b"}, count)
    rows = load_named("their_batches:rows", inputs=["a"])
    assert isinstance(rows.inputs, Tensor)
    assert rows.inputs[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(DataError, match="batches of other names"):
        load_named("their_batches:odd")


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("method", ["auto", "hutchinson"])
def test_an_input_for_all_samples_of_as_many_rows_is_named(method: str, count: int) -> None:
    """Cut with the samples it fits no more, or is broadcast where one row is left."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, given: dict[str, Any]) -> Tensor:
            x, mask = given["x"], given["more"][0]
            scores = (self.q(x) @ x.mT).masked_fill(mask, -1e9)
            return self.b((scores.softmax(-1) @ x).mean(1))

    model, y = Masked(), torch.arange(count) % 3
    for places in (count, 3):
        mask = torch.ones(places, places, dtype=torch.bool).triu(1)
        batch = {"x": torch.randn(count, places, 4), "more": [mask]}
        if places != count:
            hd.measure(hd.Objective(model), [(batch, y)], method=method, max_replicates=10)
            continue
        message = rf"inputs\['more'\]\[0\] of shape \[{count}, {count}\] has as many rows as there are samples"
        with pytest.raises(ConfigurationError, match=message):
            hd.measure(hd.Objective(model), [(batch, y)], method=method, max_replicates=10)
        batch["more"] = [mask.expand(count, -1, -1)]  # as the message says
        hd.measure(hd.Objective(model), [(batch, y)], method=method, max_replicates=10)
