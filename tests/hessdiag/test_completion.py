"""What the shell offers is what there is, and is offered without waiting for torch."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from hessdiag import activations, networks
from hessdiag.activations.registry import ALIASES, REGISTRY
from hessdiag.cli import complete
from hessdiag.cli.options import DTYPES, STATISTICS
from hessdiag.cli.program import app
from hessdiag.data.load import NAMES, SCHEMES
from hessdiag.examples import EXAMPLES
from hessdiag.methods import METHODS
from hessdiag.problem.losses import LOSSES
from hessdiag.problem.perturbation import parse_pgd


def _offered(words: str) -> list[str]:
    env = {"_HESSDIAG_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    return CliRunner(env=env).invoke(app, [], prog_name="hessdiag").stdout.split()


def test_the_names_are_those_of_the_registries() -> None:
    plain = {name for name in complete.ACTIVATIONS if ":" not in name}
    assert plain == {*REGISTRY, *ALIASES}
    for name in set(complete.ACTIVATIONS) - plain:
        activations.build(f"{name}7")
    assert set(complete.NETWORKS) == set(networks.NETWORKS)
    assert set(complete.METHODS) == {"auto", *METHODS}
    assert set(complete.LOSSES) == set(LOSSES)
    assert set(complete.DATA) == {*NAMES, *(f"{scheme}:" for scheme in SCHEMES)}
    assert set(complete.DTYPES) == set(DTYPES)
    assert set(complete.NORMALISATIONS) == set(STATISTICS)
    assert set(complete.EXAMPLES) == set(EXAMPLES)
    for attack in complete.ATTACKS:
        parse_pgd(attack)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("hessdiag measure --method p", ["propagation"]),
        ("hessdiag measure --network r", ["resnet18"]),
        ("hessdiag measure --activation s", ["selu", "silu", "softplus", "sigmoid", "swish"]),
        ("hessdiag measure --target ", ["data", "population"]),
        ("hessdiag measure --weights e", ["ema"]),
        ("hessdiag curvature mi", ["mish"]),
        ("hessdiag curvature mish ge", ["gelu"]),
        ("hessdiag data cifar100", ["cifar100"]),
        ("hessdiag measure dig", ["digits-example"]),
    ],
)
def test_values_are_offered(words: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _offered(words) == expected


def test_files_that_may_be_checkpoints_are_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.pt", "a.safetensors", "a.txt", "b.pth"):
        (tmp_path / name).write_text("")
    (tmp_path / "across").mkdir()
    (tmp_path / "across" / "inner.pt").write_text("")
    assert complete.example_or_file("a") == ["a.pt", "a.safetensors", "across/"]
    assert complete.example_or_file("across/") == ["across/inner.pt"]
    assert complete.example_or_file(f"{tmp_path}/b") == [f"{tmp_path}/b.pth"]
    assert complete.example_or_file("nowhere/x") == []
