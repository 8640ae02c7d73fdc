"""What α can and cannot do: σ_{α,β}(x) = σ_{1,β}(αx)/α, a net with σ_α *is* one with σ_1 in other
coordinates.

A `Rule` says by which power of α each entry of a state dict is multiplied to get from the net with
σ_{α,β} to the net with σ_{1,β} that computes the same function; θ_k becomes c_k θ_k, c_k = α^power. Then

* gradients are divided by c_k, entries of the Hessian diagonal by c_k² (θ² H_kk stays as it is);
* SGD with momentum and weight decay follows the same trajectory with lr × c_k², decay ÷ c_k², momentum
  buffers ÷ c_k;
* running means go × α, running variances and eps × α² wherever a BatchNorm is fed by scaled activations.

Everything works on names and dicts of tensors; no model is needed. To go back, or between two values of
α, use `factor`: rescale(state, rule, a1 / a2) leads from σ_{a1} to σ_{a2}.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog
from torch import Tensor

from theory._refusals import refuse

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rule:
    """Powers of α: for parameters, for buffers, and for the eps of each BatchNorm (by module name)."""

    parameters: Mapping[str, int]
    buffers: Mapping[str, int]
    eps: Mapping[str, int]


@dataclass(frozen=True)
class StepSizes:
    """Learning rate and weight decay of one parameter after rescaling."""

    lr: float
    weight_decay: float


def batchnorms(names: Iterable[str]) -> tuple[str, ...]:
    """Module names with running statistics, in order: the BatchNorms of a state dict."""
    suffix = ".running_var"
    return tuple(name[: -len(suffix)] for name in names if name.endswith(suffix))


def mlp_rule(names: Sequence[str], layers: Sequence[str]) -> Rule:
    """MLP: (W_1, b_1) × α, middle biases × α, middle weights as they are, W_L ÷ α, b_L as it is.

    `layers` names the linear modules from input to output; with L = 1 there is no activation and nothing
    changes.
    """
    _require(names, [f"{layer}.weight" for layer in layers])
    powers = dict.fromkeys(names, 0)
    for l, layer in enumerate(layers, 1):
        if len(layers) == 1:
            break
        powers[f"{layer}.weight"] = 1 if l == 1 else -1 if l == len(layers) else 0
        if f"{layer}.bias" in powers:
            powers[f"{layer}.bias"] = 0 if l == len(layers) else 1
    return Rule(powers, {}, {})


def resnet_rule(
    names: Sequence[str],
    *,
    stem: str,
    classifier: str,
    norms: Sequence[str] | None = None,
    stem_convolution: str | None = None,
) -> Rule:
    """Post-activation BatchNorm ResNet: BN gain and bias × α, classifier weight ÷ α, convolutions untouched.

    Every BatchNorm but the stem's (`stem`) is fed by scaled activations: running_mean × α, running_var and
    eps × α². Biases of convolutions are × α as well, but the first one's: name it by `stem_convolution` if
    there are any.
    """
    norms = batchnorms(names) if norms is None else norms
    if stem not in norms:
        refuse(f"the stem {stem!r} is no BatchNorm of this net; they are {', '.join(norms)}")
    _require(names, [f"{classifier}.weight"])
    extra = {f"{classifier}.weight": -1, f"{classifier}.bias": 0}
    if stem_convolution is not None:
        extra |= {f"{stem_convolution}.weight": 0, f"{stem_convolution}.bias": 0}
    else:
        loose = [n for n in _biases(names, norms) if n not in extra]
        if loose:
            refuse(f"{loose[0]!r} is a bias beside the BatchNorms': name the first layer as stem_convolution")
    return _batchnorm_rule(names, norms, [n for n in norms if n != stem], extra)


def preact_rule(names: Sequence[str], *, stem: str, classifier: str, norms: Sequence[str] | None = None) -> Rule:
    """Pre-activation ResNet: as `resnet_rule`, but the stem *convolution* (`stem`) is × α, its bias too.

    Every BatchNorm then sees scaled input.
    """
    norms = batchnorms(names) if norms is None else norms
    extra = {f"{stem}.weight": 1, f"{stem}.bias": 1, f"{classifier}.weight": -1, f"{classifier}.bias": 0}
    return _batchnorm_rule(names, norms, norms, extra)


def batchnorm_rule(names: Sequence[str], *, norm: str, layer: str) -> Rule:
    """What feeds one BatchNorm (`layer`, weight and bias) × c, its running mean × c, running variance and eps × c².

    The activation stays as it is: this rescaling keeps the function of the very same architecture.
    """
    _require(names, [f"{layer}.weight"])
    if f"{norm}.running_var" not in names:
        refuse(f"{norm!r} is no BatchNorm with running statistics")
    buffers = {n: 0 for n in names if n.rsplit(".", 1)[-1] in ("running_mean", "running_var", "num_batches_tracked")}
    powers = {n: int(n in (f"{layer}.weight", f"{layer}.bias")) for n in names if n not in buffers}
    eps = {n: 2 if n == norm else 0 for n in batchnorms(names)}
    return Rule(powers, buffers | {f"{norm}.running_mean": 1, f"{norm}.running_var": 2}, eps)


def _biases(names: Sequence[str], norms: Sequence[str]) -> list[str]:
    """Biases of layers that are no BatchNorm."""
    return [n for n in names if n.endswith(".bias") and n[: -len(".bias")] not in norms]


def _batchnorm_rule(
    names: Sequence[str], norms: Sequence[str], scaled: Sequence[str], extra: Mapping[str, int]
) -> Rule:
    if not norms:
        refuse("no BatchNorm (entry ending in .running_var) among the names; an MLP has mlp_rule")
    _require(names, [f"{n}.{part}" for n in norms for part in ("weight", "bias")])
    _require(names, [name for name in extra if name.endswith(".weight")])
    ends = ("running_mean", "running_var", "num_batches_tracked")
    buffers = {name: 0 for name in names if name.rsplit(".", 1)[-1] in ends}
    powers = {name: 0 for name in names if name not in buffers}
    for name in powers:
        if name.rsplit(".", 1)[-1] not in ("weight", "bias"):
            refuse(f"{name!r} is no weight, bias or running statistic: the rule does not cover this net")
    powers |= dict.fromkeys(_biases(names, norms), 1)  # their layers take αh and must give α(Wh + b)
    powers |= {name: power for name, power in extra.items() if name in powers}
    for n in norms:
        powers[f"{n}.weight"] = powers[f"{n}.bias"] = 1
    for n in scaled:
        buffers |= {f"{n}.running_mean": 1, f"{n}.running_var": 2}
    return Rule(powers, buffers, {n: 2 if n in scaled else 0 for n in norms})


def _require(names: Sequence[str], wanted: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in names]
    if missing:
        refuse(f"the rule needs {missing[0]!r}, no entry of this state dict (a BatchNorm must be affine)")


def scales(rule: Rule, factor: float) -> dict[str, float]:
    """c_k for every parameter tensor."""
    if not factor > 0:
        refuse(f"alpha must be positive, got {factor}")
    return {name: float(factor) ** power for name, power in rule.parameters.items()}


def rescale(state: Mapping[str, Tensor], rule: Rule, factor: float) -> dict[str, Tensor]:
    """The state dict in the new coordinates; `factor` = α leads from σ_{α,β} to σ_{1,β}."""
    scales(rule, factor)
    unknown = [n for n in state if n not in rule.parameters and n not in rule.buffers]
    if unknown:
        refuse(f"the rule says nothing of {unknown[0]!r}; make it from the names of this state dict")
    powers = {**rule.parameters, **rule.buffers}
    return {n: t if powers[n] == 0 else t * float(factor) ** powers[n] for n, t in state.items()}


def rescale_eps(eps: Mapping[str, float], rule: Rule, factor: float) -> dict[str, float]:
    """Eps of each BatchNorm; left alone, the function is equal to O(eps/var) only."""
    return {name: value * float(factor) ** rule.eps[name] for name, value in eps.items()}


def rescale_diagonal(diagonal: Mapping[str, Tensor], rule: Rule, factor: float) -> dict[str, Tensor]:
    """H_kk -> H_kk / c_k²: the diagonal of the same loss in the new coordinates."""
    c = scales(rule, factor)
    return {name: h / c[name] ** 2 for name, h in diagonal.items()}


def rescale_optimizer(rule: Rule, factor: float, *, lr: float, weight_decay: float) -> dict[str, StepSizes]:
    """Lr × c², weight decay ÷ c² per parameter: SGD then takes the same trajectory (eps and buffers
    rescaled too).
    """
    return {n: StepSizes(lr * c**2, weight_decay / c**2) for n, c in scales(rule, factor).items()}


def invariant_entries(diagonal: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """θ_k² H_kk: the same in all coordinates of a rule."""
    return {name: state[name] ** 2 * h for name, h in diagonal.items()}


def effective_curvature(gain: Tensor, max_curvature: float) -> Tensor:
    """|γ|·max|σ''| of a BatchNorm-activation pair: the same in all coordinates (γ × α, max|σ''| ÷ α)."""
    return gain.abs() * max_curvature


def root_mean_square(diagonal: Mapping[str, Tensor]) -> float:
    """Right side of E[8]: sqrt((1/p) Σ h²)."""
    p = sum(h.numel() for h in diagonal.values())
    squares = sum(float((h.double() ** 2).sum()) for h in diagonal.values())
    return math.sqrt(squares / p)


def factor_for_norm(diagonal: Mapping[str, Tensor], rule: Rule, ratio: float) -> float:
    """The factor that makes E[8] `ratio` times as large for the very same function, or a refusal.

    With S_e = Σ h² over the entries of power e, the new sum of squares is S_{-1} q + S_0 + S_1/q, q =
    factor⁴. Of the two solutions the one with the smaller factor is returned: a factor below 1 blows the
    scaled groups up.
    """
    sums = {-1: 0.0, 0: 0.0, 1: 0.0}
    for name, h in diagonal.items():
        sums[rule.parameters[name]] += float((h.double() ** 2).sum())
    target = ratio**2 * sum(sums.values())
    rest = target - sums[0]
    if sums[1] == 0 or rest <= 0 or rest**2 < 4 * sums[-1] * sums[1]:
        refuse(f"no rescaling by this rule makes the norm {ratio:g} times as large")
    q = 2 * sums[1] / (rest + (rest**2 - 4 * sums[-1] * sums[1]) ** 0.5)
    return float(q**0.25)


def rescaled_norm(diagonal: Mapping[str, Tensor], rules: Sequence[Rule], factors: Sequence[float]) -> float:
    """E[8] after several rescalings at once: each Σ h² of a tensor is divided by its factors to the power 4."""
    sums, powers = _sums(diagonal, rules)
    p = sum(h.numel() for h in diagonal.values())
    return math.sqrt(float((sums * np.exp(-4 * powers @ np.log(np.asarray(factors, dtype=np.float64)))).sum()) / p)


@dataclass(frozen=True)
class Infimum:
    """The infimum of E[8] over rescalings: its value, the tensors whose share can be made as small as one likes, and
    factors at which the rest is smallest. `attained` where nothing has to vanish.
    """

    value: float
    vanishing: tuple[str, ...]
    factors: tuple[float, ...]
    attained: bool


def infimum(diagonal: Mapping[str, Tensor], rules: Sequence[Rule]) -> Infimum:
    """Inf over c > 0 of p · E[8]² = Σ_g S_g Π_m c_m^(-4 a_gm), g a tensor, a_gm its power in rule m, S_g its Σ h².

    With c = e^t this is Φ(t) = Σ_g S_g exp(-4 a_g·t). A tensor with a_g·t > 0 for a t that raises no other one
    (a_g'·t >= 0 for all g') vanishes along t; one linear programme finds them all. 0 then lies in the relative interior
    of the hull of the other powers, so the rest is a convex function with a minimum (docs/derivation.md, section 5).
    """
    names = [name for name, h in diagonal.items() if float((h.double() ** 2).sum()) > 0]
    sums, powers = _sums({name: diagonal[name] for name in names}, rules)
    p = sum(h.numel() for h in diagonal.values())
    count, moves = powers.shape
    objective = np.concatenate([np.zeros(moves), -np.ones(count)])
    below = np.hstack([-powers, np.eye(count)])
    found = linprog(objective, below, np.zeros(count), bounds=[(None, None)] * moves + [(0, 1)] * count)
    gone = found.x[moves:] > 0.5
    at = _smallest(sums[~gone], powers[~gone])
    rest = float((sums[~gone] * np.exp(-4 * powers[~gone] @ at)).sum())
    vanishing = tuple(name for name, v in zip(names, gone, strict=True) if v)
    return Infimum(math.sqrt(rest / p), vanishing, tuple(np.exp(at).tolist()), not vanishing)


def _sums(diagonal: Mapping[str, Tensor], rules: Sequence[Rule]) -> tuple[Array, Array]:
    sums = np.array([float((h.double() ** 2).sum()) for h in diagonal.values()])
    powers = np.array([[rule.parameters[name] for rule in rules] for name in diagonal], dtype=np.float64)
    return sums, powers.reshape(len(sums), len(rules))


def _log_sum(sums: Array, powers: Array, at: Array) -> float:
    """Ln Σ S e^(-4 a·t), whatever its size."""
    exponents = np.log(sums) - 4 * powers @ at
    top = float(exponents.max())
    return top + math.log(float(np.exp(exponents - top).sum()))


def _smallest(sums: Array, powers: Array) -> Array:
    """Newton's method on the convex ln Σ S e^(-4 a·t); directions in which it is flat are left alone."""
    at = np.zeros(powers.shape[1])
    if len(sums) == 0:
        return at
    value = _log_sum(sums, powers, at)
    for _ in range(200):
        weights = sums * np.exp(-4 * powers @ at - value)
        mean = weights @ powers
        curvature = 16 * ((powers - mean).T * weights) @ (powers - mean)
        step = np.linalg.lstsq(curvature, 4 * mean, rcond=1e-12)[0]
        length = 1.0
        while True:
            after = _log_sum(sums, powers, at + length * step)
            if after <= value or length < 1e-12:
                break
            length /= 2
        if not after < value - 1e-15 * max(abs(value), 1.0):
            break
        at, value = at + length * step, after
    return at
