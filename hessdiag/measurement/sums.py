"""What a measurement has added up so far, and what it says: sums only, so that they can be saved, merged and resumed.

Exactly known: the Gauss-Newton part (where it was taken exactly) and the functional part, or its direct share.
Random: one `Replicates` for each stream. The rest is where the loop stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..diagonal.parts import Tensors, accumulate, zeros
from ..diagonal.result import Diagonal
from ..norm import NormEstimate, Replicates, estimate
from ..objective import Objective
from ..stream import Survey
from .plan import Plan


class Sums:
    """The state of one measurement."""

    def __init__(self, objective: Objective, plan: Plan, survey: Survey, *, invariant: bool) -> None:
        self.objective, self.plan, self.survey = objective, plan, survey
        parameters = objective.parameters
        theta2 = {n: p.detach().square() for n, p in parameters.items()} if invariant else None
        exact_outer = plan.method == "propagation" and plan.gauss_newton == "exact"
        self.gauss_newton: Tensors | None = zeros(parameters) if plan.deterministic or exact_outer else None
        self.functional: Tensors | None = (
            zeros(parameters) if plan.deterministic or plan.method == "propagation" else None
        )
        self.streams = {
            name: Replicates(parameters, groups=plan.groups, weights=theta2, device=objective.device)
            for name in self._stream_names()
        }
        self.known_done = False
        self.done = 0
        self.history: list[tuple[int, float, float, float]] = []
        self._partial: dict[str, Tensors] = {}
        self._position = 0

    @property
    def has_known(self) -> bool:
        """Whether part of the diagonal comes exactly from one pass."""
        return self.functional is not None

    def offset(self, stream: str) -> Tensors | None:
        """What is known exactly besides the replicates of a stream ("total", "gauss_newton" or "functional").

        The Gauss-Newton part where it was taken exactly, the direct share of the functional part, and weight decay.
        """
        l2 = self.objective.l2 if stream != "functional" else 0.0
        parts = [
            sums
            for sums, kind in ((self.gauss_newton, "gauss_newton"), (self.functional, "functional"))
            if sums is not None and stream in ("total", kind)
        ]
        if not parts and not l2:
            return None
        out = zeros(self.objective.parameters)
        for part in parts:
            accumulate(out, part)
        for tensor in out.values() if l2 else ():
            tensor += l2
        return out

    def stream_of(self, part: str) -> Replicates | None:
        """The replicates that carry what is random of a part (the total's are the functional's where g is exact)."""
        if part in self.streams:
            return self.streams[part]
        return self.streams.get("functional") if part == "total" else None

    def current(self, confidence: float) -> NormEstimate:
        """The norm of the whole diagonal as it stands."""
        stream = self.stream_of("total")
        assert stream is not None
        total = estimate(stream, offset=self.offset("total"), confidence=confidence, sequential=True).total
        if self.history and self.history[-1][0] == total.replicates:  # looked at before, or taken up from a file
            self.history.pop()
        self.history.append((total.replicates, total.rms, total.low, total.high))
        return total

    def diagonal(self, facts: dict[str, Any]) -> Diagonal:
        """The diagonal as it stands, its parts, and standard errors of the total."""
        kind, samples = self.plan.method, self.survey.samples
        if self.plan.deterministic:
            total, outer, inner = (self.offset(part) or {} for part in ("total", "gauss_newton", "functional"))
            errors = {name: torch.zeros_like(t) for name, t in total.items()}
            return Diagonal(total, outer, inner, errors, kind, samples, provenance=facts)
        stream = self.stream_of("total")
        assert stream is not None
        total = stream.mean(offset=self.offset("total"))
        random = self.streams.get("functional")
        inner = {} if random is None else random.mean(offset=self.offset("functional"))
        outer = {name: total[name] - inner[name] for name in inner}
        return Diagonal(
            total,
            outer,
            inner,
            stream.standard_error(),
            kind,
            samples,
            stream.count,
            status="estimate",
            provenance=facts,
        )

    def tensors(self, *, partial: bool) -> dict[str, Tensor]:
        """Everything that was added up, by name; with the replicates under way if asked for."""
        found: dict[str, Tensor] = {}
        for label, sums in (("gauss_newton", self.gauss_newton), ("functional", self.functional)):
            found |= {f"known|{label}|{n}": t for n, t in (sums or {}).items()}
        for stream, replicates in self.streams.items():
            found |= {f"stream|{stream}|{k}": t for k, t in replicates.state_dict().items()}
        for key, sums in self._partial.items() if partial else ():
            found |= {f"partial|{key}|{n}": t for n, t in sums.items()}
        return found

    def place(self, *, partial: bool) -> dict[str, Any]:
        """Where the loop stands, in plain values."""
        return {
            "known_done": self.known_done,
            "done": self.done,
            "position": self._position if partial else 0,
            "partial": list(self._partial) if partial else [],
            "history": self.history,
            "plan": self.plan.to_dict(),
        }

    def load(self, tensors: Mapping[str, Tensor], place: Mapping[str, Any]) -> None:
        """The inverse of `tensors` and `place`; KeyError, TypeError or RuntimeError where they do not fit."""
        for label, sums in (("gauss_newton", self.gauss_newton), ("functional", self.functional)):
            for name, tensor in (sums or {}).items():
                tensor.copy_(tensors[f"known|{label}|{name}"])
        for stream, replicates in self.streams.items():
            prefix = f"stream|{stream}|"
            replicates.load_state_dict({k[len(prefix) :]: t for k, t in tensors.items() if k.startswith(prefix)})
        for key in place["partial"]:
            self._partial[key] = {
                n: tensors[f"partial|{key}|{n}"].to(self.objective.device) for n in self.objective.parameters
            }
        self.known_done, self.done = bool(place["known_done"]), int(place["done"])
        self._position = int(place["position"])
        self.history = [tuple(row) for row in place["history"]]

    def _stream_names(self) -> list[str]:
        if self.plan.deterministic:
            return []
        if self.plan.method == "propagation":
            return ["functional"] if self.plan.gauss_newton == "exact" else ["total", "gauss_newton", "functional"]
        return ["total", "gauss_newton", "functional"] if self.plan.parts else ["total"]
