"""docs/findings.md and README say what the committed results hold: its tables row by row, its verdicts' numbers."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.correlation.courses import arm, looks, seen
from experiments.correlation.judges import band
from experiments.correlation.rows import rows
from experiments.correlation.verdicts import load_rules, shared_rules
from experiments.sweep.export import read

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/findings.md").read_text()
TOLD = " ".join(PAGE.split())
VERDICTS: dict[str, Any] = json.loads((ROOT / "results/verdicts.json").read_text())
CLOSER: dict[str, Any] = json.loads((ROOT / "results/closer.json").read_text())
ANALYSIS: dict[str, Any] = json.loads((ROOT / "results/analysis.json").read_text())
ARMS = {
    "dropped rate": "drop",
    "dropped rate, AWP": "drop, AWP",
    "constant rate": "constant",
    "constant rate, AWP": "constant, AWP",
}


def table(first: str) -> list[list[str]]:
    """The cells of the table whose head begins with `first`."""
    _, _, rest = PAGE.partition(f"| {first} |")
    assert rest, first
    lines = rest.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def recorded(sweep: str, method: str = "pgd_at") -> dict[float, list[Any]]:
    """What the runs of a method recorded, by max|σ''|."""
    found: dict[float, list[Any]] = {}
    for run in json.loads((ROOT / f"results/{sweep}.json").read_text())["runs"]:
        if run["config"]["train"]["method"] == method:
            found.setdefault(float(run["record"]["max_curvature"]), []).append(run["record"])
    return dict(sorted(found.items()))


def close(said: str, stored: float) -> bool:
    """As rounded as it is said."""
    digits = len(said.partition(".")[2])
    return abs(float(said) - stored) <= 0.5000001 * 10.0**-digits


def test_the_main_sweeps_table_is_what_is_stored() -> None:
    """Means and standard deviations over seeds, from the runs themselves."""
    by_level = recorded("campaign/main")
    told = table(r"max\|σ''\|")
    assert len(told) == len(by_level)
    for cells, (level, records) in zip(told, by_level.items()):
        columns: list[list[float]] = [[level], [len(records)]]
        columns.append([100 * record["clean_accuracy"]["value"] for record in records])
        columns.append([100 * record["aa2"]["value"] for record in records])
        norms = [(record["norms"]["train/clean"], record["norms"]["train/adversarial"]) for record in records]
        columns += [[pair[loss]["rms"] for pair in norms] for loss in (0, 1)]
        columns.append([hard["invariant"]["rms"] for _, hard in norms])
        columns += [[pair[loss]["cosine"]["value"] for pair in norms] for loss in (0, 1)]
        stored = [
            each for of in columns for each in (of if len(of) == 1 else [statistics.mean(of), statistics.stdev(of)])
        ]
        numbers = [number for cell in cells for number in re.findall(r"[-+]?\d+(?:\.\d+)?", cell)]
        assert len(numbers) == len(stored)
        assert all(map(close, numbers, stored)), (numbers, stored)


@pytest.mark.parametrize("name", ["main_norms"])
def test_a_table_is_the_one_that_the_figures_command_writes(name: str) -> None:
    written = (ROOT / f"results/figures/{name}_campaign.md").read_text()
    assert written.partition("\n\n")[0] in PAGE


def test_what_the_main_sweep_shows_so_far() -> None:
    said = []
    for claim in ("S4.2.peak-in-4-10", "S4.5.same-range", "S4.5.same-range [adversarial]"):
        evidence = VERDICTS[claim]["settings"]["campaign/main"]
        said.append(" and ".join(re.findall(r"band less (?:low|high) [-+.\d]+%? \[[^\]]*\]", evidence["text"])[:2]))
        assert evidence["word"] == "inconclusive"
    assert all(contrasts in TOLD for contrasts in said), said
    robustness = said[0]
    by_level = recorded("campaign/main")

    def means(of: Callable[[Any], float]) -> dict[float, float]:
        return {level: statistics.mean(map(of, records)) for level, records in by_level.items()}

    robust = means(lambda record: 100 * record["aa2"]["value"])
    clean, hard = (means(lambda record, k=k: record["norms"][k]["rms"]) for k in ("train/clean", "train/adversarial"))
    best, low, lowest = max(robust, key=robust.__getitem__), *(min(m, key=m.__getitem__) for m in (clean, hard))
    second = sorted(robust, key=robust.__getitem__)[-2]
    assert f"it is highest at {best:g}, with {second:g} beside it" in TOLD
    assert robust[best] - robust[second] < 0.1
    assert f"by at most {max(robust.values()) - min(robust.values()):.1f} points" in TOLD
    beside = sorted(clean, key=clean.__getitem__)[1]
    assert f"it is lowest at {low:g} ({beside:g} lies {100 * (clean[beside] / clean[low] - 1):.0f}% above)" in TOLD
    last = max(hard)
    factor = f"{hard[last] / hard[lowest]:.1f} times the least at {last:g}"
    assert f"level up to 4 (lowest at {lowest:g}), then rising, to {factor}" in TOLD
    assert max(norm for level, norm in hard.items() if level <= 4) < 1.1 * hard[lowest]
    companion = means(lambda record: record["norms"]["train/adversarial"]["invariant"]["rms"])
    flattest = min(companion, key=companion.__getitem__)
    assert f"The invariant companion of the latter is lowest at {flattest:g}" in TOLD
    rising = [norm for level, norm in sorted(hard.items()) if level >= lowest]
    assert rising == sorted(rising)
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"of AA-2, {robustness} points" in readme
    assert f"norm of the adversarial loss is level up to 4 and rises from there, to {factor}" in readme
    assert f"AA-2 is {robust[best]:.0f}% here; the paper has 54.8" in TOLD


@pytest.mark.parametrize(
    ("path", "ends", "scale", "said"),
    [
        ("contrasts/band less low/p by seeds", "", 1, "beats the band with p = {:.4f} on its own"),
        ("contrasts/band less low", "by images", 100, "held fixed, band less low is {:+.2f} [{:+.2f}, {:+.2f}]"),
        ("contrasts/band less high", "by images", 100, "and band less high {:+.2f} [{:+.2f}, {:+.2f}]; for other"),
        ("contrasts/band less low", "by both", 100, "seeds together {:+.2f} [{:+.2f}, {:+.2f}] and"),
        ("contrasts/band less high", "by both", 100, "and {:+.2f} [{:+.2f}, {:+.2f}]. The best level"),
        ("best in band/images and seeds", "", 100, "lies in the band in {:.1f}% of draws of both"),
        ("scatter/disagree", "", 100, "disagree on {:.1f}% of the images"),
        ("scatter/images alone", "", 100, "scatters a run by {:.2f} points"),
        ("scatter/runs", "", 100, "where runs scatter by {:.2f}:"),
        ("clean/band less low", "interval", -100, "is {:.2f} points [{:.2f}, {:.2f}] lower in the band"),
        ("kept/band less low", "interval", 100, "55.3% in both, difference {:.2f} points [{:.2f}, {:+.2f}]"),
        ("fitted/band less low", "interval", -100, "the band is {:.2f} points [{:.2f}, {:.2f}] less accurate"),
        (
            "contrasts/band less low",
            "by both",
            -100,
            "{:.2f} points lower there than at low curvature ([0.50, 1.63] for",
        ),
        ("flat is robust, shuffled/log norm train/clean", "", 1, "p is {:.3f} where the rule has"),
    ],
)
def test_a_closer_look_at_the_main_sweep(path: str, ends: str, scale: float, said: str) -> None:
    found: Any = next(iter(CLOSER["campaign/main"].values()))
    while path:
        key = next(key for key in found if path == key or path.startswith(f"{key}/"))
        found, path = found[key], path.removeprefix(key).removeprefix("/")
    interval = sorted(scale * end for end in found[ends]) if ends else []
    assert said.format(scale * (found["value"] if ends else found), *interval) in TOLD


def test_both_intervals_of_low_curvature_stand_in_short() -> None:
    """For other seeds, by the rules; for other seeds and images, by the closer look."""
    seeds = re.search(r"\[([-+.\d]+), ([-+.\d]+)\]", VERDICTS["S4.2.peak-in-4-10"]["settings"]["campaign/main"]["text"])
    both = next(iter(CLOSER["campaign/main"].values()))["contrasts"]["band less low"]["by both"]
    assert seeds is not None
    ends = [sorted(-float(end) for end in seeds.groups()), sorted(-100 * end for end in both)]
    told = [f"[{low:.2f}, {high:.2f}]" for low, high in ends]
    assert f"({told[0]} for other seeds, {told[1]} for other seeds and test images)" in TOLD


def test_a_level_that_fits_no_better_is_more_robust() -> None:
    by_level = recorded("campaign/main")

    def apart(of: Callable[[Any], float]) -> float:
        return statistics.mean(map(of, by_level[0.5])) - statistics.mean(map(of, by_level[4.0]))

    fitted = 100 * apart(lambda record: record["train"]["last_epoch"]["train_adversarial"])
    robust = 100 * apart(lambda record: record["aa2"]["value"])
    said = f"fit only {fitted:.1f} points better than nets at 4, and AA-2 is {robust:.1f} points higher at 0.5"
    assert said in TOLD


def test_the_flatter_net_by_the_rule() -> None:
    p = 2 * VERDICTS["S4.5.flat-is-robust"]["settings"]["campaign/main"]["p_for"]
    assert f"where the rule has {p:.3f}" in TOLD


def test_all_that_is_decided_is_on_the_page() -> None:
    """Claim by claim and setting by setting, with its word, its star and its corrected p-value."""
    told = {(cells[0].strip("`"), cells[1].strip("`")): (cells[2], cells[3]) for cells in table("claim | setting")}
    stored, judged = {}, 0
    for claim, verdict in VERDICTS.items():
        for setting, one in verdict["settings"].items():
            judged += one["word"] != "not tested"
            if one["word"] not in ("inconclusive", "not tested"):
                star = r" \*" if one["status"] == "exploratory" else ""
                p = f"{one['p_holm']:.3f}" if one["p_holm"] >= 0.001 else "< 0.001"
                stored[claim, setting] = one["word"] + star, p
    assert told == stored
    assert f"Of {judged} places that were judged" in TOLD


def test_who_carries_that_the_flatter_net_is_the_more_robust() -> None:
    levels = next(iter(CLOSER["campaign/main"].values()))["flat is robust, without"]["log norm train/clean"]
    without = levels["0.5"]
    told = [100 * value for value in (without["value"], *without["interval"])]
    assert "without them it is {:+.2f} [{:+.2f}, {:+.2f}] (r = {:.2f})".format(*told, without["r"]) in TOLD


def test_right_more_often_and_not_held_more_often() -> None:
    kept = next(iter(CLOSER["campaign/main"].values()))["kept"]
    assert f"{100 * kept['low']:.1f}" == f"{100 * kept['band']:.1f}"
    assert f"leaves the same share right ({100 * kept['low']:.1f}% in both," in TOLD


def test_the_control_so_far() -> None:
    found = {}
    for run in json.loads((ROOT / "results/campaign/control.json").read_text())["runs"]:
        control, seed = run["config"]["train"]["control"], run["config"]["train"]["seed"]
        found[control["as_alpha"], len(control["factors"]), seed] = 100 * run["record"]["aa2"]["value"]
    assert len(found) == 3 + 2
    said = "that seed has an AA-2 of {:.1f}%; with all factors that make it the net at 6, {:.1f}%; with its initial weights"
    assert said.format(found[None, 4, 0], found[12, 4, 0]) in TOLD
    assert f"with its initial weights alone, {found[12, 1, 0]:.1f}%" in TOLD


def test_the_cards_table_is_what_is_stored() -> None:
    stored = recorded("campaign/card", "n_fgsm")
    told = table("curvature")
    assert len(told) == len(stored)
    for cells, (level, (record,)) in zip(told, stored.items()):
        clean, hard = (record["norms"][f"train/{loss}"] for loss in ("clean", "adversarial"))
        expected = [level, 100 * record["clean_accuracy"]["value"]]
        expected += [100 * record["aa2"][key] for key in ("value", "low", "high")] + [100 * record["pgd"]["value"]]
        expected += [norm[key] for norm in (clean, hard) for key in ("rms", "low", "high")]
        expected.append(hard["cosine"]["value"])
        numbers = [number for cell in cells for number in re.findall(r"[-+]?\d*\.?\d+", cell)]
        assert all(map(close, numbers, expected)) and len(numbers) == len(expected), (numbers, expected)
    hard = {level: record["norms"]["train/adversarial"]["rms"] for level, (record,) in stored.items()}
    assert min(hard, key=hard.__getitem__) == min(hard)
    assert f"to {hard[25] / min(hard.values()):.1f} times its least at 25" in TOLD


def test_the_cards_runs_image_by_image() -> None:
    steps = next(iter(CLOSER["campaign/card"].values()))["steps"]
    said = [
        "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(100 * part for part in (step["value"], *step["interval"])))
        for name in ("aa2", "pgd")
        for step in steps[name]
    ]
    first, second, third, *others = said
    assert f"AA-2 goes {first} points from 2.5 to 6, {second} from 6 to 12 and {third} from 12 to 25" in TOLD
    assert "PGD-10 {}, {} and {}.".format(*others) in TOLD


@pytest.mark.parametrize("page", ["docs/findings.md", "README.md"])
def test_how_far_the_main_sweep_is(page: str) -> None:
    runs = json.loads((ROOT / "results/campaign/main.json").read_text())["runs"]
    assert f"has {len(runs)} of the 24 runs" in (ROOT / page).read_text()


def test_the_overfitting_table_is_what_is_stored() -> None:
    stored = {arm(row): row for row in rows(read(ROOT / "results/quick/overfitting.json"))}
    told = table("arm")
    assert {ARMS[cells[0]] for cells in told} == set(stored)
    for name, *cells in told:
        at = {look["epoch"]: look for look in looks(stored[ARMS[name]])}
        for cell, quantity, scale in zip(cells, ("robust test", "tr(HC)", "norm adversarial"), (100, 1, 1)):
            begun, ended = re.findall(r"\d*\.\d+", cell)
            assert close(begun, scale * seen(at[25], quantity).value), (name, quantity)
            assert close(ended, scale * seen(at[50], quantity).value), (name, quantity)


def test_what_perturbed_weights_end_with() -> None:
    stored = {arm(row): looks(row)[-1] for row in rows(read(ROOT / "results/quick/overfitting.json"))}
    trace, noise = (
        seen(stored["drop, AWP"], quantity).value / seen(stored["drop"], quantity).value
        for quantity in ("Gauss-Newton trace", "tr(HC)")
    )
    assert f"ends with {trace:.2f} of the Gauss-Newton trace and {noise:.2f} of tr(HC)" in TOLD


def test_the_trace_that_rises_at_a_constant_rate() -> None:
    stored = {arm(row): row for row in rows(read(ROOT / "results/quick/overfitting.json"))}
    at = {look["epoch"]: seen(look, "Gauss-Newton trace").value for look in looks(stored["constant"])}
    assert f"(the Gauss-Newton trace does, from {at[25]:.0f} to {at[50]:.0f})" in TOLD


def test_whose_factors_the_digits_control_has() -> None:
    for run in json.loads((ROOT / "results/smoke/control.json").read_text())["runs"]:
        alpha = run["config"]["train"]["control"]["as_alpha"]
        assert (
            alpha is None
            or f"factors of α = {alpha:g} built into its training computes the function of α = {alpha:g}" in TOLD
        )


def test_what_correction_makes_of_the_peak() -> None:
    peak = VERDICTS["S4.2.peak-in-4-10"]["settings"]["campaign/main"]
    told = f"({peak['p_against']:.3f} against a peak in the band, {peak['p_holm']:.3f} corrected)"
    assert told in TOLD


def test_where_the_norm_is_lowest_after_trades_and_what_sweeps_could_see() -> None:
    """The level of the smallest mean, and the vertex of the quadratic; not where the test's two lines break."""
    settled = VERDICTS["H.trades-u [adversarial]"]["settings"]
    told = {setting: one for setting, one in settled.items() if setting.startswith("smoke")}
    assert len(told) == 3
    places, vertices, breaks = [], [], []
    for setting, one in told.items():
        places += [float(number) for number in re.findall(r"lowest at ([\d.]+)", one["text"])]
        breaks += [float(number) for number in re.findall(r"break at ([\d.]+)", one["text"])]
        means: dict[tuple[str, float], list[float]] = {}
        for row in rows(read(ROOT / "results" / f"{setting}.json")):
            if row.method == "trades":
                norm = row.value("norm train/adversarial")
                means.setdefault((row.network, round(row.curvature, 9)), []).append(math.log(norm))
        for network in {name for name, _ in means}:
            curve = {level: statistics.mean(logs) for (name, level), logs in means.items() if name == network}
            assert min(curve, key=curve.__getitem__) == 4
        for name, report in ANALYSIS[setting].items():
            if name.startswith("trades,"):
                curves = [c for c in report["curves"] if c["quantity"] == "log norm train/adversarial"]
                vertices += [c["extreme"]["quadratic"]["at"] for c in curves]
    assert places == [4.0] * 4
    assert len(vertices) == 4
    assert min(breaks) > 4.5
    assert (
        f"lowest at 4 (a quadratic in log: at {min(vertices):.1f} to {max(vertices):.1f}), in all four curves" in PAGE
    )
    assert "the norm of the adversarial loss is lowest at 4." in " ".join((ROOT / "README.md").read_text().split())
    reason = load_rules()["hypotheses"]["H.trades-u"]["reason"]
    assert f"minimum at {min(vertices):.1f} to {max(vertices):.1f} in four curves" in reason
    powers = [
        [
            one["power"]
            for setting, one in VERDICTS[claim]["settings"].items()
            if one["power"] is not None and keep(setting)
        ]
        for claim, keep in (
            ("S4.5.same-range", bool),
            ("S4.2.peak-in-4-10", lambda name: not name.startswith("campaign")),
        )
    ]
    ends = [f"{100 * min(each):.0f} to {100 * max(each):.0f}%" for each in powers]
    assert f"{ends[0]} for an effect" in TOLD
    assert f"for robustness alone it is {ends[1]} on the small ones and above 99% in `campaign/main`" in TOLD
    assert VERDICTS["S4.2.peak-in-4-10"]["settings"]["campaign/main"]["power"] > 0.99


