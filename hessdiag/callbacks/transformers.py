"""`Watch` as a callback of the Trainer of transformers, which is not imported.

The loggers are callbacks themselves, and stand before ours: only `Trainer.log` reaches all of them. It also clears the
wish to log the epoch's loss, which is therefore put back.

What is measured is the loss that is trained. The Trainer takes it from the model, who knows its own convention - a
language model compares each place with the next token - or smooths its labels, or asks a function of the user's. So the
trainer is asked for the loss of the first batch, and of the losses below the one that agrees is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.callbacks.watch import Callback
from hessdiag.errors import ran_out
from hessdiag.feed import Fed
from hessdiag.problem.forward import unwrapped
from hessdiag.problem.objective import Objective
from hessdiag.problem.outputs import meant
from hessdiag.problem.own_loss import alike, batch_mean, number, own_loss


def with_logits(model: nn.Module, loss: str = "cross_entropy", *, output: Any = "logits", **options: Any) -> Objective:
    """A loss of what the model calls its logits; inputs under several names are given by name."""
    return Objective(model, loss, output=output, forward=_by_name, **options)


def _single(returned: Any) -> Any:
    """Logits [N, 1] as [N], for targets [N]."""
    logits = meant(returned, "logits")
    return logits[:, 0] if isinstance(logits, Tensor) and logits.ndim == 2 and logits.shape[1] == 1 else logits


FORMS: dict[str, Callable[..., Objective]] = {
    "cross-entropy": with_logits,
    "cross-entropy of each place and the next token (shift=1)": partial(with_logits, shift=1),
    "binary cross-entropy": partial(with_logits, loss="bce"),
    "squared error": partial(with_logits, loss="mse", output=_single),
}
"""What models of transformers are trained on, by their heads."""


class TrainerWatch(Callback):
    """`trainer.add_callback(TrainerWatch(trainer, dataset))`: the norm at the end of each epoch, by `trainer.log`.

    So it reaches every integration of the trainer ("report_to") and `trainer.state.log_history`. Where the trainer has
    a data collator, batches are made by it: give `trainer.get_eval_dataloader()`, or any DataLoader. The loss is the
    one that the trainer trains, as far as it is one of `FORMS`; a note says which. `objective` measures another; either
    is compared with the trainer's on the first batch, and a difference is warned of.
    """

    def __init__(
        self, trainer: Any, data: Any, objective: Callable[[Any], Objective] = with_logits, **options: Any
    ) -> None:
        super().__init__(data, objective, **options)
        self.trainer = trainer
        self._compared = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_given: Any) -> None:
        """Measure and log."""
        if self.due(round(state.epoch)) and (found := self(model)):
            wanted = control.should_log
            self.trainer.log(found)
            control.should_log = wanted

    def settled(self, objective: Objective, model: nn.Module, fed: Fed) -> Objective:
        """The objective itself, or in place of the default the one that is trained; decided once."""
        if self._compared or objective.model is not unwrapped(model):  # a part of it has no loss to compare with
            return objective
        inputs, targets = objective.check_batch(next(iter(fed)), 0)
        wanted = self._trained(objective, inputs, targets)
        self._compared = True
        if wanted is None:
            return objective
        ours = batch_mean(objective, inputs, targets)
        if self.objective is with_logits:
            forms = self._forms()
            means = {words: batch_mean(form(model), inputs, targets) for words, form in forms.items()}
            words = alike(wanted, means)
            if words is not None:
                self.objective = forms[words]
                if forms[words] is not with_logits:
                    both = f"{wanted:.4g} on the first batch"
                    self.notes = (f"the loss is the {words}, as the trainer's is ({both})",)
                return self.objective(model)
        elif alike(wanted, {"": ours}) is not None:
            return objective
        if ours is not None:
            self._tell(
                f"measured of another loss than the one trained: {ours:.4g} on the first batch, where the trainer has "
                f"{wanted:.4g}; give TrainerWatch(..., objective=...) the loss that is trained",
                depth=5,
            )
        return objective

    def _forms(self) -> dict[str, Callable[..., Objective]]:
        """Those of `FORMS`, with the labels smoothed where the trainer does that."""
        smoothing = getattr(getattr(self.trainer, "args", None), "label_smoothing_factor", 0.0)
        if not isinstance(smoothing, float) or not 0.0 < smoothing <= 1.0:
            return FORMS
        words = f", labels smoothed by {smoothing:g}"
        soft = {name + words: partial(FORMS[name], label_smoothing=smoothing) for name in list(FORMS)[:2]}
        return soft | FORMS

    def _trained(self, objective: Objective, inputs: Any, targets: Tensor) -> float | None:
        """The trainer's loss of a batch; the model's own where the trainer gives none."""
        compute = getattr(self.trainer, "compute_loss", None)
        if callable(compute):
            first = getattr(objective.model, "main_input_name", "input_ids")
            named = dict(inputs) if isinstance(inputs, Mapping) else {first: inputs}
            try:
                with torch.no_grad():
                    found = number(compute(objective.model, named | {self.targets or "labels": targets}))
            except Exception as error:  # whatever its code makes of a batch that it was not written for
                if ran_out(error):
                    raise
                found = None
            if found is not None:
                return found
        return own_loss(objective, inputs, targets)


def _by_name(model: Any, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
