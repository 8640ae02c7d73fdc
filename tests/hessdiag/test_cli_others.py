"""The other commands, the page, pipes, completion, and the documents that tell of them."""

from __future__ import annotations

import base64
import json
import math
import os
import random
import re
import resource
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import hessdiag as hd
from hessdiag.cli.program import app
from hessdiag.data import load
from hessdiag.errors import DataError
from hessdiag.examples import example_path
from hessdiag.examples.build_digits import accuracy, train
from hessdiag.norm import ratio
from hessdiag.show import norm_of, read_document
from hessdiag.show.comparison import compare, unpaired

DOCS = Path(__file__).parents[2] / "docs"


def run(*args: str, columns: int = 100) -> Result:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, list(args))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three measurements: two networks a hair apart under common signs, one of them with another seed as well."""
    folder = tmp_path_factory.mktemp("compare")
    near = hd.networks.build("mlp", in_features=64, widths=(6, 5), activation="silu", seed=0)
    hd.save_checkpoint(folder / "a.pt", near, data="digits")
    with torch.no_grad():
        for p in near.parameters():
            p.mul_(1.01)
    hd.save_checkpoint(folder / "b.pt", near, data="digits")
    common = ["--samples", "30", "--method", "hutchinson", "--min-replicates", "24", "--max-replicates", "24", "-q"]
    for name, model, more in (("a", "a", []), ("b", "b", []), ("c", "b", ["--seed", "5"])):
        run("measure", str(folder / f"{model}.pt"), *common, *more, "--json", str(folder / f"{name}.json"))
    return {name: folder / f"{name}.json" for name in "abc"}


def test_paired_ratio_is_that_of_the_library_and_narrower(files: dict[str, Path]) -> None:
    documents = [(name, read_document(path)) for name, path in files.items()]
    a, b, c = compare(documents)
    assert a.ratio is None
    assert b.unpaired is None
    assert c.unpaired == "the seeds differ"
    estimates = []
    for name in "ab":
        model = hd.load_checkpoint(files["a"].with_name(f"{name}.pt")).model
        batches = load("digits", samples=30).batches(128)
        m = hd.measure(hd.Objective(model), batches, method="hutchinson", min_replicates=24, max_replicates=24)
        estimates.append(m.norm.total)
    assert b.ratio == ratio(estimates[1], estimates[0], paired=True)
    assert b.ratio is not None
    assert c.ratio is not None
    # The networks differ by one per cent in each weight: common signs cancel all but that.
    assert b.ratio.high / b.ratio.low < 1 + 0.2 * (c.ratio.high / c.ratio.low - 1)


BAD = (None, True, -1, 0, 2, 1e300, 10**400, -5, "x", "inf", "", [], {}, [None], {"a": 1}, "a" * 20_000)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a document, tables and lists included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in leaves(item, (*path, key)))]


def test_any_malformed_document_is_compared_or_refused_in_one_line(files: dict[str, Path], tmp_path: Path) -> None:
    """Each place of a document with each bad value, and without it: exit 0 or 3, never an internal error."""
    text, odd = files["a"].read_text(), tmp_path / "odd.json"
    whole = json.loads(text)
    few = dict(list(whole["layers"].items())[:1])
    whole |= {"layers": few, "groups": few, "invariant_groups": {}, "history": whole["history"][:1]}
    rng, refused = random.Random(0), 0
    places = [place for place in leaves(whole) if place]
    for place in rng.sample(places, 150):
        content = json.loads(json.dumps(whole))
        target = content
        for step in place[:-1]:
            target = target[step]
        target[place[-1]] = rng.choice(BAD)
        if rng.random() < 0.2:
            del target[place[-1]]
        odd.write_text(json.dumps(content))
        told = ""
        try:
            compare([("a", read_document(files["a"])), ("odd", read_document(odd))])
            compare([("odd", read_document(odd)), ("a", read_document(files["a"]))])
        except DataError as error:
            told, refused = str(error), refused + 1
        assert "\n" not in told
        assert len(told) < 500
    assert refused > 75


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (("plan",), {}, "lacks method"),
        (("norm", "total", "rms"), 10**400, "rms"),
        (("cli",), "x", "cli is no table"),
        (("norm", "total", "confidence"), 2, "confidence"),
        (("norm", "total", "entries"), -5, "entries"),
        (("replicates",), -3, "replicates"),
        (("plan", "at_once"), 10**9, "at_once"),
        (("plan", "sample_groups"), {"0": -3}, "sample_groups"),
        (("norm", "total", "low"), 1e9, "interval"),
        (("norm", "total", "sizes"), [1], "groups of"),
    ],
    ids=lambda item: item[-1] if isinstance(item, tuple) else "",
)
def test_a_document_out_of_range_is_one_line(
    where: tuple[str, ...], value: Any, words: str, files: dict[str, Path], tmp_path: Path
) -> None:
    content = json.loads(files["a"].read_text())
    target = content
    for step in where[:-1]:
        target = target[step]
    target[where[-1]] = value
    odd = tmp_path / "odd.json"
    odd.write_text(json.dumps(content))
    for arguments in (("compare", str(files["a"]), str(odd)), ("measure", "digits-example", "--plan", str(odd))):
        found = run(*arguments)
        assert found.exit_code == 3, found.output
        assert words in found.stderr
        assert found.stderr.count("\n") == 1


def test_compare_prints_plots_and_writes(files: dict[str, Path], tmp_path: Path) -> None:
    plot, out = tmp_path / "p.svg", tmp_path / "c.json"
    names = [str(path) for path in files.values()]
    for columns in (60, 80, 120, 200):
        found = run("compare", *names, "--plot", str(plot), "--json", str(out), columns=columns)
        assert found.exit_code == 0, found.output
        assert max(map(len, found.stdout.splitlines())) <= columns
        assert "95%" in found.stdout
        assert "ratio" in found.stdout
        assert "not paired: the seeds differ" in found.stdout
    assert "paired: common signs" in found.stdout
    assert ET.fromstring(plot.read_text()[plot.read_text().index("<svg") :]).tag.endswith("svg")
    rows = json.loads(out.read_text())["rows"]
    assert rows[1]["ratio"]["paired"] is True
    assert rows[2]["ratio"]["paired"] is False
    assert rows[0]["max_curvature"] == pytest.approx(0.5)  # SiLU's


def test_what_cannot_be_paired_says_why(files: dict[str, Path]) -> None:
    a, b = (json.loads(files[name].read_text()) for name in "ab")
    assert unpaired(a, b) is None
    for path, value, words in (
        (("plan", "method"), "propagation", "methods"),
        (("plan", "sample_groups"), {"conv": 16}, "--plan"),
        (("cli", "data", "sha256"), "0", "data"),
        (("norm", "total", "sizes"), [3] * 8, "--min-replicates"),
        (("layers",), {}, "parameters"),
    ):
        changed: Any = json.loads(json.dumps(b))
        place = changed
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        assert words in str(unpaired(a, changed)), path


def test_compare_refuses(files: dict[str, Path], tmp_path: Path) -> None:
    a = str(files["a"])
    odd = tmp_path / "odd.json"
    for content, words in (
        ("{", "no JSON"),
        ("[1]", "no measurement"),
        (files["a"].read_text().replace("measurement/1", "measurement/9"), "schema"),
        (files["a"].read_text().replace('"square":', '"squares":'), "damaged"),
        ("[" * 100000, "nested"),
    ):
        odd.write_text(content)
        found = run("compare", a, str(odd))
        assert found.exit_code == 3, found.output
        assert words in found.stderr
        assert found.stderr.count("\n") == 1
    assert run("compare", a).exit_code == 2
    assert run("compare", a, a, "--plot", str(tmp_path / "x.gif")).exit_code == 2


def test_no_output_replaces_what_is_read_or_another_output(files: dict[str, Path], tmp_path: Path) -> None:
    """By whatever name it goes; devices are written through, and a resume file is read before it is written."""
    weights, data, link = tmp_path / "m.pt", tmp_path / "d.npz", tmp_path / "other"
    model = hd.networks.build("mlp", in_features=64, widths=(5,), activation="silu", seed=0)
    hd.save_checkpoint(weights, model, data="digits")
    np.savez(data, inputs=np.zeros((4, 64), np.float32), targets=np.arange(4))
    link.symlink_to(weights)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    plan = tmp_path / "plan.json"
    plan.write_bytes(next(iter(files.values())).read_bytes())
    before = {path: path.read_bytes() for path in (weights, data, plan)}
    new = str(tmp_path / "new")
    for args, words in (
        ((weights, "--json", weights), "would replace the checkpoint"),
        ((weights, "--html", link), "would replace the checkpoint"),
        ((link, "--save-diagonal", weights), "would replace the checkpoint"),
        ((weights, "--data", f"npz:{data}", "--json", data), f"would replace the data npz:{data}"),
        ((weights, "--plan", plan, "--json", plan), "would replace the plan"),
        ((folder, "--json", folder / "config.json"), "would replace the checkpoint"),
        (("--model", f"hf:{folder}", "--save-diagonal", folder / "model.safetensors"), "would replace the checkpoint"),
        ((weights, "--json", new, "--html", tmp_path / "." / "new"), f"would replace --json {new}"),
        ((weights, "--json", new, "--resume", new), f"would replace --json {new}"),
    ):
        found = run("measure", *map(str, args))
        assert found.exit_code == 2, args
        assert words in found.stderr, args
    result = str(plan)
    for args in (("compare", result, result, "--json", result), ("inspect", str(weights), "--json", str(link))):
        found = run(*args)
        assert (found.exit_code, "would replace the" in found.stderr) == (2, True)
    assert before == {path: path.read_bytes() for path in before}
    through = run("measure", str(weights), "--samples", "4", "-q", "--json", os.devnull, "--html", os.devnull)
    assert through.exit_code == 0, through.output


def test_estimates_survive_json(files: dict[str, Path]) -> None:
    content = read_document(files["a"])
    for summary in [content["norm"], *content["layers"].values()]:
        back = norm_of(summary["total"])
        again = json.loads(json.dumps(back.to_dict()).replace("NaN", "null"))
        assert again == summary["total"]


def test_curvature() -> None:
    found = run("curvature", "mish", "relu", "rct:beta=1,curvature=7", columns=60)
    assert found.exit_code == 0
    assert "0.6442046" in found.stdout
    assert "-0.0879344" in found.stdout
    assert "infinite" in found.stdout
    assert "alpha=14" in found.stdout
    assert max(map(len, found.stdout.splitlines())) <= 60
    values = [float(x) for x in run("curvature", "rct:beta=2,alpha=5", "silu", "-q").stdout.split()]
    assert values == [5.0, pytest.approx(0.5)]
    wrong = run("curvature", "misch")
    assert wrong.exit_code == 2
    assert "did you mean 'mish'" in wrong.stderr
    assert float(run("curvature", "torch:sin", "-q").stdout) == pytest.approx(1.0)


def test_inspect(tmp_path: Path) -> None:
    found = run("inspect", "digits-example", "--tensors", columns=60)
    assert found.exit_code == 0
    for word in ("rct:beta=1,alpha=14", "small_resnet", "2,626 parameters", "test_accuracy", "blocks.0.conv1"):
        assert word in found.stdout
    assert max(map(len, found.stdout.splitlines())) <= 60
    content = json.loads(run("inspect", "digits-example", "--json", "-").stdout)
    assert content["schema"] == "hessdiag-inspect/1"
    assert content["parameters"] == 2626
    (tmp_path / "x.pt").write_bytes(os.urandom(100))
    assert run("inspect", str(tmp_path / "x.pt")).exit_code == 3


def test_data_tells_where_to_put_files(tmp_path: Path) -> None:
    found = run("data", "--root", str(tmp_path), columns=100)
    text = "".join(found.stdout.split())
    assert found.exit_code == 0
    assert "cifar-10-python.tar.gz" in text
    assert "c58f30108f718f92721af3b95e74349a" in text
    assert str(tmp_path) in text
    assert run("data", "imagenet", "--root", str(tmp_path)).exit_code == 2
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test"):
        (folder / name).write_bytes(b"")
    assert f"here: {folder}" in run("data", "--root", str(tmp_path), columns=200).stdout


def test_shipped_example_is_what_its_script_makes() -> None:
    """Trained anew for an epoch twice: equal bits. The shipped one is what it says of itself."""
    first, second = train(epochs=1), train(epochs=1)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    path = example_path("digits-example")
    assert path is not None
    assert path.stat().st_size < 50_000
    shipped = hd.load_checkpoint(path)
    assert sum(p.numel() for p in shipped.model.parameters()) == 2626
    assert shipped.metrics["test_accuracy"] == pytest.approx(accuracy(shipped.model, "test"), abs=5e-3)
    assert accuracy(shipped.model, "test") > 0.95


def test_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    model = hd.networks.build("mlp", in_features=64, widths=(6, 4), activation="silu", seed=0)
    hd.save_checkpoint(tmp_path / "m.pt", model, data="digits", method='<script>alert(1)</script>"&')
    page = tmp_path / "m.html"
    args = ["measure", str(tmp_path / "m.pt"), "--samples", "20", "--method", "hutchinson", "--max-replicates", "14"]
    found = run(*args, "--html", str(page))
    assert found.exit_code in (0, 1), found.output
    text = page.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(https?:)?//", text)
    pictures = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', text)
    narrow = re.findall(r'media="\(max-width:\d+px\)" srcset="data:image/svg\+xml;base64,([^"]+)"', text)
    assert len(pictures) == len(narrow) == 4
    assert all(alt and text.count(alt) == 2 for alt in re.findall(r'alt="([^"]+)"', text))  # beside its heading
    assert '<b class="badge mind">' in text
    for picture in pictures + narrow:
        root = ET.fromstring(base64.b64decode(picture))
        assert root.tag.endswith("svg")
        assert not [e for e in root.iter() if e.tag.endswith("script")]
        links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
        assert all(link.startswith("#") for link in links)
    for heading in ("The diagonal", "Norm of each parameter", "Convergence", "Gauss-Newton against functional part"):
        assert heading in text
    assert "Broadened by noise" in text
    exact = run("measure", str(tmp_path / "m.pt"), "--samples", "20", "--html", str(page))
    assert exact.exit_code == 0
    assert "Broadened by noise" not in page.read_text()
    assert '<b class="badge good">exact</b> for these 20 samples' in page.read_text()


def test_page_of_a_piecewise_linear_network(tmp_path: Path) -> None:
    model = hd.networks.build("mlp", in_features=64, widths=(4,), activation="relu", seed=0)
    hd.save_checkpoint(tmp_path / "m.pt", model, data="digits")
    page = tmp_path / "m.html"
    assert run("measure", str(tmp_path / "m.pt"), "--samples", "20", "--html", str(page)).exit_code == 0
    assert "No parameter has both parts" in page.read_text()


def test_json_page_names_every_key(files: dict[str, Path]) -> None:
    words = set(re.findall(r"`([^`]+)`", (DOCS / "json.md").read_text()))
    content = json.loads(files["a"].read_text())
    cli = content["cli"]
    tables = [content, content["norm"], content["norm"]["total"], content["norm"]["share_functional"], content["plan"]]
    tables += [content["provenance"], content["trace"], content["audit"], content["audit"]["entries"][0]]
    tables += [cli, cli["checkpoint"], cli["data"], cli["accuracy"], cli["spread"]]
    missing = {key for table in tables for key in table if key not in words}
    assert not missing
    assert content["schema"] in words
    assert cli["schema"] in words


def test_exit_codes_are_documented() -> None:
    from hessdiag.cli.exits import CODES

    text = (DOCS / "measure.md").read_text()
    for code, meaning in CODES.items():
        assert f"| {code} | {meaning.replace('--rtol', '`--rtol`').replace('--debug', '`--debug`')} |" in text


def test_every_option_has_a_word_in_the_pages() -> None:
    pages = "".join(path.read_text() for path in DOCS.glob("*.md"))
    for command in ("measure", "compare", "curvature", "inspect", "data"):
        helped = run(command, "--help", columns=120)
        assert helped.exit_code == 0
        assert "Examples" in helped.stdout
        assert f"hessdiag {command}" in helped.stdout
        for option in set(re.findall(r"(--[a-z][a-z-]+)", helped.stdout)) - {"--help", "--debug"}:
            assert option in pages, (command, option)
        assert f"# `hessdiag {command}`" in (DOCS / f"{command}.md").read_text()


def test_quickstart_python(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "quickstart.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "quickstart.md", "exec"), {})
    *six, last = capsys.readouterr().out.splitlines()
    assert len(six) == 6
    assert math.isfinite(float(last.split()[0]))
    assert read_document(tmp_path / "m.json")["samples"] == 64
    assert (tmp_path / "m.html").exists()


def test_quickstart_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command as it stands, in one process for speed; the shell would add nothing but its words."""
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```sh\n(.*?)```", (DOCS / "quickstart.md").read_text(), re.S)
    lines = [line for line in code.splitlines() if line and not line.startswith("#")]
    assert len(lines) >= 6
    for line in lines:
        words = line.split()
        assert words[0] == "hessdiag"
        assert not set("|&;<>$'\"\\") & set(line)
        found = run(*words[1:])
        assert found.exit_code == 0, (line, found.output)
    assert {p.name for p in tmp_path.iterdir()} == {"example.json", "example.html", "attacked.json", "norms.svg"}


