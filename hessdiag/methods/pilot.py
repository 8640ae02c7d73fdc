"""What a plan measures rather than guesses, on samples of the first batch whose replicates are thrown away.

How many neighbouring samples to sum before squaring, how many directions per sample to take out of the signs, the
balance of the two factors of each product of activations, and which layers are left to products rather than signs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hessdiag.errors import UncoveredModelError
from hessdiag.graph import Linearisation, edge_shape
from hessdiag.kernels.probes import Probes
from hessdiag.kernels.propagator import Propagator
from hessdiag.kernels.tensors import Tensors, accumulate
from hessdiag.methods.base import Aim
from hessdiag.signs import BLOCK, Signs

PILOT_SAMPLES = 2 * BLOCK
"""Samples of the first batch that a pilot looks at: enough to tell groups from single samples."""
DEFLATE = 16
"""Directions per sample squared exactly where signs are noisy: about forty replicates' time, once."""
DEFLATE_BYTES = 1 << 29
"""The directions of all samples are kept, in this many bytes at most."""
DEFLATE_LEAST = 4
DIRECTION_COST = 2.5
"""Replicates that one direction costs, found and squared (measured: 1.5 to 2.5)."""
DIRECTION_SHARE = 0.75
LEAST_REPLICATES = 10
PILOT_REPLICATES = 8
PROBED_NOISE = 1.0
"""A replicate by signs whose variance is less than this, relative to the squared norm, is quiet enough."""
PROBED_SHARE = 0.1
"""Layers with less of the noise than this are left to signs."""
PROBED_MOST = 3
PROBE_COUNTS = (1, 2, 4)
PROBE_RANK = 16
PROBE_COST = 0.45
"""Replicates by signs that one product at a layer's output costs (measured on a ViT and a GPT)."""
PILOT_ONCE = 30
"""Replicates over which what is done once is spread."""
PROBE_REPLICATES = 4
PROBES_PAY = 1.5
"""Variance times time must fall by this much, so that chance does not decide."""
ROUNDED = 1e-3
"""Bound of the relative rounding error of what directions give; beyond it all is left to signs, whose spread shows."""
_PILOT = 1 << 40  # replicate numbers of the pilot, never those of a measurement


def choose_groups(batch: Linearisation, seed: int, *, candidates: tuple[int, ...] = (1, BLOCK)) -> dict[str, int]:
    """How many samples to sum before squaring, by variance times time of pilot replicates.

    Summing is chosen only where it wins by a factor of two, so that the noise of a clock does not decide.
    """
    summable = [layer.name for layer in batch.layers if layer.kind.sums_samples]
    if not summable or not batch.sites or batch.samples < BLOCK:
        return {}
    signs = Signs(seed, batch.outputs.device)
    cost: dict[int, float] = {}
    for group in candidates:
        propagator = Propagator(batch, groups={layer.name: group for layer in batch.layers})
        propagator.functional(signs, _PILOT)  # first call prepares
        begun = time.perf_counter()
        pair = [propagator.functional(signs, _PILOT + i) for i in (1, 2)]
        seconds = time.perf_counter() - begun
        cost[group] = seconds * _half_difference(*pair)
    best = min(cost, key=lambda g: cost[g])
    if best == 1 or cost[best] * 2.0 > cost[1]:
        return {}
    return {layer.name: best for layer in batch.layers}


def balance_products(batch: Linearisation, seed: int) -> dict[int, float]:
    """Lambda of each pair, so that both halves reach the parameters with equal strength.

    lambda^4 = |J_w^T s|^2 / |J_z^T s|^2 with random signs s on its entries, weighted by sqrt|c|: two backward passes.
    """
    halves = [number for number, site in enumerate(batch.sites) if site.right]
    signs = Signs(seed, batch.outputs.device)
    parameters = list(batch.objective.parameters.values())
    balance: dict[int, float] = {}
    blank: list[Tensor | None] = [None] * len(batch.sites)
    for product, number in enumerate(halves):
        site = batch.sites[number]
        s = signs.plain(site.c, _PILOT, number) * site.c.abs().sqrt()
        one = [*blank[:number], s, *blank[number + 1 :]]
        strength = []
        for left, right in ((one, blank), (blank, one)):
            found = batch.backward(left, None, parameters, right=right)
            strength.append(sum(float(g.double().square().sum()) for g in found if g is not None))
        a, b = strength
        if a > 0 and b > 0:
            balance[product] = min(max((b / a) ** 0.25, 1e-3), 1e3)
    return balance


