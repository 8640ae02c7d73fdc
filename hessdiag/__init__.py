"""Exact and stochastic Hessian diagonals of neural networks, and their norms with error bars."""

__version__ = "0.1.0"
