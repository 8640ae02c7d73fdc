"""Signs belong to what they are keyed by: neither where a batch begins nor where it ends changes any."""

from __future__ import annotations

import pytest
import torch

from hessdiag.signs import BLOCK, Signs


@pytest.mark.parametrize("shape", [(), (7,), (3, 65)])
@pytest.mark.parametrize(("start", "count"), [(0, 1), (0, BLOCK - 1), (5, 3), (13, 10), (BLOCK, 2 * BLOCK), (0, 40)])
def test_a_batch_holds_the_signs_of_its_samples(shape: tuple[int, ...], start: int, count: int) -> None:
    whole = Signs(3).samples(torch.Size((3 * BLOCK, *shape)), 0, 5, 1, dtype=torch.float32)
    assert bool((whole.abs() == 1).all())
    part = Signs(3).samples(torch.Size((count, *shape)), start, 5, 1, dtype=torch.float32)
    assert torch.equal(part, whole[start : start + count])


@pytest.mark.parametrize("shape", [(), (7,), (3, 65)])
@pytest.mark.parametrize(("start", "count"), [(0, 1), (5, 3), (13, 10), (BLOCK, 2 * BLOCK)])
def test_where_all_numbers_are_drawn_at_once(shape: tuple[int, ...], start: int, count: int) -> None:
    """As on cards: whole blocks, of which a batch keeps its samples."""
    signs = Signs(3)
    signs.in_order = False
    whole = signs.samples(torch.Size((3 * BLOCK, *shape)), 0, 5, 1, dtype=torch.float32)
    assert bool((whole.abs() == 1).all())
    part = signs.samples(torch.Size((count, *shape)), start, 5, 1, dtype=torch.float32)
    assert torch.equal(part, whole[start : start + count])


def test_bytes_and_numbers_say_the_same_signs() -> None:
    shape = torch.Size((5, 3, 65))
    one, other = (Signs(3).samples(shape, 2, 5, 1, dtype=dtype) for dtype in (torch.int8, torch.float32))
    assert torch.equal(one.float(), other)
