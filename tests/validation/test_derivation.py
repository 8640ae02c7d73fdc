"""docs/derivation.md by numbers: every statement on random nets and losses, the infimum on random scalings, the page."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hessdiag.errors import ConfigurationError, DataError
from theory.claims import BY_ID, DERIVATION
from theory.net import random_net
from theory.rescaling import Rule, batchnorm_rule, infimum, rescaled_norm
from validation import ledger as ledgers
from validation.__main__ import main as validation_main
from validation.bridge import ACTIVATIONS, deviation, engine_diagonal
from validation.checks.derivation import SPECS, deviations, input_gap, losses
from validation.coordinates import batch, build, feeds, rescaled
from validation.register import Run
from validation.studies import STUDIES, stored
from validation.studies.parts import EPS, attack, input_parts

torch.set_num_threads(1)
PAGE = Path(__file__).parents[2] / "docs" / "derivation.md"

nets = st.tuples(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),  # two to five layers
    st.integers(1, 3),
    st.sampled_from(SPECS),
    st.integers(0, 999),
)


@settings(deadline=None, derandomize=True, max_examples=15)
@given(nets)
def test_every_identity_for_any_depth_width_and_loss(case: tuple[list[int], int, str, int]) -> None:
    """Recursion, entries, sites, pairs and what E[28] leaves out, against autograd; E[28] exact just where said."""
    hidden, outputs, spec, seed = case
    g = torch.Generator().manual_seed(seed)
    net = random_net([2, *hidden, outputs], ACTIVATIONS[spec], generator=g)
    x = torch.randn(3, 2, generator=g, dtype=torch.float64)
    for loss in losses(3, outputs, g):
        if loss.name == "cross-entropy" and outputs == 1:
            continue  # one class: the loss is constant
        found = deviations(net, spec, x, loss)
        worst = max(found.matrices, found.entries, found.sites, found.pairs, found.gap)
        assert worst <= 1e-10, (loss.name, found)
        for layer, error in enumerate(found.printed, 1):
            single = set(hidden[layer : len(hidden) - 1]) <= {1}
            assert (error <= 1e-10) == single, (loss.name, layer, hidden, error)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.sampled_from(SPECS), st.integers(0, 999))
def test_the_input_shares_the_weights_of_the_sites(hidden: list[int], spec: str, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    net = random_net([3, *hidden, 2], ACTIVATIONS[spec], generator=g)
    x = torch.randn(2, 3, generator=g, dtype=torch.float64)
    assert max(input_gap(net, x, loss) for loss in losses(2, 2, g)) <= 1e-10


def _scaling(powers: np.ndarray) -> list[Rule]:
    return [Rule({f"t{k}": int(a) for k, a in enumerate(column)}, {}, {}) for column in powers.T]


scalings = st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(0, 9999))


@settings(deadline=None, derandomize=True, max_examples=80)
@given(scalings)
def test_the_infimum_is_a_bound_and_is_approached(case: tuple[int, int, int]) -> None:
    """No factors go below it; along the direction in which the vanishing tensors shrink the norm comes near it."""
    tensors, moves, seed = case
    rng = np.random.default_rng(seed)
    powers = rng.integers(-2, 3, (tensors, moves))
    diagonal = {f"t{k}": torch.from_numpy(rng.standard_normal(4) * 10 ** rng.uniform(-2, 2)) for k in range(tensors)}
    rules = _scaling(powers)
    found = infimum(diagonal, rules)
    for _ in range(50):
        factors = np.exp(rng.standard_normal(moves) * rng.choice([0.1, 1.0, 3.0]))
        assert rescaled_norm(diagonal, rules, factors) >= found.value * (1 - 1e-9)
    kept = np.array([f"t{k}" not in found.vanishing for k in range(tensors)])
    best = np.log(found.factors)
    if kept.any():
        rest = {n: d for n, d in diagonal.items() if n not in found.vanishing}
        reached = rescaled_norm(rest, rules, found.factors)
        assert reached * math.sqrt(kept.mean()) == pytest.approx(found.value, rel=1e-9)
        assert found.value > 0
        weights = np.array([float((diagonal[f"t{k}"] ** 2).sum()) for k in range(tensors)])[kept]
        weights = weights * np.exp(-4 * powers[kept] @ best)
        assert np.abs(weights @ powers[kept]).max() <= 1e-6 * weights.sum() * 2  # the minimum's gradient is zero
    else:
        assert found.value == 0
    assert found.attained == (not found.vanishing)
    if found.vanishing:  # a direction that raises nothing and shrinks all of them: a sum of the programme's corners
        from scipy.optimize import linprog

        gone = powers[~kept]
        direction = linprog(
            np.zeros(moves), np.vstack([-powers, -gone]), np.r_[np.zeros(tensors), -np.ones(len(gone))],
            bounds=[(None, None)] * moves,
        ).x  # fmt: skip
        near = rescaled_norm(diagonal, rules, np.exp(best + 8 * direction))
        assert near <= max(found.value * (1 + 1e-5), 1e-5)


def test_the_infimum_of_one_factor_is_the_closed_form() -> None:
    """S₀ + 2√(S₊S₋) over p; with nothing on one side that side vanishes."""
    diagonal = {"t0": torch.tensor([3.0]), "t1": torch.tensor([2.0]), "t2": torch.tensor([0.5])}
    found = infimum(diagonal, _scaling(np.array([[1], [0], [-1]])))
    assert found.value == pytest.approx(math.sqrt((4.0 + 2 * 3.0 * 0.5) / 3), rel=1e-12)
    assert found.attained
    assert found.factors[0] ** 4 == pytest.approx(3.0 / 0.5, rel=1e-6)
    found = infimum({"t0": diagonal["t0"], "t1": diagonal["t1"]}, _scaling(np.array([[1], [0]])))
    assert (found.vanishing, found.attained) == (("t0",), False)
    assert found.value == pytest.approx(math.sqrt(4.0 / 2))


@pytest.mark.parametrize("training", [False, True])
def test_weights_before_a_batchnorm_may_have_any_scale(training: bool) -> None:
    """The same function in eval mode and with batch statistics, activation untouched; entries go as 1/c²."""
    model = build("small_resnet", 7.0, 2, seed=3)
    x, y = batch("small_resnet", 6)
    twin = model
    for norm, layer in feeds(model).items():
        twin = rescaled(twin, batchnorm_rule(list(model.state_dict()), norm=norm, layer=layer), 4.0)
    with torch.no_grad():
        assert deviation(twin.train(training)(x), model.train(training)(x)) <= 1e-9
    model, twin = build("small_resnet", 7.0, 2, seed=3), twin.eval()
    one, two = (dict(engine_diagonal(m, x, y, "cross_entropy").total) for m in (model, _again(model)))
    for name, tensor in one.items():
        fed = any(name.startswith(f"{layer}.") for layer in feeds(model).values())
        assert deviation(two[name] * (16.0 if fed else 1.0), tensor) <= 1e-8, name


def _again(model: torch.nn.Module) -> torch.nn.Module:
    for norm, layer in feeds(model).items():
        model = rescaled(model, batchnorm_rule(list(model.state_dict()), norm=norm, layer=layer), 4.0)
    return model


def test_a_rule_for_what_is_no_batchnorm_is_refused() -> None:
    names = list(build("small_resnet", 7.0, 2).state_dict())
    with pytest.raises(ConfigurationError, match="no BatchNorm"):
        batchnorm_rule(names, norm="conv1", layer="conv1")
    with pytest.raises(ConfigurationError, match=r"conv9\.weight"):
        batchnorm_rule(names, norm="bn1", layer="conv9")


def test_the_attack_stays_in_the_ball_and_climbs() -> None:
    model = build("small_resnet", 7.0, 1).eval()
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0])
    at = attack(model, x, y, steps=5, share=0.25, seed=0)
    assert float((at - x).abs().max()) <= EPS + 1e-12
    assert float(at.min()) >= 0
    assert float(at.max()) <= 1
    before, after = (float(torch.nn.functional.cross_entropy(model(v), y).detach()) for v in (x, at))
    assert after > before


def test_parts_of_the_input_s_hessian_add_up() -> None:
    model = build("small_resnet", 7.0, 1).eval()
    x, y = batch("small_resnet", 2)
    outer, bend = input_parts(model, x, y)

    def loss(v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(v.reshape(1, 1, 8, 8)), y[:1])

    truth = torch.autograd.functional.hessian(loss, x[0].reshape(-1)).diagonal()  # type: ignore[no-untyped-call]
    assert deviation((outer + bend)[0], truth, outer[0]) <= 1e-10
    assert bool((outer >= -1e-12).all())


def test_stored_runs_are_read_or_refused(tmp_path: Path) -> None:
    """|γ| and the cosine from a record; arms of a control by name; a broken file in one line."""
    norm = {"rms": 5.0, "gauss_newton": {"rms": 3.0}, "functional": {"rms": 4.0}}
    record = {
        "max_curvature": 2.0,
        "effective_curvature": [{"mean": 1.0, "max_curvature": 2.0}, {"mean": None, "max_curvature": "inf"}],
        "norms": {"train/clean": norm, "train/adversarial": {"rms": 1.0, **{k: norm[k] for k in ("functional",)}}},
    }
    assert stored.gains(record) == [0.5]
    assert stored.cosine(record, "train/clean") == pytest.approx(0.0)
    assert stored.cosine(record, "train/adversarial") is None
    folder = tmp_path / "smoke"
    folder.mkdir()
    train = {"method": "n_fgsm", "activation": "rct:beta=1,alpha=4", "control": {"as_alpha": 28.0, "factors": ["lr"]}}
    export = {"runs": [{"key": "one", "config": {"train": train}, "record": record}]}
    (folder / "control.json").write_text(json.dumps(export))
    (folder / "figure3.json").write_text(json.dumps(export))
    found = stored.run(Run(results=tmp_path))
    assert [row[:4] for row in found.rows] == [
        ("smoke/control", "", "rct:beta=1,alpha=4 trained as α = 28 (lr)", 1),
        ("smoke/figure3", "n_fgsm", "max|σ''| < 4", 1),
    ]
    for tier in ("campaign", "own", "paper", "quick"):
        (tmp_path / tier).mkdir()
        (tmp_path / tier / "mine.json").write_text(json.dumps(export))
    found = stored.run(Run(results=tmp_path))
    assert [row[0] for row in found.rows[2:]] == ["quick/mine", "campaign/mine", "paper/mine", "own/mine"]
    (tmp_path / "own" / "mine_too.json").write_text(json.dumps(export))
    found = stored.run(Run(results=tmp_path))
    assert "own, clean loss: 0 of 1;" in found.notes[-1]  # a run of two sweeps is one
    (folder / "figure3.json").write_text("{")
    with pytest.raises(DataError, match=r"figure3\.json: no export"):
        stored.run(Run(results=tmp_path))


# The page ------------------------------------------------------------------------------------------------------------


def commands() -> list[list[str]]:
    """Every `python -m ...` that the page names."""
    return [found.split()[2:] for found in sorted(set(re.findall(r"`(python -m [^`]+)`", PAGE.read_text())))]


def test_the_page_names_every_statement_and_shows_its_formula() -> None:
    """One source: a displayed formula of a statement stands in the page exactly as in the claim that is checked."""
    text = PAGE.read_text()
    for claim in DERIVATION:
        assert f"`python -m validation --claim {claim.id}`" in text, claim.id
        if claim.formula:
            assert f"$${claim.formula}$$" in text, claim.id
        section = int(claim.where.rsplit(" ", 1)[1])
        start = text.index(f"\n## {section}. ")
        assert f"--claim {claim.id}`" in text[start : text.find("\n## ", start + 4) % (len(text) + 1)], claim.id


def test_the_page_s_numbers_of_stored_runs_are_those_of_the_study() -> None:
    """Counts of signs on digits, medians of |γ|, and the control: from the committed runs of the smoke tier."""
    text = " ".join(PAGE.read_text().split())
    found = stored.run(Run(results=PAGE.parents[1] / "results"))
    signs = dict(re.findall(r"smoke, (\w+) loss: (\d+ of \d+)", found.notes[-1]))
    assert f"on digits {signs['clean']} have a positive cosine on the clean loss" in text
    assert f"and {signs['adversarial']} on the adversarial one" in text
    gains = {(row[0], row[1]): [] for row in found.rows}  # type: ignore[var-annotated]
    for row in found.rows:
        gains[row[0], row[1]].append(f"{row[4]:.2f}")
    assert f"{', '.join(gains['smoke/figure3', 'n_fgsm'])} after N-FGSM on digits" in text
    assert f"{', '.join(gains['smoke/figure7', 'standard'])} after standard training on digits" in text
    arms = {str(row[2]): row for row in found.rows if row[0] == "smoke/control"}
    high, moved = (
        arms["rct:beta=1,alpha=28"],
        arms["rct:beta=1,alpha=4 trained as α = 28 (init, lr, decay, statistics)"],
    )
    assert f"{high[6]:.3g} with α = 28 and {moved[6]:.3g} in the other coordinates" in text
    assert f"robust accuracy (AA-2) {high[5]:.3f} and {moved[5]:.3f}" in text
    assert f"${moved[4]:.3g}\\cdot2$" in text
    assert f"${high[4]:.3g}\\cdot14$" in text


def test_every_command_of_the_page_exists() -> None:
    found = commands()
    assert len(found) >= len(DERIVATION)
    for words in found:
        assert words[0] in ("validation", "theory")
        names = [words[k + 1] for k, word in enumerate(words) if word == "--claim"]
        assert ledgers.select(names) == names
        assert all(words[k + 1] in STUDIES for k, word in enumerate(words) if word == "--study")
        if words[0] == "theory":
            assert all(name in BY_ID for name in words[1:])


@pytest.mark.slow
@pytest.mark.timeout(7200)  # the study of the two parts trains six networks
@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_of_the_page_passes(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As written, from the root of the repository; verdicts that refute nothing, and exit code 0."""
    from theory.__main__ import main as theory_main

    monkeypatch.chdir(PAGE.parents[1])
    assert (validation_main if words[0] == "validation" else theory_main)(words[1:]) == 0
    for k, word in enumerate(words):
        if word == "--claim" and words[k + 1].startswith("D."):
            record = ledgers.check_claim(words[k + 1], Run())
            assert record["verdict"] in ("proved", "verified exactly", "holds numerically")
            assert record["surprises"] == []
