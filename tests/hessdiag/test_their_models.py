"""What people have: models that return more than a tensor, dictionaries, arrays, Datasets, compiled models, float labels."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import hessdiag as hd
from hessdiag import feed
from hessdiag.errors import ConfigurationError, DeviceError, DtypeError, EmptyDataError, TargetError
from hessdiag.graph.saved import constant
from hessdiag.measuring.spread import spread
from hessdiag.problem.forward import InDouble


@dataclass
class Returned:
    loss: Tensor | None
    logits: Tensor


class Place(NamedTuple):
    logits: Tensor
    features: Tensor


class Core(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


class Wrapped(Core):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(super().forward(x))


class Keywords(Core):
    def forward(self, a: Tensor, b: Tensor) -> Any:  # type: ignore[override]
        return {"logits": super().forward(a + b), "hidden": a}


def _core(kind: Any = Core, *args: Any) -> Any:
    torch.manual_seed(0)
    return kind(*args).double().eval()


def _data(count: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (count,), generator=generator)


@pytest.fixture(scope="module")
def truth() -> float:
    return hd.measure(hd.Objective(_core()), [_data()]).rms


@pytest.mark.parametrize(
    ("wrap", "output"),
    [
        (lambda y: Returned(None, y), "logits"),
        (lambda y: {"logits": y, "aux": y * 2}, "logits"),
        (lambda y: (y * 2, y), 1),
        (lambda y: [y, y * 2], 0),
        (lambda y: Place(y, y * 2), "logits"),
        (lambda y: Place(y, y * 2), lambda returned: returned.features / 2),
    ],
)
def test_the_output_that_is_meant(wrap: Any, output: Any, truth: float) -> None:
    model = _core(Wrapped, wrap)
    m = hd.measure(hd.Objective(model, output=output), [_data()])
    assert m.rms == pytest.approx(truth, rel=1e-12)
    assert m.status == "exact"  # read through the wrapper, not given up on


@pytest.mark.parametrize(
    ("wrap", "output", "words"),
    [
        (lambda y: Returned(None, y), None, r"output='logits'"),
        (lambda y: {"scores": y}, None, r"output='scores'"),
        (lambda y: (y, y), None, r"output=0"),
        (lambda y: {"logits": y}, "logit", r"did you mean 'logits'"),
        (lambda y: (y,), 1, r"output=0"),
        (lambda y: y, "logits", r"leave output out"),
        (lambda y: y.tolist(), None, r"output=lambda"),
    ],
)
def test_what_could_be_meant_is_said(wrap: Any, output: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        hd.measure(hd.Objective(_core(Wrapped, wrap), output=output), [_data()])


def test_a_model_with_keywords_and_dictionaries(truth: float) -> None:
    x, y = _data()
    batches = feed.batches(
        [{"a": part * 0.25, "b": part * 0.75, "labels": label} for part, label in zip(x.split(7), y.split(7))],
        dtype=torch.float64,
    )
    objective = hd.Objective(_core(Keywords), output="logits", forward=lambda model, inputs: model(**inputs))
    m = hd.measure(objective, batches)
    assert m.rms == pytest.approx(truth, rel=1e-12)
    assert spread(m, objective, batches).groups == 16
    assert hd.measure(objective, batches, method="hutchinson", rtol=0.5).status


class Rows(Dataset[tuple[Any, int]]):
    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, place: int) -> tuple[Any, int]:
        return self.x[place], int(self.y[place])


def test_arrays_and_datasets_are_the_same_data(truth: float) -> None:
    x, y = _data()
    sources = [
        (x.numpy(), y.numpy()),
        (x.numpy(), y.numpy().astype(np.int32)),
        (x, y),
        TensorDataset(x, y),
        Rows(x.numpy(), y.numpy()),
        DataLoader(TensorDataset(x, y), batch_size=6),
        [(x.numpy()[:5], y.numpy()[:5].tolist()), (x.numpy()[5:], y.numpy()[5:])],
        [{"image": x, "label": y}],
    ]
    for source in sources:
        fed = feed.batches(source, batch_size=7, dtype=torch.float64)
        assert hd.measure(hd.Objective(_core()), fed).rms == pytest.approx(truth, rel=1e-12)


class Lines:
    """Rows as the library `datasets` gives them: no torch Dataset, single ones by number, columns by slice."""

    column_names = ("a", "b", "labels")

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.rows[place] if place < len(self.rows) else self.rows[-1]  # of which iteration alone has no end

    def __iter__(self) -> Any:
        return iter(self.rows)


class Numbered:
    """Rows by number alone."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Any:
        return self.rows[place % len(self.rows)]


