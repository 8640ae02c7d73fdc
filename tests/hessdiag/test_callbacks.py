"""The norm epoch by epoch: training goes as without it, to the bit; the loggers are reached; nothing ends a training."""

from __future__ import annotations

import copy
import math
import types
import warnings
from collections import UserDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hessdiag as hd
from hessdiag.callbacks import LightningWatch, TrainerWatch, Watch
from hessdiag.callbacks.transformers import with_logits
from hessdiag.data import load
from hessdiag.errors import ConfigurationError, HessdiagError
from hessdiag.networks import build

X, Y = next(iter(load("digits", split="train", samples=96).batches(96)))


def small() -> nn.Module:
    return build("small_resnet", activation="silu", seed=0, width=4)


class MLP(nn.Module):
    """With dropout, and one layer that stays in eval mode, as fine-tuning has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.SiLU(), nn.Dropout(0.3), nn.Linear(6, 10))

    def forward(self, x):
        return self.net(x)


class Names(MLP):
    """As models of transformers are called and answer."""

    def forward(self, x=None, mask=None):
        return {"logits": self.net(x if mask is None else x * mask), "hidden": x}


class Scrambled(nn.Module):
    """Mixes the samples of a batch whatever its mode is."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10, track_running_stats=False))

    def forward(self, x):
        return self.net(x)


