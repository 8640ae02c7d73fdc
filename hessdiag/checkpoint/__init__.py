"""A file becomes a network, and a network a file; tensors and plain values only."""

from hessdiag.checkpoint.contents import CheckpointSummary, TensorEntry, inspect_checkpoint
from hessdiag.checkpoint.save import save_checkpoint
from hessdiag.checkpoint.to_network import Checkpoint, load_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointSummary",
    "TensorEntry",
    "inspect_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
]
