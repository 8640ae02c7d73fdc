"""Activations, layers and sites registered from outside: the page that shows them, and what is done with wrong ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Residual, Tokens, beyond_in_the_mean, dense_diagonal, seeded
from torch import Tensor, nn

import hessdiag as hd
from hessdiag.activations import functions, registry
from hessdiag.errors import AuditError, CheckpointError, ConfigurationError, UncoveredModelError
from hessdiag.graph import Layer, LayerKind, Linearisation, Pointwise, Site, SiteKind, layers, saved, sites
from hessdiag.kernels import exact_batch as exact_module
from hessdiag.kernels.propagator import Propagator
from hessdiag.kernels.tensors import accumulate
from hessdiag.signs import Signs

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
G = torch.Generator().manual_seed(5)
X = torch.randn(12, 6, generator=G, dtype=torch.float64)
Y = torch.randint(0, 3, (12,), generator=G)


@pytest.fixture(autouse=True)
def nothing_stays_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(layers.KINDS, "_kinds", dict(layers.KINDS._kinds))
    monkeypatch.setattr(sites.KINDS, "_kinds", dict(sites.KINDS._kinds))
    for table in (registry._ENTRIES, functions.CURVES):
        for key in table:  # monkeypatch puts back what was there ...
            monkeypatch.setitem(table, key, table[key])  # type: ignore[index]


@pytest.fixture
def fresh() -> Iterator[None]:
    """... and what was not there is taken out here."""
    before = set(registry._ENTRIES), set(functions.CURVES)
    yield
    for table, known in zip((registry._ENTRIES, functions.CURVES), before):
        for key in set(table) - known:  # type: ignore[operator]
            del table[key]  # type: ignore[attr-defined]


pytestmark = pytest.mark.usefixtures("fresh")


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


def agrees_with_dense(model: nn.Module, x: Tensor = X, y: Tensor = Y) -> None:
    truth = dense_diagonal(model, losses, x, y)
    found = hd.diagonal(hd.Objective(model), [(x, y)], method="exact").total
    for name, wanted in truth.items():
        assert torch.allclose(found[name], wanted, rtol=1e-10, atol=1e-10 * float(wanted.abs().max())), name


def agrees_in_the_mean(model: nn.Module, x: Tensor = X, y: Tensor = Y, *, rank: int = 0) -> None:
    """The functional part of propagation with every one-hot vector in the place of the signs, without statistics."""
    objective = hd.Objective(model)
    linear = Linearisation(objective, x, y)
    propagator = Propagator(linear)
    propagator.deflate(Signs(0), rank)
    out = beyond_in_the_mean(propagator)
    for part in (propagator.direct(), propagator.deflated()):
        accumulate(out, part)
    wanted = hd.diagonal(objective, [(x, y)], method="exact").functional
    for name, truth in wanted.items():
        assert torch.allclose(out[name] / len(y), truth, rtol=1e-9, atol=1e-10 * float(truth.abs().max() + 1)), name


# -- the page


def test_the_page_runs_and_its_numbers_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.DOTALL):
        try:
            exec(block, names)
        except UncoveredModelError as error:
            if "MKL FFT error" not in str(error):
                raise
            pytest.skip(f"this version of torch has no second derivative of a spectrum: {error}")  # torch 2.6
    supremum, rms, site, layer, other = (float(line) for line in capsys.readouterr().out.split())
    assert supremum == 5.0
    assert rms > 0
    assert site < 1e-14
    assert layer < 1e-14
    assert other > 0
    agrees_in_the_mean(names["model"], names["x"], names["y"])
    agrees_in_the_mean(names["model"], names["x"], names["y"], rank=3)
    agrees_in_the_mean(names["Maxout"]().double(), names["x"], names["y"])


# -- activations


def squareplus(wrong: float = 1.0) -> dict[str, Any]:
    return {
        "value": lambda x, b: (x + torch.sqrt(x * x + b)) / 2,
        "first": lambda x, b: (1 + x * torch.rsqrt(x * x + b)) / 2,
        "second": lambda x, b: b**wrong / 2 * torch.rsqrt(x * x + b) ** 3,
        "options": {"b": 1.0},
    }


def net(activation: str) -> nn.Module:
    torch.manual_seed(3)
    act = hd.activations.build(activation).double()
    return nn.Sequential(nn.Linear(6, 5), act, nn.Linear(5, 5), act, nn.Linear(5, 3)).double()


def test_a_registered_activation_is_one_site_and_like_any_other() -> None:
    hd.register_activation("squareplus", **squareplus())
    module = hd.activations.build("squareplus:b=0.25")
    assert hd.activations.spec_of(module) == "squareplus:b=0.25"
    assert hd.activations.spec_of(hd.activations.build("squareplus")) == "squareplus"
    assert hd.activations.max_curvature("squareplus:b=0.25") == pytest.approx(1.0, rel=1e-9)
    model = net("squareplus:b=0.25")
    assert len(Linearisation(hd.Objective(model), X, Y).sites) == 2
    agrees_with_dense(model)
    agrees_in_the_mean(model)
    norm = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), module, nn.Linear(5, 3)).double().eval()
    found = hd.measure(hd.Objective(norm), [(X, Y)], method="exact").effective_curvature
    assert found[0].activation == "squareplus:b=0.25"
    assert found[0].mean == pytest.approx(1.0, rel=1e-9)


def test_derivatives_left_out_are_autograds() -> None:
    hd.register_activation("bump", lambda x: x * torch.exp(-x * x))
    agrees_with_dense(net("bump"))
    agrees_in_the_mean(net("bump"))


def test_a_registered_activation_survives_a_checkpoint(tmp_path: Path) -> None:
    hd.register_activation("squareplus", **squareplus())
    model = hd.networks.build("mlp", activation="squareplus:b=0.5", in_features=6, num_classes=3)
    hd.save_checkpoint(tmp_path / "m.pt", model)
    loaded = hd.load_checkpoint(tmp_path / "m.pt").model
    assert torch.equal(loaded(X.float()), model(X.float()))
    del registry._ENTRIES["squareplus"]  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="unknown activation 'squareplus'"):
        hd.load_checkpoint(tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first": lambda x, b: torch.sigmoid(x)}, "first derivative is not that of the function"),
        ({"second": lambda x, b: 0 * x}, "second derivative is not that of the first"),
        ({"second": lambda x, b: x.sum()}, "one of the same shape"),
        ({"second": lambda x, b: x / 0}, "not finite"),
        ({"value": lambda x, b: x.cumsum(0)}, "not elementwise"),
        ({"value": lambda x, b: torch.relu(x).float()}, "elementwise"),
        ({"max_curvature": 1.0}, "reaches 0.5"),
        ({"name": "silu"}, "registered already"),
        ({"name": "swish"}, "registered already"),
        ({"name": "Square Plus"}, "lower-case"),
        ({"options": {"b": 1.0, "forward": 2}}, "cannot be called 'forward'"),
        ({"options": {"b": None}}, "number or a string"),
    ],
)
def test_a_wrong_registration_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"name": "squareplus", **squareplus(), **change}
    with pytest.raises(ConfigurationError, match=message):
        hd.register_activation(arguments.pop("name"), arguments.pop("value"), **arguments)
    assert "squareplus" not in hd.activations.REGISTRY


@pytest.mark.parametrize("off", [1.0, 1e-2, 1e-4])
def test_a_derivative_that_is_right_for_the_defaults_only_is_refused_where_others_are_given(off: float) -> None:
    """Off by so much at b = 0.3; less than two per cent passed the audit of a measurement, and was called exact."""
    given = squareplus()
    right = given["second"]
    given["second"] = lambda x, b: right(x, b) * (1 + off * (b != 1.0))
    hd.register_activation("squareplus", **given)
    module = hd.activations.build("squareplus")
    words = r"activation 'squareplus:b=0.3': the second derivative is not that of the first: at x = "
    with pytest.raises(ConfigurationError, match=words):
        hd.networks.build("mlp", activation="squareplus:b=0.3", in_features=6, num_classes=3)
    with pytest.raises(ConfigurationError, match=words):
        module.b = 0.3
    module.b = 1.0
    agrees_with_dense(net("squareplus"))


@pytest.mark.parametrize("given", ["second", "none"])
@pytest.mark.parametrize("where", [lambda: torch.device("meta"), torch.inference_mode, torch.no_grad])
def test_a_module_may_be_built_where_nothing_is_computed(where: Any, given: str) -> None:
    """On the meta device, as checkpoints are read, and under inference mode; a wrong derivative is refused there, too."""
    right = squareplus(wrong=2.0 if given == "second" else 1.0)
    if given == "none":
        right = {"value": right["value"], "options": right["options"]}
    hd.register_activation("squareplus", **right)
    with where():
        assert repr(hd.activations.build("squareplus")) == "squareplus(b=1.0)"
    if given == "none":
        with where():
            hd.activations.build("squareplus:b=0.3")
        return
    with pytest.raises(ConfigurationError, match=r"squareplus:b=0\.3"), where():
        hd.activations.build("squareplus:b=0.3")


def test_derivatives_are_tested_once_for_each_set_of_options() -> None:
    calls, given = [], squareplus()
    second = given["second"]

    def counted(x: Tensor, b: float) -> Tensor:
        calls.append(b)
        return second(x, b)  # type: ignore[no-any-return]

    hd.register_activation("squareplus", **{**given, "second": counted})
    assert calls == [1.0]
    for _ in range(3):
        hd.networks.build("mlp", activation="squareplus:b=0.5", in_features=6, num_classes=3)
        hd.networks.build("mlp", activation="squareplus", in_features=6, num_classes=3)
    assert calls == [1.0, 0.5]


@pytest.mark.parametrize("method", ["exact", "propagation", "hutchinson"])
def test_the_audit_catches_a_derivative_that_no_grid_was_asked_of(method: str) -> None:
    hd.register_activation("squareplus", **squareplus(wrong=2.0))
    model = net("squareplus")
    hd.measure(hd.Objective(model), [(X, Y)], method=method, max_replicates=10)
    vars(model[1])["b"] = 0.3  # type: ignore[index]
    with pytest.raises(AuditError, match="second derivatives are not the model's"):
        hd.measure(hd.Objective(model), [(X, Y)], method=method)


def swish_function(
    *, keep: bool = True, carry: bool = True, slope: Callable[[Tensor], Tensor] | None = None
) -> type[torch.autograd.Function]:
    class Swish(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
            ctx.save_for_backward(x if keep else torch.sigmoid(alpha * x))
            if carry:
                ctx.alpha = alpha
            ctx.rate = alpha
            return x * torch.sigmoid(alpha * x)

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Any) -> Any:
            (x,), (g,) = ctx.saved_tensors, grad_outputs
            if slope is not None:
                return g * slope(x), None
            s = torch.sigmoid(ctx.rate * x)
            return g * (s + ctx.rate * x * s * (1 - s)), None

    return Swish


def of_swish(function: type[torch.autograd.Function]) -> dict[str, Any]:
    def first(x: Tensor, alpha: float) -> Tensor:
        s = torch.sigmoid(alpha * x)
        return s + alpha * x * s * (1 - s)

    value: Callable[..., Tensor] = lambda x, alpha: function.apply(x, alpha)  # noqa: E731
    return {"value": value, "first": first, "options": {"alpha": 2.0}, "function": function}


def test_a_custom_function_is_known_wherever_the_graph_shows_it() -> None:
    function = swish_function()

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = function.apply(self.a(x), 1.5)
            return self.c(function.apply(self.b(h) - h, 3.0))

    torch.manual_seed(0)
    model = Own().double()
    objective = hd.Objective(model)
    names = [{site.name for site in Linearisation(objective, X, Y).sites}]
    hd.register_activation("my_swish", **of_swish(function))
    names.append({site.name for site in Linearisation(objective, X, Y).sites})
    assert names[0] == names[1] == {"Swish after 'a'", "Swish after 'b'"}
    found = hd.diagonal(objective, [(X, Y)], method="exact").total
    truth = hd.diagonal(objective, [(X, Y)], method="reference").total
    assert all(torch.allclose(found[n], truth[n], rtol=1e-9, atol=1e-12) for n in truth)
    agrees_in_the_mean(model)
    built = hd.activations.build("my_swish:alpha=3")
    assert torch.equal(built(X), function.apply(X, 3.0))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": False}, "does not save its input"),
        ({"carry": False}, "does not carry 'alpha'"),
        ({"slope": lambda x: (x > 0).to(x)}, "another than the one given"),
        (
            {"slope": lambda x: (torch.sigmoid(2 * x) * (1 + 2 * x * torch.sigmoid(-2 * x))).detach()},
            "second derivative",
        ),
    ],
)
def test_a_custom_function_is_admitted_by_test(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        hd.register_activation("my_swish", **of_swish(swish_function(**options)))


@pytest.mark.parametrize("method", ["auto", "exact", "propagation", "hutchinson", "reference"])
def test_formulas_of_a_custom_function_must_be_right_at_the_options_that_a_graph_shows(method: str) -> None:
    """One per cent off away from the default: what rests on autograd alone does not need them, and is right."""
    function = swish_function()
    given = of_swish(function)
    right = given["first"]
    given["first"] = lambda x, alpha: right(x, alpha) * (1 + 0.01 * (alpha != 2.0))

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(function.apply(self.a(x), 1.5))  # type: ignore[no-untyped-call,no-any-return]

    torch.manual_seed(0)
    model = Own().double()
    truth = hd.measure(hd.Objective(model), [(X, Y)], method="reference").rms
    hd.register_activation("my_swish", **given)
    if method in ("auto", "exact", "propagation"):
        with pytest.raises(ConfigurationError, match=r"my_swish:alpha=1.5.*first derivative"):
            hd.measure(hd.Objective(model), [(X, Y)], method=method)
        return
    found = hd.measure(hd.Objective(model), [(X, Y)], method=method, rtol=0.1, max_replicates=100)
    low, high = found.interval
    assert low * (1 - 1e-9) <= truth <= high * (1 + 1e-9)


# -- layers and sites


class Outer(LayerKind):
    """What `Linear` is, told by `match` and `each` alone."""

    name = "outer"
    nodes = frozenset({"AddmmBackward0", "LinearBackward0", "MmBackward0"})
    wrong = 1.0

    @classmethod
    def match(cls, node: Any, graph: Any) -> Layer | None:
        return None

    def each(self, delta: Tensor) -> dict[str, Tensor]:
        node, out = self.layer.node, {}
        d = delta.reshape(self.samples, -1, delta.shape[-1])
        if self.layer.weight:
            found = saved.first_tensor(node, "mat1", "self", "input")
            assert found is not None
            x = found.reshape(self.samples, d.shape[1], -1)
            gradient = torch.einsum("nta,ntb->nab", d, x) * self.wrong
            out[self.layer.weight] = gradient.transpose(1, 2) if self.layer.transposed else gradient
        if self.layer.bias:
            out[self.layer.bias] = d.sum(1)
        return out


@pytest.mark.parametrize(("build", "shape"), [(Tokens, (4, 5)), (Residual, (2, 8, 8))])
def test_what_follows_from_gradients_alone_is_what_the_kinds_know(build: Callable[[], nn.Module], shape: Any) -> None:
    """Squares, J J^T and directions by double backward against every closed form, layer by layer."""
    model = seeded(build)
    x, y = torch.randn(5, *shape, generator=G, dtype=torch.float64), Y[:5]
    objective = hd.Objective(model)
    linear = Linearisation(objective, x, y)
    for layer in linear.layers:

        class Plain(layer.kind):  # type: ignore[misc,name-defined]
            push, gram, ways, directions, summed = (
                getattr(LayerKind, name) for name in ("push", "gram", "ways", "directions", "summed")
            )

        known, plain = layer.on(5), Plain(layer, 5)
        delta = torch.randn(known.out, generator=G, dtype=torch.float64)
        assert torch.allclose(plain.gram(delta), known.gram(delta), rtol=1e-11, atol=1e-11), layer.name
        for name, square in known.summed(delta).items():
            assert torch.allclose(square, plain.each(delta)[name].square().sum(0), rtol=1e-11, atol=1e-12), name
        mine = {
            (n, k): t for n, i, s in plain.directions(objective.parameters, 3) for k, t in _entries(i, s, known.out)
        }
        its = {(n, k): t for n, i, s in known.directions(objective.parameters, 4) for k, t in _entries(i, s, known.out)}
        turned = layer.weight if layer.transposed else None
        if turned is None:
            assert mine.keys() == its.keys()
            assert all(torch.allclose(mine[key], its[key], atol=1e-12) for key in mine), layer.name


def _entries(indices: slice, seed: Any, out: torch.Size) -> Iterator[tuple[int, Tensor]]:
    yield from zip(range(indices.start, indices.stop), seed.dense(out))


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.SiLU(), nn.Linear(5, 3)).double()


def with_outer(monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    """A table in which `Outer` stands for `Linear`."""
    linear = layers.KINDS._kinds["linear"]
    kind = type(
        "Stand",
        (Outer,),
        {"match": classmethod(linear.match.__func__), "carries": classmethod(linear.carries.__func__), "wrong": wrong},
    )
    monkeypatch.setitem(layers.KINDS._kinds, "linear", kind)


def test_a_kind_of_two_methods_gives_the_same_diagonals(monkeypatch: pytest.MonkeyPatch) -> None:
    with_outer(monkeypatch, 1.0)
    assert not Linearisation(hd.Objective(mlp()), X, Y).direct  # no closed share: left to signs
    monkeypatch.setattr(exact_module, "find_chain", lambda batch: None)
    agrees_with_dense(mlp())
    agrees_in_the_mean(mlp())
    agrees_in_the_mean(mlp(), rank=2)


@pytest.mark.parametrize("method", ["exact", "propagation"])
def test_the_audit_catches_a_layer_with_wrong_gradients(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_outer(monkeypatch, 1.01)
    with pytest.raises(AuditError, match=r"squares of layer '\d\.weight'"):
        hd.measure(hd.Objective(mlp()), [(X, Y)], method=method, max_replicates=10)


class Smooth(nn.Module):
    """logaddexp of two branches, and of two functions of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.logaddexp(self.a(x), torch.tanh(self.b(x)))
        u = self.c(h)
        return self.d(torch.logaddexp(torch.sin(u), 2 * u))


