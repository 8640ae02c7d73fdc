"""Running sums of independent diagonals: all that a norm, its error, a trace and per-entry errors need.

A *replicate* is one unbiased estimate of a Hessian diagonal, already summed over all batches. Replicate `r`
falls into group `r % groups`, whichever process made it, so that the sums of several processes or of several
sittings add up to the same state. Memory: 8 * groups * p bytes for p parameters, however many replicates
come, and what `moments.chunk` says beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from hessdiag.errors import ConfigurationError, DtypeError, NonFiniteError, NoParametersError, ResumeError
from hessdiag.norm.moments import Moments, chunk, quarters, tensor_moments

Target = Literal["data", "population"]
CAPACITY = 1 << 16
"""Replicates are numbered below this; one byte each, so that none is ever counted twice."""


class Replicates:
    """Accumulates replicates of a diagonal in float64, in groups, mergeable by addition.

    `like` gives names and shapes (the parameters, or any tensors shaped like them); `weights`, one tensor per
    name, asks for the norm of the weighted entries `w * d` beside the plain one (w = theta^2: the norm that
    rescaling leaves alone). `target="population"` says that replicates are independent in data as well, which
    rules out an exact offset.
    """

    def __init__(
        self,
        like: Mapping[str, Tensor],
        *,
        groups: int = 16,
        weights: Mapping[str, Tensor] | None = None,
        target: Target = "data",
        device: torch.device | str = "cpu",
    ) -> None:
        if not like:
            raise NoParametersError("replicates of nothing: no parameter was given")
        if not isinstance(groups, int) or groups < 4:
            raise ConfigurationError(f"groups={groups!r}: at least 4 groups of replicates are needed")
        if target not in ("data", "population"):
            raise ConfigurationError(f"target={target!r}: known: data, population")
        self.shapes = {name: tensor.shape for name, tensor in like.items()}
        for name, shape in self.shapes.items():
            if shape.numel() == 0:
                raise NoParametersError(f"parameter {name!r} has no entries: leave it out")
        self.groups, self.target, self.device = groups, target, torch.device(device)
        self.weights = None
        if weights is not None:
            self._check(weights, "weights")
            self.weights = {name: weights[name].detach() for name in self.shapes}

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=self.device)

        # The whole state: sums over replicates and nothing else, so that states add.
        self._sums = {name: zeros(groups, shape.numel()) for name, shape in self.shapes.items()}
        self._squares = zeros(len(self.shapes), groups)
        self._weighted = zeros(len(self.shapes), groups)
        self._traces = zeros(2, groups)
        self._seen = torch.zeros(CAPACITY, dtype=torch.uint8, device=self.device)

    def add(self, replicate: Mapping[str, Tensor], index: int) -> None:
        """Count replicate number `index`; all of it or, where something is wrong with it, nothing of it."""
        if not 0 <= index < CAPACITY:
            raise ConfigurationError(f"replicate {index}: replicates are numbered from 0 to {CAPACITY - 1}")
        if self._seen[index]:
            raise ConfigurationError(f"replicate {index} is counted already: replicates must be independent")
        self._check(replicate, f"replicate {index}")
        squares, weighted, traces, step = [], [], [], chunk(self.device)
        for name in self.shapes:
            flat = replicate[name].detach().reshape(-1)
            theta = None if self.weights is None else self.weights[name].reshape(-1)
            square, heavy, trace = self._traces.new_zeros(3)
            for start in range(0, flat.numel(), step):
                values = self._double(flat[start : start + step])
                square, trace = square + values.dot(values), trace + values.sum()
                if theta is not None:
                    values = values * self._double(theta[start : start + step])
                    heavy = heavy + values.dot(values)
            squares.append(square)
            weighted.append(heavy)
            traces.append(trace)
        own, own_weighted, trace = torch.stack(squares), torch.stack(weighted), torch.stack(traces).sum()
        wrong = (~torch.isfinite(own + own_weighted)).nonzero().reshape(-1).tolist()
        if wrong:
            names = ", ".join(repr(list(self.shapes)[i]) for i in wrong[:3])
            raise NonFiniteError(f"replicate {index} holds NaN, Inf or values too large to square in {names}")
        group = index % self.groups
        for name in self.shapes:
            self._sums[name][group].add_(replicate[name].detach().reshape(-1).to(self.device))
        self._squares[:, group] += own
        self._weighted[:, group] += own_weighted
        self._traces[:, group] += torch.stack([trace, trace * trace])
        self._seen[index] = 1

    def merge(self, other: Replicates) -> Replicates:
        """Count the replicates of another accumulator of the same parameters too; returns itself."""
        same = self.shapes == other.shapes and self.groups == other.groups and self.target == other.target
        if not same or list(self.shapes) != list(other.shapes):
            raise ConfigurationError("replicates to merge differ in parameters, groups or target")
        if (self.weights is None) != (other.weights is None):
            raise ConfigurationError("replicates to merge: one has entry weights, the other has none")
        if self.weights is not None and other.weights is not None:
            for name, weight in self.weights.items():
                if not torch.equal(weight.to(self.device), other.weights[name].to(self.device)):
                    raise ConfigurationError(f"replicates to merge have different entry weights for {name!r}")
        both = (self._seen * other._seen.to(self.device)).nonzero().reshape(-1).tolist()
        if both:
            raise ConfigurationError(f"replicates to merge share number {both[0]} ({len(both)} in all)")
        for mine, theirs in zip(self.state_dict().values(), other.state_dict().values()):
            mine += theirs.to(self.device)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """The state as named tensors, all of them sums: adding is merging. Shares memory, as modules do."""
        state = {f"sum.{name}": total for name, total in self._sums.items()}
        return state | {
            "squares": self._squares,
            "weighted": self._weighted,
            "traces": self._traces,
            "seen": self._seen,
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take a stored state in place of the present one; refused as a whole where it does not fit."""
        mine = self.state_dict()
        odd = sorted(set(mine) ^ set(state))
        if odd:
            raise ResumeError(f"stored replicates are of other parameters: {odd[0]!r} is on one side only")
        for key, tensor in mine.items():
            if state[key].shape != tensor.shape or state[key].dtype != tensor.dtype:
                theirs = f"{tuple(state[key].shape)} {state[key].dtype}"
                wanted = f"{tuple(tensor.shape)} {tensor.dtype}"
                raise ResumeError(f"stored replicates: {key!r} is {theirs}, not {wanted}")
        if int(state["seen"].max()) > 1:
            raise ResumeError("stored replicates: one was counted twice, the states that were added overlap")
        for key, tensor in mine.items():
            tensor.copy_(state[key])

    @property
    def sizes(self) -> tuple[int, ...]:
        """Replicates in each group."""
        twice = (self._seen > 1).nonzero().reshape(-1).tolist()
        if twice:
            raise ConfigurationError(f"replicate {twice[0]} counts twice: the states that were added overlap")
        padded = torch.nn.functional.pad(self._seen.long(), (0, -CAPACITY % self.groups))
        return tuple(padded.reshape(-1, self.groups).sum(0).tolist())

    @property
    def count(self) -> int:
        """Replicates counted so far."""
        return sum(self.sizes)

    def moments(self, *, offset: Mapping[str, Tensor] | None = None, weighted: bool = False) -> dict[str, Moments]:
        """Per tensor, the moments of `d`, of `offset + d`, or of either with every entry weighted."""
        self._check_offset(offset)
        if weighted and self.weights is None:
            raise ConfigurationError("weighted=True needs entry weights: give weights= to Replicates")
        sizes = self.sizes
        counts = torch.tensor(sizes, dtype=torch.float64, device=self.device)
        parts = quarters(sizes, self.device)
        rows = []
        for row, (name, sums) in enumerate(self._sums.items()):
            own = (self._weighted if weighted else self._squares)[row]
            weight = self.weights[name] if weighted and self.weights is not None else None
            known = None if offset is None else offset[name].detach()
            rows.append(tensor_moments(sums, own, counts, parts, weight=weight, offset=known))
        # One transfer for all tensors.
        grams, owns, fourths = (torch.stack(column).cpu().numpy() for column in zip(*rows))
        return {
            name: Moments(grams[i], owns[i], sizes, float(fourths[i]), shape.numel())
            for i, (name, shape) in enumerate(self.shapes.items())
        }

    def mean(self, *, offset: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The diagonal itself, entry by entry: mean over replicates, plus the offset, in float64."""
        self._check_offset(offset)
        count = self._at_least(1)
        means = {name: sums.sum(0).div_(count).view(self.shapes[name]) for name, sums in self._sums.items()}
        if offset is not None:
            for name, mean in means.items():
                mean += self._double(offset[name].detach())
        return means

    def standard_error(self) -> dict[str, Tensor]:
        """Standard error of each entry of `mean`, from the spread between groups; its square has no bias."""
        self._at_least(2)
        used = [g for g, n in enumerate(self.sizes) if n]
        if len(used) < 2:
            raise ConfigurationError("errors need two groups of replicates: number them 0, 1, 2, ...")
        n = torch.tensor([self.sizes[g] for g in used], dtype=torch.float64, device=self.device)
        m, out, step = n.sum(), {}, chunk(self.device, self.groups)
        for name, sums in self._sums.items():
            flat = sums.new_empty(sums.shape[1])
            for start in range(0, sums.shape[1], step):
                part = sums[used, start : start + step]
                spread = part / n[:, None] - part.sum(0) / m
                flat[start : start + step] = (spread.square() * (n / (m - n))[:, None]).mean(0).sqrt()
            out[name] = flat.view(self.shapes[name])
        return out

    def trace_sums(self) -> tuple[int, float, float]:
        """Number of replicates, sum of their traces, sum of their traces squared."""
        total, squares = self._traces.sum(1).tolist()
        return self.count, total, squares

    def _double(self, values: Tensor) -> Tensor:
        return values.to(device=self.device, dtype=torch.float64)

    def _at_least(self, count: int) -> int:
        if self.count < count:
            raise ConfigurationError(f"{self.count} replicates counted, at least {count} needed")
        return self.count

    def _check_offset(self, offset: Mapping[str, Tensor] | None) -> None:
        if offset is None:
            return
        if self.target == "population":
            raise ConfigurationError("an offset is exact on one data set only: none for the population")
        self._check(offset, "offset")

    def _check(self, tensors: Mapping[str, Tensor], what: str) -> None:
        odd = [name for name in (*self.shapes, *tensors) if (name in self.shapes) != (name in tensors)]
        if odd:
            raise ConfigurationError(f"{what}: {odd[0]!r} is missing or no parameter's name")
        for name, shape in self.shapes.items():
            tensor = tensors[name]
            if tensor.shape != shape:
                raise ConfigurationError(f"{what}: {name!r} is {tuple(tensor.shape)}, not {tuple(shape)}")
            if tensor.dtype not in (torch.float32, torch.float64):
                raise DtypeError(f"{what}: {name!r} is {tensor.dtype}, float32 or float64 needed")
            if what in ("offset", "weights") and not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(f"{what}: {name!r} holds NaN or Inf")