@pytest.mark.parametrize(
    ("claim", "setting", "evidence", "said"),
    [
        ("H.same-function", "smoke/control", "ratio of the norms 10.3 [9.13, 11.6]", "10.3 times the norm [9.1, 11.6]"),
        ("H.same-function", "smoke/control", "robustness -0.56 [-4.33, +3.22]", "differs by -0.6 points [-4.3, +3.2]"),
        (
            "H.minimum-after-adversarial-training",
            "campaign/main",
            "at 1 it is beyond the band by 45.2%",
            "lies 45% above",
        ),
        ("S4.5.flat-is-robust", "campaign/main", "goes -1.00 [-1.80, -0.20]", "falls by 1.00 points [0.20, 1.80]"),
        ("S4.5.flat-is-robust", "campaign/main", "(r = -0.60); along the curve Spearman -0.76", "another (-0.76)"),
        (
            "S3.2.residual-large",
            "campaign/main",
            "of every run at least 0.36",
            "in every run its lower bound is at least 0.36",
        ),
        ("S4.2.below-4-rises", "campaign/main", "-0.82 [-1.78, +0.14]", "up to 4 (-0.82 [-1.78, +0.14] from 0.5 to 4"),
        (
            "S4.2.above-10-falls",
            "campaign/main",
            "-0.76 [-1.75, +0.23]",
            "beyond 10 (-0.76 [-1.75, +0.23] from 10 to 50",
        ),
        ("S4.4.relu-below-rct", "smoke/table1", "-4.33 [-6.10, -2.56]", "less robust than ReLU (-4.33 [-6.10, -2.56])"),
        ("H.robust-overfitting", "quick/overfitting", "-4.40 [-7.19, -1.61]", "loses 4.4 points [1.6, 7.2]"),
        ("H.norm-rises-with-overfitting", "quick/overfitting", "+106% [+76%, +141%]", "(+106% [+76, +141])"),
    ],
)
def test_numbers_of_verdicts(claim: str, setting: str, evidence: str, said: str) -> None:
    assert evidence in VERDICTS[claim]["settings"][setting]["text"]
    assert said in TOLD


