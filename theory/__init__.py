"""The mathematics behind curvature and robustness, written out: symbolically and as plain functions.

`theory.symbolic`        sympy: E[1]-E[33] of the paper (arXiv 2603.23860) derived, proved, or refuted by
subtraction
`theory.path_expansion`  E[28], E[30]-E[33] and the exact recursion, for any fully connected net
`theory.rescaling`       what alpha changes (coordinates) and what it leaves alone (the function)
`theory.estimators`      closed forms for the variance and bias of stochastic diagonals and norms
`theory.dynamics`        covariance of SGD near a minimum, stationary and transient
`theory.claims`          every claim of the paper, numbered; verdicts are computed elsewhere
"""
