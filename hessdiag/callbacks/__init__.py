"""The norm epoch by epoch, in a loop of one's own, in Lightning and in the Trainer of transformers."""

from hessdiag.callbacks.lightning import LightningWatch
from hessdiag.callbacks.transformers import TrainerWatch
from hessdiag.callbacks.watch import Watch

__all__ = ["LightningWatch", "TrainerWatch", "Watch"]
