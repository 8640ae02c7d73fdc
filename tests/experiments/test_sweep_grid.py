"""Sweep files: what they expand to, and what is refused with which words; cost said before the start."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.config import TrainConfig
from experiments.sweep.cost import check_budget, duration, estimate
from experiments.sweep.grid import load
from experiments.sweep.settings import AttackSettings, MeasureSettings
from experiments.sweep.store import Store
from hessdiag.errors import BudgetError, ConfigurationError, UnknownNameError

BASE = """
figure = "figure3"
tier = "smoke"
[train]
method = "n_fgsm"
network = "small_resnet"
data = "digits"
eps = "0.15"
epochs = 2
augment = { crop = 0, flip = false }
[attack]
aa2_samples = 20
[[grid]]
beta = [0, 1]
curvature = [2, 7]
seed = [0, 1]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_a_grid_is_every_combination_first_seed_first(tmp_path):
    sweep = load(write(tmp_path, BASE))
    assert sweep.name == "smoke/mine"
    assert len(sweep.runs) == 8
    assert [run.train["seed"] for run in sweep.runs] == [0] * 4 + [1] * 4
    assert {run.train["activation"] for run in sweep.runs} == {
        "rct:beta=0,alpha=8", "rct:beta=0,alpha=28", "rct:beta=1,alpha=4", "rct:beta=1,alpha=14",
    }  # fmt: skip
    assert len({run.key for run in sweep.runs}) == 8
    assert len({run.family for run in sweep.runs}) == 1
    assert len(load(write(tmp_path, BASE), seeds=[3]).runs) == 4


def test_every_default_is_written_out(tmp_path):
    run = load(write(tmp_path, BASE)).runs[0]
    assert set(run.train) == {field.name for field in dataclasses.fields(TrainConfig)}
    assert set(run.attack) == {field.name for field in dataclasses.fields(AttackSettings)}
    assert set(run.measure) == {field.name for field in dataclasses.fields(MeasureSettings)}
    assert run.attack["eps"] == "0.15"
    spelt = BASE.replace("epochs = 2", "epochs = 2\nmomentum = 0.9").replace("curvature = [2, 7]", "alpha = [14]")
    other = load(write(tmp_path, spelt.replace("beta = [0, 1]", "beta = 1")))
    assert other.runs[0].key in {run.key for run in load(write(tmp_path, BASE)).runs}


def test_overrides_change_what_they_match(tmp_path):
    text = BASE + "\n[[override]]\nwhere = { beta = 1, curvature = [7.0], seed = 0 }\nattack = { aa_samples = 5 }\n"
    runs = load(write(tmp_path, text)).runs
    assert [run.attack["aa_samples"] for run in runs].count(5) == 1
    assert len({run.family for run in runs}) == 1
    with pytest.raises(ConfigurationError, match="matches no run"):
        load(write(tmp_path, text.replace("[7.0]", "[8]")))
    with pytest.raises(UnknownNameError, match="did you mean 'curvature'"):
        load(write(tmp_path, text.replace("curvature = [7.0]", "curvatur = 7")))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[attack]", "[atack]", "unknown key 'atack'; did you mean 'attack'"),
        ("epochs = 2", "epoch = 2", "did you mean 'epochs'"),
        ("aa2_samples", "aa2_sample", "did you mean 'aa2_samples'"),
        ("curvature = [2, 7]", "curvatre = [2, 7]", "did you mean 'curvature'"),
        ('tier = "smoke"', 'tier = "smok"', "did you mean 'smoke'"),
        ('figure = "figure3"', 'figure = "figur3"', "did you mean 'figure3'"),
        ('method = "n_fgsm"', 'method = "nfgsm"', "did you mean 'n_fgsm'"),
        ("curvature = [2, 7]", "curvature = []", "curvature is empty"),
        ("beta = [0, 1]\n", "", "by `activation`, or by `beta` with"),
        ("[[grid]]", "[grid]", "grid"),
        ("aa2_samples = 20", "aa2_samples = -1", "must not be negative"),
        ("aa2_samples = 20", 'eps = "3"', "attack.eps"),
        ("[attack]", "[measure]\nrtol = 0\n[attack]", "measure.rtol"),
        ("[attack]", '[measure]\nsplits = ["tran"]\n[attack]', "did you mean 'train'"),
        ("[attack]", "[measure]\nplugin_probes = 1\n[attack]", "at least 2"),
        ("[attack]", "[attack", "mine.toml"),
        ("epochs = 2", "epochs = 2\nnetwork_options = { widht = 4 }", "did you mean 'width'"),
        ("epochs = 2", 'epochs = 2\nnetwork_options = { width = "four" }', "width must be a positive integer"),
        ("epochs = 2", 'epochs = 2\ngroups = [{ match = "bnn" }]', "unknown group 'bnn'"),
        ("epochs = 2", "epochs = 2\nnormalize = 3", "normalize must be"),
        ("epochs = 2", 'epochs = 2\nnormalize = "standard"', "not digits"),
        ("epochs = 2", "epochs = 2\nlr = 1" + "0" * 400, "range of a float"),
        ("epochs = 2", "epochs = 2\nattack = { stepz = 1 }", "[train]: unknown key 'attack.stepz'"),
        ("seed = [0, 1]", 'seed = ["a", 0]', "grid 1: seed must be a whole number, not 'a'"),
        ("seed = [0, 1]", "variant = ['a', 'b']", "variant must be text"),
        ("seed = [0, 1]", "train = 3", "grid 1: train: expected a table"),
        ("seed = [0, 1]", "lr = [0.1]\ntrain = { lr = 0.2 }", "lr is given twice"),
        ("aa2_samples = 20", '[measure]\nmethod = "propagatoin"', "did you mean 'propagation'"),
        ("aa2_samples = 20", "[measure]\nconfidence = 2.0", "measure.confidence"),
        ("aa2_samples = 20", "[measure]\nmin_replicates = 50\nmax_replicates = 20", "min_replicates <= max_replicates"),
        ("aa2_samples = 20", '[measure]\nsplits = ["test", "test"]', "each once"),
        ("aa2_samples = 20", "[measure]\nseed = -1", "must not be negative"),
    ],
)
def test_refusals_say_what_and_where(tmp_path, old, new, words):
    assert old in BASE
    with pytest.raises(ConfigurationError) as caught:
        load(write(tmp_path, BASE.replace(old, new, 1)))
    assert words in str(caught.value)
    assert "mine.toml" in str(caught.value)


