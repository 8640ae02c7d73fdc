"""The processes that share a measurement: who takes which batches and replicates, and how sums meet.

Works on torch.distributed where it is initialised (gloo on CPU, nccl on GPU) and is a no-op in a single process.
A process that dies shows up as a failed or timed-out reduction in the others: DistributedError, never a hang, as
long as the process group was made with a timeout (the command line does).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from hessdiag.errors import DistributedError


class World:
    """This process's place among `size` processes."""

    asked_to_stop: ClassVar[bool] = False
    """Set by a signal handler where several processes must stop at the same batch, whichever of them is told to."""
    stops_together: ClassVar[bool] = False
    """Set where they look at it from now on, since there is something to lose."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def current(cls) -> World:
        """The initialised process group, or a single process."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def mine(self, batch: int, batches: int, replicate: int = 0) -> bool:
        """Whether this process computes this batch of this replicate: batches are dealt out, replicates if scarce."""
        turn = batch if batches >= self.size else batch + replicate
        return turn % self.size == self.rank

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Add the tensors of all processes, in place, everywhere."""
        if self.size == 1:
            return
        try:
            for tensor in tensors:
                dist.all_reduce(tensor)
        except RuntimeError as error:
            raise self._lost("while adding results") from error

    @property
    def local_rank(self) -> int:
        """Number of this process among those of its machine, as torchrun tells it."""
        return int(os.environ.get("LOCAL_RANK", self.rank))

    def from_rank(self, tensor: Tensor, owner: int) -> Tensor:
        """The tensor of process `owner`, everywhere."""
        if self.size > 1:
            try:
                dist.broadcast(tensor, owner)
            except RuntimeError as error:
                raise self._lost("while sharing data") from error
        return tensor

    def text_from_first(self, text: str, device: torch.device) -> str:
        """What process 0 says, everywhere."""
        if self.size == 1:
            return text
        content = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
        length = self.from_rank(torch.tensor([len(content)], device=device), 0)
        if self.rank:
            content = torch.empty(int(length), dtype=torch.uint8, device=device)
        return bytes(self.from_rank(content, 0).tolist()).decode()

    def agree(self, flag: bool, device: torch.device) -> bool:
        """True everywhere if it is true anywhere."""
        if self.size == 1:
            return flag
        value = torch.tensor([float(flag)], device=device)
        self.sum_([value])
        return bool(value.item() > 0)

    def sums(self, values: list[float], device: torch.device) -> list[float]:
        """A few numbers of all processes, added up, everywhere."""
        total = torch.tensor(values, dtype=torch.float64, device=device)
        self.sum_([total])
        return [float(value) for value in total]

    def gather(self, values: list[float], device: torch.device) -> list[list[float]]:
        """The few numbers of every process, by rank, everywhere: a table in which each adds its row to zeros."""
        table = torch.zeros(self.size, len(values), dtype=torch.float64, device=device)
        table[self.rank] = torch.tensor(values, dtype=torch.float64)
        self.sum_([table])
        return table.tolist()

    def _lost(self, when: str) -> DistributedError:
        return DistributedError(
            f"process {self.rank} of {self.size} lost another one {when}; start the job again "
            "(with --resume it continues)"
        )
