"""Where a loader's order comes from: the global random states of torch, numpy and python, and generators of its own."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomStates:
    """The states at one moment."""

    torch: Tensor
    python: tuple[Any, ...]
    numpy: Any
    own: tuple[Tensor, ...] = ()
    """Of the loader's generators."""

    @classmethod
    def now(cls, loader: Any = None) -> RandomStates:
        """Those of this moment, with those of a DataLoader's own generators."""
        own = tuple(generator.get_state() for generator in _generators(loader))
        return cls(torch.get_rng_state(), random.getstate(), numpy.random.get_state(), own)  # noqa: NPY002 (loaders use it)

    def put(self, loader: Any = None) -> None:
        """Set them all back."""
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        if self.numpy is not None:
            numpy.random.set_state(self.numpy)  # noqa: NPY002
        for generator, state in zip(_generators(loader), self.own):
            generator.set_state(state)

    def same(self, other: RandomStates) -> bool:
        """Whether nothing was drawn between the two moments."""
        mine, yours = (one.numpy[1:3] if isinstance(one.numpy, tuple) else (0, 0) for one in (self, other))
        alike = numpy.array_equal(mine[0], yours[0]) and mine[1] == yours[1]
        return alike and torch.equal(self.torch, other.torch) and self.python == other.python

    def plain(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        version, words, gauss = self.python
        twister = None
        if isinstance(self.numpy, tuple):  # not where somebody exchanged numpy's generator
            kind, keys, *rest = self.numpy
            twister = [kind, keys.tolist(), *rest]
        return {
            "torch": _hex(self.torch),
            "own": [_hex(state) for state in self.own],
            "python": [version, list(words), gauss],
            "numpy": twister,
        }

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> RandomStates:
        """The inverse of `plain`; KeyError, TypeError or ValueError where it is none."""
        version, words, gauss = values["python"]
        twister = None
        if values["numpy"] is not None:
            kind, keys, *rest = values["numpy"]
            twister = (kind, numpy.array(keys, dtype=numpy.uint32), *rest)
        own = tuple(_state(text) for text in values["own"])
        return cls(_state(values["torch"]), (version, tuple(words), gauss), twister, own)


def _hex(state: Tensor) -> str:
    return bytes(state.tolist()).hex()


def _state(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8, device="cpu")


def _generators(loader: Any) -> Iterator[torch.Generator]:
    """A DataLoader's and its samplers', each once."""
    batches = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    yield from {id(g): g for g in found if isinstance(g, torch.Generator)}.values()
