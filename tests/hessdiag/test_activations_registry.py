"""Spec strings, factories and names of activations."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import nn

from hessdiag.activations import RCTAF, REGISTRY, build, describe, factory, spec_of
from hessdiag.errors import ConfigurationError, UnknownNameError

CLASSES = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "rct": RCTAF,
}


def test_names() -> None:
    assert {name: type(build(name)) for name in REGISTRY} == CLASSES
    assert isinstance(build("swish"), nn.SiLU)
    assert isinstance(build(" ReLU "), nn.ReLU)


@pytest.mark.parametrize(
    "spec, canonical",
    [
        ("rct", "rct:beta=1,alpha=14"),
        ("rct:beta=1,alpha=14", "rct:beta=1,alpha=14"),
        ("rct: alpha = 14.0 , beta = 1", "rct:beta=1,alpha=14"),
        ("rct:beta=1,curvature=7", "rct:beta=1,alpha=14"),
        ("rct:curvature=7,beta=0", "rct:beta=0,alpha=28"),
        ("rct:beta=2,curvature=0.7", "rct:beta=2,alpha=0.7"),
        ("rct:alpha=1e-3", "rct:beta=1,alpha=0.001"),
        ("swish", "silu"),
        ("leaky_relu", "leaky_relu"),
        ("leaky_relu:negative_slope=0.1", "leaky_relu:negative_slope=0.1"),
        ("leaky_relu:negative_slope=0.01", "leaky_relu"),
        ("elu:alpha=0.5", "elu:alpha=0.5"),
        ("gelu:approximate=tanh", "gelu:approximate=tanh"),
        ("softplus:beta=14", "softplus:beta=14"),
    ],
)
def test_specs_and_their_canonical_form(spec: str, canonical: str) -> None:
    built = build(spec)
    assert spec_of(built) == canonical
    again = build(canonical)
    assert spec_of(again) == canonical
    x = torch.linspace(-3, 3, 13)
    assert torch.equal(built(x), again(x))


def test_a_canonical_spec_keeps_every_digit() -> None:
    for alpha in (0.1, 1 / 3, 1e-9, 12345.678, 1e16):
        again = build(spec_of(RCTAF(alpha, 3)))
        assert isinstance(again, RCTAF)
        assert (again.alpha, again.beta) == (alpha, 3)


@pytest.mark.parametrize(
    "spec, error, message",
    [
        ("rleu", UnknownNameError, "did you mean 'relu'"),
        ("", UnknownNameError, "unknown activation"),
        ("rct:gamma=1", UnknownNameError, "no option 'gamma'"),
        ("rct:aplha=1", UnknownNameError, "did you mean 'alpha'"),
        ("relu:alpha=1", UnknownNameError, "takes none"),
        ("relu:inplace=True", UnknownNameError, "takes none"),
        ("elu:curvature=1", UnknownNameError, "no option"),
        ("rct:alpha", ConfigurationError, "option=value"),
        ("rct:alpha=", ConfigurationError, "option=value"),
        ("rct:alpha=1,alpha=2", ConfigurationError, "twice"),
        ("rct:alpha=1,curvature=2", ConfigurationError, "not both"),
        ("rct:alpha=x", ConfigurationError, "must be a number"),
        ("rct:beta=1.5", ConfigurationError, "must be an integer"),
        ("rct:alpha=nan", ConfigurationError, "finite"),
        ("rct:alpha=-1", ConfigurationError, "positive"),
        ("rct:beta=-1", ConfigurationError, "beta"),
        ("rct:curvature=0", ConfigurationError, "max_curvature"),
        ("gelu:approximate=erf", ConfigurationError, "none or tanh"),
        ("custom:mine.Act", UnknownNameError, "pass the module"),
        (3, ConfigurationError, "a name, a module or a factory"),
        (torch.tanh, ConfigurationError, "Tanh"),
        (lambda: 3, ConfigurationError, "returned int"),
    ],
)
def test_bad_specs_are_refused(spec: object, error: type[Exception], message: str) -> None:
    for use in (build, factory):
        with pytest.raises(error, match=message):
            use(spec)  # type: ignore[arg-type]


def test_factories_make_new_modules_that_are_never_in_place() -> None:
    inplace = nn.LeakyReLU(0.3, inplace=True)
    for spec in ("relu", inplace, nn.SiLU, lambda: nn.ReLU(inplace=True), RCTAF(3.0, 2)):
        make = factory(spec)  # type: ignore[arg-type]
        a, b = make(), make()
        assert a is not b
        assert a is not spec
        assert not getattr(a, "inplace", False)
    assert inplace.inplace  # the caller's own module is left alone
    nested = build(nn.Sequential(nn.ReLU(inplace=True)))
    x = -torch.ones(2)
    nested(x)
    assert torch.equal(x, -torch.ones(2))


def test_an_unregistered_module_is_described_by_its_class() -> None:
    class Mine(nn.ReLU):
        pass

    with pytest.raises(UnknownNameError, match="Mine"):
        spec_of(Mine())
    assert describe(Mine()).startswith("custom:")
    assert describe(nn.Tanh()) == "tanh"


@pytest.mark.parametrize("name", ["coefficients", "largest", "module", "registry"])
def test_docstring_examples(name: str) -> None:
    import importlib

    result = doctest.testmod(importlib.import_module(f"hessdiag.activations.{name}"), extraglobs={"nn": nn})
    assert result.attempted > 0
    assert result.failed == 0
