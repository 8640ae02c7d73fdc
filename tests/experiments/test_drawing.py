"""What a reader sees: tick labels that tell the truth, labelled axes, legends, pictures of incomplete results."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from experiments.correlation.rows import learned, rows
from experiments.figures import curves, extras, tables
from experiments.figures.style import PlainTicks, canvas, log_values
from experiments.sweep import export
from experiments.sweep.export import Result, SweepResults
from experiments.sweep.grid import load
from experiments.sweep.records import proportion

SWEEPS = Path(__file__).parents[2] / "experiments" / "sweeps"
RANGES = [(0.0131, 0.0312), (0.0021, 0.0042), (0.07, 0.17), (1.0, 130.0), (0.2, 0.21), (1e-9, 1e7)]


def made(name: str, seeds: list[int], *, without: str = "") -> SweepResults:
    """Every run of a sweep with plain numbers; the first run has none under `without`."""
    sweep = load(SWEEPS / f"{name}.toml", seeds=seeds)
    runs = []
    for index, run in enumerate(sweep.runs):
        part = {"rms": 0.02 + 0.001 * index}
        norm = {**part, "invariant": part, "plugin": part, "layers": {"a.weight": part, "b.weight": part}}
        record = {
            "max_curvature": 1.0 + index % 8,
            "clean_accuracy": {"value": 0.9 - 0.001 * index},
            "aa2": {"value": 0.6 - 0.001 * index},
            "norms": {"train/clean": norm},
            "effective_curvature": [{"mean": 1.0 + index}],
        }
        if not index:
            record.pop(without, None)
        runs.append(Result(run.key, run, sweep.variants[run.key], 1.0, record))
    return SweepResults(sweep.name, sweep.figure, sweep.tier, sweep.title, 0, tuple(runs))


@pytest.fixture
def seen(monkeypatch, tmp_path):
    """Labels, titles and legends of the axes that a drawing leaves."""

    def look(module, drawing, results):
        kept = []

        @contextmanager
        def watched(*args, **options):
            with canvas(*args, **options) as axes:
                yield axes
                kept.extend(
                    {
                        "x": a.get_xlabel(),
                        "y": a.get_ylabel(),
                        "rows": [text.get_text() for text in a.get_yticklabels()],
                        "legend": a.get_legend_handles_labels()[1],
                    }
                    for a in axes.flat
                )

        monkeypatch.setattr(module, "canvas", watched)
        drawing(results, rows(results), tmp_path / "picture")
        assert (tmp_path / "picture.png").exists()
        return kept

    return look


@pytest.mark.parametrize(("low", "high"), RANGES)
@pytest.mark.parametrize("horizontal", [True, False])
def test_every_tick_of_a_logarithmic_axis_says_where_it_stands(low, high, horizontal):
    figure, axis = plt.subplots()
    try:
        axis.plot([low, high], [low, high])
        log_values(axis, horizontal=horizontal)
        (axis.set_xlim if horizontal else axis.set_ylim)(low, high)
        figure.canvas.draw()
        side = axis.xaxis if horizontal else axis.yaxis
        ticks, labels = side.get_majorticklocs(), [text.get_text() for text in side.get_ticklabels()]
        assert 3 <= len(ticks) <= 9
        np.testing.assert_allclose([float(text) for text in labels], ticks, rtol=1e-5)
        assert not len(side.get_minorticklocs())
    finally:
        plt.close(figure)
    assert PlainTicks().tick_values(-1.0, 1.0) == []


@pytest.mark.parametrize(
    ("module", "drawing", "name"),
    [
        (curves, curves.figure3, "smoke/figure3"),
        (curves, curves.figure4, "smoke/figure4"),
        (curves, curves.figure5, "smoke/figure5"),
        (curves, curves.figure6, "smoke/figure6"),
        (curves, curves.figure7, "smoke/figure7"),
        (extras, extras.scatter, "smoke/figure3"),
        (extras, extras.control, "smoke/control"),
    ],
)
def test_every_axis_is_labelled(seen, module, drawing, name):
    """Axes in a row may share the vertical label of the leftmost; those with different quantities do not."""
    axes = seen(module, drawing, made(name, [0, 1]))
    assert all(axis["x"] for axis in axes)
    shared = name in ("smoke/control", "smoke/figure3")
    assert shared or all(axis["y"] for axis in axes)
    assert name == "smoke/control" or axes[0]["y"]


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_ours_and_the_papers_are_named_once_whichever_row_is_empty(tmp_path, monkeypatch, empty):
    marks = [("a", 1.0, 0.1, 0.2, 2.0), ("b", 2.0, 0.0, 0.0, 3.0), ("c", 3.0, 0.1, 0.1, 4.0)]
    marks[empty] = (marks[empty][0], np.nan, 0.0, 0.0, None)
    legends = []

    @contextmanager
    def watched(*args, **options):
        with canvas(*args, **options) as axes:
            yield axes
            legends.extend(text.get_text() for text in axes[0][0].get_legend().get_texts())

    monkeypatch.setattr(tables, "canvas", watched)
    tables._dots(tmp_path / "table", marks, "accuracy", "note")
    assert sorted(legends) == ["ours", "paper"]


def test_a_heat_map_needs_no_layers_in_its_first_run_and_says_when_there_are_none(seen):
    first = made("smoke/figure3", [0], without="norms")
    assert len(seen(extras, extras.heat_map, first)) == 3
    bare = tuple(Result(r.key, r.config, "", 1.0, {**r.record, "norms": {}}) for r in first.runs)
    nothing = SweepResults(first.name, first.figure, first.tier, first.title, 0, bare)
    seen(extras, extras.heat_map, nothing)


def test_a_seed_without_a_number_hides_no_other_in_the_control(monkeypatch, tmp_path):
    results = made("smoke/control", [0, 1], without="clean_accuracy")
    drawn = []

    @contextmanager
    def watched(*args, **options):
        with canvas(*args, **options) as axes:
            yield axes
            drawn.extend(axes[0][1].containers)

    monkeypatch.setattr(extras, "canvas", watched)
    extras.control(results, rows(results), tmp_path / "control")
    assert all(np.isfinite(np.asarray(bar.lines[0].get_xdata(), dtype=float)).all() for bar in drawn)
    assert len(drawn) == len({row.variant for row in rows(results)})


def test_a_footer_tells_what_few_test_images_do_to_an_accuracy():
    """15% on 200 images: sqrt(0.15 · 0.85 / 200) is 2.5 points."""
    results = made("smoke/figure3", [0])
    few = tuple(Result(r.key, r.config, "", 1.0, {"aa2": {"value": 0.15, "samples": 200}}) for r in results.runs)
    chosen = rows(SweepResults(results.name, results.figure, results.tier, "", 0, few))
    wanted = "; on 200 test images, whose draw alone scatters an accuracy by 2.5 points"
    assert curves.images(chosen, "aa2") == wanted
    assert curves.images(chosen, "clean") == curves.images(rows(results), "aa2") == ""


def test_a_footer_says_when_a_single_seed_shows_no_scatter():
    one, two = made("smoke/figure3", [0]), made("smoke/figure3", [0, 1])
    assert "one seed: no scatter of seeds shown" in curves.footer(one, rows(one))
    assert "2 seeds" in curves.footer(two, rows(two))


def drawn_from(record: dict, data: str = "digits", seeds: int = 1) -> list:
    """Rows of one configuration with the same record, as of so many seeds."""
    results = made("smoke/figure3", list(range(seeds)))
    first = results.runs[0].config.train["activation"]
    runs = [run for run in results.runs if run.config.train["activation"] == first]
    configs = [run.config.replace(train={"data": data}) for run in runs]
    same = tuple(Result(config.key, config, "", 1.0, record) for config in configs)
    return rows(SweepResults(results.name, results.figure, results.tier, "", 0, same))


def test_a_single_seed_has_the_interval_of_its_images_or_of_its_measurement_for_a_bar():
    norms = {"train/clean": {"rms": 0.5, "low": 0.4, "high": 0.7, "plugin": {"rms": 1.0}}}
    record = {"aa2": proportion(28, 200), "clean_accuracy": proportion(90, 200), "norms": norms}
    chosen = drawn_from(record)
    n, z, p = 200, 1.959963984540054, 28 / 200  # Wilson's ends solve |p - x| = z sqrt(x (1 - x)/n)
    mean, down, up = curves.bar(chosen, "aa2", 100.0)
    for end in (mean - down, mean + up):
        assert abs(p - end / 100) == pytest.approx(z * np.sqrt(end / 100 * (1 - end / 100) / n))
    assert curves.bar(chosen, "norm train/clean", 1.0) == pytest.approx((0.5, 0.1, 0.2))
    assert curves.bar(chosen, "plugin train/clean", 1.0) == (1.0, 0.0, 0.0)
    assert "Wilson" in curves.bars(chosen, ["aa2"])
    assert "measurement" not in curves.bars(chosen, ["aa2"])
    assert "the plug-in norm has none" in curves.bars(chosen, ["norm train/clean", "plugin train/clean"])


def test_several_seeds_have_their_own_scatter_for_a_bar():
    chosen = drawn_from({}, seeds=3)
    for row, share in zip(chosen, (0.1, 0.2, 0.6), strict=True):
        object.__setattr__(row.result, "record", {"aa2": {"value": share, "low": 0.0, "high": 1.0, "samples": 9}})
    mean, down, up = curves.bar(chosen, "aa2", 100.0)
    assert (mean, down, up) == pytest.approx((30.0, *2 * [100 * np.std([0.1, 0.2, 0.6], ddof=1)]))
    assert curves.bars(chosen, ["aa2"]) == "; bars: one standard deviation of a seed"


def test_a_sweep_that_is_under_way_has_bars_of_two_kinds_and_says_so(monkeypatch, tmp_path):
    """Eight levels of seed 0, two of seed 1, as stored: six bars are intervals of single runs."""
    main = export.read(SWEEPS.parents[1] / "results" / "campaign" / "main.json")
    first = [run for run in main.runs if run.config.train["seed"] == 0]
    second = [run for run in main.runs if run.config.train["seed"] == 1][:2]
    part = replace(main, runs=(*first, *second), missing=14)
    wilson = "95% intervals (Wilson's, of the draw of test images)"
    spread = "; bars: one standard deviation of a seed"
    assert curves.bars(rows(part), ["aa2"]) == f"{spread}; where a level has a single seed, {wilson}"
    assert curves.bars(rows(replace(part, runs=tuple(first))), ["aa2"]) == f"; bars: {wilson}"
    both = [
        run for run in part.runs if run.config.train["activation"] in {r.config.train["activation"] for r in second}
    ]
    assert curves.bars(rows(replace(part, runs=tuple(both))), ["aa2"]) == spread
    told = []
    monkeypatch.setattr(extras, "label", lambda axis, text: told.append(text))
    extras.norms(part, rows(part), tmp_path / "norms")
    assert (
        f"{spread}; where a level has a single seed, 95% intervals (Wilson's, of the draw of test images, or "
        in told[0]
    )
    assert "or of the norm's measurement)" in told[0]
    assert told[0].count("14 runs missing") == 1


def test_a_heat_map_is_of_the_networks_that_learned(monkeypatch, tmp_path):
    """One of two seeds at a level is dead, with norms a thousand times as large: the colours are those of the other."""
    results = made("smoke/figure3", [0, 1])
    last, alive = results.runs[-1], {"status": "finished", "clean_loss": 0.3}
    dead = {"status": "did_not_learn", "clean_loss": 2.3}
    layers = {name: {"rms": 1000.0} for name in ("a.weight", "b.weight")}

    def changed(run):
        if run is not last:
            return replace(run, record={**run.record, "train": alive})
        norms = {"train/clean": {**run.record["norms"]["train/clean"], "layers": layers}}
        return replace(run, record={**run.record, "train": dead, "norms": norms})

    mixed = replace(results, runs=tuple(map(changed, results.runs)))
    shown, told = [], []
    old = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda axis, table, **k: (shown.append(table), old(axis, table, **k))[1])
    monkeypatch.setattr(extras, "label", lambda axis, text: told.append(text))
    extras.heat_map(mixed, rows(mixed), tmp_path / "mixed")
    with_dead = shown[:]
    shown.clear()
    extras.heat_map(mixed, [row for row in rows(mixed) if row.learned], tmp_path / "alive")
    assert "1 did not learn (accuracy at chance) and are not drawn" in told[0]
    assert len(with_dead) == len(shown) == 3
    for one, other in zip(with_dead, shown, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_did_not_learn_is_named_and_moves_no_axis(tmp_path, monkeypatch):
    results = made("smoke/control", [0, 1])
    dead = results.runs[-1].variant
    changed = []
    for run in results.runs:
        record = dict(run.record)
        if run.variant == dead:
            record |= {"train": {"status": "did_not_learn", "clean_loss": 2.3}, "clean_accuracy": proportion(50, 500)}
            record |= {"aa2": proportion(1, 300)}
        else:
            record |= {"train": {"status": "finished", "clean_loss": 0.3}, "clean_accuracy": proportion(480, 500)}
            record |= {"aa2": proportion(200, 300)}
        changed.append(Result(run.key, run.config, run.variant, 1.0, record))
    results = SweepResults(results.name, results.figure, results.tier, results.title, 0, tuple(changed))
    seen_limits, seen_texts = [], []

    @contextmanager
    def watched(*args, **options):
        with canvas(*args, **options) as axes:
            yield axes
            seen_limits.append(axes[0][0].get_xlim())
            seen_texts.extend(text.get_text() for text in axes[0][0].texts)

    monkeypatch.setattr(extras, "canvas", watched)
    extras.control(results, rows(results), tmp_path / "control")
    assert seen_limits[0][0] > 50.0
    assert seen_texts == ["did not learn"]
    assert "; 2 did not learn (accuracy at chance) and are not drawn" in curves.footer(results, rows(results))
    assert len(learned(rows(results))) == len(results.runs) - 2


def test_the_papers_numbers_stand_on_no_axis_of_another_setting():
    assert not curves.papers_setting(drawn_from({}))
    assert not curves.papers_setting(drawn_from({}, data="cifar10"))  # a small net
    results = made("quick/figure3", [0])
    assert curves.papers_setting(rows(results))


def test_a_heat_map_lists_layers_from_the_input_on(seen):
    """Exports sort a run's layers by name; names that the network has not come last."""
    results = made("smoke/figure3", [0])
    for run in results.runs:
        layers = run.record["norms"]["train/clean"]["layers"]
        layers |= {name: {"rms": 0.1} for name in ("blocks.0.conv1.weight", "bn1.weight", "conv1.weight")}
    assert seen(extras, extras.heat_map, results)[0]["rows"] == [
        "conv1.weight",
        "bn1.weight",
        "blocks.0.conv1.weight",
        "a.weight",
        "b.weight",
    ]
