"""E[9]-E[33] on symbolic nets: one hidden layer term by term, deep nets by subtraction."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache

import pytest
import sympy as sp

from hessdiag.errors import ConfigurationError
from theory.symbolic import DeepNet, chain_rule_gap, printed, subtract
from theory.symbolic import deep_identities as deep
from theory.symbolic import one_hidden_layer as shallow
from theory.symbolic.printed import norm_ratio, shallow_identities

THREE, FOUR = (2, 2, 2), (2, 2, 2, 2)
EXACT_ONLY_AT_THE_TOP = {"E27", "E28", "E30", "E31", "E32", "E33"}


@pytest.mark.parametrize("parameters", [1, 4, 9])
def test_e8_sides_differ_by_the_root_of_p(parameters: int) -> None:
    """E[8]: right side over left side is √p."""
    assert norm_ratio(parameters) == sp.sqrt(parameters)


def test_e9_to_e18_term_by_term() -> None:
    """E[9], E[11]-E[18]: each printed entry minus the loss's own second derivative is zero."""
    for number in range(9, 19):
        rows = shallow_identities(f"E{number}", inputs=2, neurons=3)
        assert rows
        assert number != 9 or len(rows) == 13  # every parameter
        assert all(row.holds for row in rows)
    assert shallow.output_layer_is_free_of_curvature()


DEEP = ["E20", "E22", "E23", "E24", "E25", "E26", "E27", "E28", "E29", "E30", "E31", "E32", "E33"]


@lru_cache(maxsize=2)
def all_identities(widths: tuple[int, ...]) -> dict[str, list[tuple[int, bool]]]:
    found = defaultdict(list)
    rows = [row for equation in DEEP for row in printed.deep_identities(equation, widths)]
    for row in (*rows, *deep.expansion_identities(widths)):
        found[row.equation].append((row.distance, row.holds))
    return dict(found)


def check(widths: tuple[int, ...], equation: str) -> None:
    for distance, holds in all_identities(widths)[equation]:
        expected = distance <= 2 or equation not in EXACT_ONLY_AT_THE_TOP
        assert holds == expected, (equation, distance)


@pytest.mark.parametrize("equation", DEEP)
def test_three_hidden_layers(equation: str) -> None:
    """E[27], E[28], E[30]-E[33] hold for l >= L-2 and fail at l = L-3; the others hold everywhere."""
    check(THREE, equation)


@pytest.mark.slow
@pytest.mark.parametrize("equation", DEEP)
def test_four_hidden_layers(equation: str) -> None:
    """As with three, two layers failing; the whole net differentiated from its input."""
    check(FOUR, equation)


@pytest.mark.parametrize("name", ["E30=E28", "E31=E28", "exact=pairs"])
def test_the_papers_forms_agree_among_themselves(name: str) -> None:
    """E[28], E[30], E[31] are one polynomial; the exact D is the sum over all pairs of paths."""
    assert all(holds for _, holds in all_identities(THREE)[name])


@pytest.mark.parametrize(
    "widths,layer,terms",
    [((2, 2, 2), 1, 2), ((2, 3, 2), 1, 6), ((2, 2, 2, 2), 1, 16), ((2, 2, 2, 2), 2, 2)],
)
def test_missing_terms_are_pairs_of_different_paths(widths: tuple[int, ...], layer: int, terms: int) -> None:
    """Exact minus E[30]/[31]/[33], expanded: so many monomials, each 2 × a product along two different paths."""
    found = subtract(widths, layer)
    assert len(found.terms) == len(found.pairs) == terms
    assert found.explained
    assert all(pair.first != pair.second and pair.first[-1] == pair.second[-1] for pair in found.pairs)


@pytest.mark.parametrize("widths", [THREE, FOUR, (1, 1, 1, 1, 1)])
def test_nothing_is_missing_at_the_top_or_with_one_path(widths: tuple[int, ...]) -> None:
    layers = range(1 if set(widths) == {1} else len(widths) - 1, len(widths) + 1)
    assert all(subtract(widths, layer).difference == 0 for layer in layers)


def test_the_missing_terms_of_the_smallest_net() -> None:
    """Hidden widths (2, 2, 2), neuron 0 of layer 1, in full."""
    net = DeepNet(THREE)
    w, u = net.weight, net.u
    both = 2 * u(1, 0) ** 2 * u(2, 0) * u(2, 1) * w(2, 0, 0) * w(2, 1, 0)
    expected = sum(both * net.v(3, j) * w(4, 0, j) * w(3, j, 0) * w(3, j, 1) for j in range(2))
    assert sp.expand(subtract(THREE, 1).difference - expected) == 0


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_what_e27_leaves_out(layer: int) -> None:
    """E[27] omits Σ_{t' != t} H_tt' W_t'i σ'(z_i): the way through the neighbours."""
    gap, neighbours = chain_rule_gap(THREE, layer, 0, 0)
    assert gap == neighbours
    assert (gap == 0) == (layer >= 2)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_displayed_recursions_are_the_polynomials_of_the_net(layer: int) -> None:
    """E[28], E[30], E[31] read from their LaTeX equal `DeepNet.paper_recursion` and `path_sum`, written without it."""
    net = DeepNet(THREE)
    exact = net.exact_hessian(layer, 0, 0)
    rows = {n: {r.layer: r for r in printed.deep_identities(n, THREE)} for n in ("E28", "E30", "E31")}
    for name, written in (
        ("E28", net.paper_recursion(layer, 0)),
        ("E30", net.paper_recursion(layer, 0, form="E30")),
        ("E31", net.path_sum(layer, 0)),
    ):
        assert sp.expand(exact - written - rows[name][layer].difference) == 0


def test_refusal() -> None:
    with pytest.raises(ConfigurationError, match="no hidden neuron"):
        subtract(THREE, 4)
