"""The statements of docs/derivation.md: on the symbolic nets from their own formulas, and in float64 for any loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import sympy as sp
import torch
from torch import Tensor

from theory import rescaling
from theory.hessian_diagonal import exact_hessian_diagonal, started_from_loss
from theory.losses import Loss, binary_cross_entropy, cross_entropy, from_callable, half_squared
from theory.net import Net, random_net, run
from theory.path_expansion import (
    exact_recursion,
    hessian_matrices,
    pair_sum,
    paper_recursion,
    site_sum,
)
from theory.symbolic import curvature_at_zero, subtract
from theory.symbolic.rct import alpha
from validation.bridge import (
    ACTIVATIONS,
    TOLERANCE,
    as_model,
    autograd_diagonal,
    deviation,
    engine_diagonal,
    vector,
)
from validation.checks.deep import ANY_DEPTH, REACH, rows_of
from validation.coordinates import (
    Steps,
    batch,
    build,
    counterpart,
    feeds,
    rescaled,
    rescaled_groups,
    rule_of,
    state_gap,
    trajectory,
)
from validation.evidence import Evidence, exactly, measured, zeros
from validation.numbers import special_nets
from validation.register import Run, alike, check

PerSample = Callable[[Tensor, Tensor], Tensor]


def entangled(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss whose Hessian is full and indefinite: no sum over outputs."""
    gap = outputs - targets
    return torch.sin(gap.sum(1)) + (gap**2).prod(1) / 4 + torch.logsumexp(gap * gap.roll(1, 1), 1)


@dataclass(frozen=True)
class Losses:
    """One batch of targets under each loss: name, theory's derivatives, and a plain function for autograd."""

    name: str
    bound: Loss
    plain: PerSample
    targets: Tensor


def losses(samples: int, outputs: int, generator: torch.Generator) -> tuple[Losses, ...]:
    """Squared error, softmax cross-entropy, and one that no formula was written for."""
    y = torch.randn(samples, outputs, generator=generator, dtype=torch.float64)
    classes = torch.randint(outputs, (samples,), generator=generator)
    return (
        Losses("squared", half_squared(y), lambda f, t: ((f - t) ** 2).sum(1) / 2, y),
        Losses(
            "cross-entropy",
            cross_entropy(classes),
            lambda f, t: torch.nn.functional.cross_entropy(f, t, reduction="none"),
            classes,
        ),
        Losses("entangled", from_callable(entangled, y), entangled, y),
    )


@dataclass(frozen=True)
class Deviations:
    """Of one net and loss: H against autograd, entries against autograd, sites and pairs against the recursion, the
    pairs that the printed recursion leaves out against its error, and that error itself, relative to D.
    """

    matrices: float
    entries: float
    sites: float
    pairs: float
    gap: float
    printed: tuple[float, ...]


def autograd_matrices(net: Net, x: Tensor, loss: Losses) -> list[Tensor]:
    """∂²ℓ/∂z^(l)² of every hidden layer by autograd alone, [N, n_l, n_l]."""
    z = run(net, x).z
    found = []
    for l in range(1, net.depth):

        def upper(v: Tensor, n: int, l: int = l) -> Tensor:
            for w, b in zip(net.weights[l:], net.biases[l:], strict=True):
                v = w @ net.activation.sigma(v) + (0 if b is None else b)
            return loss.plain(v[None], loss.targets[n : n + 1])[0]

        rows = [
            torch.autograd.functional.hessian(lambda v, n=n: upper(v, n), z[l][n])  # type: ignore[no-untyped-call]
            for n in range(len(x))
        ]
        found.append(torch.stack(rows))
    return found