def choose_probes(
    batch: Linearisation,
    seed: int,
    *,
    samples: int,
    ordered: bool,
    groups: Mapping[str, int] | None = None,
    outer: bool = True,
) -> tuple[dict[str, int], int]:
    """(products a replicate by layer, directions per sample): what makes variance times time least, set-up included.

    The layers in which signs are noisiest are tried with products at their outputs, and with directions of these where
    the samples come in one order (`ordered`) and memory allows. Time is counted in replicates by signs, and no clock is
    read: the same net gets the same plan. ({}, 0) where signs are quiet, or no worse, or no product exists. `outer`:
    the Gauss-Newton part is known exactly.
    """
    if not batch.sites or batch.free:
        return {}, 0
    signs, plain = Signs(seed, batch.outputs.device), Propagator(batch, groups=groups)
    known = plain.direct()
    accumulate(known, plain.gauss_newton() if outer else plain.heads())
    noise, mean = _spread(lambda r: plain.functional(signs, r, outer=not outer))
    total = sum(noise.values())
    size = sum(float((mean[name] + known[name]).square().sum()) for name in mean) - total / PROBE_REPLICATES
    if total <= PROBED_NOISE * size:
        return {}, 0
    shares: dict[str, float] = {}
    entries: dict[str, int] = {}
    for _, layer in Propagator.probed(batch):
        shares[layer.name] = shares.get(layer.name, 0.0) + sum(noise[name] for name in layer.own)
        entries[layer.name] = entries.get(layer.name, 0) + edge_shape((layer.node, 0)).numel()
    noisy = sorted((n for n in shares if shares[n] > PROBED_SHARE * total), key=lambda n: -shares[n])[:PROBED_MOST]
    left: dict[int, dict[str, float]] = {0: {}, PROBE_RANK: {}}
    for name in noisy:
        try:
            probes = Propagator(batch, probes={name: 1}).probes
            probes.check(signs)
            left[0][name] = _noise(probes, signs)
            held = 8 * PROBE_RANK * entries[name] * samples // batch.samples
            if ordered and left[0][name] < shares[name] and held <= DEFLATE_BYTES // PROBED_MOST:
                probes.find(signs, PROBE_RANK)
                left[PROBE_RANK][name] = _noise(probes, signs)
        except UncoveredModelError:  # no product there
            continue
    best, price, chosen = total / PROBES_PAY, 1.0, (dict[str, int](), 0)
    for rank, found in left.items():
        rest, noise_left, each = total, 0.0, 0.0
        for number, name in enumerate(found):
            rest, noise_left = rest - shares[name], noise_left + found[name]
            for count in PROBE_COUNTS:
                each = (number + 1) * PROBE_COST * (count + 2 * rank / PILOT_ONCE)
                cost = (max(rest, 0.0) + noise_left / count) * (1.0 + each)
                if cost < best:
                    best, price, chosen = cost, 1.0 + each, (dict.fromkeys(list(found)[: number + 1], count), rank)
    if not chosen[0]:
        return chosen
    taken = Propagator(batch, groups=groups, probes=chosen[0])  # of a tied table the mixed terms stay with the signs
    if chosen[1]:
        taken.probes.find(signs, chosen[1])
    noise, _ = _spread(lambda r: taken.functional(signs, r, outer=not outer))
    return chosen if math.fsum(noise.values()) * price < total / PROBES_PAY else ({}, 0)


def _noise(probes: Probes, signs: Signs) -> float:
    """Variance of one replicate of products, summed over all entries."""
    return math.fsum(_spread(lambda r: probes.replicate(signs, r))[0].values())


def _spread(draw: Callable[[int], Tensors]) -> tuple[dict[str, float], Tensors]:
    """(variance of one replicate, summed over the entries of each tensor; the mean), from a few.

    One after the other: sum_k (1 - 1/k) |d_k - mean of those before|^2 = (R - 1) variance, and none is kept.
    """
    mean, variance = draw(_PILOT), dict[str, float]()
    for number in range(1, PROBE_REPLICATES):
        for name, found in draw(_PILOT + number).items():
            off = found - mean[name]
            apart = float(off.square().sum()) * number / (number + 1) / (PROBE_REPLICATES - 1)
            variance[name] = variance.get(name, 0.0) + apart
            mean[name] += off / (number + 1)
    return variance, mean


def direction_bytes(batch: Linearisation, samples: int) -> float:
    """Bytes of one direction for so many samples like the batch's."""
    return sum(site.c.numel() * site.c.element_size() for site in batch.sites) / batch.samples * samples


def affordable_rank(batch: Linearisation, samples: int) -> int:
    """Directions per sample that `DEFLATE_BYTES` hold for so many samples like the batch's; 0 where too few."""
    size = direction_bytes(batch, samples)
    rank = min(DEFLATE, int(DEFLATE_BYTES / size)) if size else 0
    return rank if rank >= DEFLATE_LEAST else 0