def test_rows_are_put_together(truth: float) -> None:
    x, y = _data()
    pairs = [(row, int(label)) for row, label in zip(x, y)]
    for source in (pairs, [(row.tolist(), label) for row, label in pairs], list(TensorDataset(x, y)), Numbered(pairs)):
        fed = feed.batches(source, batch_size=7, dtype=torch.float64)
        assert [len(targets) for _, targets in fed] == [7, 7, 6]
        assert hd.measure(hd.Objective(_core()), fed).rms == pytest.approx(truth, rel=1e-12)
    named = [{"a": row * 0.25, "b": row * 0.75, "labels": label} for row, label in pairs]
    plain = [{key: value.tolist() if isinstance(value, Tensor) else value for key, value in r.items()} for r in named]
    columns = {key: [row[key] for row in plain] for key in plain[0]}
    arrays = {key: np.asarray(value) for key, value in columns.items()}
    objective = hd.Objective(_core(Keywords), output="logits", forward=lambda model, inputs: model(**inputs))
    pair = ({key: value for key, value in arrays.items() if key != "labels"}, y.numpy())
    for given in (Lines(named), Lines(plain), named, columns, arrays, pair):
        fed = feed.batches(given, batch_size=7, dtype=torch.float64)
        assert hd.measure(objective, fed).rms == pytest.approx(truth, rel=1e-12)
    one = ({"a": x * 0.25, "b": x * 0.75}, y)
    assert hd.measure(objective, one).rms == pytest.approx(truth, rel=1e-12)


def test_a_target_for_each_place_of_a_row() -> None:
    """Then `column_names` alone tells rows from batches."""
    rows = [{"ids": [0, 1, 2], "labels": [1, 0, -100]} for _ in range(4)]
    assert [tuple(y.shape) for _, y in feed.batches(Lines(rows), batch_size=3)] == [(3, 3), (1, 3)]
    assert [tuple(y.shape) for _, y in feed.batches(rows, batch_size=3)] == [(3,)] * 4


def test_rows_that_cannot_be_put_together() -> None:
    ragged = [{"ids": [0, 1], "labels": 1}, {"ids": [0], "labels": 0}]
    with pytest.raises(ConfigurationError, match=r"cannot be stacked .* padding .*collate_fn"):
        list(feed.batches(ragged))
    with pytest.raises(ConfigurationError, match="lists of unequal lengths"):
        list(feed.batches({"ids": [[0, 1], [0]], "labels": [1, 0]}))
    with pytest.raises(TargetError, match="3 inputs 'a' but 2 targets"):
        list(feed.batches({"a": np.zeros((3, 1)), "b": np.zeros(2), "labels": np.zeros(2)}))
    with pytest.raises(ConfigurationError, match="int holds no samples"):
        feed.batches(3)


def test_refusals_of_the_feed() -> None:
    x, y = _data()
    for source, error, words in (
        (iter([(x, y)]), ConfigurationError, "several passes"),
        ([{"image": x, "what": y}], ConfigurationError, "image, what: say targets="),
        (
            [(x, y, y)],
            ConfigurationError,
            r"neither a pair nor a dictionary but a tuple of 3: give pairs, e.g. \[\(x, y\) for",
        ),
        ((x, y[:3]), TargetError, "20 inputs but 3"),
        ((x[:0], y[:0]), EmptyDataError, "no samples"),
        ((np.array([["a"]] * 20), y), DtypeError, "inputs are an array of text: give numbers; of text a tokenizer's"),
        (
            (x, np.array(["cat"] * 20)),
            TargetError,
            r"targets of batch 0 are text.*numpy.unique\(y, return_inverse=True",
        ),
        ([(x, ["cat"] * 20)], TargetError, "targets of batch 0 are text"),
        ((x, np.array([None] * 20)), TargetError, "targets of batch 0 are Python objects"),
        ((x, torch.tensor(3)), TargetError, "the targets are a single number, not one for each sample"),
        ({"x": x, "y": 3}, TargetError, "the targets are a single number"),
        ((np.float64(3.0) * np.ones(()), y), TargetError, "the inputs are a single number, not one for each of 20"),
    ):
        with pytest.raises(error, match=words) as caught:
            list(feed.batches(source))
        assert "\n" not in str(caught.value)
    for device in ("gpu", 3.5):
        with pytest.raises(DeviceError, match=r"it is 'cpu', 'cuda'"):
            feed.batches((x, y), device=device)  # type: ignore[arg-type]
    for size in (0, 2.0, "8", None):
        with pytest.raises(ConfigurationError, match="a whole number of samples"):
            feed.batches((x, y), batch_size=size)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="did you mean 'labels'"):
        list(feed.batches([{"x": x, "labels": y}], targets="label"))
    with pytest.raises(ConfigurationError, match=r"feed.batches\(data"):
        hd.measure(hd.Objective(_core()), [{"x": x, "labels": y}])


