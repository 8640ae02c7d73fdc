"""`hessdiag measure`: what it prints and writes, checked against the library and against autograd."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import hessdiag as hd
from hessdiag.cli.program import app
from hessdiag.data import load
from hessdiag.methods.pilot import DEFLATE
from hessdiag.problem.perturbation import parse_pgd, perturb_batches

SMALL = ["--samples", "24", "--batch-size", "10"]
FACTORY = """
import torch
from torch import nn

class Mirrored(torch.autograd.Function):  # of no kind that is known: its entries meet
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.flip(1)
    @staticmethod
    def backward(ctx, g):
        return (g + g.flip(1)) * ctx.saved_tensors[0].flip(1)

class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 8)
        self.last = nn.Linear(8, 10)
    def forward(self, x):
        return self.last(Mirrored.apply(self.inner(x.flatten(1))))

def mixed():
    torch.manual_seed(0)
    return Mixed()

def wide():
    return nn.Sequential(nn.Flatten(), nn.Linear(7, 10))

def cubic(outputs, targets):
    return (outputs ** 3).sum(1)
"""


def run(*args: str, columns: int = 100) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, ["measure", *args])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny network of ours, in a file."""
    path = tmp_path_factory.mktemp("cli") / "small.pt"
    model = hd.networks.build("mlp", in_features=64, widths=(5,), activation="silu", seed=0)
    hd.save_checkpoint(path, model, epoch=3, metrics={"accuracy": 0.5}, data="digits", method="none")
    return str(path)


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's own in the working directory, and the weights of its models."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "usernets.py").write_text(FACTORY)
    from hessdiag.store.factories import import_object

    torch.save(import_object("usernets:mixed")().state_dict(), tmp_path / "mixed.pt")
    torch.save(import_object("usernets:wide")().state_dict(), tmp_path / "wide.pt")
    return tmp_path


def test_everything_is_printed() -> None:
    found = run("digits-example", "--samples", "16", "--method", "propagation", "--max-replicates", "12")
    assert found.exit_code in (0, 1), found.output
    for word in (
        "rms norm", "mean-scaled norm", "Gauss-Newton", "functional", "invariant rms", "trace", "status", "By group",
        "norm gain", "By parameter", "blocks.1.shortcut.1.weight", "Effective curvature", "rct:beta=1,alpha=14",
        "digits (test), 16 of 500 samples", "accuracy", "other samples", "chosen with seed 0", "batches of 128", "cross_entropy", "eval mode",
        "none (clean inputs)", "audit", "passed", "wall time", "at 95%", "SGD on clean images", "epoch 12",
    ):  # fmt: skip
        assert word in found.stdout, word
    assert found.stderr == ""  # no progress where nobody watches
    assert "\x1b" not in found.stdout


def test_json_equals_the_library_and_autograd(small: str, tmp_path: Path) -> None:
    out = tmp_path / "m.json"
    found = run(small, *SMALL, "--dtype", "float64", "--json", str(out))
    assert found.exit_code == 0, found.output
    content = json.loads(out.read_text())
    data = load("digits", samples=24)
    objective = hd.Objective(hd.load_checkpoint(small).model.double())
    m = hd.measure(objective, data.batches(10, dtype=torch.float64))
    assert content["rms"] == m.rms
    assert content["trace"]["value"] == m.trace.value
    # An independent reference: the diagonal from torch.autograd.functional on the whole loss.
    model, names = objective.model, list(objective.parameters)
    shapes = [p.shape for p in objective.parameters.values()]

    def loss(*weights: torch.Tensor) -> torch.Tensor:
        outputs = torch.func.functional_call(model, dict(zip(names, weights)), (data.inputs.double(),))
        return torch.nn.functional.cross_entropy(outputs, data.targets)

    blocks = torch.autograd.functional.hessian(loss, tuple(p.detach() for p in objective.parameters.values()))
    square = sum(float(blocks[i][i].reshape(s.numel(), -1).diagonal().square().sum()) for i, s in enumerate(shapes))
    assert content["rms"] == pytest.approx(math.sqrt(square / objective.size), rel=1e-10)
    cli = content["cli"]
    assert cli["checkpoint"]["epoch"] == 3
    assert cli["data"]["samples"] == 24
    assert cli["checkpoint"]["sha256"] == hd.load_checkpoint(small).sha256
    assert cli["data"]["sha256"] == data.sha256
    assert cli["perturbation"] is None


def test_quiet_line_is_the_number(small: str) -> None:
    quiet = run(small, *SMALL, "-q")
    whole = json.loads(run(small, *SMALL, "--json", "-").stdout)
    assert [float(x) for x in quiet.stdout.split()] == [whole["rms"], *whole["interval"]]
    assert quiet.stdout.count("\n") == 1