def deviations(net: Net, spec: str, x: Tensor, loss: Losses) -> Deviations:
    """See `Deviations`."""
    values = loss.bound(run(net, x).outputs)
    g, curvature = values.gradient, values.hessian
    matrices = hessian_matrices(net, x, cotangent=g, start=curvature)
    truth = autograd_matrices(net, x, loss)
    split = exact_hessian_diagonal(net, x, loss.bound)
    model = as_model(net, spec)
    diagonal = vector(autograd_diagonal(model, x, loss.targets, lambda f, t: loss.plain(f, t).mean()))
    exact = exact_recursion(net, x, cotangent=g).values
    printed = paper_recursion(net, x, cotangent=g).values
    sites, pairs = site_sum(net, x, cotangent=g).values, pair_sum(net, x, cotangent=g).values
    left_out = pair_sum(net, x, cotangent=g, pairs="different").values
    largest = max(float(d.norm()) for d in exact)

    def worst(found: list[tuple[Tensor, Tensor]]) -> float:
        return max(float((a - b).norm()) / largest for a, b in found)

    return Deviations(
        matrices=max((deviation(a, b) for a, b in zip(matrices, truth, strict=True))),
        entries=deviation(split.total.vector(), diagonal, split.gauss_newton.vector(), split.functional.vector()),
        sites=worst(list(zip(sites, exact, strict=True))),
        pairs=worst(list(zip(pairs, exact, strict=True))),
        gap=worst([(d - b, m) for d, b, m in zip(exact, printed, left_out, strict=True)]),
        printed=tuple(float((d - b).norm() / d.norm()) for d, b in zip(exact, printed, strict=True)),
    )


SPECS = ("rct:beta=0,alpha=1.0", "rct:beta=2,alpha=7.0", "tanh")


@lru_cache(maxsize=2)
def cases(quick: bool) -> tuple[Deviations, ...]:
    """Random nets of two to five layers (six without `quick`), every loss."""
    found = []
    for depth in (2, 3, 4, 5) if quick else (2, 3, 4, 5, 6):
        for number, spec in enumerate(SPECS):
            g = torch.Generator().manual_seed(100 * depth + number)
            net = random_net([3, *[3, 2, 4, 3, 2][: depth - 1], 3], ACTIVATIONS[spec], generator=g)
            x = torch.randn(4, 3, generator=g, dtype=torch.float64)
            found += [deviations(net, spec, x, loss) for loss in losses(4, 3, g)]
    return tuple(found)


STATED = {
    "D.recursion": ("H^(l) of the loss, started from ∇²ℓ, equals autograd", "matrices"),
    "D.entry": ("Gauss-Newton part plus c² D equals autograd", "entries"),
    "D.sites": ("the sum over sites equals the recursion", "sites"),
    "D.pairs": ("the sum over pairs of paths equals the recursion", "pairs"),
    "D.gap": ("pairs of different paths equal the error of E[28]", "gap"),
}


def _stated(claim: str, run: Run) -> Evidence:
    """A statement for any depth: term by term on the symbolic nets, and this deviation of random nets and losses."""
    statement, part = STATED[claim]
    values = [getattr(case, part) for case in cases(run.quick)]
    text = f"{statement}, {len(values)} random nets and losses (squared, cross-entropy, one with a full Hessian)"
    found = measured(text, max(values), at_most=TOLERANCE, label="deviation")
    return Evidence(claim, (zeros(rows_of(claim), reach=REACH), found), note=ANY_DEPTH)


alike(
    {
        "D.recursion": "Section 1: the matrix recursion.",
        "D.entry": "Section 1: entries of the diagonal.",
        "D.sites": "Section 2: the recursion unrolled.",
        "D.pairs": "Section 3: pairs of paths.",
        "D.gap": "Section 3: the pairs that E[28] leaves out.",
    },
    _stated,
)


@check("D.scope")
def check_D_scope(run: Run) -> Evidence:
    """Section 4: where E[28] is exact, and that it is not elsewhere."""
    rows = rows_of("E28")
    nets = ((2, 2, 2), (2, 2, 2, 2), (1, 2, 1), (2, 2, 1, 2), (2, 1, 2, 1), (2, 1, 1, 2), (1, 1, 1, 1))
    sharp = all(
        (subtract(widths, layer).difference == 0) == (set(widths[layer : len(widths) - 1]) <= {1})
        for widths in nets
        for layer in range(1, len(widths) + 1)
    )
    top = [error for c in cases(run.quick) for error in c.printed[-2:]]
    below = [error for c in cases(run.quick) for error in c.printed[:-2]]
    found = (
        exactly("E[28] - D = 0 for l >= L-2", all(r.holds for r in rows if r.distance <= 2), reach=REACH),
        exactly("E[28] - D is the zero polynomial exactly where every layer between l and L-1 has one neuron", sharp,
                reach="up to five layers (seven nets)"),
        measured("largest relative error of E[28] at l >= L-2", max(top), at_most=TOLERANCE),
        measured("smallest relative error of E[28] below", min(below), at_least=1e-6),
        *(measured(f"E[28] on a net with {n}", max(c.paper_top, *c.below), at_most=TOLERANCE)
          for n, c in special_nets().items()),
    )  # fmt: skip
    return Evidence("D.scope", found, note=ANY_DEPTH + "; analytic σ with biases")


