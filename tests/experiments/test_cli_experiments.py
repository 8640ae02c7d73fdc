"""`python -m experiments`: train, attack, refusals, and the whole of the digits recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments import robustbench
from experiments.__main__ import main
from experiments.evaluate import Request, evaluate
from hessdiag import data, networks
from hessdiag.errors import ConfigurationError, UnknownNameError

QUICK = [
    *("--recipe", "digits_n_fgsm", "--epochs", "2", "--quiet", "--device", "cpu"),
    *("--set", "network_options.width=4", "--set", "train_samples=128"),
]


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any], str]:
    code = main(list(words))
    out, err = capsys.readouterr()
    return code, json.loads(out) if out.startswith("{") else {}, err


def test_train_then_attack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word.replace("n_fgsm", "standard").replace("=128", "=1000") for word in QUICK]  # learns in two epochs
    code, summary, _ = call(capsys, "train", *words, "--out", str(tmp_path), "--attack", "pgd:40")
    assert code == 0
    assert summary["status"] == "finished"
    assert summary["attacks"]["pgd"]["samples"] == 40
    code, record, _ = call(capsys, "attack", str(tmp_path), "--attack", "aa2:20", "--quiet")
    assert code == 0
    assert record["eps"] == "0.15"
    assert record["aa2"]["samples"] == 20
    assert 0 <= record["aa2"]["robust_accuracy"] <= 1
    assert record["clean_samples"] == 500
    stored = json.loads((tmp_path / "result.json").read_text())
    assert {"pgd", "aa2", "clean", "provenance"} <= stored["evaluation"].keys()  # attacks of one checkpoint gather
    assert stored["status"] == "finished"
    assert stored["provenance"]["card"]
    code, record, _ = call(capsys, "attack", str(tmp_path / "last.pt"), "--attack", "pgd", "--eps", "1/10", "--quiet")
    assert code == 0
    assert record["eps"] == "1/10"
    assert record["pgd"]["samples"] == 500
    assert "aa2" not in json.loads((tmp_path / "result.json").read_text())["evaluation"]  # another eps: nothing mixes


def test_progress_is_one_line_an_epoch_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for word in QUICK if word != "--quiet"]
    _, _, err = call(capsys, "train", *words, "--out", str(tmp_path), "--set", "watch.every=1", "--attack", "pgd:5")
    lines = [line for line in err.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 2
    assert "epoch 2/2" in lines[1]
    assert all(part in lines[1] for part in ("loss", "img/s", "clean", "PGD"))


def test_dry_run_shows_the_whole_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown, _ = call(
        capsys,
        "train",
        "--method",
        "trades",
        "--activation",
        "rct:beta=1,curvature=7",
        "--data",
        "cifar10",
        "--dry-run",
    )
    assert code == 0
    assert shown["config"]["activation"] == "rct:beta=1,alpha=14"
    assert shown["config"]["options"] == {"beta": 6.0}
    assert shown["config"]["eps"] == "8/255"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--method", "tradse"], "did you mean 'trades'"),
        (["train", "--method", "trades", "--eps", "8"], "[0, 1]"),
        (["train", "--method", "trades", "--network", "wrn"], "known:"),
        (["train", "--recipe", "dajat"], "dajat_rn18_high"),
        (["train", "--recipe", "digits_n_fgsm", "--attack", "aaa", "--out", "NOWHERE"], "did you mean 'aa'"),
        (["attack", "NOWHERE", "--attack", "aa"], "NOWHERE"),
        (["attack", "NOWHERE", "--attack", "aaa"], "did you mean 'aa'"),
    ],
)
def test_refusals_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, *words)
    assert code == (3 if message == "NOWHERE" else 2)  # a file that is missing; a word that is wrong
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith("experiments: ")
    assert not Path("NOWHERE").exists()  # refused before anything was trained


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("[evaluate]\natacks = ['aa']", "unknown key 'evaluate.atacks'; did you mean 'attacks'"),
        ("[evaluate]\nattacks = 'aa'", "evaluate.attacks must be a list"),
        ("evaluate = 3", "[evaluate] must be a table"),
        ("source = 3", "[source] must be a table"),
    ],
)
def test_what_a_recipe_says_besides_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: str, message: str
) -> None:
    (tmp_path / "mine.toml").write_text(f"method = 'standard'\n{lines}\n")
    code, _, err = call(capsys, "train", "--recipe", str(tmp_path / "mine.toml"), "--dry-run")
    assert code == 2
    assert message in err


def test_missing_data_says_how_to_get_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--method", "standard", "--root", str(tmp_path), "--out", str(tmp_path / "run"), "--quiet"]
    code, _, err = call(capsys, *words)
    assert code == 3
    assert "hessdiag data cifar10" in err


def test_a_checkpoint_of_another_network_or_class_count_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(capsys, "train", *QUICK, "--out", str(tmp_path), "--attack", "pgd:5")
    code, _, err = call(capsys, "attack", str(tmp_path), "--attack", "pgd", "--network", "resnet18")
    assert code == 3
    assert "small_resnet" in err
    assert "resnet18" in err
    code, _, err = call(capsys, "attack", str(tmp_path), "--attack", "pgd", "--num-classes", "100")
    assert code == 3
    assert "100" in err
    hundred = networks.build("small_resnet", width=4, num_classes=100)
    with pytest.raises(ConfigurationError, match=r"100 classes.*digits has 10"):
        evaluate(hundred, data.load("digits"), eps="0.1", attacks=["pgd:5"])


def test_requests() -> None:
    assert Request.parse("aa2:300") == Request("aa2", 300)
    assert Request.parse("pgd:eps=8/255,steps=20").samples is None
    for text in ("aa2:many", "aa:0", "aa:eps=0.1"):
        with pytest.raises(ConfigurationError):
            Request.parse(text)
    with pytest.raises(UnknownNameError, match="known: aa, aa2, pgd"):
        Request.parse("aa3")


def test_a_robustbench_entry_has_the_fields_of_the_leaderboard() -> None:
    evaluation = {
        "eps": "8/255",
        "clean": 0.8571,
        "data": {"name": "cifar10"},
        "aa": {"robust_accuracy": 0.525, "samples": 10_000, "warnings": []},
    }
    training = {"method": "dajat", "network": "resnet18", "activation": "relu", "seed": 1}
    found = robustbench.entry(evaluation, training)
    assert list(found) == [
        "link",
        "name",
        "authors",
        "additional_data",
        "number_forward_passes",
        "dataset",
        "venue",
        "architecture",
        "eps",
        "clean_acc",
        "reported",
        "autoattack_acc",
        "unreliable",
        "footnote",
    ]
    assert (found["clean_acc"], found["autoattack_acc"], found["eps"]) == ("85.71", "52.50", "8/255")
    assert not found["unreliable"]
    assert "only" not in found["footnote"]
    evaluation["aa"] = {"robust_accuracy": 0.5, "samples": 50, "warnings": ["odd"]}
    found = robustbench.entry(evaluation, training)
    assert found["unreliable"]
    assert "on 50 test images only" in found["footnote"]
    with pytest.raises(ConfigurationError, match="AutoAttack"):
        robustbench.entry({"eps": "8/255"}, training)


@pytest.mark.slow
def test_the_digits_recipe_beats_standard_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained and attacked (AA-2 on 300 images, AutoAttack on 50)."""
    code, robust, _ = call(capsys, "train", "--recipe", "digits_n_fgsm", "--out", str(tmp_path / "a"), "--quiet")
    assert code == 0
    code, plain, _ = call(capsys, "train", "--recipe", "digits_standard", "--out", str(tmp_path / "b"), "--quiet")
    assert code == 0
    gain = robust["attacks"]["aa2"]["robust_accuracy"] - plain["attacks"]["aa2"]["robust_accuracy"]
    assert gain >= 0.20
    assert robust["attacks"]["aa"]["samples"] == 50
    assert robust["attacks"]["aa2"]["samples"] == 300
    entry = json.loads((tmp_path / "a" / "robustbench.json").read_text())
    assert entry["eps"] == "0.15"
    assert "50 test images only" in entry["footnote"]


def test_a_dry_run_of_a_sweep_registers_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(Path(__file__).parents[2] / "experiments" / "sweeps" / "smoke" / "figure3.toml")
    assert main(["sweep", file, "--store", str(tmp_path / "store"), "--dry-run"]) == 0
    assert "24 runs, 0 done" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()
