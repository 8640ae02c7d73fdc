"""Hessian diagonals of a batch by four methods, and the diagonal as a result."""

from .result import Diagonal

__all__ = ["Diagonal"]
