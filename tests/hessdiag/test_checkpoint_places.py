"""Where a stranger's weights lie: TorchScript archives, indexes of several files, folders, keys and prefixes."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import most_held, noting, spent
from safetensors.torch import save_file
from torch import Tensor, nn

from hessdiag import networks
from hessdiag.checkpoint import Checkpoint, inspect_checkpoint, load_checkpoint
from hessdiag.errors import CheckpointError, NonFiniteError
from hessdiag.store import pickled, zips

MLP = {"network": "mlp", "activation": "relu"}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def model() -> nn.Module:
    return networks.build("mlp", in_features=3, widths=(2,), num_classes=2, seed=0).eval()


@pytest.fixture
def state(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def same(loaded: Checkpoint, state: dict[str, Tensor]) -> bool:
    found = loaded.model.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def written(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


# --- TorchScript ---


class Net(nn.Module):
    """Attributes of every kind that a script module may have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.bn = nn.BatchNorm2d(2)
        self.tail = nn.Sequential(nn.Flatten(), nn.Linear(72, 3))
        self.numbers = [1, 2]
        self.table = {"a": torch.ones(1)}
        self.loose = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.tail(torch.relu(self.bn(self.conv(x))))
        return out


def scripted(path: Path, how: str) -> nn.Module:
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        net.bn.running_mean.uniform_()
    made = torch.jit.script(net) if how == "script" else torch.jit.trace(net, torch.rand(1, 1, 8, 8))
    if how == "frozen":
        made = torch.jit.freeze(made)
    torch.jit.save(made, path)
    return net


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_gives_its_tensors_and_runs_none_of_its_code(how: str, tmp_path: Path) -> None:
    net = scripted(tmp_path / "net.pt", how)
    with zipfile.ZipFile(tmp_path / "net.pt") as archive:
        assert any(entry.compress_type == zipfile.ZIP_DEFLATED for entry in archive.infolist())  # its code
    found = load_checkpoint(tmp_path / "net.pt", factory=Net)
    assert same(found, dict(net.state_dict()))
    assert any("loose" in note for note in found.notes) == (how == "script")  # an attribute, no state
    summary = inspect_checkpoint(tmp_path / "net.pt")
    assert summary.kind == "TorchScript"
    assert {entry.name for entry in summary.tensors} >= set(net.state_dict())


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_frozen_archive_says_how_to_save_anew(tmp_path: Path) -> None:
    scripted(tmp_path / "net.pt", "frozen")
    with pytest.raises(CheckpointError, match=r"frozen .* save model.state_dict\(\)"):
        load_checkpoint(tmp_path / "net.pt", factory=Net)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("entry", ["net/code/__torch__.py", "net/data.pkl", "net/data/5"])
def test_torchscript_is_no_zip_bomb(entry: str, tmp_path: Path) -> None:
    """An entry of 128 MiB of zeros in 128 KiB: code is never unpacked, the rest must not be compressed."""
    scripted(tmp_path / "net.pt", "script")
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(tmp_path / "net.pt") as old, zipfile.ZipFile(bomb, "w") as new:
        for info in old.infolist():
            if info.filename != entry:
                new.writestr(info.filename, old.read(info), compress_type=info.compress_type)
        new.writestr(entry, bytes(2**27), compress_type=zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 2**18
    unpacked: list[int] = []
    content = zips.content

    def watched(*args: Any, **options: Any) -> memoryview:
        found = content(*args, **options)
        unpacked.append(len(found))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zips, "content", watched)
        if entry.endswith(".py"):
            load_checkpoint(bomb, factory=Net)
        else:
            with pytest.raises(CheckpointError, match=r"is compressed .*zip bomb|claims 8 bytes"):
                load_checkpoint(bomb, factory=Net)
    assert sum(unpacked) < 2**16


