"""From stored runs to figures, tables, verdicts and the gallery, on records with known shapes."""

from __future__ import annotations

import csv
import html
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt

from experiments.correlation.printed import PRINTED
from experiments.correlation.report import analyse
from experiments.correlation.rows import one_family, rows
from experiments.correlation.verdicts import WORDS, load_rules, verdicts
from experiments.fields import storable
from experiments.figures import findings, gallery
from experiments.figures.build import TITLES, build
from experiments.figures.curves import DRAWINGS, footer
from experiments.figures.forest import Axis, Line, forest
from experiments.figures.numbers import numbers
from experiments.sweep import export, grid
from experiments.sweep.export import Result, SweepResults
from experiments.sweep.grid import load
from experiments.sweep.keys import RunConfig
from experiments.sweep.reader import Reader
from experiments.sweep.records import UNLEARNED
from experiments.sweep.store import Store
from experiments.sweep.worker import work
from hessdiag.activations import max_curvature
from hessdiag.errors import ConfigurationError, NonFiniteError, StoreError

SWEEPS = Path(__file__).parents[2] / "experiments" / "sweeps"
PNG = b"\x89PNG"


def fake_record(config: RunConfig, peak: float = 6.0, *, noise: float = 0.004) -> dict[str, object]:
    """A record whose robustness peaks, and whose norm is smallest, at max|σ''| = `peak`."""
    curvature = max_curvature(config.train["activation"])
    attack = {name: value for name, value in config.attack.items() if name != "pgd_samples"}
    drawn_from = RunConfig(config.train, attack, config.measure, config.schema).key  # as before that setting came
    dice = np.random.default_rng(int(drawn_from, 16) % 2**32)
    bend = min(math.log(curvature / peak) ** 2, 4.0) if math.isfinite(curvature) else 4.0
    robust = 0.6 - 0.05 * bend + noise * dice.normal()
    clean = 0.95 - 0.02 * bend + noise * dice.normal()

    def norm(level: float) -> dict[str, object]:
        part = {"rms": level, "low": level * 0.97, "high": level * 1.03, "entries": 100}
        layers = {f"layer{i}.weight": {**part, "rms": level * (i + 1)} for i in range(4)}
        return {
            **part,
            "invariant": part,
            "plugin": {"rms": 3 * level, "biased": True},
            "gauss_newton": part,
            "functional": part,
            "cosine": {"value": 0.5 - 0.1 * bend, "low": 0.4, "high": 0.6},
            "layers": layers,
        }

    def look(epoch: int) -> dict[str, object]:
        level = 0.01 * (1 + epoch / 100)
        share = {"value": robust, "samples": 100}
        spread = {"value": level, "error": 0.1 * level, "low": 0.8 * level, "high": 1.2 * level}
        traces = dict.fromkeys(("trace", "curved", "half_trace", "at_rest"), spread)
        return {
            "epoch": epoch,
            "lr": 0.1,
            "accuracy": {split: {"clean": share, "robust": share} for split in ("train", "test")},
            "norms": {loss: {**norm(level), "replicates": 10} for loss in ("clean", "adversarial")},
            "gauss_newton_trace": spread,
            "noise": {**traces, "batches": 8, "batch_size": 20},
        }

    places = ("train/clean", "train/adversarial", "test/clean", "test/adversarial")
    samples = config.attack.get("aa2_samples", 300)
    return {
        "max_curvature": curvature,
        "clean_accuracy": {"value": clean, "samples": 500},
        "aa2": {"value": robust, "samples": samples} if samples else None,
        "aa": {"value": robust - 0.01, "samples": 50} if config.attack.get("aa_samples") else None,
        "norms": {place: norm(0.02 * math.exp(bend + 5 * noise * dice.normal())) for place in places},
        "effective_curvature": [{"layer": "bn1", "mean": 1 + bend}],
        "cost": {"peak_memory": None, "saved_bytes": 1000 + int(dice.integers(100))},
        "train": {"train_seconds": 5.0 + dice.random()},
        "seconds": {"train": 7.0, "aa2": 3.0},
        "provenance": {"device": "cpu: test"},
        "along": [look(epoch) for epoch in config.along.get("epochs", ())],
    }


