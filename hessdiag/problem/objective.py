"""What is differentiated: a model, a loss, the parameters chosen, and optional weight decay.

    L(theta) = (1/W) sum_n w_n l(f(x_n; theta), y_n) + (l2/2) |theta|^2,   W = sum of weights (samples, as a rule)

The objective holds no data. It checks what can be checked before any pass (modes, parameters) and what each batch
brings (shapes, dtypes, devices, targets), and evaluates model and loss on a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.errors import (
    ConfigurationError,
    DeviceError,
    DtypeError,
    EmptyDataError,
    HessdiagError,
    NonFiniteError,
    NoParametersError,
    StochasticModeError,
    TargetError,
    UncoveredModelError,
    ran_out,
)
from hessdiag.problem.finite import all_finite
from hessdiag.problem.forward import forward, leaves, unwrapped
from hessdiag.problem.losses import IGNORE, make_loss
from hessdiag.problem.outputs import Output, advice, meant
from hessdiag.problem.persample import Loss, PerSample
from hessdiag.problem.selection import choose
from hessdiag.problem.sparse import instead_of, is_dense, stored

WRITES = (
    "the forward pass writes to its own parameter {name!r} (a constraint such as clamp_ or renorm): at the bound the "
    "loss has a kink that no gradient shows; constrain it after each step of training instead, or freeze it"
)
_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_DROPOUT = nn.modules.dropout._DropoutNd


class Objective:
    """A `model` and a `loss`, ready to be differentiated on batches.

    `loss` is "cross_entropy" (with `label_smoothing`, `class_weights` and `ignore_index` as torch has them), another
    name, or any callable that gives one value per sample. Of sequences, outputs [N, T, C] and targets [N, T], the
    sample is the sequence and the mean is per token that counts; `shift=1` compares each token's output with the next
    token, outputs[:, :-1] with targets[:, 1:]. `class_axis` says where the classes are, 1 or -1, if shapes do not.
    `parameters` chooses some of the model's: names, a regular expression
    matched against whole names, or a function of the name; by default all that require a gradient.
    `l2` adds (l2/2)|theta|^2 over the chosen parameters: +l2 on every diagonal entry (counted with the
    Gauss-Newton part, being positive and free of sigma''). Off by default.
    `output` names what is meant of a model that returns more than a tensor: a key or attribute ("logits"), a place (0),
    or a function of what it returns. `forward` calls a model that takes more than one argument:
    `lambda model, x: model(**x)`. A model compiled by torch.compile(model) is taken out of its wrapper.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str | PerSample = "cross_entropy",
        *,
        parameters: str | Iterable[str] | Callable[[str], bool] | None = None,
        l2: float = 0.0,
        label_smoothing: float = 0.0,
        class_weights: Tensor | Sequence[float] | None = None,
        ignore_index: int = IGNORE,
        class_axis: int | None = None,
        shift: int = 0,
        output: Output = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigurationError(f"model must be a torch.nn.Module, not {type(model).__name__}")
        if not (isinstance(l2, (int, float)) and 0.0 <= l2 < float("inf")):
            raise ConfigurationError(f"l2 must be a finite number >= 0, not {l2!r}")
        weights = None if class_weights is None else torch.as_tensor(class_weights, dtype=torch.float64).detach()
        if forward is not None and not callable(forward):
            raise ConfigurationError("forward must be a function (model, inputs) -> outputs")
        self.model = model = unwrapped(model)
        self.output, self.call = output, forward
        self.loss: Loss = make_loss(
            loss,
            label_smoothing=label_smoothing,
            class_weights=weights,
            ignore_index=ignore_index,
            class_axis=class_axis,
            shift=shift,
        )
        self.l2 = float(l2)
        self.parameters: dict[str, nn.Parameter] = choose(model, parameters)
        everything = dict(model.named_parameters()) if parameters is None else {}
        self.frozen = tuple(name for name in everything if name not in self.parameters)
        """Parameters left out because they need no gradient, where nobody said which are meant."""
        first = next(iter(self.parameters.values()))
        self.device, self.dtype = first.device, first.dtype
        self._check_parameters()

    @property
    def size(self) -> int:
        """Number of chosen scalar parameters, p."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def check_modes(self) -> None:
        """Refuse a model that is no longer the one described, and what makes the loss no mean over samples:
        BatchNorm on batch statistics, active dropout.
        """
        present = dict(self.model.named_parameters())
        for name, parameter in self.parameters.items():
            if present.get(name) is not parameter or not parameter.requires_grad or parameter.dtype != self.dtype:
                raise ConfigurationError(
                    f"parameter {name!r} was replaced, frozen or converted after Objective(...) was made; make it anew"
                )
        for name, module in self.model.named_modules():
            if isinstance(module, _BATCH_NORM) and (module.training or module.running_mean is None):
                why = "is in training mode" if module.training else "has no running statistics"
                raise StochasticModeError(
                    f"BatchNorm {name or 'model'!r} {why}: it mixes the samples of a batch; call model.eval()"
                )
            if isinstance(module, _DROPOUT) and module.training and module.p > 0:
                raise StochasticModeError(f"dropout {name or 'model'!r} is in training mode; call model.eval()")
            if isinstance(module, nn.RNNBase) and module.training and module.dropout > 0:
                raise StochasticModeError(f"dropout of {name or 'model'!r} is in training mode; call model.eval()")

    def check_batch(self, batch: Any, index: int) -> tuple[Any, Tensor]:
        """`(inputs, targets)` of `batch` number `index`, or the exception that says what is wrong with it."""
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ConfigurationError(
                f"batch {index} is no pair (inputs, targets) but {_describe(batch)}; hessdiag.feed.batches(data, "
                "targets=...) makes pairs of dictionaries, arrays and Datasets"
            )
        inputs, targets = batch
        if not isinstance(targets, Tensor):
            raise TargetError(
                f"targets of batch {index} are no tensor but {_describe(targets)}; hessdiag.feed.batches(data) makes "
                "batches of Datasets and arrays"
            )
        for leaf in (*leaves(inputs), targets):
            if isinstance(leaf, Tensor) and not is_dense(leaf):
                raise ConfigurationError(f"batch {index} holds a {instead_of(leaf)}")
        if targets.ndim == 0 or (isinstance(inputs, Tensor) and inputs.ndim == 0):
            raise TargetError(
                f"batch {index} is a single sample, not a batch of samples; DataLoader(dataset, batch_size=...) or "
                "hessdiag.feed.batches(dataset) makes batches"
            )
        if isinstance(inputs, Tensor):
            if len(inputs) == 0:
                raise EmptyDataError(f"batch {index} holds no samples")
            if len(inputs) != len(targets):
                raise TargetError(f"batch {index}: {len(inputs)} inputs but {len(targets)} targets")
            if inputs.device != self.device:
                raise DeviceError(
                    f"batch {index} is on {inputs.device}, the model on {self.device}; move one with .to()"
                )
            if inputs.is_floating_point() and inputs.dtype != self.dtype:
                raise DtypeError(f"batch {index} is {inputs.dtype}, the model {self.dtype}; convert one with .to()")
        if targets.device != self.device:
            raise DeviceError(f"targets of batch {index} are on {targets.device}, the model on {self.device}")
        if len(targets) == 0:
            raise EmptyDataError(f"batch {index} holds no samples")
        return inputs, targets.detach()  # constants, also where the model itself predicts them

    def outputs(self, inputs: Any, targets: Tensor, *, index: int) -> Tensor:
        """The model's outputs for checked `inputs`, themselves checked against the `targets` of batch `index`."""
        written = [p._version for p in self.parameters.values()]
        try:
            outputs = meant(forward(self.model, inputs, self.call), self.output)
        except HessdiagError:
            raise
        except Exception as error:
            if ran_out(error):
                raise
            raise self._failure(error, inputs, index) from error
        for (name, p), before in zip(self.parameters.items(), written):
            if p._version != before:
                raise UncoveredModelError(WRITES.format(name=name))
        if not isinstance(outputs, Tensor):
            raise ConfigurationError(f"the model returned {_describe(outputs)}; {advice(outputs)}")
        if not outputs.is_floating_point():
            raise DtypeError(f"the model's outputs are {outputs.dtype}; real floating-point outputs are needed")
        if outputs.ndim:
            outputs = self.loss.by_sample(outputs, targets)
        if outputs.ndim == 0 or len(outputs) != len(targets):
            raise TargetError(
                f"batch {index}: outputs of shape {list(outputs.shape)} for {len(targets)} targets; "
                + (_uncut(inputs) or "the first axis must be the samples")
            )
        self.loss.check(outputs, targets)
        if not all_finite(outputs):
            raise NonFiniteError(f"batch {index}: {self._first_non_finite(inputs, outputs)}")
        return outputs

    def summed_loss(self, inputs: Any, targets: Tensor, *, index: int = 0) -> tuple[Tensor, Tensor]:
        """`(sum_n w_n l_n, W)` of `inputs` and `targets`, batch `index`: differentiable, without weight decay."""
        return self.summed_losses(self.outputs(inputs, targets, index=index), targets, index=index)

    def summed_losses(self, outputs: Tensor, targets: Tensor, *, index: int = 0) -> tuple[Tensor, Tensor]:
        """The same from the `outputs` for `targets`, batch `index`."""
        losses = self.loss.values(outputs, targets)
        if not all_finite(losses):
            raise NonFiniteError(f"batch {index}: the loss {self.loss.name!r} is not finite; check the targets")
        return losses.sum(), self.loss.weights(outputs, targets).sum()

    def _check_parameters(self) -> None:
        for name, parameter in self.parameters.items():
            if not isinstance(parameter, nn.parameter.UninitializedParameter) and parameter.numel() == 0:
                raise NoParametersError(f"parameter {name!r} has no entries: leave it out (parameters=...)")
            if parameter.is_complex():
                raise DtypeError(
                    f"parameter {name!r} is complex: curvature is that along real numbers; keep its torch.view_as_real "
                    "as the parameter and take torch.view_as_complex of that in forward"
                )
            if not is_dense(parameter):
                raise UncoveredModelError(
                    f"parameter {name!r} is sparse ({parameter.layout}): keep its values as the parameter, a dense "
                    "tensor, and make the sparse one of them in forward"
                )
            if parameter.device != self.device:
                raise DeviceError(f"parameter {name!r} is on {parameter.device}, others on {self.device}")
            if parameter.dtype not in (torch.float32, torch.float64):
                raise DtypeError(
                    f"parameter {name!r} is {parameter.dtype}: curvature needs float32 or float64; call model.float()"
                )
            if parameter.dtype != self.dtype:
                raise DtypeError(f"parameter {name!r} is {parameter.dtype}, others {self.dtype}; convert with .to()")
        parameters = dict(self.model.named_parameters())
        for name, tensor in [*parameters.items(), *self.model.named_buffers()]:
            if isinstance(tensor, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)):
                raise ConfigurationError(f"{name!r} has no shape yet: run the model once on a batch")
            if tensor.is_meta:
                raise DeviceError(
                    f"{name!r} is on the device 'meta', where tensors hold no numbers: load the weights first, e.g. by "
                    "load_state_dict(..., assign=True)"
                )
            if tensor.is_floating_point():
                held = stored(tensor.detach())[0]
                finite = torch.isfinite(held)
                if name not in parameters:
                    finite |= held.isneginf()  # a mask
                if not bool(finite.all()):
                    raise NonFiniteError(
                        f"{name!r} holds NaN or Inf: the model cannot be measured; reload or retrain it"
                    )

    def _failure(self, error: Exception, inputs: Any, index: int) -> HessdiagError:
        """The model's own exception as one line, with what is visibly wrong with the inputs."""
        for leaf in leaves(inputs):
            if not isinstance(leaf, Tensor):
                if hasattr(leaf, "__array__"):
                    return ConfigurationError(
                        f"batch {index} holds a {type(leaf).__name__} where a tensor is needed; use torch.as_tensor"
                    )
                continue
            if leaf.device != self.device:
                return DeviceError(f"batch {index} is on {leaf.device}, the model on {self.device}; use .to()")
            if leaf.is_inference():
                return ConfigurationError(
                    f"batch {index} was made under torch.inference_mode(); load it outside, or clone its tensors"
                )
            if leaf.dtype != self.dtype and "dtype" in str(error):
                return DtypeError(f"batch {index} is {leaf.dtype}, the model {self.dtype}; convert one with .to()")
        text = (str(error).splitlines() or [""])[0]
        if self.call is not None and isinstance(inputs, Tensor) and isinstance(error, (TypeError, IndexError)):
            text += " (forward was given one tensor: of a dictionary with a single input, that input by itself)"
        elif self.call is None and isinstance(inputs, (Mapping, tuple, list)):
            kind, how, star = type(inputs).__name__, "one by one", "*"
            if isinstance(inputs, Mapping):
                kind, how, star = "dictionary", "by name", "**"
            text += (
                f"; it was given the {kind} of inputs as one argument: if it takes them {how}, say "
                f"Objective(..., forward=lambda model, x: model({star}x))"
            )
        return ConfigurationError(f"batch {index}: the model raised {type(error).__name__}: {text}")

    def _first_non_finite(self, inputs: Any, outputs: Tensor) -> str:
        """Name of the first module whose output is NaN or Inf, found by one more pass with hooks."""
        found: list[str] = []

        def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
                if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                    found.append(name)

            return look

        handles = [
            module.register_forward_hook(hook(name))
            for name, module in self.model.named_modules()
            if name and not list(module.children())
        ]
        try:
            with torch.no_grad():
                forward(self.model, inputs, self.call)
        finally:
            for handle in handles:
                handle.remove()
        if isinstance(inputs, Tensor) and inputs.is_floating_point() and not bool(torch.isfinite(inputs).all()):
            return "the inputs hold NaN or Inf"
        if found:
            return f"layer {found[0]!r} gives NaN or Inf"
        return _masked(outputs) or "the model's outputs are NaN or Inf"


def _masked(outputs: Tensor) -> str | None:
    """What to do about outputs that are finite but for those put at minus infinity."""
    low = outputs.isneginf()
    if not bool(low.any()) or not bool((low | torch.isfinite(outputs)).all()):
        return None
    return (
        f"{int(low.sum())} of {outputs.numel()} outputs are minus infinity (a mask?); put them at -1e9 instead: a "
        "softmax gives them zero as well"
    )


def _uncut(inputs: Any) -> str | None:
    """The first object among the inputs that holds tensors and is no container that a batch is cut through."""
    for leaf in leaves(inputs):
        if isinstance(leaf, Tensor):
            continue
        names = [field.name for field in fields(leaf)] if is_dataclass(leaf) else list(getattr(leaf, "__dict__", ()))
        held = [name for name in names if isinstance(getattr(leaf, name, None), Tensor)]
        if held:
            name = type(leaf).__name__
            return (
                f"the inputs hold a {name}, whose tensors ({', '.join(map(repr, held[:3]))}) cannot be cut by samples; "
                f"give them as a dictionary and make the {name} in Objective(..., forward=lambda model, x: "
                f"model({name}(**x)))"
            )
    return None


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)} items"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' or name == 'ndarray' else 'a'} {name}"