def test_completion_and_version() -> None:
    assert run("--version").stdout == f"hessdiag {hd.__version__}\n"
    env = {"_HESSDIAG_COMPLETE": "complete_bash", "COMP_WORDS": "hessdiag cur", "COMP_CWORD": "1"}
    found = CliRunner(env=env).invoke(app, [], prog_name="hessdiag")
    assert "curvature" in found.stdout


def test_closed_pipe_is_quiet() -> None:
    code = "import os, sys\nfrom hessdiag.cli import main\nsys.argv = ['hessdiag', 'data']\n"
    close = "os.close(1); r, w = os.pipe(); os.close(r); os.dup2(w, 1)\nmain()\n"
    ended = subprocess.run([sys.executable, "-c", code + close], capture_output=True, text=True)
    assert ended.returncode == 141
    assert ended.stderr == ""


def test_commands_import_torch_only_when_they_run() -> None:
    """Help must be quick: whatever the package's own `__init__` does, the command line's modules do not need torch."""
    code = (
        "import sys, types, os\n"
        f"m = types.ModuleType('hessdiag'); m.__path__ = [{str(Path(hd.__file__).parent)!r}]\n"
        "sys.modules['hessdiag'] = m\nimport hessdiag.cli\nassert 'torch' not in sys.modules\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_curve_waits_for_torch_and_little_else() -> None:
    """Importing torch is most of `hessdiag curvature mish`: what measures is not imported, and what is left is short."""

    def spent(*arguments: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    code = (
        "import sys\nfrom hessdiag.cli.program import app\napp(['curvature', 'mish'], standalone_mode=False)\n"
        "assert 'hessdiag.measuring' not in sys.modules and 'matplotlib' not in sys.modules\n"
    )
    ratios = [spent("-c", code) / spent("-c", "import torch") for _ in range(3)]
    assert min(ratios) < 1.7, ratios
