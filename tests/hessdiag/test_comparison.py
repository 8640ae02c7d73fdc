"""Two results side by side: whatever makes them results of different losses or data is said, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import hessdiag as hd
from hessdiag.cli.program import app
from hessdiag.data import load
from hessdiag.examples import example_path
from hessdiag.problem.losses import CrossEntropy
from hessdiag.show import read_document
from hessdiag.show.comparison import compare, differences, unpaired

COMMON = ("--samples", "40", "--method", "propagation", "--min-replicates", "8", "--max-replicates", "8", "--no-spread")
LOSSES = """
def scaled(outputs, targets):
    return 2.0 * outputs.square().mean(1)
"""


def run(*args: str) -> str:
    found = CliRunner(env={"COLUMNS": "200"}).invoke(app, list(args))
    assert found.exit_code in (0, 1), found.output
    return found.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    run("measure", "digits-example", *COMMON, "--json", str(folder / "plain.json"), "--quiet")
    return folder


def measured(folder: Path, name: str, *options: str) -> dict[str, Any]:
    path = folder / f"{name}.json"
    told = run(
        "measure", "digits-example", *COMMON, "--plan", str(folder / "plain.json"), *options, "--json", str(path)
    )
    (folder / f"{name}.txt").write_text(told)
    return read_document(path)


def in_python(folder: Path, name: str, size: int, **options: Any) -> Path:
    model = hd.load_checkpoint(example_path("digits-example")).model
    plan = hd.Plan.from_dict(read_document(folder / "plain.json")["plan"])
    batches = load("digits", samples=40).batches(size)
    found = hd.measure(hd.Objective(model, **options), batches, plan=plan, min_replicates=8, max_replicates=8)
    found.save_json(folder / f"{name}.json")
    return folder / f"{name}.json"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--label-smoothing", "0.2"), "loss (cross_entropy; cross_entropy (label_smoothing=0.2))"),
        (("--ignore-index", "3"), "loss (cross_entropy; cross_entropy (ignore_index=3))"),
    ],
    ids=lambda item: item[0] if isinstance(item, tuple) else "",
)
def test_an_option_that_makes_another_loss_is_said(options: tuple[str, ...], words: str, folder: Path) -> None:
    plain, other = read_document(folder / "plain.json"), measured(folder, "other", *options)
    assert differences(plain, plain) == []
    assert words in differences(plain, other)
    assert f"measured otherwise: {words}" in run("compare", *(str(folder / f"{x}.json") for x in ("plain", "other")))
    key, value = options[0][2:].replace("-", "_"), options[1]
    assert str(other["provenance"]["loss_options"][key]) == value
    assert f"({key}={value})" in (folder / "other.txt").read_text()
    assert other["provenance"]["loss"] == "cross_entropy"


@pytest.mark.parametrize("key", ["normalize", "output", "forward"])
def test_how_inputs_and_outputs_were_taken_is_said(key: str, folder: Path) -> None:
    plain = read_document(folder / "plain.json")
    other = json.loads(json.dumps(plain))
    assert other["cli"][key] is None
    other["cli"][key] = "cifar10"
    assert differences(plain, other) == [f"{key} (none, cifar10)"]
    del other["cli"][key]
    assert differences(plain, other) == []


def test_class_weights_of_python_are_said_and_shown(folder: Path) -> None:
    path = in_python(folder, "weighted", 40, class_weights=[1.0] * 9 + [50.0], label_smoothing=0.1)
    content = read_document(path)
    assert content["provenance"]["loss_options"] == {"label_smoothing": 0.1, "class_weights": [1.0] * 9 + [50.0]}
    told = "cross_entropy (label_smoothing=0.1, class_weights=[1, 1, 1, 1, 1, 1, 1, 1, 1, 50])"
    assert f"loss (cross_entropy; {told})" in differences(read_document(folder / "plain.json"), content)
    model = nn.Linear(3, 2)
    batch = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]
    m = hd.measure(hd.Objective(model, class_weights=[1.0, 2.0]), batch)
    assert "cross_entropy (class_weights=[1, 2])" in repr(m)
    page = folder / "page.html"
    m.save_html(page)
    assert "cross_entropy (class_weights=[1, 2])" in page.read_text()


def test_many_class_weights_are_told_apart_by_a_hash() -> None:
    weights = torch.linspace(0, 1, 1000, dtype=torch.float64)
    told = CrossEntropy(class_weights=weights).options["class_weights"]
    assert told.startswith("1000 numbers, sha256 ")
    assert told == CrossEntropy(class_weights=weights.clone()).options["class_weights"]
    weights[3] += 1e-12
    assert told != CrossEntropy(class_weights=weights).options["class_weights"]


def test_functions_of_one_name_in_two_places(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for name in ("here", "there"):
        (folder / f"loss_{name}.py").write_text(LOSSES)
        measured(folder, name, "--loss", f"loss_{name}:scaled")
    found = [read_document(folder / f"{name}.json") for name in ("here", "there")]
    assert [x["provenance"]["loss"] for x in found] == ["scaled", "scaled"]
    assert differences(*found) == ["loss (loss_here:scaled; loss_there:scaled)"]


def test_results_of_before_there_were_options(folder: Path) -> None:
    """Read, compared, and told to differ only where the other file has options."""
    new = folder / "plain.json"
    content = json.loads(new.read_text())
    del content["provenance"]["loss_options"], content["provenance"]["data_order"]
    for key in ("loss", "output", "forward", "key", "prefix", "inputs", "targets"):
        del content["cli"][key]
    old = folder / "old.json"
    old.write_text(json.dumps(content))
    smooth = folder / "smooth.json"
    measured(folder, "smooth", "--label-smoothing", "0.2")
    rows = compare([(path.stem, read_document(path)) for path in (old, new, smooth)])
    assert [row.differs for row in rows] == [
        (),
        (),
        ("loss (cross_entropy, its options not told; cross_entropy (label_smoothing=0.2))",),
    ]
    assert all(row.unpaired is None for row in rows)
    assert rows[1].ratio is not None
    assert rows[1].ratio.value == 1.0
    assert hd.read_result(old).ratio(hd.read_result(new)).value == 1.0
    run("compare", str(old), str(smooth))
    plans = run("measure", "digits-example", *COMMON, "--plan", str(old), "--quiet")
    assert plans == run("measure", "digits-example", *COMMON, "--plan", str(new), "--quiet")


def test_options_of_a_strange_file_are_refused_or_shown_harmlessly(folder: Path) -> None:
    content = json.loads((folder / "plain.json").read_text())
    odd = folder / "odd.json"
    for options, refused in (({"a": {}}, True), ({"a": [0] * 2000}, True), ({"\x1b[2J": "\x1b[31m"}, False), (3, True)):
        content["provenance"]["loss_options"] = options
        odd.write_text(json.dumps(content))
        found = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["compare", str(folder / "plain.json"), str(odd)])
        assert found.exit_code == (3 if refused else 0), found.output
        assert "\x1b" not in found.output


def test_equal_data_of_the_command_line_and_of_python(folder: Path) -> None:
    """The command line tells a hash, Python a fingerprint, whose last digits are those of the batches."""
    line = read_document(folder / "plain.json")
    for size in (40, 7):
        path = in_python(folder, f"python{size}", size)
        stored = read_document(path)
        assert unpaired(line, stored) is None
        assert unpaired(stored, line) is None
        assert differences(line, stored) == []
        assert hd.read_result(path).ratio(hd.read_result(folder / "plain.json")).paired
    turned = [(x.flip(0), y.flip(0)) for x, y in load("digits", samples=40).batches(40)]
    model = hd.load_checkpoint(example_path("digits-example")).model
    plan = hd.Plan.from_dict(line["plan"])
    other = hd.measure(hd.Objective(model), turned, plan=plan, min_replicates=8, max_replicates=8)
    assert unpaired(line, other.to_dict()) == "the data come in another order"
    assert differences(line, other.to_dict()) == []
    attacked = measured(folder, "attacked", "--attack", "pgd:eps=1/255,steps=1")
    assert unpaired(attacked, stored) == "the data differ"
    moved = [(x + 1e-6, y) for x, y in load("digits", samples=40).batches(40)]
    other = hd.measure(hd.Objective(model), moved, plan=plan, min_replicates=8, max_replicates=8)
    assert unpaired(line, other.to_dict()) == "the data differ"
    assert differences(line, other.to_dict()) == ["data or perturbation"]