def train(model: nn.Module, *, epochs: int = 2, after=lambda model, epoch: None) -> dict[str, torch.Tensor]:
    """A loop with everything that a measurement might disturb: shuffling, dropout, momentum, gradients left over."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(TensorDataset(X, Y), batch_size=32, shuffle=True, generator=generator)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model.train()
    for epoch in range(epochs):
        for inputs, targets in loader:
            nn.functional.cross_entropy(
                out if isinstance(out := model(inputs), torch.Tensor) else out["logits"], targets
            ).backward()
            optimiser.step()
        after(model, epoch, loader)  # gradients are not yet cleared
        optimiser.zero_grad()
    return copy.deepcopy(model.state_dict()) | {"random": torch.rand(3)}


@pytest.mark.parametrize("make", [small, MLP])
@pytest.mark.parametrize("own", [True, False])
def test_training_goes_as_without_it_to_the_bit(make, own):
    """Weights, running statistics and the next random numbers; also where the training loader itself is watched."""
    plain = train(make(), after=lambda *_: None)
    seen = []

    def look(model, epoch, loader):
        model.get_submodule("net.2" if make is MLP else "bn1").eval()
        before = [(p.grad, p.grad.clone()) for p in model.parameters()]
        modes = [m.training for m in model.modules()]
        if not seen:
            seen.append(Watch((X, Y) if own else loader, samples=16))
        seen.append(seen[0](model))
        assert [m.training for m in model.modules()] == modes
        for parameter, (gradient, value) in zip(model.parameters(), before, strict=True):
            assert parameter.grad is gradient
            assert torch.equal(gradient, value)
        model.train()

    watched = train(make(), after=look)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert all(row["hessian_rms"] > 0 for row in seen[1:])


def test_the_numbers_are_those_of_measure_on_the_first_samples_in_every_epoch():
    model = MLP().train()
    watch = Watch(DataLoader(TensorDataset(X, Y), batch_size=32), samples=40, method="propagation", rtol=0.2, seed=3)
    first = watch(model)
    batches = [(X[:32], Y[:32]), (X[32:40], Y[32:40])]
    found = hd.measure(hd.Objective(copy.deepcopy(model).eval()), batches, method="propagation", rtol=0.2, seed=3)
    assert (first["hessian_rms"], first["hessian_rms_low"], first["hessian_rms_high"]) == (found.rms, *found.interval)
    assert watch.last is not None
    assert watch.last.samples == 40
    again = watch(model)  # by the plan of before, of the samples of before
    assert {k: v for k, v in again.items() if k != "hessian_seconds"} == {
        k: v for k, v in first.items() if k != "hessian_seconds"
    }
    assert "given" in watch.last.notes[0] or watch.last.plan == found.plan


def test_a_loader_that_shuffles_gives_the_same_samples_to_every_epoch():
    model = MLP().eval()
    shuffled = DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True)
    watch = Watch(shuffled, samples=16)
    values = [watch(model)["hessian_rms"] for _ in range(3)]
    assert len(set(values)) == 1


def test_the_generator_of_a_sampler_stays_where_it_was():
    generator = torch.Generator().manual_seed(5)
    data = TensorDataset(X, Y)
    sampler = torch.utils.data.RandomSampler(data, generator=generator)
    in_batches = torch.utils.data.BatchSampler(sampler, 8, False)
    for loader in (DataLoader(data, batch_size=8, sampler=sampler), DataLoader(data, batch_sampler=in_batches)):
        for samples in (16, None):
            before = generator.get_state()
            assert Watch(loader, samples=samples)(MLP())
            assert torch.equal(generator.get_state(), before)


def test_data_that_are_read_anew_are_all_of_them():
    watch = Watch((X, Y), samples=None)
    watch(MLP())
    assert watch.last is not None
    assert watch.last.samples == len(X)


def test_what_cannot_be_measured_is_warned_of_once_with_the_reason_and_training_goes_on():
    watch = Watch((X, Y), samples=16)
    with pytest.warns(UserWarning, match="no running statistics") as told:
        train(Scrambled(), epochs=3, after=lambda model, *_: watch(model))
    assert len(told) == 1
    assert "BatchNorm 'net.2' has no running statistics" in str(told[0].message)
    assert "training goes on" in str(told[0].message)
    assert told[0].filename == __file__


@pytest.mark.parametrize("fault", ["model", "data", "objective"])
def test_no_fault_of_anybody_reaches_the_training(fault):
    class Faulty(MLP):
        def forward(self, x):
            if not self.training and fault == "model":
                raise OSError("the disk is gone")
            return self.net(x)

    class Data(TensorDataset):
        def __getitem__(self, index):
            if fault == "data":
                raise OSError("the disk is gone")
            return super().__getitem__(index)

    def objective(model):
        if fault == "objective":
            raise OSError("the disk is gone")
        return hd.Objective(model)

    model = Faulty().train()
    with pytest.warns(UserWarning, match="the disk is gone"):
        assert Watch(Data(X, Y), objective, samples=8)(model) == {}
    assert model.training


def test_a_number_that_is_not_as_wanted_is_given_and_told_of():
    watch = Watch((X, Y), samples=64, method="propagation", rtol=1e-4, max_seconds=1e-3)
    with pytest.warns(UserWarning, match=r"measured, but .*before rtol=0.0001 was reached"):
        found = watch(MLP())
    assert found["hessian_rms_low"] <= found["hessian_rms"] <= found["hessian_rms_high"]


def test_ctrl_c_ends_the_training_that_it_was_meant_for(monkeypatch):
    monkeypatch.setattr("hessdiag.methods.base.HELD", 0)  # no graph is held, so that each replicate runs the model

    class Slow(MLP):
        count = 0

        def forward(self, x):
            type(self).count += 1
            if self.count == 30:  # among the replicates, where `measure` would keep what it has
                raise KeyboardInterrupt
            return self.net(x)

    with pytest.raises(KeyboardInterrupt):
        Watch([(X[:8], Y[:8]), (X[8:16], Y[8:16])], method="hutchinson", rtol=1e-4)(Slow())
    assert Slow.count < 40


def test_mistakes_are_told_before_the_training_begins():
    with pytest.raises(ConfigurationError, match="samples=0"):
        Watch((X, Y), samples=0)
    with pytest.raises(ConfigurationError, match="every='two'"):
        Watch((X, Y), every="two")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="an iterator gives its batches once"):
        Watch(iter([(X, Y)]))
    for mistake, words in (
        ({"method": "hutch"}, "unknown method 'hutch'; did you mean 'hutchinson'"),
        ({"rtol": -1}, "rtol=-1: a positive number"),
        ({"rtol": "5%"}, "rtol='5%': a positive number"),
        ({"seed": 1.5}, "seed=1.5: an integer"),
        ({"max_seconds": 0}, "max_seconds=0: a positive number of seconds"),
        ({"max_seconds": "60"}, "max_seconds='60': a positive number of seconds"),
        ({"objective": hd.Objective(MLP())}, r"lambda model: Objective\(model, 'mse'\), and not of type Objective"),
        ({"objective": "mse"}, "and not of type str"),
    ):
        for kind in (Watch, LightningWatch, lambda data, **options: TrainerWatch(None, data, **options)):
            with pytest.raises(HessdiagError, match=words):
                kind((X, Y), **mistake)
    Watch((X, Y), seed=np.int64(3), max_seconds=None, objective=lambda model: hd.Objective(model, "mse"))


class Encoding(UserDict):
    """A tokenizer's mapping, into which torch does not look."""


