"""`Watch` as a callback of Lightning, of either of its packages: none is imported."""

from __future__ import annotations

from typing import Any

from hessdiag.callbacks.watch import Callback


class LightningWatch(Callback):
    """`Trainer(callbacks=[LightningWatch(batches)])`: the norm at the end of each epoch, by `log_dict` of the module.

    So it reaches every logger of the trainer, the progress bar's metrics, and callbacks that monitor a metric
    ("hessian_rms"). The module itself is the model: `objective=lambda m: Objective(m.net)` takes a part of it.
    """

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Measure and log."""
        if self.due(int(trainer.current_epoch) + 1) and (found := self(module)):
            module.log_dict(found)

    @property
    def state_key(self) -> str:
        """Its name in checkpoints, one for each `name`."""
        return f"{type(self).__name__}[{self.name}]"

    _legacy_state_key = state_key

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the next epoch is measured anew."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take up."""
