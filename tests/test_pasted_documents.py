"""README.md and docs/*.md as a reader pastes them: every shell block, in order, in an empty directory, and what comes of it.

A line is run as it stands, or in the shorter form that `SHORTER` gives for it, or not at all for the reason in
`ELSEWHERE`. What a line that runs must bring about is in `OUTCOMES`: a command without an entry fails the test, since an
exit code of 0 says nothing (a network that does not learn once ended so).
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GPU = "needs a GPU for hours"
LEDGER = "takes minutes to hours; tests/validation runs its checks"
FIGURE3 = "python -m experiments sweep experiments/sweeps/smoke/figure3.toml"
CUT = "python -m experiments sweep short/figure3.toml --results runs/results --export --no-pilot"

SHORTER = {
    f"{FIGURE3} --seeds 0,1,2 --export": CUT,  # one run of 72
    "python -m experiments sweep experiments/sweeps/smoke/table2.toml --seeds 0,1,2 --workers 1 --export": (
        "python -m experiments sweep experiments/sweeps/smoke/table2.toml --seeds 0 --workers 1 --dry-run --no-pilot"
    ),
    "python -m experiments status --watch": "python -m experiments status",
    "python -m benchmarks.deletion": "python -m benchmarks.deletion --seeds 1 --weights 20 --late 40 --out runs/deletion",
    "python tests/hessdiag/fuzz/fuzz_checkpoint.py --mutations 100000 --seed 0": (
        "python tests/hessdiag/fuzz/fuzz_checkpoint.py --mutations 500 --seed 0"
    ),
}
ELSEWHERE = {
    "make demo": "installs an environment",
    "make test": "runs this",
    "python -m validation": LEDGER,
    "python -m validation --quick": LEDGER,
    "python -m validation --study dynamics": LEDGER,
    "python -m experiments train --method trades --network resnet18 --activation rct:beta=1,curvature=7 --data cifar10": GPU,
    "python -m experiments train --recipe dajat_rn18_high --set autocast=bfloat16 --set channels_last=true"
    " --set compile=true": GPU,
    "hessdiag data cifar10": "fetches from the network",
    "hessdiag data cifar10 --root /big/disk": "fetches from the network",
}


class Outcome:
    """What a command left: its output, its words, and the directory."""

    def __init__(self, line: str, done: subprocess.CompletedProcess[str], home: Path) -> None:
        self.line, self.out, self.err, self.home = line, done.stdout, done.stderr, home

    def option(self, name: str) -> str | None:
        found = re.search(rf"{name}[ =](\S+)", self.line)
        return None if found is None else found.group(1)

    def table(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.out)
        return content


def measured(seen: Outcome) -> None:
    if "--dry-run" in seen.line:
        assert "propagation" in seen.out
        return
    assert "rms" in seen.out
    if name := seen.option("--json"):
        norm = json.loads((seen.home / name).read_text())["norm"]["total"]
        assert 0 < norm["low"] <= norm["rms"] <= norm["high"] < math.inf
    if page := seen.option("--html"):
        assert "</html>" in (seen.home / page).read_text() or "<svg" in (seen.home / page).read_text()


def compared(seen: Outcome) -> None:
    assert re.search(r"ratio", seen.out)
    if plot := seen.option("--plot"):
        assert "<svg" in (seen.home / plot).read_text()


def trained(seen: Outcome) -> None:
    if "--dry-run" in seen.line:
        assert seen.table()["config"]["augment"] == {"crop": 4, "pad": "zeros", "flip": True, "auto": "none"}
        return
    told = seen.table()
    assert told["status"] == "finished", told
    assert told["clean_accuracy"] > 0.7
    assert told["clean_loss"] < 1.2
    if "aa2" in told.get("attacks", {}):
        robust = told["attacks"]["aa2"]["robust_accuracy"]
        assert robust > 0.4 if "n_fgsm" in seen.line else robust < 0.1


def attacked(seen: Outcome) -> None:
    assert seen.table()["aa2"]["robust_accuracy"] > 0.4


def swept(seen: Outcome) -> None:
    if "--dry-run" in seen.line:
        assert re.search(r"\d+ of \d+ runs|\d+ runs", seen.err), seen.err
        return
    assert "1 done, 0 failed" in seen.out
    assert "did not learn" not in seen.out
    (path,) = (seen.home / "runs" / "results").glob("*/figure3.json")
    (run,) = json.loads(path.read_text())["runs"]
    learned(run["record"])


def learned(record: dict[str, Any]) -> None:
    assert record["train"]["status"] == "finished"
    assert record["clean_accuracy"]["value"] > 0.7
    assert record["aa2"]["value"] > 0.3
    assert record["norms"]["train/clean"]["rms"] > 0


def drawn(seen: Outcome) -> None:
    assert (seen.home / "results" / "gallery.html").read_text().startswith("<!doctype html>")
    assert seen.out.count("drawn ") >= 12
    assert "verdicts " in seen.out


def deleted(seen: Outcome) -> None:
    """The second-order price orders what deleting a weight costs, for both nets, early and late."""
    assert (seen.home / "runs" / "deletion" / "deletion.svg").stat().st_size > 1000
    found = json.loads((seen.home / "runs" / "deletion" / "deletion.json").read_text())["results"]
    assert len(found) == 4
    for row in found.values():
        assert row["correlation"]["exact"]["value"] > 0.95


def shows(*words: str) -> Callable[[Outcome], None]:
    def check(seen: Outcome) -> None:
        for word in words:
            assert re.search(word, seen.out), (word, seen.out)

    return check


OUTCOMES: list[tuple[str, Callable[[Outcome], None]]] = [
    (r"(torchrun .* -m )?hessdiag measure", measured),
    (r"python -c \"import numpy.*numpy.savez", lambda seen: (seen.home / "mine.npz").stat()),
    (r"hessdiag compare", compared),
    (r"hessdiag inspect", shows("small_resnet", "digits")),
    (r"hessdiag curvature", shows(r"0\.64|7\.?0*\b")),
    (r"hessdiag data$", shows("digits", "cifar10")),
    (r"python -m experiments recipes", shows("digits_n_fgsm", "dajat_rn18_high", "guessed")),
    (r"python -m experiments train", trained),
    (r"python -m experiments attack", attacked),
    (r"python -m experiments sweep", swept),
    (r"python -m experiments status", shows(r"figure3", r"1/1")),
    (r"python -m experiments figures", drawn),
    (r"python -m validation --claim", shows(r"E\[?(30|28)", "verdict|proved|refuted|holds")),
    (r"python -m benchmarks\.deletion", deleted),
    (r"python -m theory", shows(r"E\[?(27|28)")),
    (r"python tests/hessdiag/fuzz", shows("500 mutations", "0 offenders")),
]


def blocks(path: Path) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.S | re.M)


def lines(path: Path) -> Iterator[str]:
    """The commands of the document's shell blocks, without comments, continued lines joined."""
    for language, text in blocks(path):
        if language == "sh":
            for line in text.replace("\\\n", " ").splitlines():
                command = " ".join(re.sub(r"(^|\s)#.*", "", line).split())
                if command:
                    yield command


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty directory in which the repository's folders can be named, results as a copy."""
    for name in ("experiments", "tests", "hessdiag", "validation", "theory"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "results", tmp_path / "results")
    sweep = (ROOT / "experiments" / "sweeps" / "smoke" / "figure3.toml").read_text()
    cut = re.sub(r"\[\[grid\]\].*", "[[grid]]\nbeta = 1\ncurvature = 7\nseed = [0]\n", sweep, flags=re.S)
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "figure3.toml").write_text('tier = "smoke"\n' + cut)
    return tmp_path