@check("D.start")
def check_D_start(run: Run) -> Evidence:
    """Section 4: E[28] started from diag ∇²ℓ."""
    g = torch.Generator().manual_seed(12)
    net = random_net([3, 4, 4, 3], ACTIVATIONS["tanh"], generator=g)
    x, y = (torch.randn(6, 3, generator=g, dtype=torch.float64) for _ in range(2))
    classes = torch.randint(3, (6,), generator=g)
    found = []
    for name, loss in (("squared", half_squared(y)), ("binary cross-entropy", binary_cross_entropy(y.sigmoid()))):
        top, below = _start_errors(net, x, loss)
        found.append(measured(f"{name}: error at l = L-1", top, at_most=1e-12))
        found.append(measured(f"{name}: error at l = L-2", below, at_least=1e-4))
    top, _ = _start_errors(net, x, cross_entropy(classes))
    found.append(measured("softmax cross-entropy: error at l = L-1", top, at_least=1e-4))
    return Evidence("D.start", tuple(found))


def _start_errors(net: Net, x: Tensor, loss: Loss) -> tuple[float, float]:
    exact, started = exact_hessian_diagonal(net, x, loss).total, started_from_loss(net, x, loss)
    top, below = (deviation(started.weights[l], exact.weights[l]) for l in (net.depth - 2, net.depth - 3))
    return top, below


@check("D.rescaling")
def check_D_rescaling(run: Run) -> Evidence:
    """Section 5: entries under a change of coordinates."""
    theta, c = sp.symbols("theta c", positive=True)
    other = sp.Function("Lc")
    entry = sp.diff(other(c * theta), theta, 2).doit()
    inner = sp.Symbol("u")
    there = sp.diff(other(inner), inner, 2).subs(inner, c * theta).doit()
    found = [exactly("L(θ) = L'(cθ) gives L''(θ) = c² (L')''(cθ)", sp.simplify(entry - c**2 * there) == 0)]
    for kind, (before, after, rule) in _fed("small_resnet").items():
        one, two = (vector(rescaling.invariant_entries(d, s)) for d, s in (before, after))
        found.append(measured(f"{kind}: θ²H stays", deviation(two, one), at_most=1e-8, label="deviation"))
        wanted = rescaling.rescale_diagonal(before[0], rule, FACTOR)
        gap = max(deviation(after[0][n].double(), wanted[n].double()) for n in wanted)
        found.append(measured(f"{kind}: H becomes H/c²", gap, at_most=1e-8, label="deviation"))
    return Evidence("D.rescaling", tuple(found))


FACTOR = 8.0
Measured = tuple[dict[str, Tensor], dict[str, Tensor]]


@lru_cache(maxsize=2)
def _fed(kind: str) -> dict[str, tuple[Measured, Measured, rescaling.Rule]]:
    """Diagonal and parameters before and after: weights before one BatchNorm × 8, and another α."""
    model = build(kind, 14.0, 1)
    x, y = batch(kind, 4)
    norm, layer = next(iter(feeds(model).items()))
    rule = rescaling.batchnorm_rule(list(model.state_dict()), norm=norm, layer=layer)
    twins = {
        f"weights before {norm} × {FACTOR:g}": (rescaled(model, rule, FACTOR), rule),
        f"α = 14 as α = {14 / FACTOR:g}": (counterpart(kind, model, 14.0, 14.0 / FACTOR, 1), rule_of(kind, model)),
    }

    def measure(net: torch.nn.Module) -> Measured:
        return dict(engine_diagonal(net, x, y, "cross_entropy").total), dict(net.named_parameters())

    return {name: (measure(model), measure(twin), rule) for name, (twin, rule) in twins.items()}


