"""A norm of the wrong thing does not look like one of the right thing: accuracy, chance, the checkpoint's own, normalisation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import hessdiag as hd
from hessdiag.cli.accuracy import Counted, judged
from hessdiag.cli.options import STATISTICS, normalize_of
from hessdiag.cli.program import app
from hessdiag.data import load
from hessdiag.errors import ConfigurationError


def _measure(*args: str) -> Any:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["measure", *args, "--no-spread"])


def test_labels_shifted_by_one_are_seen(tmp_path: Path) -> None:
    data = load("digits", samples=40)
    good, bad = tmp_path / "good.npz", tmp_path / "bad.npz"
    np.savez(good, inputs=data.inputs.numpy(), targets=data.targets.numpy())
    np.savez(bad, inputs=data.inputs.numpy(), targets=(data.targets.numpy() + 1) % 10)
    right = _measure("digits-example", "--data", f"npz:{good}")
    assert "accuracy" in right.stdout
    assert "97.2%" in right.stdout  # the checkpoint's own, beside it
    assert "warning" not in right.stdout
    wrong = _measure("digits-example", "--data", f"npz:{bad}")
    assert wrong.exit_code == 0
    assert "no better than chance" in " ".join(wrong.stdout.split())
    quiet = _measure("digits-example", "--data", f"npz:{bad}", "-q")
    assert "warning: the accuracy is no better than chance" in quiet.stderr
    assert quiet.stdout.count("\n") == 1
    told = json.loads(_measure("digits-example", "--data", f"npz:{bad}", "--json", "-").stdout)["cli"]["accuracy"]
    assert told["no_better_than_chance"] is True
    assert told["below_own"] is True
    assert told["own"] == pytest.approx(0.972)


@pytest.mark.parametrize(
    ("accuracy", "metrics", "chance", "below"),
    [
        (0.97, {"test_accuracy": 0.972}, False, False),
        (0.10, {}, True, False),
        (0.17, {}, False, False),
        (0.80, {"test_accuracy": 0.972}, False, True),
        (0.80, {"test_acc": 97.2}, False, True),
        (0.80, {"train_accuracy": 0.999}, False, False),  # of another split
        (0.80, {"robust_accuracy": 0.999}, False, False),
        (0.80, {"test_pgd_accuracy": 0.999}, False, False),
        (0.80, {"grad_accum_steps": 97, "best_acc_epoch": 97, "accumulation": 0.99}, False, False),
        (0.80, {"acc_5": 97.2, "val/accuracyTop5": 0.99, "acc_at_step": 97, "FGSM-acc": 97.0}, False, False),
        *(
            (0.80, {name: 97.2}, False, True)
            for name in ("acc", "Acc@1", "val/top1", "valAccuracy", "testacc1", "acc1")
        ),
        (0.96, {"test_accuracy": 0.972}, False, False),  # as far as 500 samples tell
    ],
)
def test_what_is_out_of_line(accuracy: float, metrics: dict[str, Any], chance: bool, below: bool) -> None:
    data = load("digits")
    found = judged(Counted(round(accuracy * len(data)), torch.bincount(data.targets)), data, metrics)
    assert found["no_better_than_chance"] is chance
    assert found["below_own"] is below


def test_chance_is_the_commonest_class() -> None:
    found = judged(Counted(90, torch.tensor([90, 10])), load("digits"), {})
    assert found["chance"] == pytest.approx(0.9)
    assert found["no_better_than_chance"]


def test_normalize_names_and_numbers() -> None:
    assert normalize_of(None) is None
    assert normalize_of("cifar10") == STATISTICS["cifar10"]
    assert normalize_of("0.1,0.2:0.3,0.4") == ((0.1, 0.2), (0.3, 0.4))
    for text, words in (
        ("cifar", "did you mean 'cifar10'"),
        ("0.5", "MEAN"),
        ("0.1:0.2,0.3", "one of each"),
        ("0.1:0", "positive"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            normalize_of(text)


FACTORY = """
from torch import nn
from hessdiag import networks

def plain():
    return networks.build("mlp", in_features=64, widths=(5,), activation="silu", seed=0)

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 10)
    def forward(self, x):
        return self.inner(x.flatten(1))
