"""What a method is: what it needs, costs, plans, computes on a batch, and how it is audited; and the table of them.

A method is one file and one entry of the table. `measure` and `diagonal` ask it and compare no names: a method from
outside (`hessdiag.register_method`) serves both commands, every target, the forecast, and stands behind the audit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hessdiag.errors import ConfigurationError, UnknownNameError, nearest
from hessdiag.kernels.tensors import Tensors
from hessdiag.methods.batches import Numbered, Stamp
from hessdiag.problem.forward import leaves

if TYPE_CHECKING:
    from hessdiag.measuring.audit import Checks
    from hessdiag.measuring.comparisons import AuditEntry
    from hessdiag.methods.case import Case
    from hessdiag.methods.plan import Plan

AUTO = "auto"
TOTAL, GAUSS_NEWTON, FUNCTIONAL = "total", "gauss_newton", "functional"
Tell = Callable[[int, int], None]
HELD = 1 << 24
"""Bytes of what is prepared of several batches that are held between replicates."""


@dataclass(frozen=True)
class Aim:
    """What a plan is made for: a norm within `rtol`, or the mean of so many `replicates`; `open` to another method."""

    rtol: float = 0.05
    replicates: int | None = None
    open: bool = False


@dataclass(frozen=True)
class FirstPass:
    """What one forward pass of the first batch tells a forecast."""

    seconds: float
    graph: int
    """Bytes that autograd keeps."""
    work: float
    """Multiplications in convolutions and linear layers."""
    columns: int
    """Columns of the loss's Hessian factor."""


@dataclass(frozen=True)
class Forecast:
    """The cost of one method. Passes are backward passes over a batch (of exact: directions moved forward)."""

    method: str
    refusal: str | None
    """Why the method does not serve, or None."""
    batches: int
    passes_once: int = 0
    """Per batch, whatever the number of replicates."""
    passes_each: int = 0
    """Per batch and replicate; 0 where nothing is random."""
    multiplications: float | None = None
    """Of exact, over all data."""
    bytes: int = 0
    seconds_once: float = 0.0
    seconds_each: float = 0.0

    def seconds(self, replicates: int) -> float:
        """Time with so many replicates."""
        return self.seconds_once + self.seconds_each * replicates

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class Work:
    """A method at work on the batches of one `case`: sums over a batch's samples, not yet divided by their weight."""

    hands_over: bool = False
    """Whether the tensors that `known` returns are the caller's to change."""

    def __init__(self, case: Case) -> None:
        self.case, self.signs = case, case.signs
        self._kept: dict[int, tuple[int, Stamp | None, Any]] = {}  # by first sample; no stamp where there is one batch
        self._held: dict[int, float] = {}

    def known(self, batch: Numbered, tell: Tell) -> dict[str, Tensors]:
        """What one pass over `batch` gives exactly, by part of `Method.known`; `tell(done, total)` is progress."""
        raise ConfigurationError(self._lacks("known(batch, tell)", "deterministic = True"))

    def replicate(self, batch: Numbered, r: int) -> dict[str, Tensors]:
        """Replicate `r` of `Method.streams` for `batch`, unbiased, keyed by (seed, r, sample numbers)."""
        raise ConfigurationError(self._lacks("replicate(batch, r)", "deterministic = False"))

    def known_parts(self, batch: Numbered, tell: Tell) -> dict[str, Tensors]:
        """`known` of `batch`, with `tell`, where every part has the parameters' names and shapes; else a refusal."""
        found, wanted = self.known(batch, tell), find(self.case.plan.method).known(self.case.plan)
        self._check("known(batch, tell)", found, wanted)
        return {part: found[part] for part in wanted}

    def drawn_streams(self, batch: Numbered, r: int) -> dict[str, Tensors]:
        """`replicate` `r` of `batch`, where every stream has the parameters' names and shapes; else a refusal."""
        found, wanted = self.replicate(batch, r), find(self.case.plan.method).streams(self.case.plan)
        self._check("replicate(batch, r)", found, wanted)
        return {stream: found[stream] for stream in wanted}

    def _lacks(self, call: str, kind: str) -> str:
        return f"method {self.case.plan.method!r} has {kind}, and its work {type(self).__name__} no {call}"

    def _check(self, call: str, found: Any, wanted: tuple[str, ...]) -> None:
        """Refuse what is no dictionary of the `wanted` dictionaries of tensors like the parameters."""
        who, parameters = f"method {self.case.plan.method!r}: {call} gives", self.case.objective.parameters
        if not isinstance(found, Mapping) or not set(wanted) <= set(found):
            told = list(found) if isinstance(found, Mapping) else _kind(found)
            raise ConfigurationError(
                f"{who} {told}, where a dictionary with {list(wanted)} is wanted, and in each a tensor by the name of "
                "every parameter"
            )
        for part in wanted:
            given = found[part]
            if not isinstance(given, Mapping):
                raise ConfigurationError(
                    f"{who} {_kind(given)} as {part!r}, no dictionary of tensors by parameter name"
                )
            lacking, unknown = [[n for n in a if n not in b] for a, b in ((parameters, given), (given, parameters))]
            if lacking or unknown:
                told = f"nothing for parameter {lacking[0]!r}" if lacking else f"{unknown[0]!r}, no chosen parameter,"
                raise ConfigurationError(f"{who} {told} in {part!r}; a tensor for each parameter is wanted")
            for name, parameter in parameters.items():
                value = given[name]
                if not isinstance(value, Tensor) or value.shape != parameter.shape:
                    told = f"shape {list(value.shape)}" if isinstance(value, Tensor) else _kind(value)
                    raise ConfigurationError(
                        f"{who} {told} for {name!r} in {part!r}; a tensor of the parameter's shape "
                        f"{list(parameter.shape)} is wanted"
                    )

    def kept(self, batch: Numbered, make: Callable[[], Any]) -> Any:
        """What `make` prepares of `batch`, kept until `spare` or `forget` lets go of it."""
        if self._is_kept(batch):
            return self._kept[batch.start][2]
        self._let_go(batch.start)  # before the next is made: two graphs at once may be too many
        stamp = None if self.case.single else Stamp(batch)
        made = make()
        self._kept[batch.start] = len(batch.targets), stamp, made
        return made

    def _is_kept(self, batch: Numbered) -> bool:
        if batch.start not in self._kept:
            return False
        count, stamp, _ = self._kept[batch.start]
        return count == len(batch.targets) and (stamp is None or stamp.holds(batch))

    def spare(self, batch: Numbered) -> None:
        """Let go of what was kept of `batch`, one of several, unless it fits into `HELD` bytes beside the others."""
        if batch.start in self._kept and batch.start not in self._held:
            size = self.size(self._kept[batch.start][2]) + sum(
                x.numel() * x.element_size() for x in leaves(batch.inputs) if isinstance(x, Tensor)
            )
            if sum(self._held.values()) + size > HELD:
                self._let_go(batch.start)
            else:
                self._held[batch.start] = size

    def size(self, prepared: Any) -> float:
        """Bytes that `prepared` holds besides the batch's inputs; by default nobody knows, and none is held."""
        return float("inf")

    def forget(self) -> None:
        """Let go of what was kept of all batches."""
        self._kept, self._held = {}, {}

    def _let_go(self, start: int) -> None:
        self._kept.pop(start, None)
        self._held.pop(start, None)


