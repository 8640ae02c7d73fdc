"""`Watch` as a callback of the Trainer of transformers, which is not imported.

The loggers are callbacks themselves, and stand before ours: only `Trainer.log` reaches all of them. It also clears the
wish to log the epoch's loss, which is therefore put back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from hessdiag.callbacks.watch import Callback
from hessdiag.problem.objective import Objective


def with_logits(model: nn.Module) -> Objective:
    """The cross-entropy of what the model calls its logits; inputs under several names are given by name."""
    return Objective(model, output="logits", forward=_by_name)


class TrainerWatch(Callback):
    """`trainer.add_callback(TrainerWatch(trainer, dataset))`: the norm at the end of each epoch, by `trainer.log`.

    So it reaches every integration of the trainer ("report_to") and `trainer.state.log_history`. Where the trainer has
    a data collator, batches are made by it: give `trainer.get_eval_dataloader()`, or any DataLoader.
    """

    def __init__(
        self, trainer: Any, data: Any, objective: Callable[[Any], Objective] = with_logits, **options: Any
    ) -> None:
        super().__init__(data, objective, **options)
        self.trainer = trainer

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_given: Any) -> None:
        """Measure and log."""
        if self.due(round(state.epoch)) and (found := self(model)):
            wanted = control.should_log
            self.trainer.log(found)
            control.should_log = wanted


def _by_name(model: Any, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
