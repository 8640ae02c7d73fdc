"""Checkpoints that come with the package."""

from hessdiag.examples.shipped import EXAMPLES, example_path

__all__ = ["EXAMPLES", "example_path"]