def choose_rank(
    batch: Linearisation,
    seed: int,
    *,
    samples: int,
    aim: Aim,
    groups: Mapping[str, int] | None = None,
    outer: bool = True,
    probes: Mapping[str, int] | None = None,
) -> int:
    """Directions per sample to square exactly: as many as memory allows, and as pay for themselves.

    Each costs `DIRECTION_COST` replicates, once. They may take `DIRECTION_SHARE` of the time of the replicates that
    the rtol of `aim` could need without them, as far as pilot replicates tell (or make a diagonal of so many replicates
    take that much longer). None where they cannot be found (no double backward), or what they give would be lost in
    rounding. `outer` adds the exact Gauss-Newton part to what the noise is held against.
    """
    rank = affordable_rank(batch, samples)
    if not rank:
        return 0
    propagator, signs = Propagator(batch, groups=groups, probes=probes), Signs(seed, batch.outputs.device)
    known = propagator.direct()
    if outer:
        apart: Tensors = {}
        accumulate(known, propagator.gauss_newton(apart))
        accumulate(known, apart, -1.0)
    if aim.replicates is None:
        products = _products(propagator, signs, known)
        need = replicates_needed(products, aim.rtol, share=batch.samples / samples, cautious=True)
        rank = min(rank, int((DIRECTION_SHARE * need - LEAST_REPLICATES) / DIRECTION_COST))
    else:
        rank = min(rank, int(DIRECTION_SHARE * 2 * aim.replicates / DIRECTION_COST))
    if rank < DEFLATE_LEAST:
        return 0
    try:
        return rank if rounding(propagator, signs, known, DEFLATE_LEAST) <= ROUNDED else 0
    except UncoveredModelError:
        return 0


def _products(propagator: Propagator, signs: Signs, known: Tensors) -> Tensor:
    """<d_i, d_j> of the pilot's replicates."""
    drawn = []
    for number in range(PILOT_REPLICATES):
        found = propagator.functional(signs, _PILOT + number)
        accumulate(found, known)
        drawn.append({name: t.float() for name, t in found.items()})  # half the memory; a pilot needs no more
    out = torch.zeros(len(drawn), len(drawn), dtype=torch.float64, device="cpu")
    for i, a in enumerate(drawn):
        for j, b in enumerate(drawn[: i + 1]):
            out[i, j] = out[j, i] = sum(float((a[name] * b[name]).sum(dtype=torch.float64)) for name in a)
    return out


def product_moments(products: Tensor) -> tuple[float, float, float]:
    """(|d|^2, v, z) without bias from <d_i, d_j> of m >= 4 replicates: their mean, variance, and covariance.

    v is the variance of one product, z the covariance of two that share a replicate; <d_i, d_i> are not looked at.
    """
    m = len(products)
    pairs = products - torch.diag(products.diagonal())
    total, squares, rows = float(pairs.sum()), float(pairs.square().sum()), float(pairs.sum(1).square().sum())
    mean = total / (m * (m - 1))
    apart = (total**2 - 4.0 * rows + 2.0 * squares) / (m * (m - 1) * (m - 2) * (m - 3))
    return mean, squares / (m * (m - 1)) - apart, (rows - squares) / (m * (m - 1) * (m - 2)) - apart


def replicates_needed(
    products: Tensor, rtol: float, *, share: float = 1.0, cautious: bool = False, most: int = 1000
) -> int:
    """How many replicates would bring the norm within `rtol` at 95%, if `share` of the samples gave these products.

    The mean of R (R - 1) / 2 products has the variance (2 / (R (R - 1))) (2 (R - 2) z + v). Relative to the square, z
    falls with the number of samples and the rest of v with its square, if no samples dominate; as some always do, with
    the root of that number and with the number are assumed. `cautious` takes z at its largest, v / 2: where the spread
    has heavy tails, a few replicates tell v roughly and z not at all (it may come out negative).
    """
    square, v, z = product_moments(products)
    if square <= 0.0:
        return most
    z = max((v / 2.0 if cautious else z) / square**2, 0.0)
    pure = max(v / square**2 - 2.0 * z, 0.0) * share
    z *= share**0.5
    for count in range(LEAST_REPLICATES, most):
        variance = 2.0 / (count * (count - 1)) * (2.0 * (count - 1) * z + pure)
        if 0.5 * 1.96 * variance**0.5 <= rtol:
            return count
    return most


def rounding(propagator: Propagator, signs: Signs, known: Tensors, rank: int) -> float:
    """Bound of the exact part's rounding relative to the diagonal: eps |sum of absolute contributions| / |their sum|.

    Halves of a product far out of balance nearly cancel. Signs left to them show it in their spread; a direction,
    squared once, does not. (Seen to be 20 to 100 times the error itself.)
    """
    propagator.deflate(signs, rank)
    absolute, total = propagator.deflated(absolute=True), propagator.deflated()
    accumulate(total, known)
    size, norm = (sum(float(t.square().sum()) for t in tensors.values()) for tensors in (absolute, total))
    eps = torch.finfo(propagator.batch.outputs.dtype).eps
    return eps * float((size / norm) ** 0.5) if norm else 0.0


def _half_difference(a: Tensors, b: Tensors) -> float:
    """Unbiased total variance of one replicate, from two."""
    return 0.5 * sum(float((a[name] - b[name]).square().sum()) for name in a)