@pytest.mark.parametrize("kind", [dict, Encoding])
@pytest.mark.parametrize("arrays", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_whose_inputs_are_a_mapping_are_cut_and_moved(kind, arrays, dtype):
    """The twelfth sample lies in the second batch; numbers of another dtype, and arrays, become the model's."""

    def batch(low):
        x = X[low : low + 8].double()
        inputs = {"x": x, "mask": torch.ones_like(x), "scale": torch.tensor(2.0)}
        return kind({k: v.numpy() for k, v in inputs.items()} if arrays else inputs), Y[low : low + 8]

    def objective(model):
        return hd.Objective(model, forward=lambda m, i: i["scale"] * m(i["x"], i["mask"])["logits"])

    model, batches = Names().to(dtype), [batch(0), batch(8)]
    before = {key: value.copy() if arrays else value.clone() for key, value in batches[1][0].items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch = Watch(batches, objective=objective, samples=12)
        row = watch(model)
    twice = hd.Objective(model.eval().net, lambda f, y: F.cross_entropy(2 * f, y, reduction="none"))
    plain = hd.measure(twice, [(X[:12].to(dtype), Y[:12])])
    assert watch.last.samples == 12
    assert row["hessian_rms"] == pytest.approx(plain.rms, rel=1e-6)
    assert type(watch._kept[1][0]) is kind
    assert all((batches[1][0][key] == value).all() for key, value in before.items())  # the loader's own stay whole


def test_a_part_of_a_parameter_is_no_parameter():
    class DTensor(nn.Parameter):
        pass

    model = MLP()
    model.net[1].weight = DTensor(model.net[1].weight.detach())
    with pytest.warns(UserWarning, match=r"'net.1.weight' is spread over processes"):
        assert Watch((X, Y), samples=8)(model) == {}


class Lightning:
    """Asks its callbacks for hooks as Lightning's Trainer does: by name, each of them, and calls what it gets."""

    hooks = (
        "setup",
        "on_fit_start",
        "on_train_start",
        "on_train_epoch_start",
        "on_train_batch_end",
        "on_a_hook_to_come",
    )

    def __init__(self, *callbacks) -> None:
        self.callbacks, self.current_epoch = callbacks, 0
        assert len({callback.state_key for callback in callbacks}) == len(callbacks)

    def fit(self, module: nn.Module, epochs: int) -> None:
        for callback in self.callbacks:
            for hook in self.hooks:
                getattr(callback, hook)(self, module, "and whatever else", batch_idx=0)
        for self.current_epoch in range(epochs):
            for callback in self.callbacks:
                callback.on_train_epoch_end(self, module)
        for callback in self.callbacks:
            assert callback.state_dict() == {}
            callback.load_state_dict({})
            assert callback._legacy_state_key
            callback.on_save_checkpoint(self, module, {})
            callback.teardown(self, module, stage="fit")


def test_lightnings_module_logs_it_and_unknown_hooks_do_nothing():
    class Module(MLP):
        def __init__(self):
            super().__init__()
            self.logged = []

        def log_dict(self, values):
            self.logged.append(values)

    module = Module().train()
    part = LightningWatch((X, Y), lambda m: hd.Objective(m.net), samples=16, every=2, name="part")
    Lightning(LightningWatch((X, Y), samples=16), part).fit(module, epochs=4)
    assert [sorted(row)[0] for row in module.logged] == ["hessian_rms", "hessian_rms", "part_rms"] * 2
    keys = {"rms", "rms_low", "rms_high", "seconds"}
    assert set(module.logged[0]) == {f"hessian_{key}" for key in keys}
    assert all(isinstance(value, float) and math.isfinite(value) for row in module.logged for value in row.values())
    assert module.logged[0]["hessian_rms"] == module.logged[2]["part_rms"]
    with pytest.raises(AttributeError, match="no attribute 'hook'"):
        getattr(part, "hook")  # noqa: B009
    copy.deepcopy(part)


class Control:
    should_log = True


class State:
    epoch = 0.0


class Trainer:
    """What the callback sees of transformers' Trainer; its `log` clears the wish to log, as `on_log` does there."""

    def __init__(self) -> None:
        self.logged, self.control, self.state = [], Control(), State()

    def log(self, logs, start_time=None):
        self.logged.append(logs)
        self.control.should_log = False

    def train(self, callback, model, epochs):
        for event in ("on_init_end", "on_train_begin", "on_step_end", "on_log", "on_push_begin"):
            assert getattr(callback, event)(None, self.state, self.control, model=model, logs={}) is None
        for epoch in range(epochs):
            self.state.epoch = epoch + 0.999
            self.control.should_log = True
            callback.on_epoch_end(None, self.state, self.control, model=model, optimizer=None, eval_dataloader=None)
            assert self.control.should_log


def test_transformers_trainer_logs_it_and_the_epochs_own_loss_is_logged_all_the_same():
    trainer, model = Trainer(), Names().train()
    data = [{"x": x, "mask": torch.ones_like(x), "labels": y} for x, y in zip(X, Y)]

    class Samples(torch.utils.data.Dataset):
        def __len__(self):
            return len(data)

        def __getitem__(self, index):
            return data[index]

    trainer.train(TrainerWatch(trainer, Samples(), samples=16), model, epochs=2)
    assert len(trainer.logged) == 2
    plain = hd.measure(hd.Objective(copy.deepcopy(model.net).eval()), [(X[:16], Y[:16])])
    assert trainer.logged[0]["hessian_rms"] == pytest.approx(plain.rms, rel=1e-6)


def test_the_trainers_inputs_of_one_name_come_as_they_are():
    trainer = Trainer()
    batches = [{"x": X[:8], "labels": Y[:8]}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train(TrainerWatch(trainer, batches), Names(), epochs=1)
    assert trainer.logged[0]["hessian_rms"] > 0


class Answer(dict):
    """What models of transformers return: a dictionary whose entries are attributes."""

    __getattr__ = dict.__getitem__


class Head(nn.Module):
    """A head of transformers on tokens: it takes labels and answers with the loss that its Trainer trains."""

    def __init__(self, kind: str, outputs: int = 7) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.embed, self.last = kind, nn.Embedding(7, 5), nn.Linear(5, outputs)

    def forward(self, input_ids=None, labels=None):
        hidden = torch.tanh(self.embed(input_ids))
        logits = self.last(hidden if self.kind in ("causal", "tagging") else hidden.mean(1))
        answer = Answer(logits=logits)
        if labels is None:
            return answer
        if self.kind == "causal":
            answer["loss"] = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        elif self.kind == "several":
            answer["loss"] = F.binary_cross_entropy_with_logits(logits, labels)
        elif self.kind == "regression":
            answer["loss"] = F.mse_loss(logits[:, 0], labels)
        else:
            answer["loss"] = F.cross_entropy(logits.flatten(0, -2), labels.flatten())
        return answer


TOKENS = torch.randint(7, (6, 5), generator=torch.Generator().manual_seed(2))
MASKED = torch.where(torch.arange(5) < torch.tensor([5, 4, 3, 5, 5, 2])[:, None], TOKENS, -100)
HEADS = {
    "causal": (MASKED, 7, {"shift": 1}),
    "tagging": (MASKED, 7, {}),
    "classes": (TOKENS[:, 0], 7, {}),
    "several": ((TOKENS[:, :3] > 2).float(), 3, {"loss": "bce"}),
    "regression": (TOKENS[:, 0].float(), 1, {"loss": "mse", "output": lambda answer: answer.logits[:, 0]}),
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("asked", ["model", "trainer"])
def test_the_loss_that_is_trained_is_the_one_measured(kind, asked):
    """As the model tells it where it is given labels, or the trainer, in several ways of calling the model."""
    labels, outputs, options = HEADS[kind]
    model, trainer = Head(kind, outputs), Trainer()
    if asked == "trainer":
        trainer.compute_loss = lambda model, inputs: model(**inputs).loss
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch = TrainerWatch(trainer, [{"input_ids": TOKENS, "labels": labels}], rtol=0.05)
        trainer.train(watch, model, epochs=2)
    call = {"output": "logits", **options, "forward": lambda model, x: model(input_ids=x)}
    plain = hd.measure(hd.Objective(model.eval(), **call), [(TOKENS, labels)], rtol=0.05)
    assert watch.last.loss == pytest.approx(model(TOKENS, labels).loss.item(), rel=1e-5)
    assert [row["hessian_rms"] for row in trainer.logged] == pytest.approx([plain.rms] * 2, rel=1e-6)
    assert any("as the trainer's is" in note for note in watch.last.notes) == bool(options)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_labels_that_the_trainer_smooths_are_smoothed():
    trainer = Trainer()
    trainer.args = types.SimpleNamespace(label_smoothing_factor=0.1)
    trainer.compute_loss = lambda model, inputs: F.cross_entropy(
        model(inputs["input_ids"]).logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), label_smoothing=0.1
    )
    watch = TrainerWatch(trainer, [{"input_ids": TOKENS, "labels": MASKED}])
    trainer.train(watch, model := Head("causal"), epochs=1)
    assert watch.last.loss == pytest.approx(
        trainer.compute_loss(model, {"input_ids": TOKENS, "labels": MASKED}).item(), rel=1e-5
    )
    assert "shift=1), labels smoothed by 0.1, as" in watch.last.notes[-1]


def test_a_loss_that_is_not_the_trainers_is_measured_with_a_warning():
    """Once, with both numbers: of an objective of one's own, and where nothing that is known agrees."""
    trainer, data = Trainer(), [{"input_ids": TOKENS, "labels": MASKED}]
    model = Head("causal")
    own = TrainerWatch(trainer, data, lambda model: with_logits(model, shift=0))
    with pytest.warns(UserWarning, match=r"another loss than the one trained: 2\.314 .* trainer has 1\.977;") as told:
        trainer.train(own, model, epochs=2)
    assert len(told) == 1
    trainer.compute_loss = lambda model, inputs: 3 * model(**inputs).loss
    with pytest.warns(UserWarning, match="another loss than the one trained"):
        trainer.train(TrainerWatch(trainer, data), model, epochs=1)
    assert len(trainer.logged) == 3
    trainer.compute_loss = lambda model, inputs: inputs["weights"]  # what only its own batches hold
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train(TrainerWatch(trainer, data), model, epochs=1)