def test_a_script_pickle_that_repeats_itself_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that hold each other 30 deep, twice each: 2^30 paths."""
    inner = b"c__torch__\nA\n)\x81}X\x01\x00\x00\x00xNsbq\x00"
    for level in range(30):
        inner += b"0c__torch__\nA\n)\x81}(X\x01\x00\x00\x00xh%cX\x01\x00\x00\x00yh%cubq%c" % (level, level, level + 1)
    path = tmp_path / "laughs.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + inner + b".")
        archive.writestr("a/constants.pkl", b"\x80\x02).")
    monkeypatch.setattr(pickled, "command", noting(pickled.command, str(tmp_path / "held")))
    begun = spent()
    with pytest.raises(CheckpointError, match="repeat one another"):
        load_checkpoint(path, factory=Net)
    assert spent() - begun < 10 * pickled.SECONDS
    assert 0 < most_held(str(tmp_path / "held")) <= pickled.MEMORY + 4 * pickled.MAX_PICKLE


def test_long_names_of_script_attributes_are_refused_before_they_multiply(tmp_path: Path) -> None:
    long, count = b"n" * 10**6, 50_000
    state = b"}(" + b"".join(b"X\x05\x00\x00\x00%05dK\x01" % number for number in range(count)) + b"u"
    text = b"X" + len(long).to_bytes(4, "little") + long
    with zipfile.ZipFile(tmp_path / "long.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02c__torch__\nA\n)\x81}" + text + state + b"sb.")
        archive.writestr("a/constants.pkl", b"\x80\x02).")
    with pytest.raises(CheckpointError, match="absurdly long"):
        load_checkpoint(tmp_path / "long.pt", factory=Net)


# --- prefixes and keys ---


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "model.module."])
@pytest.mark.parametrize("extra", ["n_averaged", "loss.weight", "epoch", "ema_model.layers.0.weight"])
def test_one_extra_tensor_does_not_spoil_the_stripping(
    prefix: str, extra: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = written(tmp_path / "a.pt", {"state_dict": {extra: torch.ones(2, 2), **under(prefix, state)}})
    found = load_checkpoint(path, **MLP)
    assert same(found, state)
    assert any(extra in note for note in found.notes)


def test_what_the_network_wants_is_never_left_outside(state: dict[str, Tensor], tmp_path: Path) -> None:
    names = list(state)
    mixed = {**under("module.", {n: state[n] for n in names[:-1]}), names[-1]: state[names[-1]]}
    with pytest.raises(CheckpointError, match="missing"):
        load_checkpoint(written(tmp_path / "a.pt", mixed), **MLP)


def test_two_wrappers_are_not_chosen_between(state: dict[str, Tensor], tmp_path: Path) -> None:
    other = {name: tensor + 1 for name, tensor in state.items()}
    path = written(tmp_path / "a.pt", {**under("model.", state), **under("net.", other)})
    with pytest.raises(CheckpointError, match=r"under both .*--prefix net\.\)"):
        load_checkpoint(path, **MLP)
    assert same(load_checkpoint(path, prefix="net.", **MLP), other)
    assert same(load_checkpoint(path, prefix="model", **MLP), state)


def test_a_prefix_of_ones_own(state: dict[str, Tensor], tmp_path: Path) -> None:
    other = {name: tensor + 1 for name, tensor in state.items()}
    path = written(tmp_path / "a.pt", {**under("student.", state), **under("teacher.", other)})
    with pytest.raises(CheckpointError, match=r"--prefix student\. or --prefix teacher\."):
        load_checkpoint(path, **MLP)
    with pytest.raises(CheckpointError, match=r"did you mean 'student.'"):
        load_checkpoint(path, prefix="studen", **MLP)
    found = load_checkpoint(path, prefix="teacher", **MLP)
    assert same(found, other)
    assert any("student.layers.0.weight" in note for note in found.notes)
    resnet = networks.build("small_resnet", seed=0)
    path = written(tmp_path / "b.pt", {**under("backbone.", dict(resnet.state_dict())), "head": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"all of them lie under a prefix: .*--prefix backbone\."):
        load_checkpoint(path, network="small_resnet", activation="relu")
    assert same(
        load_checkpoint(path, network="small_resnet", activation="relu", prefix="backbone"), dict(resnet.state_dict())
    )


def test_a_prefix_of_the_averaged_weights_alone(state: dict[str, Tensor], tmp_path: Path) -> None:
    """Beside plain weights, as ema-pytorch stores its two copies: what the message proposes is what is loaded."""
    online, average = ({name: tensor + k for name, tensor in state.items()} for k in (1, 2))
    held = {**under("online_model.", online), **under("ema_model.", average), "step": torch.tensor(5)}
    path = written(tmp_path / "a.pt", {"model": state, "ema": held})
    with pytest.raises(CheckpointError, match=r"--prefix online_model\. or --prefix ema_model\."):
        load_checkpoint(path, **MLP)
    for prefix, meant in (("online_model.", online), ("ema_model.", average)):
        found = load_checkpoint(path, prefix=prefix, **MLP)
        assert same(found, meant)
        assert found.notes[0] == "read as a state dict under 'ema'"
        assert not any("which the file holds beside" in note for note in found.notes)
    with pytest.raises(CheckpointError, match=r"did you mean 'ema_model\.'"):
        load_checkpoint(path, prefix="ema_modl", **MLP)


def test_weights_of_a_part(model: nn.Module, state: dict[str, Tensor], tmp_path: Path) -> None:
    """A wrapper with no weights of its own takes its part's; one with more says which part they are of."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"backbone": networks.build("mlp", in_features=3, widths=(2,), num_classes=2)})

    found = load_checkpoint(written(tmp_path / "a.pt", state), factory=Scaled)
    assert same(found, under("inner.backbone.", state))
    assert "names put under inner.backbone., which all of the network's have" in found.notes

    class Longer(Scaled):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 2)

    with pytest.raises(CheckpointError, match=r"those of its part inner\.backbone alone: let factory \(--model\)"):
        load_checkpoint(tmp_path / "a.pt", factory=Longer)