def test_whole_numbers_of_numpy_are_whole_numbers(truth: float) -> None:
    x, y = _data()
    fed = feed.batches((x, y), batch_size=np.int64(7), dtype=torch.float64)  # type: ignore[arg-type]
    assert [len(labels) for _, labels in fed] == [7, 7, 6]
    own = {"seed": 3, "min_replicates": 4, "max_replicates": 6}
    theirs = {key: np.int64(value) for key, value in own.items()}
    found = [hd.measure(hd.Objective(_core()), fed, method="hutchinson", **o) for o in (own, theirs)]  # type: ignore[arg-type]
    assert found[0].rms == found[1].rms
    assert found[0].provenance["seed"] == found[1].provenance["seed"] == 3
    json.dumps(found[1].to_dict())
    two = [hd.diagonal(hd.Objective(_core()), fed, method="hutchinson", replicates=n) for n in (4, np.int32(4))]  # type: ignore[arg-type]
    assert all(torch.equal(two[0].total[name], two[1].total[name]) for name in two[0].total)


def test_a_plan_may_be_the_table_of_a_file(tmp_path: Path) -> None:
    x, y = _data()
    objective = hd.Objective(_core())
    first = hd.measure(objective, [(x, y)], method="propagation", min_replicates=4, max_replicates=6)
    first.save_json(tmp_path / "a.json")
    table = hd.read_result(tmp_path / "a.json").content["plan"]
    for plan in (table, first.plan):
        again = hd.measure(objective, [(x, y)], plan=plan, min_replicates=4, max_replicates=6)
        assert again.rms == first.rms
        assert again.plan == first.plan
    assert torch.equal(
        hd.diagonal(objective, [(x, y)], plan=table, replicates=4).total["fc1.weight"],
        hd.diagonal(objective, [(x, y)], plan=first.plan, replicates=4).total["fc1.weight"],
    )
    for plan, words in (
        ({}, "holds no plan"),
        ({**table, "sample_groups": [3]}, "holds no plan"),
        ({**table, "metod": "exact"}, "unknown key 'metod'"),
        (first, r"plan is a Measurement: give the plan of a measurement, m\.plan"),
        (str(tmp_path / "a.json"), r"read_result\(path\)\.content\['plan'\]"),
    ):
        with pytest.raises(ConfigurationError, match=words) as caught:
            hd.measure(objective, [(x, y)], plan=plan)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_class_numbers_stored_as_floats_are_told() -> None:
    x, y = _data()
    with pytest.raises(TargetError, match=r"targets.long\(\)"):
        hd.measure(hd.Objective(_core()), [(x, y.double())])


def test_a_compiled_model_is_taken_out_of_its_wrapper(truth: float) -> None:
    model = _core()
    compiled = torch.compile(model, backend="eager")
    objective = hd.Objective(compiled)
    assert objective.model is model
    assert set(objective.parameters) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    m = hd.measure(objective, [_data()])
    assert m.status == "exact"
    assert m.rms == pytest.approx(truth, rel=1e-12)


def test_a_number_that_scales_is_read_where_short_parts_are_audited_in_double() -> None:
    """As the queries of language models with norms in float32 have it."""
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    with InDouble():
        found = constant((x * 0.25).grad_fn, 0)
    assert (found.dtype, found.item()) == (torch.float64, 0.25)