@pytest.mark.parametrize(
    ("claim", "word", "settings"),
    [
        ("F4.wider-is-higher", "transfers", ["smoke/figure4"]),
        ("A6.higher-order-time", "transfers", ["smoke/table2"]),
        ("A6.higher-order-memory", "no difference beyond δ", ["smoke/table2"]),
        ("A6.no-advantage-of-b2", "transfers", ["smoke/table1"]),
        ("H.trades-u [adversarial]", "transfers", ["smoke/figure4", "smoke/figure5", "smoke/figure6"]),
        ("S4.4.relu-below-rct", "does not transfer", ["smoke/table1"]),
        ("S4.1.single-run", "does not transfer", ["smoke/figure3"]),
        ("F7a.minimum-in-4-10 [adversarial]", "does not transfer", ["smoke/figure7"]),
        ("F7a.minimum-in-4-10 [invariant]", "does not transfer", ["smoke/figure7"]),
        ("H.learning-rates-alone", "transfers", ["smoke/control"]),
        ("S4.3.independent", "inconclusive", ["tier campaign"]),
        ("F5.methods-peak-in-4-10", "does not transfer", ["campaign/trades"]),
        ("H.trades-u [adversarial]", "inconclusive", ["campaign/trades"]),
        ("H.minimum-after-adversarial-training", "does not transfer", ["campaign/main"]),
        ("S4.5.flat-is-robust", "transfers", ["campaign/main"]),
        ("S3.2.residual-large", "transfers", ["campaign/main"]),
    ],
)
def test_words_of_verdicts(claim: str, word: str, settings: list[str]) -> None:
    assert claim.partition(" ")[0] in PAGE
    assert {VERDICTS[claim]["settings"][setting]["word"] for setting in settings} == {word}


