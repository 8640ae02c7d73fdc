"""The accumulator: sums against brute force, merging, stored state, refusals."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hessdiag.errors import (
    ConfigurationError,
    DtypeError,
    NonFiniteError,
    NoParametersError,
    ResumeError,
)
from hessdiag.graph import chunks
from hessdiag.norm import Replicates, course, estimate, exact_norm, moments, plug_in_square, trace

SHAPES = {"conv.weight": (3, 2, 2, 2), "conv.bias": (3,), "gain": ()}


def draw(count: int, *, seed: int = 0, shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[dict[str, Tensor]]:
    """Random replicates around a random diagonal, in float64."""
    generator = torch.Generator().manual_seed(seed)
    centre = {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}
    noise = {"generator": generator, "dtype": torch.float64}
    return [{k: c + 0.5 * torch.randn(c.shape, **noise) for k, c in centre.items()} for _ in range(count)]


def filled(replicates: list[dict[str, Tensor]], *, first: int = 0, **options: object) -> Replicates:
    out = Replicates(replicates[0], **options)  # type: ignore[arg-type]
    for index, replicate in enumerate(replicates, start=first):
        out.add(replicate, index)
    return out


def flat(replicate: dict[str, Tensor]) -> np.ndarray:
    return torch.cat([t.double().reshape(-1) for t in replicate.values()]).numpy()


def brute_square(rows: list[np.ndarray]) -> float:
    """T as the mean of the products of all pairs: the definition, not the formula with sums."""
    pairs = [a @ b for i, a in enumerate(rows) for b in rows[:i]]
    return float(np.mean(pairs))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    count=st.integers(2, 23),
    groups=st.integers(4, 9),
    sizes=st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=4),
    with_offset=st.booleans(),
    with_weights=st.booleans(),
)
def test_square_is_the_mean_over_pairs(
    count: int, groups: int, sizes: list[list[int]], with_offset: bool, with_weights: bool
) -> None:
    shapes = {f"t{i}": tuple(s) for i, s in enumerate(sizes)}
    replicates = draw(count, seed=count, shapes=shapes)
    offset = draw(1, seed=99, shapes=shapes)[0] if with_offset else None
    weights = {k: v.square() for k, v in draw(1, seed=98, shapes=shapes)[0].items()} if with_weights else None
    report = estimate(
        filled(replicates, groups=groups, weights=weights),
        offset=offset,
        weighted=with_weights,
        groups={k: "odd" if int(k[1:]) % 2 else "even" for k in shapes},
    )

    def rows(names: list[str]) -> list[np.ndarray]:
        return [
            flat({k: (r[k] + (offset[k] if offset else 0)) * (weights[k] if weights else 1) for k in names})
            for r in replicates
        ]

    def check(value: float, names: list[str]) -> None:
        scale = np.mean([row @ row for row in rows(names)])
        assert value == pytest.approx(brute_square(rows(names)), abs=1e-12 * scale)

    names = list(shapes)
    check(report.total.square, names)
    for name, one in report.tensors.items():
        check(one.square, [name])
    check(report.groups["even"].square, names[::2])
    assert sum(e.square for e in report.groups.values()) == pytest.approx(report.total.square, abs=1e-9)
    assert report.total.entries == sum(math.prod(s) for s in shapes.values())
    # Group left out for group left out as well, wherever two replicates remain.
    used = [g for g in range(groups) if any(i % groups == g for i in range(count))]
    for group, deleted in zip(used, report.total.deleted):
        left = [row for i, row in enumerate(rows(names)) if i % groups != group]
        if len(left) < 2:
            assert math.isnan(deleted)
        else:
            assert deleted == pytest.approx(brute_square(left), abs=1e-11 * np.mean([r @ r for r in left]))


def test_offset_is_the_same_as_adding_it_to_every_replicate() -> None:
    """Closed form against brute force to 1e-12, interval included, over more than one chunk of entries."""
    shapes = {"big": (70_001,), "small": (5,)}
    replicates = draw(9, shapes=shapes)
    offset = draw(1, seed=5, shapes=shapes)[0]
    shifted = filled([{k: v + offset[k] for k, v in r.items()} for r in replicates])
    closed, brute = estimate(filled(replicates), offset=offset), estimate(shifted)
    for a, b in [(closed.total, brute.total), *((closed.tensors[k], brute.tensors[k]) for k in shapes)]:
        for field in ("square", "square_error", "rms", "low", "high", "participation"):
            tolerance = 1e-12 if field == "square" else 1e-8
            assert getattr(a, field) == pytest.approx(getattr(b, field), rel=tolerance), field
    assert trace(filled(replicates), offset=offset).value == pytest.approx(trace(shifted).value, rel=1e-12)
    for name, mean in filled(replicates).mean(offset=offset).items():
        torch.testing.assert_close(mean, shifted.mean()[name], rtol=1e-12, atol=1e-12)


def test_merging_in_any_order_gives_the_same() -> None:
    replicates = draw(21)
    whole = filled(replicates)
    parts = [filled(replicates[a:b], first=a) for a, b in ((0, 5), (5, 6), (6, 14), (14, 21))]
    for order in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)):
        merged = Replicates(replicates[0])
        for part in order:
            merged.merge(parts[part])
        assert merged.sizes == whole.sizes
        a, b = estimate(merged).total, estimate(whole).total
        assert a.square == pytest.approx(b.square, rel=1e-13)
        assert a.square_error == pytest.approx(b.square_error, rel=1e-11)
        assert trace(merged).error == pytest.approx(trace(whole).error, rel=1e-11)
    backwards = Replicates(replicates[0])
    for index in reversed(range(21)):
        backwards.add(replicates[index], index)
    assert estimate(backwards).total.square == pytest.approx(estimate(whole).total.square, rel=1e-13)


def test_adding_stored_states_is_merging() -> None:
    """What an all-reduce does to the state: every tensor of it is a sum."""
    replicates = draw(12)
    left, right = filled(replicates[:5]), filled(replicates[5:], first=5)
    added = {k: v + right.state_dict()[k] for k, v in left.state_dict().items()}
    loaded = Replicates(replicates[0])
    loaded.load_state_dict(added)
    assert repr(estimate(loaded)) == repr(estimate(left.merge(right)))


def test_stored_state_is_exact_and_goes_on(tmp_path: object) -> None:
    replicates = draw(12)
    weights = draw(1, seed=3)[0]
    first = filled(replicates[:7], weights=weights)
    torch.save(first.state_dict(), f"{tmp_path}/state.pt")
    resumed = Replicates(replicates[0], weights=weights)
    resumed.load_state_dict(torch.load(f"{tmp_path}/state.pt", weights_only=True))
    assert repr(estimate(resumed, weighted=True)) == repr(estimate(first, weighted=True))
    for index in range(7, 12):
        resumed.add(replicates[index], index)
        first.add(replicates[index], index)
    for key, tensor in first.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key


def test_memory_does_not_grow_with_replicates() -> None:
    shapes = {"a": (1000,), "b": (10, 10)}
    out = filled(draw(3, shapes=shapes))
    bytes_ = sum(t.numel() * t.element_size() for k, t in out.state_dict().items() if k.startswith("sum."))
    assert bytes_ == 8 * 16 * 1100
    before = {k: (t.data_ptr(), t.shape) for k, t in out.state_dict().items()}
    for index, replicate in enumerate(draw(40, shapes=shapes), start=3):
        out.add(replicate, index)
    assert {k: (t.data_ptr(), t.shape) for k, t in out.state_dict().items()} == before


def test_float32_replicates_are_summed_in_float64() -> None:
    """A small replicate after a large one is not lost, as it would be in float32 sums."""
    like = {"w": torch.zeros(3)}
    out = Replicates(like, groups=4)
    out.add({"w": torch.full((3,), 2.0**25)}, 0)
    out.add({"w": torch.ones(3)}, 4)
    assert out.mean()["w"].tolist() == [(2.0**25 + 1.0) / 2.0] * 3


def test_standard_errors_of_entries() -> None:
    """One replicate in a group: the usual s / sqrt(m); unequal groups: the weighted spread of their means."""
    replicates = draw(11)
    out = filled(replicates)
    stacked = torch.stack([r["conv.weight"] for r in replicates])
    torch.testing.assert_close(out.mean()["conv.weight"], stacked.mean(0))
    torch.testing.assert_close(out.standard_error()["conv.weight"], stacked.std(0) / math.sqrt(11))
    grouped = filled(replicates, groups=4)
    n = torch.tensor([3.0, 3.0, 3.0, 2.0], dtype=torch.float64)
    means = torch.stack([stacked[g::4].mean(0) for g in range(4)])
    spread = (means - stacked.mean(0)) ** 2 * (n / (11 - n)).reshape(4, 1, 1, 1, 1)
    torch.testing.assert_close(grouped.standard_error()["conv.weight"], spread.mean(0).sqrt())


@pytest.mark.statistical
def test_standard_errors_have_no_bias_in_the_square() -> None:
    """20,000 entries, 21 replicates in unequal groups; |z| < 4.5: false alarm once in 150,000 runs."""
    p, m = 20_000, 21
    generator = torch.Generator().manual_seed(1)
    out = Replicates({"w": torch.zeros(p)})
    for index in range(m):
        out.add({"w": torch.randn(p, generator=generator, dtype=torch.float64)}, index)
    squares = out.standard_error()["w"].square()
    z = float((squares.mean() - 1.0 / m) / (squares.std() / math.sqrt(p)))
    assert abs(z) < 4.5


def test_trace_is_the_mean_of_traces() -> None:
    replicates = draw(9)
    traces = np.array([flat(r).sum() for r in replicates])
    got = trace(filled(replicates))
    assert got.value == pytest.approx(traces.mean(), rel=1e-12)
    assert got.error == pytest.approx(traces.std(ddof=1) / 3.0, rel=1e-9)
    assert got.high - got.value == pytest.approx(2.3060041352 * got.error, rel=1e-9)  # Student, 8


def test_plug_in_is_too_large_by_the_variance() -> None:
    """|mean|^2 - T = trace of the sample covariance / m, exactly."""
    replicates = draw(9)
    rows = np.stack([flat(r) for r in replicates])
    excess = plug_in_square(filled(replicates)) - estimate(filled(replicates)).total.square
    assert excess == pytest.approx(rows.var(0, ddof=1).sum() / 9, rel=1e-10)


def test_both_sides_of_the_norm() -> None:
    """E[8]: |d| / sqrt(p) on the right, |d| / p on the left, intervals in the same proportion."""
    total = estimate(filled(draw(12))).total
    p = total.entries
    assert total.norm == pytest.approx(math.sqrt(total.square))
    assert total.rms == pytest.approx(total.norm / math.sqrt(p))
    assert total.mean_scaled == pytest.approx(total.norm / p)
    root = math.sqrt(p)
    for interval, scale in ((total.norm_interval, root), (total.mean_scaled_interval, 1 / root)):
        assert interval == pytest.approx((total.low * scale, total.high * scale))


def test_exact_norms() -> None:
    diagonal = draw(1)[0]
    report = exact_norm(diagonal, groups={"conv.weight": "conv", "conv.bias": "conv", "gain": "gain"})
    values = flat(diagonal)
    assert report.total.square == pytest.approx(values @ values)
    assert report.total.status == "exact"
    assert report.total.low == report.total.rms == report.total.high
    assert report.total.participation == pytest.approx((values @ values) ** 2 / (values**4).sum())
    assert report.groups["conv"].entries == 27
    with pytest.raises(NonFiniteError, match="gain"):
        exact_norm({"gain": torch.tensor(math.nan)})
    with pytest.raises(NoParametersError):
        exact_norm({})


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_bad_values_name_the_tensor_and_leave_no_trace(bad: float) -> None:
    replicates = draw(4)
    out = filled(replicates[:3])
    before = {k: t.clone() for k, t in out.state_dict().items()}
    replicates[3]["conv.bias"][1] = bad
    with pytest.raises(NonFiniteError, match=r"conv\.bias"):
        out.add(replicates[3], 3)
    for key, tensor in out.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def test_refusals() -> None:
    replicates = draw(6)
    out = filled(replicates[:5])
    good = replicates[5]
    with pytest.raises(ConfigurationError, match="counted already"):
        out.add(good, 4)
    with pytest.raises(ConfigurationError, match="numbered"):
        out.add(good, -1)
    with pytest.raises(ConfigurationError, match="numbered"):
        out.add(good, 1 << 16)
    with pytest.raises(ConfigurationError, match="gain"):
        out.add({k: v for k, v in good.items() if k != "gain"}, 5)
    with pytest.raises(ConfigurationError, match="extra"):
        out.add({**good, "extra": torch.zeros(1)}, 5)
    with pytest.raises(ConfigurationError, match=r"conv\.bias"):
        out.add({**good, "conv.bias": torch.zeros(4)}, 5)
    with pytest.raises(DtypeError, match=r"conv\.bias.*float16"):
        out.add({**good, "conv.bias": torch.zeros(3, dtype=torch.float16)}, 5)
    assert out.count == 5
    with pytest.raises(NoParametersError):
        Replicates({})
    with pytest.raises(NoParametersError, match="empty"):
        Replicates({"empty": torch.zeros(0)})
    with pytest.raises(ConfigurationError, match="at least 4 groups"):
        Replicates(good, groups=3)
    with pytest.raises(ConfigurationError, match="target"):
        Replicates(good, target="both")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="at least 2"):
        estimate(filled(replicates[:1]))
    with pytest.raises(ConfigurationError, match="at least 2"):
        trace(filled(replicates[:1]))
    with pytest.raises(ConfigurationError, match="at least 2"):
        filled(replicates[:1]).standard_error()
    with pytest.raises(ConfigurationError, match="confidence"):
        estimate(out, confidence=1.0)
    with pytest.raises(ConfigurationError, match="weights"):
        estimate(out, weighted=True)
    with pytest.raises(ConfigurationError, match="gain"):
        estimate(out, groups={"conv.weight": "conv", "conv.bias": "conv"})
    with pytest.raises(NonFiniteError, match="offset"):
        estimate(out, offset={**good, "gain": torch.tensor(math.inf)})


def test_merge_and_load_refuse_what_does_not_fit() -> None:
    replicates = draw(6)
    out = filled(replicates[:4])
    with pytest.raises(ConfigurationError, match="share number 3"):
        out.merge(filled(replicates[3:], first=3))
    with pytest.raises(ConfigurationError, match="differ"):
        out.merge(filled(replicates[4:], first=4, groups=8))
    with pytest.raises(ConfigurationError, match="differ"):
        out.merge(filled(replicates[4:], first=4, target="population"))
    with pytest.raises(ConfigurationError, match="weights"):
        out.merge(filled(replicates[4:], first=4, weights=replicates[0]))
    weighted = filled(replicates[:2], weights=replicates[0])
    with pytest.raises(ConfigurationError, match="different entry weights"):
        weighted.merge(filled(replicates[4:], first=4, weights=replicates[1]))
    assert out.count == 4
    with pytest.raises(ResumeError, match="squares"):
        out.load_state_dict({k: v for k, v in out.state_dict().items() if k != "squares"})
    with pytest.raises(ResumeError, match=r"sum\.conv\.weight"):
        out.load_state_dict(filled(replicates[:4], groups=8).state_dict())
    doubled = {k: v + v for k, v in out.state_dict().items()}
    with pytest.raises(ResumeError, match="twice"):
        out.load_state_dict(doubled)
    # An all-reduce in place, over states that overlap, is caught when the state is next used.
    out.state_dict()["seen"].mul_(2)
    with pytest.raises(ConfigurationError, match="counts twice"):
        estimate(out)


def test_the_population_target_takes_no_offset() -> None:
    replicates = draw(5)
    out = filled(replicates, target="population")
    assert estimate(out).total == estimate(filled(replicates)).total
    for call in (estimate, trace, plug_in_square):
        with pytest.raises(ConfigurationError, match="population"):
            call(out, offset=replicates[0])  # type: ignore[operator]
    with pytest.raises(ConfigurationError, match="population"):
        out.mean(offset=replicates[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_on_cuda() -> None:
    """State, replicates or both on the card: what the processor gives, to float64 rounding."""
    shapes = {"big": (70_001,), "small": (5,)}
    replicates = draw(9, shapes=shapes)
    weights, offset = draw(2, seed=5, shapes=shapes)
    here = filled(replicates, weights=weights)
    there = [{k: v.cuda() for k, v in r.items()} for r in replicates]
    for out in (
        filled(there, weights=weights),
        filled(replicates, weights=weights, device="cuda"),
        filled(there[:4], weights=weights, device="cuda").merge(filled(replicates[4:], first=4, weights=weights)),
    ):
        for weighted in (False, True):
            a, b = (estimate(x, offset=offset, weighted=weighted).total for x in (out, here))
            assert a.square == pytest.approx(b.square, rel=1e-12)
            assert a.square_error == pytest.approx(b.square_error, rel=1e-9)
        torch.testing.assert_close(out.standard_error()["big"].cpu(), here.standard_error()["big"])


@pytest.mark.parametrize("count", [2, 4, 9, 23])
def test_the_course_is_what_looking_each_time_would_have_shown(count: int) -> None:
    """Up to as many replicates as groups; beyond, the first groups hold what they hold."""
    replicates, groups = draw(count), 8
    offset = {name: torch.full(shape, 0.25, dtype=torch.float64) for name, shape in SHAPES.items()}
    found = course(filled(replicates, groups=groups), offset=offset, confidence=0.9)
    held = [[r for i, r in enumerate(replicates) if i % groups < k] for k in range(4, min(count, groups))]
    assert len(found) == len(held) + 1
    for k, (look, part) in enumerate(zip(found, [*held, replicates], strict=True), start=4):
        alone = Replicates(replicates[0], groups=groups)
        for i, replicate in enumerate(replicates):
            if i % groups < k or len(part) == count:
                alone.add(replicate, i)
        wanted = estimate(alone, offset=offset, confidence=0.9, sequential=True).total
        assert (look.replicates, look.sizes, look.dof) == (len(part), wanted.sizes, wanted.dof)
        for name in ("rms", "low", "high"):
            assert getattr(look, name) == pytest.approx(getattr(wanted, name), rel=1e-12, nan_ok=True)
    whole = estimate(filled(replicates, groups=groups), offset=offset, confidence=0.9, sequential=True).total
    assert repr(found[-1]) == repr(whole)


def test_chunks_on_a_card_go_by_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between what a processor has and 2 GiB; of norms' entries as many as their copies fit into that."""
    card, cpu = torch.device("cuda"), torch.device("cpu")
    for memory, expected in ((1 << 30, 1 << 26), (1 << 33, 1 << 27), (1 << 38, 1 << 31)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, m=memory: SimpleNamespace(total_memory=m))
        assert chunks.chunk_bytes(card) == expected
        assert 8 * moments.COPIES * 16 * moments.chunk(card, 16) <= expected
        assert moments.chunk(card, 16) >= moments.chunk(cpu, 16) == moments.CHUNK
