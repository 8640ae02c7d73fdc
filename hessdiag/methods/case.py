"""One measurement's question: objective, data, what was found of them, plan, seed and the processes that share it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from hessdiag.errors import HessdiagError, UncoveredModelError
from hessdiag.graph import Graph, Linearisation
from hessdiag.graph.reading import detach_guard
from hessdiag.methods.batches import Batches, Numbered, Stamp, Survey
from hessdiag.problem.objective import Objective
from hessdiag.signs import Signs

if TYPE_CHECKING:
    from hessdiag.measuring.ranks import World
    from hessdiag.methods.plan import Plan


@dataclass
class Case:
    """What is measured. The first batch is linearised at most once before the first number: `linear`."""

    objective: Objective
    batches: Batches
    survey: Survey
    first: Numbered
    seed: int
    world: World
    outputs: Tensor | None = field(default=None, repr=False)
    """The model's for the first batch, with their graph, until somebody takes it."""
    stamp: Stamp | None = field(default=None, repr=False)
    """What the first batch held when they were computed."""
    read: Linearisation | HessdiagError | None = field(default=None, repr=False)
    """The linearisation of the first batch, or why there is none; None before anyone asked."""
    longest: Numbered | None = None
    """A few samples of the batch with the most numbers a sample, where the first has fewer: a model may do otherwise
    with long sequences than with short ones.
    """
    chosen: Plan | None = None

    @property
    def plan(self) -> Plan:
        """The plan that was decided on."""
        assert self.chosen is not None
        return self.chosen

    @property
    def linear(self) -> Linearisation:
        """The first batch, linearised; UncoveredModelError where the site identity does not cover it."""
        if self.read is None:
            try:
                self.read = self._linearised(self.first, self.outputs)
            except HessdiagError as error:
                self.read = error.with_traceback(None)  # whose frames hold the graph
        if isinstance(self.read, HessdiagError):
            raise self.read
        return self.read

    @property
    def uncovered(self) -> str | None:
        """Why the site identity does not serve some batch, or None."""
        if self.survey.uncovered:
            return self.survey.uncovered
        try:
            _ = self.linear
        except UncoveredModelError as error:
            return str(error)
        return None

    @property
    def single(self) -> bool:
        """Whether one batch is all there is, so that its graph serves every replicate."""
        return self.survey.batches == 1

    @property
    def signs(self) -> Signs:
        """A source of this case's signs."""
        return Signs(self.seed, self.objective.device)

    def few(self, count: int, balance: Mapping[int, float] | None = None) -> Linearisation:
        """The first samples, `count` of them or all there are, linearised."""
        if count >= len(self.first.targets):
            self.linear.balance(balance or {})
            return self.linear
        return self._linearised(self.first.few(count), None, balance)

    def linearise(self, batch: Numbered) -> Linearisation:
        """A batch under the plan; the one that was read is given away, since nobody needs it any more."""
        balance = self.plan.balance
        read, self.read = self.read, None
        outputs = self.outputs_of(batch)
        if isinstance(read, Linearisation) and outputs is read.outputs:
            read.balance(balance)
            return read
        return self._linearised(batch, outputs, balance)

    def outputs_of(self, batch: Numbered) -> Tensor | None:
        """The outputs of a batch if they are at hand; given away, since nobody needs them any more."""
        outputs, self.outputs = self.outputs, None
        return outputs if outputs is not None and self.stamp is not None and self.stamp.holds(batch) else None

    @property
    def graph(self) -> Graph:
        """That of any sample of the first batch; UncoveredModelError where it cannot be read."""
        if isinstance(self.read, Linearisation):
            return self.read.graph
        if self.outputs is None:
            return self.few(1).graph
        detach_guard(self.outputs)
        return Graph(self.outputs, self.objective.parameters)

    def _linearised(
        self, batch: Numbered, outputs: Tensor | None, balance: Mapping[int, float] | None = None
    ) -> Linearisation:
        return Linearisation(
            self.objective, batch.inputs, batch.targets, index=batch.index, balance=balance, outputs=outputs
        )