def test_wide_interval_exits_1(small: str) -> None:
    found = run(small, *SMALL, "--method", "hutchinson", "--rtol", "1e-6", "--max-replicates", "12")
    assert found.exit_code == 1
    assert "before rtol=1e-06 was reached" in " ".join(found.stdout.split())


def test_seconds_stop_it(small: str) -> None:
    found = run(small, *SMALL, "--method", "hutchinson", "--rtol", "1e-9", "--max-seconds", "0.2",
                "--min-replicates", "60000", "--max-replicates", "60000")  # fmt: skip
    assert found.exit_code == 1
    assert "stopped after" in found.stdout


@pytest.mark.parametrize(
    ("args", "code_", "words"),
    [
        (["nothing.pt"], 3, "no such file"),
        (["nothing"], 2, "neither a file nor a shipped example"),
        (["FILE", "--method", "guess"], 2, "unknown method"),
        (["FILE", "--data", "digit"], 2, "did you mean 'digits'"),
        (["FILE", "--split", "half"], 2, "split"),
        (["FILE", "--rtol", "-1"], 2, "rtol"),
        (["FILE", "--confidence", "95"], 2, "between 0 and 1"),
        (["FILE", "--samples", "501"], 3, "fewer than"),
        (["FILE", "--layers", "*bias"], 2, "regular expression"),
        (["FILE", "--layers", "nothing"], 2, "no parameter matches"),
        (["FILE", "--weights", "ema"], 3, "averaged"),
        (["FILE", "--network", "resnet18"], 3, "you asked for"),
        (["FILE", "--device", "cuda:77"], 5, "cuda"),
        (["FILE", "--device", "tpu"], 2, "--device"),
        (["FILE", "--dtype", "float16"], 2, "--dtype"),
        (["FILE", "--attack", "pgd:eps=8/255"], 2, "lacks steps"),
        (["FILE", "--attack", "pgd"], 2, "'pgd' lacks eps; write pgd:eps=8/255,steps=10"),
        (["FILE", "--loss", "hinge"], 2, "hinge"),
        (["FILE", "--layers", "layers.0"], 2, r"'layers.0\..*' would mean layers.0.weight, layers.0.bias"),
        (["FILE", "--layers", "bias"], 2, "'.*bias.*' would mean layers.0.bias"),
        (["FILE", "--data", "mine.npz"], 2, "did you mean 'npz:mine.npz'"),
        (["FILE", "--data", "mine.npy"], 2, "numpy.savez"),
        (["FILE", "--data", "/"], 2, "did you mean 'folder:/'"),
        (["FILE", "--normalize", "cifar"], 2, "did you mean 'cifar10'"),
        (["FILE", "--json", "nowhere/x.json"], 2, "no folder"),
        (["FILE", "--html", "."], 2, "a folder"),
        (["FILE", "--plan", "nothing.json"], 3, "no such file"),
        (["FILE", "--model", "usernets:none"], 2, "no attribute"),
        (["FILE", "--model", "os.path:join", "--network", "mlp"], 2, "leave out"),
        (["FILE", "--model", "os.path:join", "--num-classes", "7"], 2, "leave out --num-classes"),
        (["FILE", "--timeout", "0"], 2, "timeout"),
        (["wide.pt", "--model", "usernets:wide", "--data", "digits"], 3, "does not take digits"),
        (["mixed.pt", "--model", "usernets:mixed"], 2, "names no data set"),
        (["mixed.pt", "--model", "usernets:mixed", "--data", "digits", "--method", "propagation"], 4, "inner"),
        (["mixed.pt", "--data", "digits"], 3, "does not name its network"),
        (["usernets.py"], 3, "neither a torch checkpoint nor safetensors"),
    ],
)  # fmt: skip
def test_refusals_are_one_line_with_a_code(code: Path, small: str, args: list[str], code_: int, words: str) -> None:
    """Every refusal: its exit code, one line on stderr, nothing on stdout, no traceback."""
    found = run(*[small if a == "FILE" else a for a in args])
    assert found.exit_code == code_, found.output
    assert found.stdout == ""
    assert found.stderr.startswith("hessdiag: ")
    assert found.stderr.count("\n") == 1 and words in found.stderr, found.stderr
    assert "Traceback" not in found.stderr


def test_debug_shows_the_traceback() -> None:
    found = run("nothing.pt", "--debug")
    assert found.exit_code == 3
    assert "Traceback" in found.stderr


def test_usage_errors_exit_2() -> None:
    assert run("--no-such-option").exit_code == 2
    assert run("--samples", "many").exit_code == 2


