"""What a measurement has added up so far, and what it says: sums only, so that they can be saved, merged and resumed.

Exactly known: the Gauss-Newton part (where it was taken exactly) and the functional part, or its direct share.
Random: one `Replicates` for each stream. The rest is where the loop stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import frexp
from typing import Any

import torch
from torch import Tensor

from hessdiag.kernels.tensors import Tensors, accumulate, zeros
from hessdiag.measuring.diagonal import Diagonal
from hessdiag.methods import Case, find
from hessdiag.methods.base import FUNCTIONAL, GAUSS_NEWTON, TOTAL
from hessdiag.norm import NormEstimate, Replicates, course


class Sums:
    """The state of one measurement."""

    def __init__(self, case: Case, *, invariant: bool) -> None:
        self.case, self.objective, self.plan, self.survey = case, case.objective, case.plan, case.survey
        self.method = find(self.plan.method)
        parameters = self.objective.parameters
        theta2 = {n: p.detach().square() for n, p in parameters.items()} if invariant else None
        self.known: dict[str, Tensors] = {}
        """Sums of what is known exactly, by part, as far as batches have been added."""
        self._own = False  # the first batch's tensors may belong to whoever made them
        self.streams = {
            name: Replicates(parameters, groups=self.plan.groups, weights=theta2, device=self.objective.device)
            for name in self.method.streams(self.plan)
        }
        self.known_done = False
        self.done = 0
        self.history: list[tuple[int, float, float, float]] = []
        self._partial: dict[str, Tensors] = {}
        self._position = 0

    @property
    def has_known(self) -> bool:
        """Whether part of the diagonal comes exactly from one pass."""
        return bool(self.method.known(self.plan))

    def add_known(self, found: Mapping[str, Tensors], *, own: bool) -> None:
        """Count one batch: of the parts of `Method.known`, each in float64; `own` if its tensors may be changed."""
        begun = bool(self.known)
        for part in self.method.known(self.plan):
            fresh = {name: t.detach().to(torch.float64) for name, t in found[part].items()}
            before = self.known.get(part)
            if before is None:
                self.known[part] = fresh
            elif self._own:
                accumulate(before, fresh)
            else:
                self.known[part] = {name: t + fresh[name] for name, t in before.items()}
        self._own = own or begun

    def divide_known(self) -> None:
        """From sums to means over the data; by a power of two a product gives the same bits in less time."""
        weight = self.survey.weight
        exact = frexp(weight)[0] == 0.5
        for part in self.method.known(self.plan):
            sums = self.known[part]
            if not self._own:
                self.known[part] = {name: t / weight for name, t in sums.items()}
                continue
            for tensor in sums.values():
                tensor.mul_(1.0 / weight) if exact else tensor.div_(weight)

    def offset(self, stream: str) -> Tensors | None:
        """What is known exactly besides the replicates of a stream ("total", "gauss_newton" or "functional").

        The Gauss-Newton part where it was taken exactly, the direct share of the functional part, and weight decay.
        """
        l2 = self.objective.l2 if stream != FUNCTIONAL else 0.0
        parts = [self.known[part] for part in self.method.known(self.plan) if stream in (TOTAL, part)]
        if len(parts) == 2:
            return {name: (t + parts[1][name]).add_(l2) if l2 else t + parts[1][name] for name, t in parts[0].items()}
        if len(parts) == 1:
            return {name: t + l2 for name, t in parts[0].items()} if l2 else parts[0]
        return {name: t.fill_(l2) for name, t in zeros(self.objective.parameters).items()} if l2 else None

    def stream_of(self, part: str) -> Replicates | None:
        """The replicates that carry what is random of a part (the total's are the functional's where g is exact)."""
        if part in self.streams:
            return self.streams[part]
        return self.streams.get("functional") if part == "total" else None

    def current(self, confidence: float) -> NormEstimate:
        """The norm of the whole diagonal as it stands; the first look also tells how it came to it."""
        stream = self.stream_of("total")
        assert stream is not None
        looks = course(stream, offset=self.offset("total"), confidence=confidence)
        if self.history:
            looks = looks[-1:]
            if self.history[-1][0] == looks[0].replicates:  # looked at before, or taken up from a file
                self.history.pop()
        self.history += [(look.replicates, look.rms, look.low, look.high) for look in looks]
        return looks[-1]

    def diagonal(self, facts: dict[str, Any]) -> Diagonal:
        """The diagonal as it stands, its parts, and standard errors of the total."""
        kind, samples = self.plan.method, self.survey.samples
        if self.method.deterministic:
            total, outer, inner = (self.offset(part) or {} for part in (TOTAL, GAUSS_NEWTON, FUNCTIONAL))
            errors = {name: t.new_zeros(()).expand(t.shape) for name, t in total.items()}
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
        for label, sums in self.known.items():
            found |= {f"known|{label}|{n}": t for n, t in sums.items()}
        for stream, replicates in self.streams.items():
            found |= {f"stream|{stream}|{k}": t for k, t in replicates.state_dict().items()}
        for key, sums in self._partial.items() if partial else ():
            found |= {f"partial|{key}|{n}": t for n, t in sums.items()}
        return found

    def shares(self) -> Iterator[tuple[str, Tensor]]:
        """What is under way, of which each of several processes holds a share: the same names in the same order."""
        for label in () if self.known_done else self.method.known(self.plan):
            held = self.known.get(label)
            for name, parameter in self.objective.parameters.items():
                nothing = torch.zeros(parameter.shape, dtype=torch.float64, device=parameter.device)
                yield f"known|{label}|{name}", nothing if held is None else held[name]
        for key, sums in self._partial.items():
            yield from ((f"partial|{key}|{name}", tensor) for name, tensor in sums.items())

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
        begun = bool(place["known_done"]) or int(place["position"]) > 0
        for label in self.method.known(self.plan) if begun else ():
            self.known[label] = {
                name: tensors[f"known|{label}|{name}"].to(p.device, torch.float64).reshape(p.shape)
                for name, p in self.objective.parameters.items()
            }
        self._own = True
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