class LogAddExp(Pointwise):
    name = "logaddexp"
    nodes = frozenset({"LogaddexpBackward0"})
    live_inputs = 2
    wrong = 1.0

    @classmethod
    def second(cls, node: Any) -> Any:
        p = torch.sigmoid(saved.tensor(node, "self") - saved.tensor(node, "other"))
        c = p * (1 - p)
        return {(0, 0): c, (0, 1): -cls.wrong * c, (1, 1): c}


def test_a_site_of_two_inputs_is_split_or_merged() -> None:
    model = seeded(Smooth)
    agrees_with_dense(model)  # by its backward alone, in blocks
    assert all(
        len(site.legs) == 2 for site in Linearisation(hd.Objective(model), X, Y).sites if "Logaddexp" in site.name
    )
    hd.register_site(LogAddExp)
    sites_ = Linearisation(hd.Objective(model), X, Y).sites
    assert sum(len(site.legs) == 2 for site in sites_) == 1  # the other eigenvalue is zero
    agrees_with_dense(model)
    agrees_in_the_mean(model)
    agrees_in_the_mean(model, rank=2)


class Half(SiteKind):
    """The same told as sites: c = p (1 - p) on da - db."""

    name = "half"
    nodes = frozenset({"LogaddexpBackward0"})

    @classmethod
    def sites(cls, node: Any, adjoint: Tensor, name: str) -> list[Site]:
        p = torch.sigmoid(saved.tensor(node, "self") - saved.tensor(node, "other"))
        a, b = node.next_functions
        return [Site(name, p * (1 - p) * adjoint, ((a, 1.0), (b, -1.0)))]


