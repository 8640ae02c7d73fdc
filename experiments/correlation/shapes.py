"""Two ways to smooth a curve with one peak: a quadratic in log x, and the best unimodal step function."""

from __future__ import annotations

import numpy as np

from experiments.correlation.coefficients import Array


def quadratic(x: Array, y: Array, weight: Array) -> Array:
    """Coefficients (a, b, c) of the least-squares fit a + b t + c t², t = log x; y may be (..., n)."""
    design = np.stack([np.ones_like(x), np.log(x), np.log(x) ** 2], axis=1)
    root = np.sqrt(weight)
    solution: Array = np.linalg.lstsq(design * root[:, None], (y * root).reshape(-1, len(x)).T, rcond=None)[0]
    return solution.T.reshape(*np.shape(y)[:-1], 3)


def quadratic_peak(coefficients: Array, low: float, high: float) -> Array:
    """Where the quadratic is largest within [low, high]: its vertex, or the better end."""
    a, b, c = np.moveaxis(coefficients, -1, 0)
    ends = np.log([low, high])
    values = [a + b * end + c * end**2 for end in ends]
    with np.errstate(divide="ignore", invalid="ignore"):
        vertex = np.where(c < 0, -b / (2 * np.where(c == 0, np.nan, c)), np.nan)
    inside = np.isfinite(vertex) & (vertex > ends[0]) & (vertex < ends[1])
    return np.exp(np.where(inside, vertex, np.where(values[1] > values[0], ends[1], ends[0])))


def increasing(y: Array, weight: Array) -> tuple[Array, Array]:
    """Best non-decreasing fit to each prefix's full length, and the squared error of every prefix (pool
    adjacent).
    """
    means: list[float] = []
    weights: list[float] = []
    sizes: list[int] = []
    errors = np.zeros(len(y) + 1)
    spent: list[float] = []  # squared error within each pooled block
    for index, (value, mass) in enumerate(zip(y, weight, strict=True)):
        mean, total, size, error = float(value), float(mass), 1, 0.0
        while means and means[-1] >= mean:
            other, amount = means.pop(), weights.pop()
            error += spent.pop() + amount * total / (amount + total) * (other - mean) ** 2
            mean = (other * amount + mean * total) / (amount + total)
            total, size = total + amount, size + sizes.pop()
        means.append(mean)
        weights.append(total)
        sizes.append(size)
        spent.append(error)
        errors[index + 1] = sum(spent)
    return np.repeat(means, sizes), errors


def unimodal(y: Array, weight: Array) -> tuple[Array, int, int]:
    """The least-squares fit that rises and then falls; with the first and last index of its highest step.

    Every split into a rising prefix and a falling suffix is tried by two passes of pooling: the prefix
    errors of y and those of y reversed. The best split needs no constraint between the parts, for its
    larger neighbour is the mode of either.
    """
    _, rising = increasing(y, weight)
    _, falling = increasing(y[::-1], weight[::-1])
    split = int(np.argmin(rising + falling[::-1]))
    left, _ = increasing(y[:split], weight[:split])
    right, _ = increasing(y[split:][::-1], weight[split:][::-1])
    fit = np.concatenate([left, right[::-1]])
    top = np.flatnonzero(fit >= fit.max() - 1e-12 * max(1.0, float(np.abs(fit).max())))
    return fit, int(top[0]), int(top[-1])


def quadratic_weights(x: Array, at: float) -> Array:
    """The weights by which a quadratic in log x, fitted to one value at each x, gives its value at `at`: the fit is
    linear in the values. Fewer than three levels bear a line.
    """
    degree = min(2, len(x) - 1)
    t = np.log(x)
    design = np.vander(t, degree + 1)
    weights: Array = np.vander([np.log(at)], degree + 1)[0] @ np.linalg.pinv(design)
    return weights