def test_internal_errors_are_told_as_such(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a fault\nof two lines")

    monkeypatch.setattr("hessdiag.cli.measuring.measure", broken)
    found = run(small)
    assert found.exit_code == 70
    assert found.stderr.count("\n") == 1
    assert "ZeroDivisionError" in found.stderr


def test_uncovered_model_falls_back_with_the_reason(code: Path) -> None:
    found = run("mixed.pt", "--model", "usernets:mixed", "--data", "digits", *SMALL, "--max-replicates", "12")
    assert found.exit_code in (0, 1), found.output
    text = " ".join(found.stdout.split())
    assert "hutchinson" in text
    assert "the site identity does not serve here" in text
    assert "inner" in text


def test_loss_of_ones_own(code: Path, small: str) -> None:
    found = run(small, *SMALL, "--loss", "usernets:cubic", "--json", "-", "--method", "reference", "--dtype", "float64")
    content = json.loads(found.stdout)
    model = hd.load_checkpoint(small).model.double()
    from hessdiag.store.factories import import_object

    objective = hd.Objective(model, import_object("usernets:cubic"))
    batches = load("digits", samples=24).batches(10, dtype=torch.float64)
    assert content["rms"] == hd.measure(objective, batches, method="reference").rms


def test_layers_and_l2(small: str) -> None:
    one = json.loads(run(small, *SMALL, "--layers", ".*bias", "--json", "-", "--dtype", "float64").stdout)
    assert one["layers"]
    assert all(name.endswith("bias") for name in one["layers"])
    more = json.loads(
        run(small, *SMALL, "--layers", ".*bias", "--l2", "0.25", "--json", "-", "--dtype", "float64").stdout
    )
    assert more["trace"]["value"] == pytest.approx(one["trace"]["value"] + 0.25 * one["parameters"], rel=1e-12)


def test_attack_is_that_of_the_library_and_hurts(small: str) -> None:
    spec = "pgd:eps=8/255,steps=3"
    found = run(small, *SMALL, "--attack", spec, "--seed", "7", "--json", "-", "--dtype", "float64")
    content = json.loads(found.stdout)
    model = hd.load_checkpoint(small).model.double()
    clean = load("digits", samples=24).batches(10, dtype=torch.float64)
    crafted = perturb_batches(model, clean, parse_pgd(f"{spec},seed=7"))
    m = hd.measure(hd.Objective(model), crafted, seed=7)
    assert content["rms"] == m.rms
    told = content["cli"]["perturbation"]
    assert told["spec"].startswith("pgd:eps=8/255,steps=3,")
    assert "seed=7" in told["spec"]
    assert content["loss"] > told["clean_loss"]
    other = json.loads(
        run(small, "--samples", "24", "--batch-size", "7", "--attack", spec, "--seed", "7", "--json", "-",
            "--dtype", "float64").stdout
    )  # fmt: skip
    assert other["rms"] == pytest.approx(m.rms, rel=1e-9)  # noise keyed by sample, not by batch


def test_saved_diagonal(small: str, tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    assert run(small, *SMALL, "--save-diagonal", str(path), "-q").exit_code == 0
    saved = load_file(path)
    batches = load("digits", samples=24).batches(10)
    truth = hd.diagonal(hd.Objective(hd.load_checkpoint(small).model), batches)
    for name, tensor in truth.total.items():
        assert torch.equal(saved[f"total|{name}"], tensor)
        assert not saved[f"standard_error|{name}"].any()


def test_saved_estimate_has_errors(small: str, tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    run(small, *SMALL, "--method", "hutchinson", "--max-replicates", "12", "--save-diagonal", str(path), "-q")
    errors = [t for name, t in load_file(path).items() if name.startswith("standard_error|")]
    assert errors
    assert all(bool((e > 0).any()) for e in errors)


def test_dry_run_runs_nothing(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a dry run measured")

    monkeypatch.setattr("hessdiag.cli.measuring.measure", never)
    monkeypatch.setattr("hessdiag.cli.setup.keyed_pgd", never)
    found = run(small, *SMALL, "--dry-run", "--attack", "pgd:eps=8/255,steps=3")
    assert found.exit_code == 0, found.output
    for word in ("exact", "propagation", "hutchinson", "reference", "Nothing was measured", "multiplications"):
        assert word in found.stdout
    content = json.loads(run(small, *SMALL, "--dry-run", "--json", "-").stdout)
    methods = {one["method"]: one for one in content["methods"]}
    size = 64 * 5 + 5 + 50 + 10
    assert methods["reference"]["passes_once"] == 2 * size + 2
    assert methods["propagation"]["passes_once"] == 9 + 4 * DEFLATE
    assert methods["propagation"]["passes_each"] == 2
    assert all(one["bytes"] > 0 and one["batches"] == 3 and one["seconds_once"] > 0 for one in methods.values())


def test_dry_run_says_what_does_not_serve(code: Path) -> None:
    found = run("mixed.pt", "--model", "usernets:mixed", "--data", "digits", *SMALL, "--dry-run")
    assert found.exit_code == 0
    assert found.stdout.count("does not serve") == 2
    assert "inner" in found.stdout


@pytest.mark.parametrize("columns", [60, 80, 120, *(pytest.param(c, marks=pytest.mark.slow) for c in (70, 100, 200))])
def test_no_line_is_wider_than_the_terminal(columns: int) -> None:
    found = run("digits-example", "--samples", "8", "--method", "propagation", "--max-replicates", "10",
                columns=columns)  # fmt: skip
    lines = found.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    assert any("rms norm" in line for line in lines)
    assert sum("functional" in line for line in lines) >= 3


def test_interrupted_gives_what_is_there(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hessdiag.measuring.loop import Loop

    honest = Loop.run_round

    def interrupted(self: Loop, count: int) -> None:
        if self.done >= 5:
            raise KeyboardInterrupt
        honest(self, count)

    monkeypatch.setattr(Loop, "run_round", interrupted)
    args = [small, "--samples", "24", "--batch-size", "2", "--method", "hutchinson", "--rtol", "1e-9"]
    found = run(*args, "--json", "-")
    assert found.exit_code == 1
    content = json.loads(found.stdout)
    assert content["replicates"] == 8
    assert "interrupted" in content["status"]
    monkeypatch.setattr(Loop, "run_round", lambda self, count: (_ for _ in ()).throw(KeyboardInterrupt()))
    found = run(*args)
    assert found.exit_code == 130
    assert "interrupted before there was a result" in found.stderr


def test_names_in_a_file_cannot_steer_the_terminal(tmp_path: Path) -> None:
    model = hd.networks.build("mlp", in_features=64, widths=(3,), activation="silu", seed=0)
    path = tmp_path / "odd.pt"
    hd.save_checkpoint(path, model, metrics={"\x1b[31m[red]acc": 0.5}, data="digits", method="\x1b]0;owned\x07[bold]x")
    found = run(str(path), *SMALL)
    assert found.exit_code == 0, found.output
    assert "\x1b" not in found.stdout
    assert "\x07" not in found.stdout
    assert "[red]acc" in found.stdout
    assert "[bold]x" in found.stdout


def test_a_file_cannot_name_code_or_paths_as_its_data(tmp_path: Path) -> None:
    model = hd.networks.build("mlp", in_features=64, widths=(3,), activation="silu", seed=0)
    path = tmp_path / "sly.pt"
    for name in ("os:getcwd", "npz:/etc/passwd"):
        hd.save_checkpoint(path, model, data=name)
        found = run(str(path))
        assert found.exit_code == 2
        assert "names no data set" in found.stderr


def test_averaged_weights_on_request(tmp_path: Path) -> None:
    make = [hd.networks.build("mlp", in_features=64, widths=(3,), activation="silu", seed=s) for s in (0, 1)]
    path = tmp_path / "ema.pt"
    hd.save_checkpoint(path, make[0], ema=make[1], data="digits")
    batches = load("digits", samples=24).batches(10)
    for which, model in zip(("model", "ema"), make):
        content = json.loads(run(str(path), *SMALL, "--weights", which, "--json", "-").stdout)
        assert content["cli"]["checkpoint"]["weights"] == which
        assert content["rms"] == hd.measure(hd.Objective(model.eval()), batches).rms


def test_population_target(small: str, tmp_path: Path) -> None:
    kept = tmp_path / "d.safetensors"
    found = run(small, "--samples", "100", "--target", "population", "--rtol", "9", "--save-diagonal", str(kept))
    assert found.exit_code == 0, found.output
    assert "the population the samples come from" in found.stdout
    assert any(key.startswith("standard_error|") for key in load_file(kept))


def test_given_plan_is_kept(small: str, tmp_path: Path) -> None:
    first = tmp_path / "a.json"
    run(small, *SMALL, "--method", "propagation", "--max-replicates", "10", "--json", str(first), "-q")
    second = json.loads(run(small, *SMALL, "--plan", str(first), "--max-replicates", "10", "--json", "-").stdout)
    assert second["plan"] == json.loads(first.read_text())["plan"]
    found = run(small, "--plan", str(first), "--method", "exact")
    assert found.exit_code == 2
    assert "leave one of them out" in found.stderr


def test_help_teaches_by_example() -> None:
    text = run("--help", columns=80).stdout
    assert "hessdiag measure digits-example" in text
    assert "torchrun" in text
    assert "Exit codes" in text
    assert re.search(r"--attack", text)
    assert "pgd:eps=8/255,steps=10" in text