def test_a_kind_may_tell_its_sites_itself() -> None:
    hd.register_site(Half)
    agrees_with_dense(seeded(Smooth))
    agrees_in_the_mean(seeded(Smooth))


def test_a_kind_derived_from_one_of_the_projects_has_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Softmax's are its backward's, and taken from there; of a kind derived from it they need not be."""

    class Tripled(sites.Softmax):
        @classmethod
        def weights(cls, p: Tensor, adjoint: Tensor, dim: int) -> Tensor:
            return 3 * super().weights(p, adjoint, dim)

    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.Softmax(-1), nn.Linear(5, 3)).double()
    (known,) = Linearisation(hd.Objective(model), X, Y).sites
    monkeypatch.setitem(sites.KINDS._kinds, "softmax", Tripled)
    (found,) = Linearisation(hd.Objective(model), X, Y).sites
    torch.testing.assert_close(found.c, 3 * known.c, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("method", ["exact", "propagation"])
def test_the_audit_catches_a_site_with_wrong_curvature(method: str) -> None:
    hd.register_site(type("Wrong", (LogAddExp,), {"wrong": 1.01}))
    with pytest.raises(AuditError, match=r"(identity|entries) of layer"):
        hd.measure(hd.Objective(seeded(Smooth)), [(X, Y)], method=method, max_replicates=10)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Outer, "'linear' answers for"),
        (type("Nameless", (LogAddExp,), {"name": ""}), "no name"),
        (type("Twice", (Outer,), {"name": "conv", "nodes": frozenset({"XBackward0"})}), "registered already"),
        (type("Nodeless", (Outer,), {"nodes": frozenset()}), "must be a set of names"),
        (type("Texts", (Outer,), {"nodes": "XBackward0"}), "must be a set of names"),
        (type("Bare", (LayerKind,), {"name": "bare", "nodes": frozenset({"XBackward0"})}), "lacks match"),
        (type("Empty", (Pointwise,), {"name": "empty", "nodes": frozenset({"XBackward0"})}), "lacks second"),
        (int, "is a class derived from"),
        (3, "is a class derived from"),
    ],
)
def test_a_kind_that_cannot_serve_is_refused(kind: Any, message: str) -> None:
    register = hd.register_site if isinstance(kind, type) and issubclass(kind, SiteKind) else hd.register_layer
    with pytest.raises(ConfigurationError, match=message):
        register(kind)


# -- the tables are the only place where kinds are told apart


def test_private_attributes_of_autograd_are_read_in_one_module() -> None:
    for path in (ROOT / "hessdiag").rglob("*.py"):
        if path.name != "saved.py":
            assert "_saved_" not in path.read_text(), path


def test_no_kind_is_compared_outside_its_file() -> None:
    for room in ("graph", "kernels", "methods", "measuring", "norm"):
        paths = list((ROOT / "hessdiag" / room).rglob("*.py"))
        assert paths, room
        for path in paths:
            assert not re.search(r"\bkind\s*(==|!=)|\.kind\s+(is|in)\b", path.read_text()), path