"""


def test_normalize_is_that_of_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For bare weights of a known network, and for a model of one's own, whose parameters keep their names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ownnets.py").write_text(FACTORY)
    from hessdiag.store.factories import import_object

    model = import_object("ownnets:Own")().double()
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    args = ["--model", "ownnets:Own", "--data", "digits", "--samples", "20", "--json", "-", "--dtype", "float64"]
    content = json.loads(_measure("own.safetensors", *args, "--normalize", "0.3:0.4").stdout)
    assert set(content["layers"]) == {"inner.weight", "inner.bias"}
    assert content["cli"]["normalize"] == "0.3:0.4"
    data = load("digits", samples=20)
    shifted = [((x - 0.3) / 0.4, y) for x, y in data.batches(128, dtype=torch.float64)]
    assert content["rms"] == pytest.approx(hd.measure(hd.Objective(model.eval()), shifted).rms, rel=1e-6)
    plain = json.loads(_measure("own.safetensors", *args).stdout)
    assert plain["rms"] != pytest.approx(content["rms"], rel=1e-3)
    # Its attack works on the raw inputs.
    attacked = _measure("own.safetensors", *args, "--normalize", "0.3:0.4", "--attack", "pgd:eps=0.1,steps=2")
    assert attacked.exit_code == 0, attacked.output


def test_normalize_for_bare_weights_and_against_a_file_that_knows_better(tmp_path: Path) -> None:
    model = hd.networks.build("small_resnet", activation="silu", num_classes=10, in_channels=1, seed=0)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    args = ["--network", "small_resnet", "--activation", "silu", "--data", "digits", "--samples", "8"]
    shown = _measure(str(tmp_path / "bare.pt"), *args, "--normalize", "0.3:0.4")
    assert shown.exit_code == 0, shown.output
    assert "by 0.3:0.4" in shown.stdout
    refused = _measure("digits-example", "--normalize", "cifar10")
    assert refused.exit_code == 3
    assert "normalize" in refused.stderr


def test_bytes_as_floats_are_seen(tmp_path: Path) -> None:
    """Warned of wherever warnings go, refused by statistics of pixels in [0, 1]."""
    model = hd.networks.build("small_resnet", activation="silu", num_classes=10, in_channels=1, seed=0)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    data = load("digits", samples=6)
    for name, inputs in (
        ("bytes", data.inputs * 255),
        ("uint8", (data.inputs * 255).to(torch.uint8)),
        ("ready", (data.inputs - 0.3) / 0.1),
    ):
        np.savez(tmp_path / f"{name}.npz", inputs=inputs.numpy(), targets=data.targets.numpy())
    model_of = [str(tmp_path / "bare.pt"), "--network", "small_resnet", "--activation", "silu"]
    normalised = ["--normalize", "0.3:0.4", "-q"]

    def told(name: str, *more: str) -> Any:
        return _measure(*model_of, "--data", f"npz:{tmp_path / name}.npz", *more)

    assert "warning: inputs span [0, 255] and are used as they are" in told("bytes", "-q").stderr
    assert "warning inputs span [0, 255]" in " ".join(told("bytes").stdout.split())
    for name in ("uint8", "ready"):
        assert "inputs span" not in told(name, "-q").stderr
    for name in ("bytes", "ready"):
        refused = told(name, *normalised)
        assert refused.exit_code == 3
        assert "--normalize is of inputs in [0, 1]" in refused.stderr
    assert told("uint8", *normalised).exit_code == 0


CAUSAL = """
import torch
from torch import nn
from torch.nn import functional as F

class Causal(nn.Module):
    scale = 1.0
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.last = nn.Embedding(7, 5), nn.Linear(5, 7)
    def forward(self, input_ids=None, labels=None):
        logits = self.last(torch.tanh(self.embed(input_ids)))
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": self.scale * F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}

class Other(Causal):
    scale = 2.0
"""


@pytest.fixture
def tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A model that computes its own loss, of the next token, and sequences whose last places do not count."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "causalnets.py").write_text(CAUSAL)
    from hessdiag.store.factories import import_object

    model = import_object("causalnets:Causal")()
    torch.save(model.state_dict(), tmp_path / "causal.pt")
    ids = torch.randint(7, (6, 5), generator=torch.Generator().manual_seed(2))
    labels = torch.where(torch.arange(5) < torch.tensor([5, 4, 3, 5, 5, 2])[:, None], ids, -100)
    np.savez(tmp_path / "tokens.npz", input_ids=ids.numpy(), labels=labels.numpy())
    return ["causal.pt", "--data", "npz:tokens.npz", "--output", "logits"]


def test_a_models_own_loss_is_measured_where_nobody_says_otherwise(tokens: list[str]) -> None:
    """A language model's is of the next token; an explicit --shift wins, with a warning; accuracy is of tokens."""
    own = json.loads((found := _measure(*tokens, "--model", "causalnets:Causal", "--json", "-")).stdout)
    assert "own loss" not in found.stderr
    same = json.loads(_measure(*tokens, "--model", "causalnets:Causal", "--json", "-", "--shift", "1").stdout)
    assert own["rms"] == same["rms"]
    assert own["loss"] == pytest.approx(own["cli"]["own_loss"]["value"], rel=1e-5)
    text = " ".join(_measure(*tokens, "--model", "causalnets:Causal").stdout.split())
    assert "note: the loss compares each place with the next token (shift=1), as the model's own does" in text
    batch = np.load("tokens.npz")
    ids, labels = torch.from_numpy(batch["input_ids"]), torch.from_numpy(batch["labels"])[:, 1:]
    from hessdiag.store.factories import import_object

    model = import_object("causalnets:Causal")()
    model.load_state_dict(torch.load("causal.pt"))
    right = (model(ids)["logits"].argmax(-1)[:, :-1] == labels)[labels != -100]
    told = own["cli"]["accuracy"]
    assert (told["value"], told["samples"]) == (pytest.approx(right.double().mean().item()), 18)
    assert told["chance"] == pytest.approx(int(torch.bincount(labels[labels != -100]).max()) / 18)
    assert "of 18 targets (chance" in text
    asked = _measure(*tokens, "--model", "causalnets:Causal", "-q", "--shift", "0")
    assert float(asked.stdout.split()[0]) != pytest.approx(own["rms"], rel=1e-2)
    assert "own loss of the first 6 samples is 1.977, the one measured is 2.314: with --shift 1 it is" in asked.stderr


def test_a_loss_that_agrees_with_no_shift_is_warned_of_with_both_numbers(tokens: list[str]) -> None:
    found = _measure(*tokens, "--model", "causalnets:Other", "-q")
    assert found.exit_code == 0
    assert "the model's own loss of the first 6 samples is" in found.stderr
    assert "say --loss, --ignore-index or --output as it was trained" in found.stderr
    smoothed = _measure(*tokens, "--model", "causalnets:Causal", "-q", "--label-smoothing", "0.1")
    assert "own loss" not in smoothed.stderr