@check("D.unbounded")
def check_D_unbounded(run: Run) -> Evidence:
    """Section 5: no upper bound."""
    c, s = sp.symbols("c S", positive=True)
    model = build("small_resnet", 14.0, 1)
    x, y = batch("small_resnet", 4)
    norm, layer = next(iter(feeds(model).items()))
    rule = rescaling.batchnorm_rule(list(model.state_dict()), norm=norm, layer=layer)
    twin = rescaled(model, rule, 1e-2)
    with torch.no_grad():
        same = deviation(twin(x), model(x))
    one, two = (
        rescaling.root_mean_square(dict(engine_diagonal(m, x, y, "cross_entropy").total)) for m in (model, twin)
    )
    found = (
        exactly("Σ h² of a rescaled tensor, S/c⁴, exceeds every bound as c falls", sp.limit(s / c**4, c, 0) == sp.oo),
        measured("weights before a BatchNorm × 1/100: same outputs", same, at_most=1e-9, label="deviation"),
        measured("E[8] of the very same function over E[8]", two / one, at_least=100.0, label="ratio"),
    )
    return Evidence("D.unbounded", found)


@dataclass(frozen=True)
class Reached:
    """The infimum of a network by `theory.rescaling.infimum`, and what a network near it measures."""

    found: rescaling.Infimum
    measured: float
    function: float
    before: float


@lru_cache(maxsize=2)
def reached(with_alpha: bool) -> Reached:
    """Weights before every BatchNorm × 100, and α moved to where the rest is smallest."""
    kind, a, beta = "small_resnet", 14.0, 1
    model = build(kind, a, beta)
    x, y = batch(kind, 4)
    names = list(model.state_dict())
    rules = [rescaling.batchnorm_rule(names, norm=n, layer=l) for n, l in feeds(model).items()]
    diagonal = dict(engine_diagonal(model, x, y, "cross_entropy").total)
    if with_alpha:
        rules.append(rule_of(kind, model))
    found = rescaling.infimum(diagonal, rules)
    twin = counterpart(kind, model, a, a / found.factors[-1], beta) if with_alpha else model
    for rule in rules[: len(feeds(model))]:
        twin = rescaled(twin, rule, 100.0)
    with torch.no_grad():
        function = deviation(twin(x), model(x))
    rms = rescaling.root_mean_square(dict(engine_diagonal(twin, x, y, "cross_entropy").total))
    return Reached(found, rms, function, rescaling.root_mean_square(diagonal))


@check("D.infimum")
def check_D_infimum(run: Run) -> Evidence:
    """Section 5: the infimum, by formula, by the general algorithm, and by a network that comes near it."""
    plus, zero, minus, q = sp.symbols("S_+ S_0 S_- q", positive=True)
    total = plus / q + zero + minus * q
    best = sp.sqrt(plus / minus)
    flat = sp.simplify(sp.diff(total, q).subs(q, best)) == 0 and bool(sp.diff(total, q, 2).is_positive)
    value = sp.simplify(total.subs(q, best) - (zero + 2 * sp.sqrt(plus * minus))) == 0
    plain, moved = reached(False), reached(True)
    kept = [n for r in (plain, moved) for n in r.found.vanishing if n.startswith("linear")]
    convolutions = [n for n in plain.found.vanishing if "conv" in n or "shortcut.0" in n]
    found = (
        exactly("min over α of S₊/c⁴ + S₀ + c⁴S₋ is S₀ + 2√(S₊S₋), at c⁴ = √(S₊/S₋)", flat and value,
                reach="for one factor (α); for several the general argument of docs/derivation.md"),
        exactly("every convolution before a BatchNorm vanishes, nothing of the classifier does",
                not kept and len(convolutions) == len(plain.found.vanishing) == len(moved.found.vanishing),
                reach="the small residual net"),
        measured("same activation: E[8] of the rescaled network over its infimum", plain.measured / plain.found.value,
                 at_least=1 - 1e-9, at_most=1 + 1e-6, label="ratio"),
        measured("any α: E[8] of the rescaled network over its infimum", moved.measured / moved.found.value,
                 at_least=1 - 1e-9, at_most=1 + 1e-6, label="ratio"),
        measured("both compute the same function", max(plain.function, moved.function), at_most=1e-9,
                 label="deviation"),
    )  # fmt: skip
    shares = f"infimum over E[8] as built: {plain.found.value / plain.before:.3g} with the same activation, "
    shares += f"{moved.found.value / moved.before:.3g} with any α"
    return Evidence("D.infimum", found, note=shares)


