"""What is held of a linearised transformer, and what a replicate takes beside that: bytes, counted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import hessdiag as hd
from benchmarks.nanogpt import GPT, Shape
from hessdiag.graph import Linearisation
from hessdiag.kernels import entering
from hessdiag.kernels.propagator import Propagator
from hessdiag.signs import Signs

torch.set_num_threads(1)


def shape(layers: int) -> Shape:
    """Attention weights far larger than all else."""
    return Shape(layers=layers, heads=4, width=16, vocabulary=48, tokens=64, sequences=2)


def propagator(layers: int) -> Propagator:
    """Of a net of so many blocks."""
    torch.manual_seed(0)
    own = shape(layers)
    x = torch.randint(own.vocabulary, (own.sequences, own.tokens))
    return Propagator(Linearisation(hd.Objective(GPT(own).eval()), x, x.roll(1, 1)))


def held(batch: Linearisation) -> Iterator[Tensor]:
    """What sites keep, and what the softmaxes of the graph gave."""
    for site in batch.sites:
        yield site.c
        for _, factor in (*site.legs, *site.right):
            kept = getattr(factor, "__dict__", {}).values()
            yield from (one for one in kept if isinstance(one, Tensor))
    for node in batch.graph.nodes:
        if "Softmax" in node.name():
            yield node._saved_result


def test_of_attention_two_numbers_are_kept_for_each_pair_of_tokens() -> None:
    """The probabilities; and the weights of the softmax's site, which are the adjoint of queries times keys."""
    own, batch = shape(2), propagator(2).batch
    pairs = own.sequences * own.heads * own.tokens**2
    kept = {one.untyped_storage().data_ptr() for one in held(batch) if one.untyped_storage().nbytes() == 4 * pairs}
    assert len(kept) == 2 * own.layers


def test_slopes_that_are_one_number_are_kept_as_one() -> None:
    batch = propagator(2).batch
    slopes = [one.slope for one in (*batch.direct.values(), *batch.heads.values())]
    assert len(slopes) == 3
    assert [one.untyped_storage().nbytes() for one in slopes] == [4] * 3


def beside(layers: int) -> tuple[int, int]:
    """(The most bytes that a replicate takes beside those held, those of the sites' weights)."""
    work = propagator(layers)
    work.functional(Signs(0), 0, outer=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work.functional(Signs(0), 1, outer=True)
    assert seen.profiler is not None
    events = [(e.start_ns(), e.nbytes()) for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    most = total = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        total += size
        most = max(most, total)
    return most, sum(4 * site.c.numel() for site in work.batch.sites)


def test_seeds_are_made_when_the_pass_comes_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a net three times as deep a replicate takes little more: what grows are the sums, one for each parameter."""
    monkeypatch.setattr(entering, "KEEP_ROOTS", 0)
    (few, first), (many, last) = beside(2), beside(6)
    assert few > first // 2  # all that one block needs
    assert many - few < (last - first) // 4