class Method:
    """One way to a Hessian diagonal. `name`, `work` and, unless `deterministic`, unbiased replicates are a must."""

    name: str
    work: type[Work]
    deterministic: bool = False
    """One pass gives the diagonal itself, and there are no replicates."""
    sites: bool = False
    """Rests on the site identity: every batch's graph must be covered."""
    singles: bool = False
    """Gives the diagonals of single samples' losses as well: `work` has `per_sample(batch)`."""
    tolerance: float = 1e-8
    """Of its own entries beside Hessian-vector products in float64, relative to the largest (see `audit`)."""

    def refusal(self, case: Case) -> str | None:
        """Why the method does not serve this `case`, or None."""
        return case.uncovered if self.sites else None

    def multiplications(self, case: Case) -> float | None:
        """Of a deterministic method over all data of `case`, held against the budget; None: unknown."""
        return None

    def cost(self, case: Case, first: FirstPass) -> Forecast:
        """Passes, bytes and seconds for `case`, from one pass of its `first` batch."""
        return Forecast(self.name, None, case.survey.batches)

    def plan(self, case: Case, aim: Aim, reason: str) -> Plan:
        """The plan for `case` and `aim`, by a pilot where there is a choice; `reason` says why this method.

        Where the aim is open, that of another method may come instead, if the pilot predicts that it takes less time.
        """
        from hessdiag.methods.plan import Plan, at_once, replicate_groups

        groups, together = replicate_groups(case.objective.size), at_once(case)
        return Plan(self.name, groups=groups, at_once=together, reason=reason)

    def check(self, case: Case, plan: Plan) -> None:
        """Refuse a `plan` that was given and does not fit the `case`."""

    def known(self, plan: Plan) -> tuple[str, ...]:
        """Parts of which one pass under `plan` gives something exactly: "gauss_newton" and "functional", or that."""
        return (GAUSS_NEWTON, FUNCTIONAL) if self.deterministic else ()

    def streams(self, plan: Plan) -> tuple[str, ...]:
        """What is random under `plan`, each averaged by itself: "total", or "functional" where the rest is known."""
        return () if self.deterministic else (TOTAL,)

    def audit(self, checks: Checks) -> list[AuditEntry]:
        """The comparisons of `checks` that are needed; by default of its own numbers with Hessian-vector products."""
        return [checks.symmetry(), *checks.own_entries(self)]


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


_TABLE: dict[str, Method] = {}
METHODS: Mapping[str, Method] = MappingProxyType(_TABLE)
"""Every method by name, in the order of their registration."""


def register_method(method: Method) -> Method:
    """Add `method`, an object of a class derived from `Method`, to those that `measure` and `diagonal` know by name."""
    if not isinstance(method, Method) or not isinstance(getattr(method, "work", None), type):
        raise ConfigurationError("a method is an object of a class derived from hessdiag.Method, with name and work")
    name = getattr(method, "name", None)
    if not isinstance(name, str) or not name.isidentifier() or name == AUTO:
        raise ConfigurationError(f"a method needs a name that is one word, not {name!r}")
    if name in _TABLE:
        raise ConfigurationError(f"there is a method {name!r} already")
    _TABLE[name] = method
    return method


def known(name: str) -> None:
    """Refuse a name that is neither a method's nor "auto"."""
    if name not in (AUTO, *_TABLE):
        raise UnknownNameError(f"unknown method {name!r}; {nearest(str(name), [*_TABLE, AUTO])}")


def find(name: str) -> Method:
    """The method of this name."""
    if name not in _TABLE:
        raise UnknownNameError(f"unknown method {name!r}; {nearest(str(name), [*_TABLE, AUTO])}")
    return _TABLE[name]
