"""One measurement's question: objective, data, what was found of them, plan, seed and the processes that share it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hessdiag.errors import HessdiagError, UncoveredModelError
from hessdiag.graph import Linearisation
from hessdiag.methods.batches import Batches, Numbered, Survey, same_samples
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
    read: Linearisation | HessdiagError | None = field(default=None, repr=False)
    """The linearisation of the first batch, or why there is none; None before anyone asked."""
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
                self.read = Linearisation(self.objective, self.first.inputs, self.first.targets, index=self.first.index)
            except HessdiagError as error:
                self.read = error
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
        few = self.first.few(count)
        return Linearisation(self.objective, few.inputs, few.targets, index=few.index, balance=balance)

    def linearise(self, batch: Numbered) -> Linearisation:
        """A batch under the plan; the one that was read is given away, since nobody needs it any more."""
        balance = self.plan.balance
        read, self.read = self.read, None
        if isinstance(read, Linearisation) and same_samples(batch, self.first):
            read.balance(balance)
            return read
        return Linearisation(self.objective, batch.inputs, batch.targets, index=batch.index, balance=balance)