def results_of(path: Path, seeds: list[int], **options: float) -> SweepResults:
    sweep = load(path, seeds=seeds)
    runs = [
        Result(run.key, run, sweep.variants[run.key], 10.0, json.loads(json.dumps(fake_record(run, **options))))
        for run in sweep.runs
    ]
    return SweepResults(sweep.name, sweep.figure, sweep.tier, sweep.title, 0, tuple(runs))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Every smoke sweep with two seeds, exported and drawn."""
    home = tmp_path_factory.mktemp("results")
    for path in sorted((SWEEPS / "smoke").glob("*.toml")):
        export.save(results_of(path, [0, 1]), home)
    built = build(home, home / "figures", resamples=100)
    gallery.write(built, home / "gallery.html")
    return home, built


def test_every_sweep_file_loads_and_every_figure_has_one_per_tier():
    for tier in grid.TIERS:
        if tier == grid.OWN:
            continue
        figures = {load(path).figure for path in (SWEEPS / tier).glob("*.toml")}
        if tier == "campaign":  # it asks its own questions, several of one figure
            assert figures - {grid.NOWHERE} < set(grid.FIGURES)
        else:
            assert figures == set(grid.FIGURES)


def test_every_figure_is_drawn_as_png_and_svg_with_its_tier(drawn):
    _, built = drawn
    assert {picture.figure for picture in built.pictures} == set(TITLES)
    for picture in built.pictures:
        assert picture.path is not None
        assert picture.path.with_suffix(".png").read_bytes()[:4] == PNG
        svg = picture.path.with_suffix(".svg").read_text(encoding="utf-8")
        assert svg.rstrip().endswith("</svg>")
        if picture.tier == "smoke":
            assert "tier smoke" in svg


def test_the_gallery_needs_no_network_and_links_only_what_exists(drawn):
    home, _ = drawn
    page = (home / "gallery.html").read_text(encoding="utf-8")
    sources = re.findall(r"src='([^']+)'", page) + re.findall(r"href='([^'#]+)'", page)
    assert len(sources) > 20
    assert all((home / source).is_file() for source in sources)
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("<h2 id=") == len(TITLES) + 4


def test_the_gallery_says_what_the_results_show_before_it_shows_them(drawn):
    home, built = drawn
    page = (home / "gallery.html").read_text(encoding="utf-8")
    opening = page[page.index("<h2 id=findings>") : page.index("<h2 id=figure1>")]
    assert "neither confirms nor refutes" in opening
    assert opening.count("<tr>") == 1 + sum(len(found) for found in built.analyses.values())
    assert "among runs of one activation" in opening
    assert "<td class=number>3 of 3<td class=number>3 of 3<td class=number>3 of 3" in opening
    assert f"Of the <a href='#verdicts'>{len(built.verdicts)} claims</a>" in opening
    shapes = page[page.index("<h2 id=shapes>") : page.index("<h2 id=correlations>")]
    assert shapes.count("<details>") == opening.count("<tr>") - 1
    assert page.count("the <a href='ledger/ledger.html'>ledger</a>") == 0


def test_the_gallery_opens_with_forest_plots_that_say_what_the_analyses_say(drawn):
    """Each interval and dot stands where its numbers are, read back from the page."""
    home, built = drawn
    page = (home / "gallery.html").read_text(encoding="utf-8")
    first, second = page.split("<div class=forest>")[1:3]
    robust = [(s, n, r) for s, n, r in findings.experiments(built.analyses) if not n.startswith("standard,")]
    lines = re.findall(
        r"<div class=row><span>(\w+)</span>.*?<i class=bar style='left:([\d.]+)%;width:([\d.]+)%'></i>"
        r"<i class=dot style='left:([\d.]+)%'></i><i class=ring style='left:([\d.]+)%'></i></div><span>(.*?)</span>",
        first,
    )
    wanted = [c for *_, r in robust for c in findings._chosen(r, "pearson", findings.WITHIN)]
    along = [c for *_, r in robust for c in findings._chosen(r, "spearman", "nothing")]
    assert len(lines) == len(wanted) == 3 * len(robust) > 0
    for (norm, left, width, dot, ring, text), c, rank in zip(lines, wanted, along, strict=True):
        assert norm == c["norm"] == rank["norm"]
        places = [
            float(dot) / 50 - 1,
            float(left) / 50 - 1,
            (float(left) + float(width)) / 50 - 1,
            float(ring) / 50 - 1,
        ]
        assert places == pytest.approx([c["value"], c["low"], c["high"], rank["value"]], abs=6e-4)
        shown = [float(x) for x in re.findall(r"[+-]\d\.\d\d", text)]
        assert shown == pytest.approx([c["value"], c["low"], c["high"], rank["value"]], abs=5.1e-3)
    assert "robustness highest" in first
    assert second.count("<div class=row><span>β") == 2 * sum(
        c["quantity"] == "aa2" and "extreme" in c for *_, r in robust for c in r["curves"]
    )
    assert "class=shade" in second


def test_an_axis_places_what_lies_outside_at_its_ends():
    axis = Axis(1.0, 100.0, (1.0, 10.0, 100.0), log=True)
    assert [axis.place(x) for x in (0.1, 1.0, 10.0, 1000.0)] == pytest.approx([0.0, 0.0, 50.0, 100.0])
    assert forest([("nothing", [])], axis) == ""
    drawn = forest([("<b>", [Line("a&b", None, None, None, "<i>", 10.0)])], axis)
    assert "<h3>&lt;b&gt;</h3>" in drawn
    assert "a&amp;b" in drawn
    assert "class=bar" not in drawn
    assert "class=dot" not in drawn


def test_no_caption_stands_twice_and_pictures_have_their_size(drawn):
    home, built = drawn
    page = (home / "gallery.html").read_text(encoding="utf-8")
    for picture in built.pictures:
        assert page.count(f"alt='{html.escape(f'{picture.title}: {picture.caption}')}'") >= 1
    visible = re.sub(r"alt='[^']*'", "", page)
    assert not any(html.escape(picture.caption) in visible for picture in built.pictures if picture.tier == "smoke")
    for source, width, height in re.findall(r"<img src='([^']+)' width=(\d+) height=(\d+)", page):
        assert plt.imread(home / source).shape[:2] == (int(height), int(width))


def test_drawing_again_gives_the_same_files(drawn, tmp_path):
    home, _ = drawn
    results = export.read(home / "smoke" / "figure3.json")
    DRAWINGS["figure3"](results, rows(results), tmp_path / "figure3_smoke")
    for name in ("figure3_smoke.png", "figure3_smoke.svg"):
        assert (tmp_path / name).read_bytes() == (home / "figures" / name).read_bytes()


def test_tables_show_ours_beside_the_papers(drawn):
    home, _ = drawn
    one = (home / "figures" / "table1_smoke.md").read_text(encoding="utf-8")
    assert "82.63 | 48.75 | 0.362 (is 0.6442)" in one
    assert re.search(r"\| ReLU \| \d\d\.\d\d ± \d\.\d\d \| .* ∞ \|", one)
    two = (home / "figures" / "table2_smoke.csv").read_text(encoding="utf-8").splitlines()
    assert len(two) == 12
    assert two[0].startswith("activation,")


def test_printed_numbers_agree_with_the_ledgers():
    from theory.claims import TABLE1, TABLE2

    by_key = {cell.key: cell for cell in PRINTED}
    for row in TABLE1:
        cell = by_key[row.key]
        assert (cell.standard, cell.robust, cell.curvature) == (row.standard, row.robust, row.curvature)
    for cost in TABLE2:
        assert (by_key[cost.key].memory, by_key[cost.key].minutes) == (cost.memory, cost.minutes)
    assert {row.key for row in TABLE1} == {cell.key for cell in PRINTED if cell.robust is not None}


def test_without_results_the_commands_are_named_and_nothing_is_claimed(tmp_path):
    built = build(tmp_path, tmp_path / "figures", resamples=100)
    missing = {picture.figure: picture.command for picture in built.pictures if picture.path is None}
    assert set(missing) == set(grid.FIGURES)
    assert missing["figure5"].startswith("python -m experiments sweep experiments/sweeps/smoke/figure5.toml")
    assert {verdict.verdict for verdict in built.verdicts.values()} == {"not tested"}
    gallery.write(built, tmp_path / "gallery.html")
    assert "No results yet" in (tmp_path / "gallery.html").read_text()


def quick_rules() -> dict[str, object]:
    return {**load_rules(), "resamples": 100}


def test_rules_name_known_claims_and_every_verdict_is_from_the_set():
    from theory.claims import BY_ID

    table = load_rules()
    found = verdicts([results_of(SWEEPS / "smoke" / "figure3.toml", [0, 1])], rules=quick_rules())
    assert set(table["claims"]) <= set(found)
    assert {verdict.claim for verdict in found.values()} <= set(BY_ID) | set(table["hypotheses"])
    assert {name for name, claim in BY_ID.items() if claim.kind == "empirical"} <= set(found)
    assert {verdict.verdict for verdict in found.values()} <= set(WORDS)
    assert {cell.word for verdict in found.values() for cell in verdict.cells} <= set(WORDS)


def test_verdicts_follow_the_shape_of_the_results():
    """A peak at 6 with little noise transfers; one at 0.9 does not; noise that drowns the curve tells nothing."""
    paths = [SWEEPS / "smoke" / "figure3.toml", SWEEPS / "smoke" / "figure7.toml"]
    claims = ("S4.2.peak-in-4-10", "F7a.u-shape", "F7a.minimum-in-4-10", "F3b.overlap-below-15")
    outcome = {}
    for name, options in {"good": {"noise": 0.001}, "low": {"peak": 0.9}, "noise": {"noise": 0.3}}.items():
        found = verdicts([results_of(path, [0, 1, 2], **options) for path in paths], rules=quick_rules())
        outcome[name] = [found[claim].verdict for claim in claims]
        assert found[claims[0]].evidence.startswith(f"smoke/figure3: {outcome[name][0]}")
    assert outcome["good"] == ["transfers"] * 4
    assert outcome["low"][0] == outcome["low"][2] == "does not transfer"
    assert outcome["noise"] == ["inconclusive"] * 4


def test_only_the_papers_own_setting_lets_a_claim_hold_and_none_hides_another():
    smoke = results_of(SWEEPS / "smoke" / "figure7.toml", [0, 1, 2], peak=1.2)
    paper = results_of(SWEEPS / "paper" / "figure7.toml", [0, 1, 2])
    found = verdicts([smoke, paper], rules=quick_rules())["F7a.minimum-in-4-10"]
    assert found.verdict == "holds"
    assert {cell.setting: cell.word for cell in found.cells} == {
        "smoke/figure7": "does not transfer",
        "paper/figure7": "holds",
    }
    assert {cell.setting: cell.status for cell in found.cells} == {
        "smoke/figure7": "exploratory",  # stored before the rules
        "paper/figure7": "confirmatory",
    }


def test_different_configurations_never_mix_in_one_curve(tmp_path):
    one = results_of(SWEEPS / "smoke" / "figure3.toml", [0])
    other = [run.config.replace(train={"epochs": 7}) for run in one.runs[:3]]
    mixed = SweepResults(
        one.name, one.figure, one.tier, one.title, 0,
        (*one.runs, *(Result(c.key, c, "", 1.0, fake_record(c)) for c in other)),
    )  # fmt: skip
    export.save(mixed, tmp_path)
    with pytest.raises(ConfigurationError, match=r"train\.epochs: 30 and 7"):
        build(tmp_path, tmp_path / "figures", resamples=100)
    one_family(rows(one), "here")
    with pytest.raises(ConfigurationError, match=r"analysis of n_fgsm, .*train\.epochs: 30 and 7"):
        analyse(rows(mixed), margin=0.05, resamples=10)


def test_the_analysis_leaves_out_what_the_pictures_leave_out_and_says_so():
    """A dead network would put the peak where it is not; a collapsed one is drawn, and stays."""
    results = results_of(SWEEPS / "smoke" / "figure6.toml", [0, 1, 2])
    runs = [replace(run, record={**run.record, "train": {"status": "finished"}}) for run in results.runs]
    whole = {**runs[0].record, "train": {"status": "catastrophic_overfitting"}}
    dead = {**runs[-1].record, "train": {"status": "did_not_learn"}, "aa2": {"value": 0.0, "samples": 300}}
    runs[0], runs[-1] = replace(runs[0], record=whole), replace(runs[-1], record=dead)
    some, most = (analyse(rows(replace(results, runs=tuple(r))), margin=0.01, resamples=10) for r in (runs, runs[:-1]))
    assert [report["unlearned"] for report in some.values()] == [1]
    counted_none = {name: {**report, "unlearned": 0} for name, report in some.items()}
    assert json.dumps(storable(counted_none)) == json.dumps(storable(most))
    assert findings.size(next(iter(some.values()))).endswith(", without 1 run that did not learn")
    assert "without" not in findings.size(next(iter(most.values())))


def test_a_run_that_failed_is_named_in_exports_apart_from_those_to_come(tmp_path):
    """A diverged run leaves no record: its error travels, and everything that says what is missing says how many."""
    sweep = load(SWEEPS / "smoke" / "figure7.toml", seeds=[0, 1])
    store = Store(tmp_path / "store")
    store.add(sweep.name, sweep.runs, tier=sweep.tier, figure=sweep.figure, title=sweep.title)

    def run(config, out):
        if config.key == sweep.runs[3].key:
            raise NonFiniteError("training \x1b[31mdiverged: the loss is nan\nand more")
        return fake_record(config)

    work(tmp_path / "store", run, seeds=[0])
    line = export.publish(Reader(tmp_path / "store"), sweep.name, tmp_path / "results")
    lost = sweep.runs[3]
    assert line.endswith(f"(23 runs, 25 missing, 1 of them failed: {lost.key[:8]})")
    results = export.read(tmp_path / "results" / "smoke" / "figure7.json")
    error = "NonFiniteError: training  [31mdiverged: the loss is nan"
    assert results.failed == (export.Failed(lost.key, lost.label, error),)
    assert results.undone == "25 runs missing, 1 of them failed"
    assert (
        export.save(results, tmp_path / "again").read_bytes()
        == (tmp_path / "results" / "smoke" / "figure7.json").read_bytes()
    )
    told = verdicts([results])["F7a.u-shape"].cells[0].text
    assert f"(25 runs missing, 1 of them failed ({lost.label}: {error}))" in told
    assert footer(results, rows(results)).endswith("; 25 runs missing, 1 of them failed")
    assert '"failed"' not in export.save(replace(results, failed=()), tmp_path / "none").read_text().splitlines()[0]


def test_exports_round_trip_and_notice_what_was_edited(tmp_path):
    results = results_of(SWEEPS / "smoke" / "table1.toml", [0])
    path = export.save(results, tmp_path)
    again = export.read(path)
    assert [run.config for run in again.runs] == [run.config for run in results.runs]
    assert export.save(again, tmp_path / "twice").read_bytes() == path.read_bytes()
    edited = path.read_text().replace('"epochs": 30', '"epochs": 31', 1)
    path.write_text(edited)
    with pytest.raises(ConfigurationError, match="is damaged: not what was written"):
        export.read(path)
    path.write_text(re.sub(r'"sha256": "\w+", ', "", edited))  # as in exports made before there were checksums
    with pytest.raises(ConfigurationError, match="is not the configuration it names"):
        export.read(path)
    path.write_text("{}")
    with pytest.raises(ConfigurationError, match="not of format"):
        export.read(path)


def test_from_a_store_to_a_figure(tmp_path):
    sweep = load(SWEEPS / "smoke" / "figure7.toml")
    store = Store(tmp_path / "store")
    store.add(sweep.name, sweep.runs, tier=sweep.tier, figure=sweep.figure, title=sweep.title)
    assert work(tmp_path / "store", lambda config, out: fake_record(config)) == {"done": 24}
    store = Reader(tmp_path / "store")
    results = export.from_store(store, sweep.name)
    with pytest.raises(StoreError, match="smoke/figure7"):
        export.from_store(store, "smoke/figure8")
    assert (len(results.runs), results.missing) == (24, 0)
    export.save(results, tmp_path / "results")
    built = build(tmp_path / "results", tmp_path / "figures", resamples=100)
    assert any(picture.figure == "figure7" and picture.path for picture in built.pictures)


@pytest.mark.slow
def test_a_thousand_runs_are_listed_and_drawn(tmp_path):
    """42 seeds of 24 runs: read from a store, listed, exported, drawn. Time is the process's own, so that a busy
    machine does not fail it.
    """
    from rich.console import Console

    from experiments.figures.curves import figure3
    from experiments.sweep.status import listing, render

    sweep = load(SWEEPS / "smoke" / "figure3.toml", seeds=list(range(42)))
    assert len(sweep.runs) == 1008
    store = Store(tmp_path / "store")
    store.add(sweep.name, sweep.runs, tier=sweep.tier, figure=sweep.figure, title=sweep.title)
    work(tmp_path / "store", lambda config, out: fake_record(config))
    console = Console(file=(tmp_path / "out.txt").open("w"), width=120)
    store = Reader(tmp_path / "store")
    console.print(render(store))
    console.print(listing(store.rows(sweep.name)))
    results = export.from_store(store, sweep.name)
    figure3(results, rows(export.read(export.save(results, tmp_path / "results"))), tmp_path / "figure3")
    assert (tmp_path / "figure3.png").exists()


def test_activations_are_compared_by_the_time_of_their_epochs_alone():
    """Loading data and, in the first run of a process, importing packages are no cost of an activation."""
    run = rows(results_of(SWEEPS / "smoke" / "table2.toml", [0]))[0]
    assert run.value("train_seconds") == run.record["train"]["train_seconds"] < run.record["seconds"]["train"]


def test_numbers_behind_a_figure(tmp_path):
    """Two methods, a level of one seed, a network that did not learn: named, and in no mean."""
    sweep = load(SWEEPS / "smoke" / "figure5.toml", seeds=[0, 1])
    runs = [Result(run.key, run, "", 1.0, fake_record(run)) for run in sweep.runs]
    dead = next(run for run in runs if run.config.train["method"] == "trades" and run.config.train["seed"] == 1)
    dead.record["train"]["status"] = UNLEARNED
    results = SweepResults(sweep.name, sweep.figure, sweep.tier, sweep.title, 0, tuple(runs))
    chosen = rows(results)
    numbers(results, chosen, tmp_path / "numbers")
    table, note = (tmp_path / "numbers.md").read_text(encoding="utf-8").split("\n\n")
    head, _, *lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert head[:4] == ["method", "max\\|σ''\\|", "seeds", "clean, %"]
    assert "1 did not learn" in note
    every = list(csv.DictReader((tmp_path / "numbers.csv").open(encoding="utf-8")))
    assert {run["key"] for run in every} == {run.key for run in runs}
    assert len(lines) == len({(run["method"], run["max|σ''|"]) for run in every})
    for method, level, seeds, *cells in lines:
        members = [run for run in every if (run["method"], run["max|σ''|"]) == (method, level)]
        alive = [run for run in members if run["key"] != dead.key]
        assert seeds == "2" + ", of which 1 did not learn" * (alive != members)
        for name, scale, cell in (("clean", 100, cells[0]), ("aa2", 100, cells[1]), ("norm train/clean", 1, cells[2])):
            values = [scale * float(run[name]) for run in alive]
            told = cell.split(" ± ")
            stored = [np.mean(values), np.std(values, ddof=1)] if len(alive) > 1 else values
            assert len(told) == len(stored)
            for said, value in zip(told, stored, strict=True):
                assert float(said) == pytest.approx(value, abs=0.51 * 10.0 ** -len(said.partition(".")[2]))
    one = next(run for run in runs if run.key == every[0]["key"]).record
    assert float(every[0]["high norm train/clean"]) == pytest.approx(one["norms"]["train/clean"]["high"], rel=1e-5)
    assert every[0]["high aa2"] == ""  # these records tell none