def paste(line: str, home: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(["bash", "-c", line], cwd=home, env=env, capture_output=True, text=True, check=False)


def test_every_block_says_what_it_is_and_no_entry_is_stale() -> None:
    known = {line for path in DOCUMENTS for line in lines(path)}
    assert set(SHORTER) | set(ELSEWHERE) <= known
    for path in DOCUMENTS:
        assert {language for language, _ in blocks(path)} <= {"sh", "text", "python", "toml", "json"}, path.name
        # Indented commands would be pasted all the same, and not be seen here.
        assert not re.search(
            r"^    (python|hessdiag|make|pip) ", re.sub(r"```.*?```", "", path.read_text(), flags=re.S), re.M
        )
    for line in known - set(ELSEWHERE):
        assert any(re.match(pattern, line) for pattern, _ in OUTCOMES), f"what comes of it? {line}"


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in DOCUMENTS if any(lines(path))], ids=lambda path: path.stem)
def test_a_document_pasted_whole_does_what_it_says(path: Path, home: Path) -> None:
    for line in lines(path):
        if line in ELSEWHERE:
            continue
        shorter = SHORTER.get(line, line)
        done = paste(shorter, home)
        assert done.returncode == 0, (shorter, done.stdout[-2000:], done.stderr[-2000:])
        check = next(check for pattern, check in OUTCOMES if re.match(pattern, line))
        check(Outcome(shorter, done, home))