@pytest.mark.parametrize("name", ["train", "attack", "measure", "override"])
def test_a_section_that_is_no_table_is_refused(tmp_path, name):
    grid = "[[grid]]\nbeta = 1\ncurvature = 2\n"
    with pytest.raises(ConfigurationError, match=name):
        load(write(tmp_path, f'tier = "smoke"\nfigure = "figure3"\n{name} = 3\n{grid}'))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("attack = 3", "attack: expected a table"),
        ("attack = {}", "changes nothing"),
        ("train = { seed = 5 }", "train.seed is the grid's to say"),
        ('train = { activation = "relu" }', "train.activation is the grid's to say"),
    ],
)
def test_an_override_that_would_do_nothing_is_refused(tmp_path, change, words):
    with pytest.raises(ConfigurationError, match="override 1") as caught:
        load(write(tmp_path, f"{BASE}\n[[override]]\nwhere = {{ beta = 1 }}\n{change}\n"))
    assert words in str(caught.value)


def test_an_override_reaches_the_runs_of_the_grid_that_has_its_key(tmp_path):
    more = (
        '[[grid]]\nactivation = ["relu"]\nseed = [0]\n[[override]]\nwhere = { beta = 1 }\nattack = { aa_samples = 5 }\n'
    )
    runs = load(write(tmp_path, BASE + more)).runs
    assert [run.attack["aa_samples"] for run in runs if run.train["activation"] == "relu"] == [0]
    assert [run.attack["aa_samples"] for run in runs].count(5) == 4


def test_tables_within_sections_are_merged_not_replaced(tmp_path):
    more = "\n[[override]]\nwhere = { beta = 1 }\ntrain = { augment = { auto = 'after' } }\n"
    changed = [run for run in load(write(tmp_path, BASE + more)).runs if run.train["augment"]["auto"] == "after"]
    assert len(changed) == 4
    assert all(run.train["augment"]["crop"] == 0 for run in changed)  # as [train] says, not the default 4


def test_one_run_cannot_be_two_variants(tmp_path):
    again = "[[grid]]\nvariant = 'other'\nbeta = [0]\ncurvature = [2]\nseed = [0]\n"
    with pytest.raises(ConfigurationError, match="'' and 'other' are the same run"):
        load(write(tmp_path, BASE + again))
    assert len(load(write(tmp_path, BASE + again.replace("variant = 'other'\n", ""))).runs) == 8


