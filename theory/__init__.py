"""The mathematics behind curvature and robustness, written out: symbolically and as plain functions.

`theory.symbolic`        E[1]-E[33] of the paper (arXiv 2603.23860) read from their LaTeX, derived, proved, or
                         refuted, in sympy
`theory.path_expansion`  E[28], E[30], E[31] and the exact recursion, for any fully connected net
`theory.hessian_diagonal` E[7], E[9], E[32], E[33]: whole diagonals, any loss, exact beside printed
`theory.error`           how far the printed form is off, by layer, depth, width and activation
`theory.rescaling`       what alpha changes (coordinates) and what it leaves alone (the function)
`theory.estimators`      closed forms for the variance and bias of stochastic diagonals and norms
`theory.dynamics`        covariance of SGD near a minimum, stationary and transient
`theory.claims`          every claim of the paper, and of docs/derivation.md; verdicts are computed elsewhere

`python -m theory E27` prints the symbolic check of one equation.
"""