@pytest.mark.parametrize(
    ("claim", "setting", "said"),
    [
        (
            "H.minimum-after-adversarial-training [invariant]",
            "campaign/main",
            "seed 0 had suggested it, {:.2f} corrected",
        ),
        ("F7a.minimum-in-4-10", "smoke/figure7", "of the clean loss: inconclusive, {:.2f})"),
    ],
)
def test_corrected_p_values(claim: str, setting: str, said: str) -> None:
    evidence = VERDICTS[claim]["settings"][setting]
    assert evidence["word"] == "inconclusive"
    assert said.format(evidence["p_holm"]) in TOLD
    if "invariant" in claim:
        sides = re.findall(r"band less (?:low|high) ([-+.\d]+% \[[^\]]*\])", evidence["text"])
        assert f"({' and '.join(sides[:2])})" in TOLD


def test_trades_on_cifar() -> None:
    """Its rows are those of the figures' table; where its best levels lie; what the same runs do to words."""
    by_level = recorded("campaign/trades", "trades")
    number = sum(map(len, by_level.values()))
    assert f"has all {number} of its runs of TRADES, three seeds" in TOLD
    assert {len(records) for records in by_level.values()} == {3}
    written = (ROOT / "results/figures/trades_norms_campaign.md").read_text().splitlines()
    rows_told = [line for line in written if line.startswith("| trades")]
    assert len(rows_told) == len(by_level)
    assert "\n".join([*written[:2], *rows_told]) in PAGE
    robust, hard = (
        {level: statistics.mean(map(of, records)) for level, records in by_level.items()}
        for of in (lambda r: 100 * r["aa2"]["value"], lambda r: r["norms"]["train/adversarial"]["rms"])
    )
    best, low = max(robust, key=robust.__getitem__), min(hard, key=hard.__getitem__)
    level = [norm for curvature, norm in hard.items() if curvature <= 7]
    ends = " to ".join(f"{end(level):.5f}".removeprefix("0") for end in (min, max))
    assert f"the norm of the adversarial loss is lowest at {low:g}; but up to 7 it hardly differs ({ends})" in TOLD
    assert max(level) < 1.25 * min(level)
    assert f"with its lowest mean at {low:g}." in TOLD
    assert f"*TRADES, three seeds:* AA-2 is highest at {best:g}, " in TOLD
    falls = list(robust.values()) == sorted(robust.values(), reverse=True)
    fallen = f"{robust[best] - robust[max(robust)]:.1f} points lower at {max(robust):g}"
    assert f"AA-2 is highest at {best:g}{' and falls from level to level' if falls else ''}: it is {fallen}" in TOLD
    (report,) = (one for name, one in ANALYSIS["campaign/trades"].items() if name.startswith("trades,"))
    (fit,) = (c["extreme"]["quadratic"] for c in report["curves"] if c["quantity"] == "log norm train/adversarial")
    assert f"the minimum is at {fit['at']:.1f} [{fit['low']:.1f}, {fit['high']:.1f}]" in TOLD
    curve = VERDICTS["F5.methods-peak-in-4-10"]["settings"]["campaign/trades"]["text"].partition("; pgd_at")[0]
    sides = re.findall(r"band less (?:low|high) [-+.\d]+ \[[^\]]*\]", curve)
    assert f"Of AA-2, TRADES by itself has {' and '.join(sides)} (" in TOLD
    assert (
        f"**does not transfer** ({VERDICTS['F5.methods-peak-in-4-10']['settings']['campaign/trades']['p_holm']:.3f})"
        in TOLD
    )
    table, runs = load_rules(), rows(read(ROOT / "results/campaign/trades.json"))
    peak = table["claims"]["F5.methods-peak-in-4-10"]
    against = [
        band([row for row in runs if row.method == method], peak, shared_rules(table)).p_against
        for method in ("trades", "pgd_at")
    ]
    assert against[1] < against[0]
    said = "TRADES alone has a p of {:.3f}, by itself and before any correction for other claims, PGD one of {:.3f}."
    assert said.format(*against) in TOLD
    whole = VERDICTS["S4.3.independent"]["settings"]["tier campaign"]["p_holm"]
    alone = 2 * VERDICTS["S4.2.peak-in-4-10"]["settings"]["campaign/main"]["p_against"]
    assert f"is inconclusive ({whole:.3f}). The main sweep by itself would decide it ({alone:.3f})" in TOLD
    assert VERDICTS["S4.3.independent"]["settings"]["tier campaign"]["word"] == "inconclusive"
    rules = " ".join((ROOT / "docs/rules.md").read_text().split())
    assert f"claim falls (p {alone:.3f}); with" in rules
    assert f"with all eighteen it is inconclusive ({whole:.3f})" in rules
    found = CLOSER["campaign/trades"]
    closer: Any = next(found[name] for name in found if name.startswith("trades"))
    for quantity, ends, said in (
        ("contrasts", "by both", "for other images as well as seeds {} and {})"),
        (
            "kept",
            "interval",
            "as at low curvature ({} points), as after PGD, and more than at high ({})",
        ),
    ):
        each = [closer[quantity][side] for side in ("band less low", "band less high")]
        scaled = [[100 * number for number in (one["value"], *sorted(one[ends]))] for one in each]
        assert said.format(*("{:+.2f} [{:+.2f}, {:+.2f}]".format(*one) for one in scaled)) in TOLD
    lower = -100 * closer["contrasts"]["band less low"]["value"]
    assert f"and {lower:.2f} points lower in the band than at low curvature" in TOLD
    clean = closer["clean"]["band less low"]
    told = [-100 * number for number in (clean["value"], *reversed(clean["interval"]))]
    assert "its clean accuracy is {:.2f} [{:.2f}, {:.2f}] points higher".format(*told) in TOLD
    flat = VERDICTS["S4.5.flat-is-robust"]["settings"]["campaign/trades"]
    slope, freedom = re.findall(r"goes ([-+.\d]+ \[[^\]]*\]), (\d+) d\.f\.", flat["text"].partition("; pgd_at")[0])[0]
    assert (
        f"and is {flat['word']} now: over the norm's range the curve of TRADES goes {slope} points ({freedom} d.f.,"
        in TOLD
    )