@pytest.mark.slow
def test_the_sweep_in_the_documents_learns(home: Path) -> None:
    """The example as it stands but for its size: of twelve runs the one that its override is about."""
    (text,) = [text for language, text in blocks(ROOT / "docs" / "sweeps.md") if language == "toml"]
    one = text.replace("[0, 1, 2]", "[1]").replace("[1, 4, 7, 15]", "[7]").replace("aa_samples = 50", "aa_samples = 5")
    assert one != text
    (home / "figure3.toml").write_text('tier = "smoke"\n' + one)
    done = paste("python -m experiments sweep figure3.toml --results runs/results --export --no-pilot", home)
    assert done.returncode == 0, done.stderr[-2000:]
    (run,) = json.loads((home / "runs" / "results" / "smoke" / "figure3.json").read_text())["runs"]
    learned(run["record"])


NUMBER = r"(?<![\w.])-?\d[\d,]*\.?\d*(?:e[+-]?\d+)?"


def numbers(text: str) -> list[float]:
    return [float(word.replace(",", "")) for word in re.findall(NUMBER, text)]


SHOWN = [
    (path, *pair)
    for path in DOCUMENTS
    for pair in re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", path.read_text(), re.S | re.M)
]


@pytest.mark.slow
@pytest.mark.parametrize(("path", "program", "printed"), SHOWN, ids=[path.stem for path, *_ in SHOWN])
def test_a_program_prints_what_stands_below_it(path: Path, program: str, printed: str, home: Path) -> None:
    """The same words, and the same numbers to two per cent: other processors round otherwise."""
    (home / "pasted.py").write_text(program)
    done = paste("python pasted.py", home)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.sub(NUMBER, "#", done.stdout).split() == re.sub(NUMBER, "#", printed).split()
    assert numbers(done.stdout) == pytest.approx(numbers(printed), rel=0.02)


PROGRAMS = {
    path: program
    for path in DOCUMENTS
    if (program := "\n\n".join(text for language, text in blocks(path) if language == "python"))
    and (path, program) not in [(page, text) for page, text, _ in SHOWN]
}
"""A page's blocks are one program: the later ones go on from the earlier. Those of `SHOWN` run above."""


@pytest.mark.slow
@pytest.mark.parametrize("path", list(PROGRAMS), ids=lambda path: path.stem)
def test_python_in_the_documents_runs(path: Path, home: Path) -> None:
    (home / "pasted.py").write_text(PROGRAMS[path])
    done = paste("python pasted.py", home)
    assert done.returncode == 0, done.stderr[-2000:]


def test_readme_shows_what_it_prints() -> None:
    assert any(path.name == "README.md" for path, *_ in SHOWN)


def test_numbers_of_benchmarks_in_readme_and_on_their_page_are_the_stored_ones() -> None:
    """README names the command of each row; every number of it stands in that benchmark's section of the table."""
    sections = {path.stem: tables.section(path) for path in tables.RESULTS.glob("*.json")}
    page = tables.README.read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| .*? \| (.*) \(`python -m benchmarks (\w+)`\) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M
    )
    assert len(rows) == 5
    for words, name in rows:
        for number in re.findall(NUMBER, re.sub(r"ResNet-18", "", words)):
            assert re.search(rf"(?<![\w.]){re.escape(number)}(?![\d.])", sections[name]), (name, number)
        assert sections[name].strip() in page, f"`python -m benchmarks table` has not been run since {name}"


def test_the_page_on_watching_holds_the_stored_ratios() -> None:
    found = json.loads((tables.RESULTS / "callbacks.json").read_text(encoding="utf-8"))["results"]
    page = (ROOT / "docs" / "watching.md").read_text(encoding="utf-8")
    for row in found.values():
        cells = [tables.spread(row["watches"][f"{samples} samples"]["ratio"]) for samples in (64, 128)]
        assert f"| {cells[0]} | {cells[1]} |" in page


def test_the_page_on_deleting_weights_holds_the_stored_tables() -> None:
    content = json.loads((tables.RESULTS / "deletion.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "deleting_weights.md").read_text(encoding="utf-8")
    for table in (tables.deletion, tables.pruning):
        assert tables.markdown(table(content["results"], content["settings"])) in page