@check("D.trajectory")
def check_D_trajectory(run: Run) -> Evidence:
    """Section 6: one step of SGD in both coordinates, hence all; and 20 steps of a network."""
    theta, c, v, g, lr, decay, mu = sp.symbols("theta c v g eta lambda mu", positive=True)
    velocity = mu * v + g + decay * theta
    here = theta - lr * velocity
    other = mu * v / c + g / c + (decay / c**2) * (c * theta)
    there = c * theta - lr * c**2 * other
    same = sp.expand(there - c * here) == 0 and sp.expand(other - velocity / c) == 0
    model, steps = build("small_resnet", 14.0, 1, seed=2), Steps()
    twin = counterpart("small_resnet", model, 14.0, 14.0 / FACTOR, 1)
    rule = rule_of("small_resnet", model)
    groups = rescaled_groups(twin, rule, FACTOR, steps)
    trajectory("small_resnet", model, steps)
    trajectory("small_resnet", twin, steps, groups)
    found = (
        exactly("θ' = cθ and v' = v/c after a step if they are so before: lr × c², decay ÷ c²", same),
        measured("20 steps, momentum and decay", state_gap(model, twin, rule, FACTOR), at_most=1e-8, label="deviation"),
    )
    return Evidence("D.trajectory", found)


@check("D.effective")
def check_D_effective(run: Run) -> Evidence:
    """Section 6: |γ| max|σ''| is the same for every α."""
    c, gain = sp.symbols("c gamma", positive=True)
    gaps = [c * gain * curvature_at_zero(b).subs(alpha, alpha / c) - gain * curvature_at_zero(b) for b in (0, 1, 2)]
    x = sp.Symbol("x", real=True)
    shape = sp.Function("s")
    bend = sp.diff(shape(gain * x), x, 2).doit()
    inner = sp.Symbol("u")
    there = gain**2 * sp.diff(shape(inner), inner, 2).subs(inner, gain * x).doit()
    found = (
        exactly("(cγ) max|σ''_{α/c}| = γ max|σ''_α|, β = 0, 1, 2", all(sp.simplify(gap) == 0 for gap in gaps)),
        exactly("in units of the normalised input σ'' is γ² σ''", sp.simplify(bend - there) == 0),
    )
    return Evidence("D.effective", found, note="measured: python -m validation --study stored")


@check("D.input-curvature")
def check_D_input_curvature(run: Run) -> Evidence:
    """Section 7: one set of weights c_j for the curvature in the input and in the parameters."""
    worst = 0.0
    for number, spec in enumerate(SPECS):
        g = torch.Generator().manual_seed(70 + number)
        net = random_net([4, 5, 4, 3, 3], ACTIVATIONS[spec], generator=g)
        x = torch.randn(5, 4, generator=g, dtype=torch.float64)
        for loss in losses(5, 3, g):
            worst = max(worst, input_gap(net, x, loss))
    text = "diag ∇²_x ℓ = Gauss-Newton part + Σ_j c_j (∂z_j/∂x)², c_j = σ''(z_j) S_j, against autograd"
    return Evidence("D.input-curvature", (measured(text, worst, at_most=TOLERANCE, label="deviation"),))


def input_gap(net: Net, x: Tensor, loss: Losses) -> float:
    """The site sum for the input against autograd, whole diagonal of each sample."""
    trace = run(net, x)
    values = loss.bound(trace.outputs)
    delta = values.gradient
    adjoints: list[Tensor] = []
    for l in range(net.depth - 1, 0, -1):
        adjoints.insert(0, delta @ net.weights[l])
        delta = adjoints[0] * trace.slope[l]
    jacobian = net.weights[0].expand(len(x), -1, -1)
    total = torch.zeros_like(x)
    for l in range(1, net.depth):
        total = total + ((trace.curvature[l] * adjoints[l - 1]).unsqueeze(2) * jacobian**2).sum(1)
        jacobian = net.weights[l] @ (trace.slope[l].unsqueeze(2) * jacobian)
    total = total + ((values.hessian @ jacobian) * jacobian).sum(1)

    def whole(v: Tensor, n: int) -> Tensor:
        return loss.plain(run_free(net, v[None]), loss.targets[n : n + 1])[0]

    rows = [
        torch.autograd.functional.hessian(lambda v, n=n: whole(v, n), x[n]).diagonal()  # type: ignore[no-untyped-call]
        for n in range(len(x))
    ]
    return deviation(total, torch.stack(rows))


def run_free(net: Net, x: Tensor) -> Tensor:
    """Outputs through σ alone, for autograd."""
    for l, (w, b) in enumerate(zip(net.weights, net.biases, strict=True)):
        x = (x if l == 0 else net.activation.sigma(x)) @ w.T + (0 if b is None else b)
    return x