@pytest.mark.parametrize("name", ["my first sweep.toml", "beta-against-alpha.v2.toml", "lr=0.1", "Ünicode.txt"])
def test_a_sweep_of_ones_own_has_any_name_and_any_folder(tmp_path, name):
    text = BASE.replace('tier = "smoke"\n', "").replace('figure = "figure3"\n', "")
    folder = tmp_path / "somebody's folder"
    folder.mkdir()
    (folder / name).write_text(text, encoding="utf-8")
    sweep = load(folder / name)
    assert (sweep.tier, sweep.figure) == ("own", "none")  # drawn and judged nowhere
    assert sweep.name == f"own/{Path(name).stem}"
    assert len(sweep.runs) == 8


def test_a_missing_file_and_a_foreign_store_end_with_one_line(tmp_path, capsys):
    assert main(["sweep", str(tmp_path / "none.toml"), "--store", str(tmp_path / "s")]) == 3
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.tex").write_text("")
    assert main(["sweep", str(write(tmp_path, BASE)), "--store", str(tmp_path / "s")]) == 3
    assert "holds other files" in capsys.readouterr().err
    for bad in (["--executor", "lcal"], ["--seeds", "a"], ["--seeds", "1,1"], ["--retries", "-1"]):
        assert main(["sweep", str(tmp_path / "mine.toml"), "--store", str(tmp_path / "t"), *bad]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
        assert not (tmp_path / "t").exists()


def test_cost_is_said_from_runs_of_the_same_kind(tmp_path):
    runs = load(write(tmp_path, BASE)).runs
    other = runs[0].replace(train={"epochs": 50})
    nothing = estimate(runs, [], [("here", [(other, 100.0)])])
    assert "no timing" in nothing.sentence(2)
    cost = estimate(runs, [runs[0].key], [("here", [(runs[0], 30.0), (runs[1], 50.0), (other, 1000.0)])])
    assert (cost.runs, cost.done, cost.seconds) == (8, 1, 280.0)
    assert cost.sentence(2) == "8 runs, 1 done, 7 to do; about 40 s each (here: 2 runs), 2 min on 2 workers"
    assert estimate(runs, [run.key for run in runs], []).sentence(2) == "8 runs, all done"
    three, rest = [run.key for run in runs[:3]], [run.key for run in runs[3:]]
    lost = estimate(runs, rest, [], failed=three)
    assert lost.sentence(2) == "8 runs, 5 done, 3 failed (--retries tries them again), 0 to do"
    assert estimate(runs, [], [("here", [(runs[0], 30.0)])], failed=three).wall(5) == 30.0
    assert estimate(runs, [], [], pilot=lambda run: 3.0).seconds == 24.0
    check_budget(cost, 2, 3)
    with pytest.raises(BudgetError, match="--budget 2"):
        check_budget(cost, 2, 2)
    assert [duration(s) for s in (2.5, 40, 600, 7200, 400000)] == ["2.5 s", "40 s", "10 min", "2.0 h", "4.6 d"]


def test_status_shows_states_workers_and_errors(tmp_path, capsys):

    sweep = load(write(tmp_path, BASE))
    store = Store(tmp_path / "s")
    store.add(sweep.name, sweep.runs, tier="smoke")
    mine = [store.claim() for _ in range(3)]
    assert mine[0] is not None
    assert mine[1] is not None
    mine[0].finish({"aa2": {"value": 0.5}}, 12.0)
    mine[1].fail("ValueError: the reason\n\ntraceback")
    assert main(["status", "--store", str(tmp_path / "s"), "--list"]) == 0
    shown = capsys.readouterr().out
    assert "1/8" in shown
    assert "ValueError: the" in shown
    assert "50.0" in shown


@pytest.mark.slow
def test_a_whole_sweep_from_the_command_line(tmp_path):
    """Two real runs on digits: trained, attacked, measured, exported, drawn; the second call does nothing."""
    path = write(tmp_path, BASE.replace("[0, 1]", "1", 1).replace("[0, 1]", "[0]").replace("epochs = 2", "epochs = 8"))
    path.write_text(path.read_text() + '[measure]\nsamples = 16\nrtol = 5.0\nplugin_probes = 2\nlosses = ["clean"]\n')
    command = [
        sys.executable,
        "-m",
        "experiments",
        "sweep",
        str(path),
        "--store",
        str(tmp_path / "s"),
        "--workers",
        "2",
    ]
    command += ["--results", str(tmp_path / "results"), "--export"]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    assert "2 done, 0 failed" in first.stdout
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "2 runs, all done" in again.stderr
    store = Store(tmp_path / "s")
    assert [len(store.attempts(row.key)) for row in store.rows()] == [1, 1]
    record = store.rows()[0].record
    assert record is not None
    assert {"aa2", "norms", "clean_accuracy", "effective_curvature", "seconds", "provenance"} <= set(record)
    assert record["norms"]["test/clean"]["plugin"]["biased"] is True
    figures = [
        sys.executable,
        "-m",
        "experiments",
        "figures",
        "--results",
        str(tmp_path / "results"),
        "--resamples",
        "100",
    ]
    assert subprocess.run(figures, capture_output=True, check=False).returncode == 0
    assert (tmp_path / "results" / "figures" / "mine_smoke.png").exists()


STAGED = (
    BASE.replace("seed = [0, 1]", "seed = [0]\nstage = 2") + "[[grid]]\nbeta = 1\ncurvature = [7, 4]\nseed = [1, 0]\n"
)


def test_a_stage_comes_before_the_next_and_within_it_a_seed(tmp_path):
    path = write(tmp_path, STAGED)
    whole, first = load(path), load(path, stage=1)
    order = [(run.train["activation"][4:], run.train["seed"]) for run in whole.runs]
    assert order[:4] == [("beta=1,alpha=14", 0), ("beta=1,alpha=8", 0), ("beta=1,alpha=14", 1), ("beta=1,alpha=8", 1)]
    assert whole.runs[:4] == first.runs  # what both stages name is done with the first
    assert len(whole.runs) == 7
    assert set(first.later) == {run.key for run in whole.runs[4:]}
    assert load(path, stage=2).runs == whole.runs
    assert not whole.later
    with pytest.raises(ConfigurationError, match="no stage 3: it has 1 to 2"):
        load(path, stage=3)
    with pytest.raises(ConfigurationError, match="no stage 2: it has only one"):
        load(write(tmp_path, BASE), stage=2)
    with pytest.raises(ConfigurationError, match="grid 1: stage must be a whole number"):
        load(write(tmp_path, STAGED.replace("stage = 2", "stage = 0")))


def test_a_sweep_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # wherever the command is called
    assert load("smoke/figure3").name == "smoke/figure3"
    with pytest.raises(
        ConfigurationError, match="no such file, and no sweep of that name; did you mean 'smoke/figure3'"
    ):
        load("smoke/figur3")


def test_a_stage_is_done_alone_and_the_sweep_keeps_what_it_had(tmp_path):
    path = write(tmp_path, STAGED)
    whole, first = load(path), load(path, stage=1)
    store = Store(tmp_path / "s")
    store.add(whole.name, whole.runs, tier=whole.tier)
    store.add(first.name, first.runs, tier=first.tier, later=first.later)
    assert len(store.rows(whole.name)) == 7
    seeds = [0, 1]
    taken = []
    while (claim := store.claim(sweep=first.name, seeds=seeds, first=4)) is not None:
        taken.append(claim.config.key)
        claim.finish({}, 1.0)
    assert taken == [run.key for run in first.runs]
    assert store.remaining(whole.name, seeds=seeds, first=4) == 0
    assert store.remaining(whole.name) == 3
    store.add("other", reversed(whole.runs), tier="smoke")  # its order is its own
    assert store.claim(sweep="other").config.key == whole.runs[-1].key
    assert store.claim(sweep=whole.name).config.key == whole.runs[4].key
    store = Store(tmp_path / "t")  # a stage alone brings no more than itself
    store.add(first.name, first.runs, tier=first.tier, later=first.later)
    assert len(store.rows(first.name)) == 4


def test_a_grid_has_a_limit(tmp_path: Path) -> None:
    """Three lists of thousands are refused before any combination is made; so is TOML without bottom."""
    path = tmp_path / "figure3.toml"
    many = list(range(3000))
    path.write_text(f'tier = "smoke"\n[[grid]]\nbeta = [0, 1, 2]\ncurvature = {many}\nseed = {many}\n')
    with pytest.raises(ConfigurationError, match="27000000 combinations"):
        load(path)
    path.write_text("a = " + "[" * 50_000)
    with pytest.raises(ConfigurationError, match="nested too deeply"):
        load(path)
    path.write_text("#" * (1 << 20) + "\n")
    with pytest.raises(ConfigurationError, match="exceed the limit"):
        load(path)