def test_what_holds_no_weights_says_what_to_save(model: nn.Module, tmp_path: Path) -> None:
    path = written(tmp_path / "a.pt", {"model": nn.Linear(2, 2), "epoch": 3})
    with pytest.raises(CheckpointError, match=r"'model' is an object of code, .*Linear: save model\.state_dict\(\)"):
        load_checkpoint(path, **MLP)
    optimizer = torch.optim.Adam(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    path = written(tmp_path / "b.pt", {"training": {"optimizer": optimizer.state_dict()}, "epoch": 1})
    with pytest.raises(CheckpointError, match=r"training\.optimizer is the state of an optimizer") as caught:
        load_checkpoint(path, **MLP)
    assert "--key" not in str(caught.value)


def test_a_folder_of_transformers_says_how_to_call_it(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"--model hf:{tmp_path}"):
        load_checkpoint(tmp_path)
    assert any(f"--model hf:{tmp_path}" in note for note in inspect_checkpoint(tmp_path).notes)
    assert same(load_checkpoint(tmp_path, **MLP), state)


def test_a_key_says_where_the_state_dict_lies(state: dict[str, Tensor], tmp_path: Path) -> None:
    other = {name: tensor + 1 for name, tensor in state.items()}
    content = {"trainer": {"models": [state, other], "a.b": other}, "opt": {"state": {0: {"avg": torch.ones(1)}}}}
    path = written(tmp_path / "a.pt", content)
    with pytest.raises(CheckpointError, match=r"say which by key= \(--key trainer\.a\.b\)"):
        load_checkpoint(path, **MLP)
    assert same(load_checkpoint(path, key="trainer.models.0", **MLP), state)
    assert same(load_checkpoint(path, key="trainer.models.1", **MLP), other)
    assert same(load_checkpoint(path, key="trainer.a.b", **MLP), other)
    assert inspect_checkpoint(path, key="trainer.models.0").layout == "state dict under 'trainer.models.0'"
    for key, words in (
        ("trainer.models.2", "nothing lies under"),
        ("trainer.models", "a list lies under"),
        ("nothing", "tensors lie under trainer"),
    ):
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(path, key=key, **MLP)
    path = written(tmp_path / "b.pt", {"model": state, "net": other})
    with pytest.raises(CheckpointError, match=r"'model', 'net': say which by key= \(--key model\)"):
        load_checkpoint(path, **MLP)
    assert same(load_checkpoint(path, key="net", **MLP), other)


def test_what_stands_among_the_weights_is_named(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = written(tmp_path / "a.pt", {"state_dict": {**state, "_extra_state": None, "lr": 0.1}})
    found = load_checkpoint(path, **MLP)
    assert same(found, state)
    assert any("'_extra_state' (NoneType)" in note and "'lr' (float)" in note for note in found.notes)


# --- several files and their index ---


def sharded(folder: Path, state: dict[str, Tensor], *, suffix: str = "safetensors", **metadata: Any) -> Path:
    """Two files and their index."""
    folder.mkdir(exist_ok=True)
    names = list(state)
    places = {name: f"model-0000{1 + (number > 0)}-of-00002.{suffix}" for number, name in enumerate(names)}
    for place in sorted(set(places.values())):
        part = {name: state[name] for name in names if places[name] == place}
        save_file(part, folder / place) if suffix == "safetensors" else torch.save(part, folder / place)
    stem = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    index = folder / f"{stem}.index.json"
    index.write_text(json.dumps({"metadata": metadata, "weight_map": places}))
    return index


def rewrite(index: Path, change: Callable[[dict[str, str]], Any]) -> None:
    content = json.loads(index.read_text())
    made = change(content["weight_map"])
    index.write_text(json.dumps(content if made is None else made))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_in_several_files(suffix: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    index = sharded(tmp_path / "m", state, suffix=suffix, total_size=sum(t.nbytes for t in state.values()))
    for path in (index, index.parent):
        found = load_checkpoint(path, **MLP)
        assert same(found, state)
        assert not any("claims" in note for note in found.notes)
    summary = inspect_checkpoint(index)
    assert summary.kind.endswith(", 2 files")
    assert summary.size == sum(path.stat().st_size for path in index.parent.iterdir() if path != index)
    before = summary.sha256
    shard = next(path for path in index.parent.iterdir() if "00001" in path.name)
    first = next(iter(state))
    save_file({first: state[first] + 1}, shard) if suffix != "bin" else torch.save({first: state[first] + 1}, shard)
    assert inspect_checkpoint(index).sha256 != before


def test_a_folder_gives_the_one_file_that_it_can_mean(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "only.safetensors")
    assert same(load_checkpoint(tmp_path, **MLP), state)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"name one of only.safetensors, other.pt"):
        load_checkpoint(tmp_path, **MLP)
    save_file({name: tensor + 1 for name, tensor in state.items()}, tmp_path / "model.safetensors")
    assert not same(load_checkpoint(tmp_path, **MLP), state)  # that is what transformers calls it


def test_a_false_total_is_told(state: dict[str, Tensor], tmp_path: Path) -> None:
    found = load_checkpoint(sharded(tmp_path / "m", state, total_size=5), **MLP)
    assert "the index claims 5 bytes of tensors, its files hold 56" in found.notes


HOSTILE: dict[str, tuple[Callable[[dict[str, str]], Any], str]] = {
    "up": (lambda m: m.update({"layers.0.weight": "../secret.safetensors"}), "no plain name of a file beside it"),
    "absolute": (lambda m: m.update({"layers.0.weight": "/etc/passwd"}), "no plain name"),
    "backslash": (lambda m: m.update({"layers.0.weight": "..\\secret"}), "no plain name"),
    "dots": (lambda m: m.update({"layers.0.weight": ".."}), "no plain name"),
    "empty name": (lambda m: m.update({"layers.0.weight": ""}), "no plain name"),
    "line break": (lambda m: m.update({"layers.0.weight": "a\nb"}), "no plain name"),
    "number": (lambda m: m.update({"layers.0.weight": 3}), "no text"),
    "itself": (lambda m: m.update({"layers.0.weight": INDEX}), "its first bytes belong to no known format"),
    "absent": (lambda m: m.update({"layers.0.weight": "model-9.safetensors"}), "missing beside it; 1 of 2 files"),
    "link": (lambda m: m.update({"layers.0.weight": "link.safetensors"}), "leads out of its folder"),
    "pipe": (lambda m: m.update({"layers.0.weight": "pipe.safetensors"}), "missing beside it"),
    "folder": (lambda m: m.update({"layers.0.weight": "sub"}), "missing beside it"),
    "tensor elsewhere": (lambda m: m.update({"hidden": "model-00001-of-00002.safetensors"}), "which does not hold it"),
    "swapped": (lambda m: m.update({"layers.0.weight": m["layers.2.bias"]}), "which does not hold it"),
    "path key": (lambda m: m.update({"../x": "model-00001-of-00002.safetensors"}), "attribute path"),
    "no map": (lambda m: {"metadata": {}}, "without a weight_map"),
    "a list": (lambda m: [1], "without a weight_map"),
    "map of lists": (lambda m: {"weight_map": {"w": ["a"]}}, "no text"),
    "many files": (lambda m: {"weight_map": {f"w{i}": f"{i}.safetensors" for i in range(200)}}, "200 files"),
    "many tensors": (lambda m: {"weight_map": dict.fromkeys(map(str, range(30_000)), "a")}, "30000 tensors"),
    "nested": (lambda m: {"weight_map": m, "metadata": [[]] * 1_000_000}, "JSON holds about"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_indexes(name: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    index = sharded(tmp_path / "m", state)
    save_file(state, tmp_path / "secret.safetensors")
    (index.parent / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (index.parent / "sub").mkdir()
    os.mkfifo(index.parent / "pipe.safetensors")
    change, words = HOSTILE[name]
    rewrite(index, change)
    begun = spent()
    with pytest.raises(CheckpointError, match=words) as caught:
        load_checkpoint(index, **MLP)
    assert spent() - begun < 10 * pickled.SECONDS
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_sizes_are_added_up_before_anything_is_read(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = sharded(tmp_path / "m", state)
    for number in (1, 2):
        with open(index.parent / f"model-0000{number}-of-00002.safetensors", "r+b") as stream:
            stream.truncate(3 * 2**30)  # sparse: 6 GiB that are not there
    opened: list[Any] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *args, **options: opened.append(path) or real(path, *args, **options))
    with pytest.raises(CheckpointError, match=r"its files have 6\.0 GiB; the limit is 4\.0 GiB"):
        load_checkpoint(index, **MLP)
    assert opened == [index]


def test_pickled_files_of_one_index_share_their_time(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hessdiag.checkpoint import shards

    index = sharded(tmp_path / "m", state, suffix="bin")
    clock = iter([0.0, 1.0, 7.0])  # as if each of the two files had taken its reader long
    monkeypatch.setattr(shards, "_children", lambda: next(clock))
    with pytest.raises(CheckpointError, match="takes too much processor time"):
        load_checkpoint(index, **MLP)


def test_links_into_the_blobs_of_a_cache_are_followed(state: dict[str, Tensor], tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / ("0" * 40)
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file(state, blobs / "abc")
    (snapshot / "model.safetensors").symlink_to(Path("..") / ".." / "blobs" / "abc")
    assert same(load_checkpoint(snapshot, **MLP), state)
    (snapshot / "model.safetensors").unlink()
    save_file(state, tmp_path / "elsewhere")
    (snapshot / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        load_checkpoint(snapshot, **MLP)


# --- files that are something else ---


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b'{"architectures": ["X"]}', "JSON"),
        (b"\x93NUMPY\x01\x00", "--data"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
    ],
)
def test_what_people_take_for_a_checkpoint(head: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(head + b" " * 600)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(tmp_path / "a.pt")


def test_tied_weights_need_to_be_stored_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(3, 4), nn.Linear(3, 4)
            self.head.weight = self.embed.weight

    torch.manual_seed(0)
    state = dict(Tied().state_dict())
    del state["head.weight"]  # as safetensors stores it
    save_file(state, tmp_path / "a.safetensors")
    found = load_checkpoint(tmp_path / "a.safetensors", factory=Tied).model
    assert torch.equal(found.head.weight, state["embed.weight"])
    assert found.head.weight is found.embed.weight


def test_an_average_that_does_not_fit_names_the_weights_that_do(tmp_path: Path) -> None:
    """An average of the parameters alone has no statistics of BatchNorm."""
    torch.manual_seed(0)
    net = Net()
    state = net.state_dict()
    averaged = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    path = written(tmp_path / "a.pt", {"model": state, "ema": averaged})
    hint = r"2 missing \(bn.running_mean, bn.running_var\).*averaged \(ema\) weights.*say weights='model' \(--weights model\)"
    with pytest.raises(CheckpointError, match=hint) as caught:
        load_checkpoint(path, factory=Net)
    assert "\n" not in str(caught.value)
    assert same(load_checkpoint(path, factory=Net, weights="model"), state)
    with pytest.raises(CheckpointError, match="2 missing") as told:
        load_checkpoint(path, factory=Net, weights="ema")
    assert "--weights model" not in str(told.value)
    averaged["bn.running_mean"] = torch.full((2,), float("nan"))
    path = written(tmp_path / "b.pt", {"model": state, "ema": averaged})
    with pytest.raises(NonFiniteError, match="--weights model"):
        load_checkpoint(path, factory=Net)
    path = written(tmp_path / "c.pt", {"model": {"other": torch.ones(1)}, "ema": averaged})
    with pytest.raises(NonFiniteError) as neither:
        load_checkpoint(path, factory=Net)
    assert "--weights model" not in str(neither.value)
