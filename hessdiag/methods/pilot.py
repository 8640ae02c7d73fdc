"""What a plan measures rather than guesses, on samples of the first batch whose replicates are thrown away.

How many neighbouring samples to sum before squaring, the balance of the two factors of each product of activations, how
many replicates a tolerance needs, and how many directions memory and rounding allow. What is taken against noise is
chosen by `hessdiag.methods.noise`.
"""

from __future__ import annotations

import bisect
import time

import torch
from torch import Tensor

from hessdiag.graph import Linearisation
from hessdiag.kernels.propagator import Propagator
from hessdiag.kernels.tensors import Tensors, accumulate, wait
from hessdiag.signs import BLOCK, Signs

PILOT_SAMPLES = 2 * BLOCK
"""Samples of the first batch that a pilot looks at: enough to tell groups from single samples."""
DEFLATE = 16
"""Directions per sample squared exactly where signs are noisy: about forty replicates' time, once."""
DEFLATE_BYTES = 1 << 29
"""The directions of all samples are kept, in this many bytes at most."""
DEFLATE_LEAST = 4
LEAST_REPLICATES = 10
ROUNDED = 1e-3
"""Bound of the relative rounding error of what directions give; beyond it all is left to signs, whose spread shows."""
PILOT = 1 << 40  # replicate numbers of the pilot, never those of a measurement


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
        propagator.functional(signs, PILOT)  # first call prepares
        wait(signs.device)
        begun = time.perf_counter()
        pair = [propagator.functional(signs, PILOT + i) for i in (1, 2)]
        wait(signs.device)
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
        s = signs.plain(site.c, PILOT, number) * site.c.abs().sqrt()
        one = [*blank[:number], s, *blank[number + 1 :]]
        strength = []
        for left, right in ((one, blank), (blank, one)):
            found = batch.backward(left, None, parameters, right=right)
            strength.append(sum(float(g.double().square().sum()) for g in found if g is not None))
        a, b = strength
        if a > 0 and b > 0:
            balance[product] = min(max((b / a) ** 0.25, 1e-3), 1e3)
    return balance


def direction_bytes(batch: Linearisation, samples: int) -> float:
    """Bytes of one direction for so many samples like the batch's."""
    return sum(site.c.numel() * site.c.element_size() for site in batch.sites) / batch.samples * samples


def affordable_rank(batch: Linearisation, samples: int) -> int:
    """Directions per sample that `DEFLATE_BYTES` hold for so many samples like the batch's; 0 where too few."""
    size = direction_bytes(batch, samples)
    rank = min(DEFLATE, int(DEFLATE_BYTES / size)) if size else 0
    return rank if rank >= DEFLATE_LEAST else 0


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
    products: Tensor,
    rtol: float,
    *,
    share: float = 1.0,
    cautious: bool = False,
    most: int = 1000,
    quieter: float = 1.0,
) -> int:
    """How many replicates would bring the norm within `rtol` at 95%, if `share` of the samples gave these products.

    The mean of R (R - 1) / 2 products has the variance (2 / (R (R - 1))) (2 (R - 2) z + v). Relative to the square, z
    falls with the number of samples and the rest of v with its square, if no samples dominate; as some always do, with
    the root of that number and with the number are assumed. `cautious` takes z at its largest, v / 2: where the spread
    has heavy tails, a few replicates tell v roughly and z not at all (it may come out negative). Replicates whose
    variance is that of these times `quieter` have z times as much, and the rest of v times its square.
    """
    square, v, z = product_moments(products)
    if square <= 0.0:
        return max(int(most * quieter), LEAST_REPLICATES)
    z = max((v / 2.0 if cautious else z) / square**2, 0.0)
    pure = max(v / square**2 - 2.0 * z, 0.0) * share * quieter**2
    z *= share**0.5 * (quieter**2 if cautious else quieter)

    def within(count: int) -> bool:
        variance = 2.0 / (count * (count - 1)) * (2.0 * (count - 1) * z + pure)
        return bool(0.5 * 1.96 * variance**0.5 <= rtol)

    return LEAST_REPLICATES + bisect.bisect_left(range(LEAST_REPLICATES, most), True, key=within)


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
